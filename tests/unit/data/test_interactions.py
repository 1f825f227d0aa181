from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from genrecall.data.interactions import Requests, flattened, popularity, query_item_pairs


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
