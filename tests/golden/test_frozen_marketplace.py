"""The marketplace that the published tables were measured on does not change unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import pyarrow as pa
import pytest

from genrecall.data.marketplace import MARKETPLACE_VERSION, Marketplace
from genrecall.data.marketplace_catalog import SIZES

CHANGED = "the simulator makes other data than the tables in docs/benchmarks.md were measured on: raise MARKETPLACE_VERSION, add what it makes here, and measure every table again"
FROZEN = {1: "59507f0344e8611bd334a32c287660b8c6d56b1296a17e70fd98858484460b7d"}
"""Version -> sha256 of the rows of `Marketplace("tiny", seed=0)`, numbers rounded to six places."""
FROZEN_STARTS = {
    (1, "small"): "a30c944911ea99f20b96d57d345740479677c2bae690e6a9d8a6a4b80123925e",
    (1, "medium"): "1dbb56276dd9fc38b9ad9d3292f0c9918f08532688adaf1f6a77a1d357575586",
}
"""(version, size) -> sha256 as above of the first tables of items, shoppers and events."""
FROZEN_SIZES = {
    1: {
        "tiny": (400, 250, 1_500, 2, 6),
        "small": (2_000, 700, 8_000, 4, 10),
        "medium": (20_000, 5_000, 30_000, 10, 25),
        "large": (100_000, 15_000, 72_000, 10, 60),
        "busy": (2_000, 5_000, 60_000, 4, 10),
    }
}
"""Version -> size -> items, shoppers, requests, departments, brands of a department."""


def digest(tables: Iterable[pa.Table]) -> str:
    found = hashlib.sha256()
    for table in tables:
        for row in table.to_pylist():
            found.update(repr(sorted((name, round(value, 6) if isinstance(value, float) else value) for name, value in row.items())).encode())
    return found.hexdigest()


def test_the_marketplace_of_the_published_tables_is_frozen() -> None:
    market = Marketplace("tiny", seed=0)
    assert digest(pa.concat_tables(chunks) for chunks in (market.items(), market.users(), market.events())) == FROZEN[MARKETPLACE_VERSION], CHANGED


@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_larger_marketplaces_begin_as_they_did(size: str) -> None:
    market = Marketplace(size, seed=0)
    assert digest(next(chunks) for chunks in (market.items(), market.users(), market.events())) == FROZEN_STARTS[MARKETPLACE_VERSION, size], CHANGED


def test_sizes_are_those_that_were_measured() -> None:
    assert {name: dataclasses.astuple(size)[1:] for name, size in SIZES.items()} == FROZEN_SIZES[MARKETPLACE_VERSION], CHANGED
