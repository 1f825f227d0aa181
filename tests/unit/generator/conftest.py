"""A tiny shop of fifty items with known SIDs, and an encoder that needs no training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.sid.semantic_id import SidSpace, SidTable

KINDS = ("bracket", "faucet", "drill", "lamp", "carpet")
COLOURS = ("red", "blue", "green", "black", "white", "brass", "steel", "oak", "gold", "grey")


class WordEncoder:
    """Sums a fixed random vector per word: `TextEncoder` without training."""

    dim = 16

    def encode_items(self, texts: Sequence[str], category_paths: object = None) -> np.ndarray:
        return self.encode_queries(texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row] += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.dim).astype(np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


@pytest.fixture(scope="session")
def encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Item row 10 k + c is the c-th colour of the k-th kind."""
    count = len(KINDS) * len(COLOURS)
    return Catalog(
        item_ids=np.array([f"i{row:02d}" for row in range(count)], dtype=object),
        titles=[f"{colour} {kind} no {row}" for row, (kind, colour) in enumerate((kind, colour) for kind in KINDS for colour in COLOURS)],
        category_paths=[("shop", kind) for kind in KINDS for _ in COLOURS],
        brands=[""] * count,
        texts=[""] * count,
        prices=np.full(count, np.nan),
        prior_scores=np.zeros(count),
        first_seen=np.full(count, np.datetime64("NaT"), dtype="datetime64[us]"),
    )


@pytest.fixture(scope="session")
def table() -> SidTable:
    """The SID of item 10 k + c is <k, c, 0>: kind, colour."""
    rows = np.arange(50)
    return SidTable.from_item_tokens(SidSpace((5, 10, 2)), np.stack([rows // 10, rows % 10, np.zeros(50, int)], axis=1).astype(np.int32))


def _make_requests(queries: Sequence[str], clicked: Sequence[Sequence[int]], **columns: Sequence) -> Requests:
    """Requests with the given queries and clicks; nothing bought, no shopper unless given."""
    count = len(queries)

    def rows(values: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [np.array(one, dtype=np.int32) for one in values]

    return Requests(
        request_ids=[f"r{row}" for row in range(count)],
        user_ids=[None] * count,
        queries=list(queries),
        genders=list(columns.get("genders", [None] * count)),
        age_bands=list(columns.get("age_bands", [None] * count)),
        times=np.arange(count, dtype=np.int64),
        exposed=rows(clicked),
        clicked=rows(clicked),
        purchased=rows(columns.get("purchased", [[]] * count)),
        history=rows(columns.get("history", [[]] * count)),
        grades=[np.full(len(one), np.nan, np.float32) for one in clicked],
    )


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., Requests]:
    return _make_requests


@pytest.fixture(scope="session")
def requests() -> Requests:
    """Every item is asked for by colour and kind; a bare kind is clicked by f on its first colour and by m on its second."""
    queries = [f"{colour} {kind}" for kind in KINDS for colour in COLOURS]
    clicked = [[row] for row in range(50)]
    genders: list[str | None] = [None] * 50
    for kind_row, kind in enumerate(KINDS):
        for gender, at in (("f", 0), ("m", 1)):
            queries.append(kind)
            clicked.append([10 * kind_row + at])
            genders.append(gender)
    return _make_requests(queries, clicked, genders=genders, history=[[]] * 50 + [[3], [4]] * 5)
