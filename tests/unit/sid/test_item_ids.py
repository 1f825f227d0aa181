"""Item ids by row and back, against a dictionary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.item_ids import ItemIds, ItemIdsError

IDS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), unique=True, max_size=40).map(sorted)


@settings(deadline=None, max_examples=60)
@given(IDS, st.lists(st.text(max_size=14), max_size=20), st.integers(1, 5))
def test_rows_and_ids_agree_with_a_dictionary(ids, others, chunks):
    kept = ItemIds.of(pa.array(ids, pa.string()))
    row_of = {one: row for row, one in enumerate(ids)}
    asked = [*ids[::-1], *others]
    assert kept.rows_of(asked).tolist() == [row_of.get(one, -1) for one in asked]
    assert kept.rows_of(asked).dtype == np.int32
    assert kept.ids_of(range(len(ids))) == ids
    table = pa.chunked_array([ids[start : start + chunks] for start in range(0, len(ids), chunks)], pa.string())
    assert kept.same_as(table)
    assert kept.rows_of(table).tolist() == list(range(len(ids)))
    assert not kept.same_as(pa.chunked_array([[*ids, "more"]]))


def test_all_forms_of_ids_are_kept_alike():
    ids = ["a", "bb", "été", "中文"]
    kept = ItemIds.of(pa.array(["left out", *ids, None])[1:5])
    assert kept.values.dtype == "S6"  # 中文
    for form in (np.array(ids, dtype=object), np.array([one.encode() for one in ids]), np.array([one.encode() for one in ids], "S60"), pa.chunked_array([ids])):
        assert np.array_equal(ItemIds.of(form).values, kept.values)
        assert ItemIds.of(form).values.dtype == "S6"


def test_what_is_no_id_has_no_row():
    kept = ItemIds.of(pa.array(["a", "ab"]))
    assert kept.rows_of(["", "abc", "a\0", "b", "\ud800", "é" * 40, "ab"]).tolist() == [-1] * 6 + [1]
    assert kept.rows_of(pa.array(["ab", None, "a\0", "abc", "é" * 40, "a"])).tolist() == [1, -1, -1, -1, -1, 0]
    assert kept.rows_of([]).tolist() == []
    assert ItemIds.of(pa.array([], pa.string())).rows_of(["a"]).tolist() == [-1]


def test_saved_ids_read_back_by_memory_map(tmp_path):
    ItemIds.of(pa.array(["i1", "i10", "i2"])).save(tmp_path)
    again = ItemIds.load(tmp_path)
    assert isinstance(again.values, np.memmap)
    assert again.ids_of([2, 0]) == ["i2", "i1"]
    assert again.rows_of(["i10", "i3"]).tolist() == [1, -1]
    assert (tmp_path / "item_ids.npy").stat().st_size == 128 + 3 * 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b" * 65], r"row 1 has 65 bytes, at most 64 are kept; give the catalogue shorter ids"),
        (["a", "é" * 33], r"row 1 has 66 bytes"),
        (["b", "a"], r"ascending and unique by their UTF-8 bytes, row 1 \(b'a'\) follows b'b'; sort the catalogue"),
        (["a", "b", "b"], r"row 2 \(b'b'\) follows b'b'"),
        (["a", None], r"row 1 has none; every item needs an id"),
        (["a", "b\0"], r"row 1 ends in a zero byte"),
    ],
)
def test_ids_that_cannot_be_kept_are_refused(ids, message):
    with pytest.raises(ItemIdsError, match=message):
        ItemIds.of(pa.array(ids, pa.string()))


def test_sixty_four_bytes_are_kept():
    assert ItemIds.of(pa.array(["x" * 64])).ids_of([0]) == ["x" * 64]


def test_rows_and_files_that_are_not_ids_are_refused(tmp_path):
    for rows in ([2], [-1]):
        with pytest.raises(ItemIdsError, match="item_rows: expected rows 0 to 1, got"):
            ItemIds.of(pa.array(["a", "b"])).ids_of(rows)
    with pytest.raises(ItemIdsError, match=r"no item_ids\.npy; .* rerun jobs/build_sid_index\.py"):
        ItemIds.load(tmp_path)
    np.save(tmp_path / "item_ids.npy", np.zeros(3))
    with pytest.raises(ItemIdsError, match=r"expected fixed-width bytes \[N\], got float64 \[3\]"):
        ItemIds.load(tmp_path)
