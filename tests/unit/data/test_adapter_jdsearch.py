"""A JDsearch row becomes a shopper's history of requests and a last search."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from genrecall.data.adapters import jdsearch
from genrecall.data.adapters.source_files import SourceError

HEADER = "\t".join(jdsearch.BEHAVIOUR_COLUMNS)
PRODUCTS = (
    "wid\tname\tbrand_id\tbrand_name\tcate_id_1\tcate_name_1\tcate_id_2\tcate_name_2\tcate_id_3\tcate_name_3\tcate_id_4\tcate_name_4\tshop_id\n"
    "9\t11\x1812\t1\t5\t1\t100\t2\t200\x18201\t3\t\t4\t400\t8\n"
)
ROW = "12\x1832\t456_123_789\t3.0_0.0_1.0\t1\x182_1\x182_-1_-1_1\x182\t5_6_7_8_9\tCLICK_CART_ORD_FLW_CLICK\t0_1_2_3_4_5\n"


def _folder(tmp_path: Path, row: str = ROW) -> Path:
    (tmp_path / "user_behavior_data_sample.txt").write_text(f"{HEADER}\n{row}")
    (tmp_path / "product_meta_data_sample.txt").write_text(PRODUCTS)
    return tmp_path


def test_neighbouring_actions_of_a_query_are_one_request_and_browsing_is_one_each(tmp_path: Path) -> None:
    raw = jdsearch.read(_folder(tmp_path))
    events = pa.concat_tables(raw.events).to_pylist()
    assert [(e["sequence"], e["query"], e["item_id"], e["action"]) for e in events] == [
        (0, "1 2", "5", "click"),
        (0, "1 2", "6", "cart"),
        (1, "", "7", "purchase"),
        (2, "", "8", "click"),
        (3, "1 2", "9", "click"),
        (4, "12 32", "123", "exposure"),
        (4, "12 32", "456", "exposure"),
        (4, "12 32", "456", "purchase"),
        (4, "12 32", "789", "exposure"),
        (4, "12 32", "789", "click"),
    ]
    assert {e["user_id"] for e in events} == {"u0"}
    assert {e["position"] for e in events} == {None}
    assert raw.split == "leave_last_out"


def test_term_ids_become_words_and_the_path_ends_at_an_empty_level(tmp_path: Path) -> None:
    (item,) = pa.concat_tables(jdsearch.read(_folder(tmp_path)).items).to_pylist()
    assert (item["item_id"], item["title"], item["brand"], item["category_path"]) == ("9", "11 12", "5", ["100", "200 201"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW.replace("3.0_0.0_1.0", "3.0_0.0"), "line 2: lists that belong together differ in length: candidate_wid_list has 3, candidate_label_list has 2"),
        (ROW.replace("CLICK_CART", "CART"), "line 2: lists that belong together differ in length: history_qry_list has 5"),
        (ROW.replace("3.0_0.0_1.0", "3.0_0.0_7"), "line 2, column 'candidate_label_list': expected 0, 1, 2 or 3, got '7'"),
        (ROW.replace("FLW", "LOOK"), "line 2, column 'history_type_list': expected CLICK, FLW, CART, ORD, got 'LOOK'"),
        ("1\t2\n", "line 2: expected 7 fields, got 2"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list(jdsearch.read(_folder(tmp_path, row)).events)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "user_behavior_data_sample.txt").write_text("query\n1\n")
    with pytest.raises(SourceError, match="missing column 'candidate_wid_list'"):
        list(jdsearch.read(folder).events)
