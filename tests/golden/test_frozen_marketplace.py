"""The marketplace that the published tables were measured on does not change unnoticed."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from genrecall.data.marketplace import MARKETPLACE_VERSION, Marketplace

FROZEN = {1: "59507f0344e8611bd334a32c287660b8c6d56b1296a17e70fd98858484460b7d"}
"""Version -> sha256 of the rows of `Marketplace("tiny", seed=0)`, numbers rounded to six places."""


def test_the_marketplace_of_the_published_tables_is_frozen() -> None:
    market, digest = Marketplace("tiny", seed=0), hashlib.sha256()
    for chunks in (market.items(), market.users(), market.events()):
        for row in pa.concat_tables(chunks).to_pylist():
            digest.update(repr(sorted((name, round(value, 6) if isinstance(value, float) else value) for name, value in row.items())).encode())
    assert digest.hexdigest() == FROZEN[MARKETPLACE_VERSION], (
        "the simulator makes other data than the tables in docs/benchmarks.md were measured on: raise MARKETPLACE_VERSION, add its digest here, and measure every table again"
    )
