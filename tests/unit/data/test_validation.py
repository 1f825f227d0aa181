from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from genrecall.data.schema import DataError
from genrecall.data.table_readers import Chunk, Portion
from genrecall.data.validation import Checked, RowRules, check_chunk

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
RULES = RowRules(max_query_characters=10, latest_time=int(NOW.timestamp() * 1e6), category_separator=">")
GOOD = {"request_id": "r", "user_id": "u", "timestamp": NOW, "query": "q", "item_id": "a", "action": "click"}


def check(table: str, columns: dict[str, Any]) -> Checked:
    found = pa.table(columns)
    return check_chunk(Portion(table, "/x.parquet", "/x.parquet", "parquet", 4), Chunk(found, np.arange(100, 100 + len(found)), []), RULES)


def events(*changes: dict[str, Any]) -> Checked:
    rows = [{**GOOD, **change} for change in changes]
    return check("events", {name: [row.get(name) for row in rows] for name in {key for row in rows for key in row}})


def reasons(checked: Checked) -> list[tuple[int, str, str]]:
    return [(row["row"], row["column"], row["reason"]) for row in checked.rejected.to_pylist()]


def test_each_bad_row_is_rejected_with_its_row_column_and_reason() -> None:
    late = NOW + datetime.timedelta(seconds=1)
    checked = events(
        {},
        {"action": "clock"},
        {"item_id": None},
        {"item_id": ""},
        {"query": None},
        {"timestamp": None},
        {"timestamp": late},
        {"request_id": "", "user_id": None},
    )
    assert checked.table["_row"].to_pylist() == [100]
    assert checked.table["_portion"].to_pylist() == [4]
    assert sorted(reasons(checked)) == [
        (101, "action", "unknown_action"),
        (102, "item_id", "missing_value"),
        (103, "item_id", "missing_value"),
        (104, "query", "missing_value"),
        (105, "timestamp", "missing_value"),
        (106, "timestamp", "future_timestamp"),
        (107, "request_id", "missing_value"),
    ]


def test_long_query_is_cut_and_counted_and_spaces_are_tidied() -> None:
    checked = events({"query": "x" * 10_000}, {"query": "  red \n\t shoes "}, {"query": ""})
    assert checked.table["query"].to_pylist() == ["x" * 10, "red shoes", ""]
    assert checked.noted == {"queries_cut": 1}


def test_numbers_and_times_in_text_are_read_and_what_is_none_is_rejected() -> None:
    checked = check(
        "events",
        {
            "request_id": [7, 7, 7],
            "query": ["q"] * 3,
            "item_id": ["a"] * 3,
            "action": ["click"] * 3,
            "timestamp": ["2026-01-01T01:00:00+01:00", "2026-01-01", "yesterday"],
            "position": ["1", "", "3"],
            "grade": ["2.5", "x", "1"],
        },
    )
    assert checked.table["timestamp"].to_pylist() == [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)]
    assert checked.table["request_id"].to_pylist() == ["7"]
    assert sorted(reasons(checked)) == [(101, "grade", "wrong_type"), (102, "timestamp", "wrong_type")]


def test_fractions_do_not_pass_as_integers() -> None:
    checked = events({"position": 1.0}, {"position": 1.5}, {"position": 3e12})
    assert checked.table["position"].to_pylist() == [1]
    assert reasons(checked) == [(101, "position", "wrong_type"), (102, "position", "wrong_type")]


def test_bytes_that_are_not_utf8_cost_their_row_only() -> None:
    checked = events({"query": b"caf\xc3\xa9"}, {"query": b"caf\xe9"})
    assert checked.table["query"].to_pylist() == ["café"]
    assert reasons(checked) == [(101, "query", "invalid_utf8")]


def text_of(*values: bytes) -> pa.Array:
    """Strings as a careless writer of Parquet leaves them: nothing says that the bytes are UTF-8."""
    return pa.StringArray.from_buffers(len(values), *pa.array(values, pa.binary()).buffers()[1:])


def test_text_that_is_not_utf8_costs_its_row_only() -> None:
    checked = check("events", {**{name: [GOOD[name]] * 2 for name in GOOD}, "query": text_of(b"caf\xe9", b"tea")})
    assert checked.table["query"].to_pylist() == ["tea"]
    assert reasons(checked) == [(100, "query", "invalid_utf8")]
    paths = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), text_of(b"caf\xe9", b"food", b"tea"))
    checked = check("items", {"item_id": ["a", "b"], "title": text_of(b"t", b"t").dictionary_encode(), "category_path": paths})
    assert checked.table["category_path"].to_pylist() == [["food", "tea"]]
    assert reasons(checked) == [(100, "category_path", "invalid_utf8")]


def test_whole_numbers_in_text_keep_every_digit_and_those_out_of_range_cost_their_row_only() -> None:
    big = 2**53 + 1  # the first that a float cannot hold
    checked = check("events", {**{name: [GOOD[name]] * 4 for name in GOOD}, "sequence": [str(big), "", "3.0", "1.5"], "position": ["1", "2", "3", "4"]})
    assert checked.table["sequence"].to_pylist() == [big, None, 3]
    assert reasons(checked) == [(103, "sequence", "wrong_type")]
    checked = events({"position": 7}, {"position": -(2**63)})
    assert checked.table["position"].to_pylist() == [7]
    assert reasons(checked) == [(101, "position", "wrong_type")]
    sequences = pa.array([big, 2**63, None], pa.uint64())
    checked = check("events", {**{name: [GOOD[name]] * 3 for name in GOOD}, "sequence": sequences})
    assert checked.table["sequence"].to_pylist() == [big, None]
    assert reasons(checked) == [(101, "sequence", "wrong_type")]


def test_a_price_that_is_nan_is_unknown_in_text_too() -> None:
    checked = check("items", {"item_id": ["a", "b", "c"], "title": ["t"] * 3, "price": ["NaN", "nan", "cheap"]})
    assert checked.table["price"].to_pylist() == [None, None]
    assert reasons(checked) == [(102, "price", "wrong_type")]


def test_an_item_id_that_no_index_could_keep_is_rejected() -> None:
    checked = check("items", {"item_id": ["a" * 64, "a" * 65, "é" * 33, "a\0"], "title": ["t"] * 4})
    assert checked.table["item_id"].to_pylist() == ["a" * 64]
    assert reasons(checked) == [(101, "item_id", "id_too_long"), (102, "item_id", "id_too_long"), (103, "item_id", "id_ends_in_zero_byte")]


def test_category_paths_lose_empty_levels_and_items_without_text_stay() -> None:
    checked = check(
        "items", {"item_id": ["a", "b", "c"], "title": ["t", None, ""], "category_path": [["x", "", " y "], None, []], "price": [1.0, float("nan"), None]}
    )
    assert checked.table["category_path"].to_pylist() == [["x", "y"], [], []]
    assert checked.table["title"].to_pylist() == ["t", "", ""]
    assert checked.table["price"].to_pylist() == [1.0, None, None]
    assert checked.noted == {"empty_category_levels_dropped": 1, "items_without_title": 2}
    assert not len(checked.rejected)


def test_category_paths_in_text_are_split_or_read_as_json() -> None:
    checked = check(
        "items", {"item_id": list("abcdef"), "title": ["t"] * 6, "category_path": ["x > y", '["p>q", "r"]', None, '["broken', "[7]", '["\\ud83d"]']}
    )
    assert checked.table["category_path"].to_pylist() == [["x", "y"], ["p>q", "r"], []]
    assert reasons(checked) == [(103, "category_path", "wrong_type"), (104, "category_path", "wrong_type"), (105, "category_path", "wrong_type")]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ("events", {"query": ["q"], "item_id": ["a"]}, r"/x\.parquet: events lack column action, timestamp \(or sequence\), request_id \(or user_id"),
        ("items", {"title": ["t"]}, r"items lack column item_id; of the known columns .* found title; rename or add it"),
        ("users", {"gender": ["f"]}, "users lack column user_id"),
    ],
)
def test_missing_column_names_file_and_columns(table: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(table, columns)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_id", [1.0], r"column 'item_id' of events: expected string, got double; .*lost digits"),
        ("timestamp", [1_700_000_000], r"column 'timestamp' of events: expected timestamp\[us, tz=UTC\], got int64; give a Parquet timestamp or ISO 8601"),
        ("query", [["q"]], r"column 'query' of events: expected string, got list"),
        ("position", [True], r"column 'position' of events: expected int32, got bool"),
    ],
)
def test_column_of_a_hopeless_type_stops_the_run(column: str, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        events({column: values[0]})
