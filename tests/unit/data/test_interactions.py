from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.data.catalog import Catalog, load_catalog, with_large_text
from genrecall.data.interactions import Requests, flattened, known_at_split, load_requests, popularity, query_item_pairs
from genrecall.data.schema import ITEMS, REQUESTS, DataError
from genrecall.storage import Artifact

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def requests_of(clicked: list[list[int]], purchased: list[list[int]]) -> Requests:
    count = len(clicked)

    def rows(ragged: list[list[int]]) -> list[np.ndarray]:
        return [np.array(one, dtype=np.int32) for one in ragged]

    return Requests(
        request_ids=[f"r{n}" for n in range(count)],
        user_ids=[None] * count,
        queries=["q"] * count,
        genders=[None] * count,
        age_bands=[None] * count,
        times=np.arange(count, dtype=np.int64),
        exposed=rows(clicked),
        clicked=rows(clicked),
        purchased=rows(purchased),
        history=rows([[]] * count),
        grades=[np.full(len(one), np.nan, dtype=np.float32) for one in clicked],
    )


def test_a_flattened_column_says_whose_each_value_is() -> None:
    owners, values = flattened([np.array([3, 1], dtype=np.int32), np.array([], dtype=np.int32), np.array([2], dtype=np.int32)])
    assert (owners.tolist(), values.tolist()) == ([0, 0, 2], [3, 1, 2])
    assert (owners.dtype, values.dtype) == (np.int64, np.int32)
    assert [part.tolist() for part in flattened([])] == [[], []]


def test_pairs_weigh_a_purchase_twice_a_click() -> None:
    request, item, weight = query_item_pairs(requests_of([[4, 2], [], [2]], [[2], [], []]))
    assert (request.tolist(), item.tolist(), weight.tolist()) == ([0, 0, 2], [4, 2, 2], [1.0, 2.0, 1.0])
    assert (request.dtype, item.dtype, weight.dtype) == (np.int32, np.int32, np.float32)


def test_popularity_counts_clicks_and_purchases() -> None:
    assert popularity(requests_of([[4, 2], [], [2]], [[2], [], []]), 6).tolist() == [0, 0, 3, 0, 1, 0]


def test_no_requests_give_no_pairs() -> None:
    empty = requests_of([], [])
    assert [len(one) for one in query_item_pairs(empty)] == [0, 0, 0]
    assert popularity(empty, 3).tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), unique_by=lambda pair: pair[0], max_size=6), max_size=12))
def test_pairs_equal_a_plain_reference(drawn: list[list[tuple[int, bool]]]) -> None:
    requests = requests_of([[item for item, _ in one] for one in drawn], [[item for item, bought in one if bought] for one in drawn])
    expected = [(place, item, 2.0 if bought else 1.0) for place, one in enumerate(drawn) for item, bought in one]
    assert list(zip(*(column.tolist() for column in query_item_pairs(requests)), strict=True)) == expected


def dataset_of(folder: Path, parts: list[list[dict[str, object]]]) -> Artifact:
    """A dataset of the items i0 to i9, the last one first, and of training requests in some parts."""
    (folder / "items").mkdir()
    for part, numbers in enumerate((range(9, 4, -1), range(4, -1, -1))):
        rows = [{"item_id": f"i{number}", "title": f"thing {number}", "category_path": []} for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows, ITEMS), folder / "items" / f"part-{part}.parquet")
    (folder / "requests/train").mkdir(parents=True)
    for number, requests in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(requests, REQUESTS), folder / "requests/train" / f"part-{number}.parquet")
    return Artifact(str(folder), folder, {})


def request(name: str, minute: int, exposed: list[str], grades: list[float | None], history: list[str]) -> dict[str, object]:
    time = START + datetime.timedelta(minutes=minute)
    lists = {"exposed": exposed, "grades": grades, "clicked": exposed[:1], "purchased": [], "history": history}
    return {"request_id": name, "user_id": f"u{name}", "timestamp": time, "query": f"q{name}", **lists}


def test_requests_of_all_parts_come_in_order_of_time_then_id(tmp_path: Path) -> None:
    first = [request("c", 5, ["i9", "i0"], [None, 2.0], []), request("b", 7, [], [], ["i3"])]
    second = [request("a", 5, ["i4"], [3.0], ["i1", "i2", "i1"]), request("d", 1, ["i7", "i8", "i9"], [1.0, None, 2.5], [])]
    dataset = dataset_of(tmp_path, [first, second])
    catalog = load_catalog(dataset)
    assert catalog.item_ids.tolist() == [f"i{number}" for number in range(10)]
    assert catalog.titles == [f"thing {number}" for number in range(10)]
    requests = load_requests(dataset, "train", catalog)
    assert requests.request_ids == ["d", "a", "c", "b"]
    assert requests.queries == ["qd", "qa", "qc", "qb"]
    assert requests.user_ids == ["ud", "ua", "uc", "ub"]
    assert requests.genders == [None] * 4
    assert (np.diff(requests.times) / 60e6).tolist() == [4, 0, 2]
    assert [row.tolist() for row in requests.exposed] == [[7, 8, 9], [4], [9, 0], []]
    assert [row.tolist() for row in requests.clicked] == [[7], [4], [9], []]
    assert [row.tolist() for row in requests.history] == [[], [1, 2, 1], [], [3]]
    assert [np.nan_to_num(row, nan=-1).tolist() for row in requests.grades] == [[1.0, -1, 2.5], [3.0], [-1, 2.0], []]
    assert {row.dtype for row in requests.exposed} == {np.dtype(np.int32)}
    assert {row.dtype for row in requests.grades} == {np.dtype(np.float32)}


def test_a_split_may_be_empty_and_an_unknown_item_is_named(tmp_path: Path) -> None:
    for name, parts in (("none", [[]]), ("ghost", [[request("a", 0, ["i1", "ghost"], [None, None], [])]])):
        (tmp_path / name).mkdir()
        dataset = dataset_of(tmp_path / name, parts)
        if name == "none":
            assert len(load_requests(dataset, "train", load_catalog(dataset))) == 0
        else:
            with pytest.raises(DataError, match=r"requests/train: exposed: item 'ghost' is not in the catalogue; rerun jobs/prepare_data.py"):
                load_requests(dataset, "train", load_catalog(dataset))


def test_text_columns_get_offsets_that_hold_more_than_two_gigabytes() -> None:
    table = pa.table({"title": ["a", None], "price": [1.0, 2.0], "path": [["x"], []]})
    large = with_large_text(table)
    assert large.schema.types == [pa.large_string(), pa.float64(), pa.list_(pa.string())]
    assert large.to_pylist() == table.to_pylist()


def test_dates_of_items_say_nothing_beside_sequence_numbers(tmp_path: Path) -> None:
    requests = requests_of([[0], [2]], [[], []])
    times = np.array(["2026-02-01", "2026-02-02"], dtype="datetime64[us]").astype(np.int64)
    for dates, known in (
        (["2026-01-01", "2026-03-01", "NaT"], [True, False, True]),
        (["2026-03-01", "2026-03-01", "NaT"], [False, False, True]),  # dated since after the split
        (["NaT", "NaT", "NaT"], [True, True, True]),
    ):
        first_seen = np.array(dates, dtype="datetime64[us]")
        catalog = Catalog(np.array(list("abc"), dtype=object), [""] * 3, [()] * 3, [""] * 3, [""] * 3, np.zeros(3), np.zeros(3), first_seen)
        requests.times[:] = times
        assert known_at_split(catalog, requests).tolist() == known
        requests.times[:] = [5, 7]
        assert known_at_split(catalog, requests).all()
