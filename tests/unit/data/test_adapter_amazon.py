"""Purchases become requests with derived queries whose kind is on the request id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.data.adapters import amazon
from genrecall.data.adapters.source_files import SourceError
from genrecall.data.schema import EVENTS, ITEMS

ITEM_RECORDS = {
    "0": {
        "title": "Acmo M4 Steel Hex Bolts &amp; Nuts",
        "description": "Strong.",
        "brand": "Acmo Tools",
        "categories": "Industrial,Fasteners,Bolts, Nuts & Screws,Hex Bolts",
    },
    "1": {"title": "Zeno Blue Nitrile Gloves", "description": "", "brand": "Zeno", "categories": "Industrial,Safety,Gloves"},
    "2": {"title": "Plain Thing", "description": "", "brand": "", "categories": ""},
}


def _folder(tmp_path: Path, items: Any = ITEM_RECORDS, purchases: Any = None) -> Path:
    (tmp_path / "X.item.json").write_text(json.dumps(items))
    (tmp_path / "X.inter.json").write_text(json.dumps({"a": [0, 1, 2, 0], "b": [1]} if purchases is None else purchases))
    return tmp_path


def test_category_names_may_hold_a_comma_and_a_space() -> None:
    assert amazon.split_category_path("A,B, C & D,E") == ["A", "B, C & D", "E"]
    assert amazon.split_category_path("") == []
    assert amazon.split_category_path("A,,B") == ["A", "B"]


def test_items_are_unescaped_and_unknown_fields_are_null(tmp_path: Path) -> None:
    items = pa.concat_tables(amazon.read(_folder(tmp_path)).items)
    assert items.schema == ITEMS
    first, _, last = items.to_pylist()
    assert first["title"] == "Acmo M4 Steel Hex Bolts & Nuts"
    assert first["category_path"] == ["Industrial", "Fasteners", "Bolts, Nuts & Screws", "Hex Bolts"]
    assert (last["brand"], last["text"], last["category_path"]) == (None, None, [])


def test_each_review_is_one_purchase_in_order(tmp_path: Path) -> None:
    raw = amazon.read(_folder(tmp_path))
    events = pa.concat_tables(raw.events)
    assert events.schema == EVENTS
    assert [(e["user_id"], e["item_id"], e["sequence"], e["action"]) for e in events.to_pylist()] == [
        ("a", "0", 0, "purchase"),
        ("a", "1", 1, "purchase"),
        ("a", "2", 2, "purchase"),
        ("a", "0", 3, "purchase"),
        ("b", "1", 0, "purchase"),
    ]
    assert all(amazon.query_kind_of(e["request_id"]) in amazon.QUERY_KINDS for e in events.to_pylist())
    assert (raw.split, raw.query_kind) == ("leave_last_out", "derived")
    assert pa.concat_tables(raw.users)["user_id"].to_pylist() == ["a", "b"]


def test_queries_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    folder = _folder(tmp_path, purchases={"a": [0, 1] * 30})
    first, again, other = (pa.concat_tables(amazon.read(folder, seed=seed).events) for seed in (1, 1, 2))
    assert first.equals(again)
    assert first["query"].to_pylist() != other["query"].to_pylist()
    assert len(set(first["query"].to_pylist())) > 10  # varied words for two items


def test_kinds_use_the_words_they_say(tmp_path: Path) -> None:
    events = pa.concat_tables(amazon.read(_folder(tmp_path, purchases={"a": [0] * 300})).events).to_pylist()
    by_kind = {kind: {e["query"] for e in events if e["request_id"].endswith(f"#{kind}")} for kind in amazon.QUERY_KINDS}
    assert by_kind["category"] == {"hex bolts", "bolts nuts screws hex"}
    assert all(query.startswith("acmo tools") for query in by_kind["brand"])
    assert all(set(query.split()) <= {"acmo", "m4", "steel", "hex", "bolts", "nuts"} for query in by_kind["title"])
    path = ITEM_RECORDS["0"]["categories"].split(",")
    free = {query for query in by_kind["title"] if not amazon.shares_category_word(query, path)}
    assert 0 < len(free) < len(by_kind["title"])


def test_an_item_without_category_or_brand_gets_title_words(tmp_path: Path) -> None:
    events = pa.concat_tables(amazon.read(_folder(tmp_path, purchases={"a": [2] * 20})).events).to_pylist()
    assert {amazon.query_kind_of(e["request_id"]) for e in events} == {"title"}
    assert all(e["query"] == "plain thing" for e in events)


def test_an_unknown_item_goes_on_to_be_rejected_later(tmp_path: Path) -> None:
    (event,) = pa.concat_tables(amazon.read(_folder(tmp_path, purchases={"a": [99]})).events).to_pylist()
    assert (event["item_id"], event["query"]) == ("99", "")


def test_plural_and_singular_are_the_same_category_word() -> None:
    assert amazon.shares_category_word("wood screw", ["Fasteners", "Wood Screws"])
    assert not amazon.shares_category_word("m4 zinc", ["Fasteners", "Wood Screws"])
    assert not amazon.shares_category_word("box of 10", ["Parts of Machines"])  # stop words do not count


@given(st.text(max_size=80), st.lists(st.text(max_size=20), max_size=4), st.text(max_size=20), st.integers(0, 50))
def test_any_text_gives_a_query_of_known_kind(title: str, path: list[str], brand: str, place: int) -> None:
    words = amazon.words_of(title)
    record = {"title": title, "path": path, "brand": brand, "words": words}
    kind, query = amazon.derive_query(record, dict.fromkeys(words, 1.0), amazon._Draws(f"0|u|{place}"))
    assert kind in amazon.QUERY_KINDS
    assert query == query.strip()


def test_a_foreign_request_id_has_no_query_kind() -> None:
    with pytest.raises(ValueError, match="request id 'r1': expected it to end in one of #category, #title, #brand"):
        amazon.query_kind_of("r1")


@pytest.mark.parametrize(
    ("items", "purchases", "message"),
    [
        ({"0": "x"}, {}, "X.item.json: item '0': expected an object with title, brand, description and categories, got str"),
        ({"0": {"title": "x"}}, {}, "item '0': field 'categories' is missing or not a string"),
        ({}, {}, "X.item.json: holds no items"),
        (ITEM_RECORDS, {"a": 3}, "X.inter.json: user 'a': expected a list of item ids, got int"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, items: Any, purchases: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list(amazon.read(_folder(tmp_path, items, purchases)).events)


def test_a_folder_without_items_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected exactly one file \*.item.json or \*.item.json.gz, found none"):
        amazon.read(tmp_path)
