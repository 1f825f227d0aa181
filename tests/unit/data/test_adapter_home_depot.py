"""Judgements become exposures, clicks and purchases by grade."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from genrecall.data.adapters import home_depot
from genrecall.data.adapters.source_files import SourceError
from genrecall.data.schema import EVENTS, ITEMS, USERS

PRODUCTS = 'product_uid,product_title\n100,"Angle, 12 in."\n200,Deck paint\n300,Faucet\n'
JUDGMENTS = "id,product_uid,search_term,relevance\n1,100,angle bracket,3\n2,200,angle bracket,1.67\n3,300,tap,2.33\n4,100,angle bracket,2.32\n"


def _folder(tmp_path: Path, products: str = PRODUCTS, judgments: str = JUDGMENTS) -> Path:
    (tmp_path / "products.csv").write_text(products)
    with gzip.open(tmp_path / "judgments.csv.gz", "wt") as file:
        file.write(judgments)
    return tmp_path


def test_actions_follow_the_grade(tmp_path: Path) -> None:
    raw = home_depot.read(_folder(tmp_path))
    events = pa.concat_tables(raw.events)
    assert events.schema == EVENTS
    assert [(e["item_id"], e["query"], e["action"]) for e in events.to_pylist()] == [
        ("100", "angle bracket", "exposure"),
        ("100", "angle bracket", "click"),
        ("100", "angle bracket", "purchase"),
        ("200", "angle bracket", "exposure"),
        ("300", "tap", "exposure"),
        ("300", "tap", "click"),
        ("100", "angle bracket", "exposure"),
    ]
    assert events["grade"].to_pylist() == pytest.approx([3.0, None, None, 1.67, 2.33, None, 2.32])
    assert (raw.split, raw.query_kind) == ("by_query", "real")


def test_a_search_term_is_one_request_with_its_place_as_sequence(tmp_path: Path) -> None:
    events = pa.concat_tables(home_depot.read(_folder(tmp_path)).events).to_pylist()
    assert {(e["query"], e["request_id"], e["sequence"]) for e in events} == {
        ("angle bracket", home_depot.request_id_of("angle bracket"), 0),
        ("tap", home_depot.request_id_of("tap"), 1),
    }
    assert {e["timestamp"] for e in events} == {None}


def test_items_have_titles_and_nothing_else(tmp_path: Path) -> None:
    raw = home_depot.read(_folder(tmp_path))
    items = pa.concat_tables(raw.items)
    assert items.schema == ITEMS
    assert items["title"].to_pylist() == ["Angle, 12 in.", "Deck paint", "Faucet"]
    assert items["category_path"].to_pylist() == [[], [], []]
    users = pa.concat_tables(raw.users)
    assert users.schema == USERS
    assert users.num_rows == 0


def test_tables_can_be_read_twice(tmp_path: Path) -> None:
    raw = home_depot.read(_folder(tmp_path))
    assert pa.concat_tables(raw.events).equals(pa.concat_tables(raw.events))


@pytest.mark.parametrize("relevance", ["good", "0.5", "nan"])
def test_a_relevance_out_of_range_names_file_line_and_column(tmp_path: Path, relevance: str) -> None:
    raw = home_depot.read(_folder(tmp_path, judgments=JUDGMENTS + f"5,100,nails,{relevance}\n"))
    with pytest.raises(SourceError, match=r"judgments.csv.gz: line 6, column 'relevance': expected a number from 1 to 3, got"):
        list(raw.events)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    raw = home_depot.read(_folder(tmp_path, products="product_uid,name\n1,a\n"))
    with pytest.raises(SourceError, match=r"products.csv: line 1: missing column 'product_title'; found product_uid, name"):
        list(raw.items)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text(PRODUCTS)
    with pytest.raises(SourceError, match=r"expected judgments.csv \(plain or .gz\) for query-product judgements, found products.csv"):
        home_depot.read(tmp_path)
