"""The adapters on the real files: counts as published, schemas kept, references sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from genrecall.data.adapters import amazon, home_depot, jdsearch, kuaisearch, ubi
from genrecall.data.schema import ACTIONS, EVENTS, ITEMS, USERS, RawTables

RealData = Callable[[str], Path]


def _tables(raw: RawTables) -> tuple[pa.Table, pa.Table, pa.Table]:
    items, users, events = (pa.concat_tables(chunks) for chunks in (raw.items, raw.users, raw.events))
    assert (items.schema, users.schema, events.schema) == (ITEMS, USERS, EVENTS)
    for table in (items, users, events):
        for field in table.schema:
            assert field.nullable or table[field.name].null_count == 0, field.name
    assert set(events["action"].to_pylist()) <= set(ACTIONS)
    ids = items["item_id"].to_pylist()
    assert len(ids) == len(set(ids))
    return items, users, events


def test_home_depot(real_data: RealData) -> None:
    items, users, events = _tables(home_depot.read(real_data("home_depot")))
    assert (items.num_rows, users.num_rows) == (54_667, 0)
    counts = Counter(events["action"].to_pylist())
    assert counts["exposure"] == 58_924
    assert counts["purchase"] < counts["click"] < counts["exposure"]
    assert len(set(events["request_id"].to_pylist())) == 9_399
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())


def test_amazon_scientific(real_data: RealData) -> None:
    items, users, events = _tables(amazon.read(real_data("amazon_scientific")))
    assert (items.num_rows, users.num_rows, events.num_rows) == (4_344, 8_317, 58_492)
    paths = [tuple(path) for path in items["category_path"].to_pylist()]
    assert len(set(paths)) == 765  # "no path" counts as one of them
    assert sum(not path for path in paths) == 131
    assert all(events["query"].to_pylist())
    requests = events["request_id"].to_pylist()
    assert len(set(requests)) == 58_492
    kinds = Counter(map(amazon.query_kind_of, requests))
    assert min(kinds[kind] for kind in amazon.QUERY_KINDS) > 10_000


def test_amazon_headline_slice_is_large_enough(real_data: RealData) -> None:
    items, _, events = _tables(amazon.read(real_data("amazon_scientific")))
    path_of = dict(zip(items["item_id"].to_pylist(), items["category_path"].to_pylist(), strict=True))
    rows = events.select(["user_id", "sequence", "query", "item_id"]).to_pylist()
    last = {row["user_id"]: row["sequence"] for row in rows}
    training = {row["query"] for row in rows if row["sequence"] < last[row["user_id"]] - 1}
    test = [row for row in rows if row["sequence"] == last[row["user_id"]]]
    headline = [row for row in test if row["query"] not in training and not amazon.shares_category_word(row["query"], path_of[row["item_id"]])]
    assert len(headline) > 0.25 * len(test)


@pytest.mark.parametrize("seed", [0, 1])
def test_amazon_queries_repeat_exactly(real_data: RealData, seed: int) -> None:
    root = real_data("amazon_scientific")
    first, again = (next(iter(amazon.read(root, seed=seed).events)) for _ in range(2))
    assert first.equals(again)


def test_kuaisearch_sample(real_data: RealData) -> None:
    items, users, events = _tables(kuaisearch.read(real_data("kuaisearch_sample")))
    assert (items.num_rows, users.num_rows) == (200, 200)
    assert len(set(events["request_id"].to_pylist())) == 200
    assert Counter(events["action"].to_pylist())["purchase"] == 19
    assert any("衣" in title for title in items["title"].to_pylist())


def test_jdsearch_sample(real_data: RealData) -> None:
    items, users, events = _tables(jdsearch.read(real_data("jdsearch_sample")))
    assert (items.num_rows, users.num_rows) == (409, 3)
    counts = Counter(events["action"].to_pylist())
    assert counts["exposure"] == 262
    assert counts["cart"] == 152
    assert "\x18" not in "".join(events["query"].to_pylist() + items["title"].to_pylist())


def test_ubi_sample(real_data: RealData) -> None:
    items, users, events = _tables(ubi.read(real_data("ubi_sample")))
    counts = Counter(events["action"].to_pylist())
    assert (counts["click"], counts["cart"], counts["purchase"]) == (298, 234, 6)
    assert counts["exposure"] > 1_999  # impressions and the hits of queries
    assert events["timestamp"].null_count == 0
    assert set(events["item_id"].to_pylist()) == set(items["item_id"].to_pylist())
    assert {user for user in events["user_id"].to_pylist() if user} <= set(users["user_id"].to_pylist())
