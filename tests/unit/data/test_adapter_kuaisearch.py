"""KuaiSearch rows become items with category paths, shoppers and pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from genrecall.data.adapters import kuaisearch
from genrecall.data.adapters.source_files import SourceError
from genrecall.data.schema import EVENTS, ITEMS, USERS

ITEM = {
    "item_id": 7,
    "item_title": "地毯",
    "brand_name": "其他/other",
    "seller_name": "家居店",
    "category_level1_name": "家纺",
    "category_level2_name": "UNKNOWN",
    "category_level3_name": "地毯",
}
USER = {"user_id": 1, "gender": "F", "age_bucket": "31-40"}
SEARCH: dict[str, Any] = {
    "user_id": 1,
    "session_id": 5,
    "impressed_item_ids": [9, 7, 9],
    "clicked_item_ids": [7, 7],
    "purchased_item_ids": [7],
    "time_index": 100,
    "query": "地毯 客厅",
}


def _folder(tmp_path: Path, item: Any = ITEM, search: Any = SEARCH) -> Path:
    for name, record in (("items", item), ("users", USER), ("recall", search)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    return tmp_path


def test_a_search_becomes_a_page_with_clicks_and_purchases(tmp_path: Path) -> None:
    raw = kuaisearch.read(_folder(tmp_path))
    events = pa.concat_tables(raw.events)
    assert events.schema == EVENTS
    assert [(e["item_id"], e["action"], e["position"]) for e in events.to_pylist()] == [
        ("9", "exposure", 0),
        ("7", "exposure", 1),
        ("7", "click", 1),
        ("7", "purchase", 1),
    ]
    first = events.to_pylist()[0]
    assert (first["query"], first["user_id"], first["sequence"], first["timestamp"]) == ("地毯 客厅", "1", 100, None)
    assert raw.split == "time"


def test_a_category_path_ends_at_the_first_unknown_level(tmp_path: Path) -> None:
    (item,) = pa.concat_tables(kuaisearch.read(_folder(tmp_path)).items).to_pylist()
    assert list(item) == ITEMS.names
    assert item["category_path"] == ["家纺"]
    assert item["brand"] is None
    assert item["text"] == "家居店"


def test_shoppers_keep_gender_and_age(tmp_path: Path) -> None:
    users = pa.concat_tables(kuaisearch.read(_folder(tmp_path)).users)
    assert users.schema == USERS
    assert users.to_pylist() == [{"user_id": "1", "gender": "F", "age_band": "31-40"}]


def test_two_searches_of_one_moment_are_two_requests(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "recall.jsonl").write_text(json.dumps(SEARCH) + "\n" + json.dumps({**SEARCH, "query": "other"}) + "\n")
    events = pa.concat_tables(kuaisearch.read(folder).events)
    assert len(set(events["request_id"].to_pylist())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clicked_item_ids": "7"}, "recall.jsonl: line 1, field 'clicked_item_ids': expected a list of item ids, got str"),
        ({"time_index": "soon"}, "recall.jsonl: line 1, field 'time_index': expected an integer, got 'soon'"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list(kuaisearch.read(_folder(tmp_path, search={**SEARCH, **change})).events)


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"recall.jsonl: line 1: missing field 'query'; found user_id"):
        list(kuaisearch.read(_folder(tmp_path, search={"user_id": 1})).events)
    (tmp_path / "users.jsonl").unlink()
    with pytest.raises(SourceError, match=r"expected users.jsonl \(plain or .gz\) for users, found items.jsonl, recall.jsonl"):
        kuaisearch.read(tmp_path)
