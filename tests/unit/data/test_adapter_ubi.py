"""UBI queries and events, bulk or plain, become canonical events."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from genrecall.data.adapters import ubi
from genrecall.data.adapters.source_files import SourceError

QUERY = {"query_id": "q1", "client_id": "c1", "user_query": " red lamp ", "timestamp": "2025-01-02T03:04:05Z", "query_response_hit_ids": ["A", "B"]}


def _event(action: str, item: str | None, *, position: int | None = None, query_id: str | None = "q1", **more: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if item is not None:
        attributes["object"] = {"object_id": item, "description": f"the {item}"}
    if position is not None:
        attributes["position"] = {"ordinal": position}
    return {"action_name": action, "query_id": query_id, "client_id": "c1", "timestamp": "2025-01-02T03:04:06Z", "event_attributes": attributes, **more}


EVENTS = [_event("click", "B", position=1), _event("add_to_cart", "B"), _event("purchase", "B", user_id="u9"), _event("type_filter", "X")]


def _bulk(folder: Path, queries: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    lines = []
    for index, documents in (("ubi_queries", queries), ("ubi_events", events)):
        for document in documents:
            lines += [{"index": {"_index": index}}, document]
    (folder / "log.ndjson").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def _plain(folder: Path, queries: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    (folder / "ubi_queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    (folder / "ubi_events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    return folder


def _read(folder: Path, **options: Any) -> list[dict[str, Any]]:
    return pa.concat_tables(ubi.read(folder, **options).events).to_pylist()


@pytest.mark.parametrize("write", [_bulk, _plain])
def test_bulk_and_plain_files_give_the_same_events(tmp_path: Path, write: Any) -> None:
    events = _read(write(tmp_path, [QUERY], EVENTS))
    assert sorted((e["item_id"], e["action"], e["position"]) for e in events if e["position"] is not None) == [
        ("A", "exposure", 0),
        ("B", "click", 1),
        ("B", "exposure", 1),
    ]
    assert {(e["action"], e["user_id"]) for e in events} == {("exposure", "u9"), ("click", "u9"), ("cart", "u9"), ("purchase", "u9")}
    assert {(e["request_id"], e["query"]) for e in events} == {("q1", "red lamp")}


def test_a_request_is_one_shoppers_whichever_of_its_documents_names_the_user(tmp_path: Path) -> None:
    queries = [QUERY, {**QUERY, "query_id": "q2", "client_id": "c1"}]  # the standard's queries have no user_id
    events = [
        _event("click", "A"),
        _event("purchase", "A", user_id="u9"),
        _event("click", "B", client_id="c2"),  # another client under the same query id
        _event("click", "A", query_id="q2"),  # the same client where no user is named
        _event("click", "B", client_id=None),  # no client: that of the query
    ]
    folder = _bulk(tmp_path, queries, events)
    found = {(e["request_id"], e["action"], e["item_id"], e["user_id"]) for e in _read(folder)}
    assert found == {
        *(("q1", "exposure", item, "u9") for item in "AB"),
        ("q1", "click", "A", "u9"),
        ("q1", "purchase", "A", "u9"),
        ("q1", "click", "B", "c2"),
        ("q1", "click", "B", "u9"),
        *(("q2", "exposure", item, "c1") for item in "AB"),
        ("q2", "click", "A", "c1"),
    }
    assert pa.concat_tables(ubi.read(folder).users)["user_id"].to_pylist() == ["c1", "c2", "u9"]


def test_what_cannot_be_placed_is_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = [*EVENTS, _event("click", None), _event("click", "B", query_id=None)]
    with caplog.at_level(logging.WARNING):
        _read(_bulk(tmp_path, [QUERY], events))
    assert "action type_filter: 1" in caplog.text
    assert "click without object id: 1" in caplog.text
    assert "no query id: 1" in caplog.text


def test_query_text_falls_back_to_the_event_and_to_search_events(tmp_path: Path) -> None:
    events = [
        {"action_name": "on_search", "query_id": "q2", "client_id": "c2", "timestamp": 1717527762025, "message": "handbag"},
        _event("click", "A", query_id="q2"),
        _event("click", "A", query_id="q3", user_query="purse"),
        _event("click", "A", query_id="q4"),
    ]
    assert [(e["request_id"], e["query"]) for e in _read(_bulk(tmp_path, [QUERY], events)) if e["action"] == "click"] == [
        ("q2", "handbag"),
        ("q3", "purse"),
        ("q4", ""),
    ]


def test_times_are_iso_or_milliseconds_and_utc_by_default(tmp_path: Path) -> None:
    events = [_event("click", item, timestamp=time) for item, time in (("A", 1717527762025), ("B", "2025-01-02T03:04:06+01:00"), ("C", "2025-01-02T03:04:06"))]
    times = {e["item_id"]: e["timestamp"] for e in _read(_bulk(tmp_path, [{**QUERY, "query_response_hit_ids": []}], events))}
    assert times["A"] == datetime.datetime(2024, 6, 4, 19, 2, 42, 25_000, tzinfo=datetime.UTC)
    assert times["B"] == datetime.datetime(2025, 1, 2, 2, 4, 6, tzinfo=datetime.UTC)
    assert times["C"] == datetime.datetime(2025, 1, 2, 3, 4, 6, tzinfo=datetime.UTC)


def test_own_action_names_can_be_mapped(tmp_path: Path) -> None:
    folder = _bulk(tmp_path, [QUERY], [_event("tapped", "A"), _event("click", "B")])
    assert [e["item_id"] for e in _read(folder, actions={"tapped": "click"}) if e["action"] == "click"] == ["A"]
    with pytest.raises(SourceError, match=r"actions: expected one of exposure, click, cart, purchase, got \{'tapped': 'tap'\}"):
        ubi.read(folder, actions={"tapped": "tap"})


def test_items_come_from_the_log_where_there_is_no_catalogue(tmp_path: Path) -> None:
    items = pa.concat_tables(ubi.read(_bulk(tmp_path, [QUERY], EVENTS)).items).to_pylist()
    assert {(item["item_id"], item["title"]) for item in items} == {("A", ""), ("B", "the B")}


def test_a_catalogue_is_used_where_there_is_one(tmp_path: Path) -> None:
    folder = _bulk(tmp_path, [QUERY], EVENTS)
    product = {"item_id": "A", "title": "Lamp", "category_path": ["Home", "Lamps"], "price": 9.5, "first_seen": "2024-12-01T00:00:00Z"}
    (folder / "products.jsonl").write_text(json.dumps(product) + "\n")
    (item,) = pa.concat_tables(ubi.read(folder).items).to_pylist()
    assert (item["item_id"], item["category_path"], item["price"], item["first_seen"].year) == ("A", ["Home", "Lamps"], 9.5, 2024)
    (folder / "products.jsonl").write_text(json.dumps({**product, "colour": "red"}) + "\n")
    with pytest.raises(SourceError, match=r"products.jsonl: line 1: unknown field 'colour'; a product has item_id, title"):
        list(ubi.read(folder).items)
    (folder / "products.jsonl").write_text(json.dumps({**product, "category_path": "Home>Lamps"}) + "\n")
    with pytest.raises(SourceError, match="field 'category_path': expected a list of names, root first"):
        list(ubi.read(folder).items)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("price", "12.99", 'expected a number, got "12.99"'),
        ("prior_score", True, "expected a number, got true"),
        pytest.param("price", 10**400, "expected a number below 1.8e308, got 1000", id="price-huge"),
        ("brand", ["x"], r'expected text, got \["x"\]'),
        ("text", {"colour": "red"}, r'expected text, got \{"colour": "red"\}'),
        ("title", None, "expected text, got null"),
        ("item_id", 1.5, "expected text or a whole number, got 1.5"),
        ("category_path", ["Home", None], r'expected a list of names, root first, got \["Home", null\]'),
        ("first_seen", "soon", "expected ISO 8601 or milliseconds since 1970, got 'soon'"),
    ],
)
def test_product_fields_of_another_type_are_named_by_line(tmp_path: Path, field: str, value: Any, message: str) -> None:
    folder = _bulk(tmp_path, [QUERY], EVENTS)
    good = {"item_id": 7, "title": "Lamp", "category_path": ["Home", 12], "brand": None, "price": 9, "prior_score": 0.5}
    (folder / "products.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, field: value}) + "\n")
    with pytest.raises(SourceError, match=rf"products.jsonl: line 2, field '{field}': {message}"):
        list(ubi.read(folder).items)
    (folder / "products.jsonl").write_text(json.dumps(good) + "\n")
    (item,) = pa.concat_tables(ubi.read(folder).items).to_pylist()
    assert (item["item_id"], item["category_path"], item["price"], item["brand"]) == ("7", ["Home", "12"], 9.0, None)


def test_documents_of_other_indices_are_passed_over(tmp_path: Path) -> None:
    folder = _bulk(tmp_path, [QUERY], EVENTS)
    with (folder / "log.ndjson").open("a") as file:
        file.write(json.dumps({"index": {"_index": "weblog"}}) + "\n" + json.dumps(_event("click", "Z")) + "\n")
        file.write(json.dumps({"delete": {"_index": "ubi_events"}}) + "\n")
    assert "Z" not in {e["item_id"] for e in _read(folder)}


@pytest.mark.parametrize(
    ("queries", "events", "message"),
    [
        ([QUERY], [{"query_id": "q1", "timestamp": 1}], "missing field 'action_name'"),
        ([{"query_id": "q1"}], EVENTS, "missing field 'user_query'"),
        ([QUERY], [_event("click", "A", timestamp="yesterday")], "field 'timestamp': expected ISO 8601 or milliseconds since 1970, got 'yesterday'"),
        ([{**QUERY, "query_response_hit_ids": "A"}], EVENTS, "field 'query_response_hit_ids': expected a list of ids, got str"),
    ],
)
def test_wrong_documents_are_named_by_line(tmp_path: Path, queries: Any, events: Any, message: str) -> None:
    with pytest.raises(SourceError, match=rf"log.ndjson: line \d+.*{message}"):
        _read(_bulk(tmp_path, queries, events))


def test_a_folder_without_logs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected UBI logs \(\*.ndjson or \*.jsonl, plain or .gz\) in this folder, found none"):
        ubi.read(tmp_path)
