from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.data.splits import TEST, TRAIN, VALIDATION, by_query, by_time, leave_last_out, normal_query, text_hash, time_cuts


def test_time_cuts_give_the_asked_fractions_when_times_differ() -> None:
    times = np.arange(100) * 7
    validation_start, test_start = time_cuts(times, np.ones(100), validation_fraction=0.1, test_fraction=0.2)
    assert (validation_start, test_start) == (70 * 7, 80 * 7)
    assert np.bincount(by_time(times, validation_start, test_start)).tolist() == [70, 10, 20]


def test_requests_of_one_instant_stay_together() -> None:
    times = np.array([1, 2, 3, 4, 4, 4, 4, 4, 4, 4])
    cuts = time_cuts(times, np.ones(10), validation_fraction=0.1, test_fraction=0.1)
    assert cuts == (4, 4)
    assert by_time(times, *cuts).tolist() == [TRAIN] * 3 + [TEST] * 7


def test_weights_stand_for_that_many_requests() -> None:
    # 1 + 1 + 8 requests: the last tenth begins inside the heavy one, which stays whole.
    assert time_cuts(np.array([1, 2, 3]), np.array([1.0, 1.0, 8.0]), validation_fraction=0.0, test_fraction=0.8)[1] == 3


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0, 0.4), st.floats(0.01, 0.4))
def test_training_is_strictly_earlier_than_validation_and_test(moments: list[int], validation: float, test: float) -> None:
    times = np.array(moments)
    splits = by_time(times, *time_cuts(times, np.ones(len(times)), validation_fraction=validation, test_fraction=test))
    for earlier, later in ((TRAIN, VALIDATION), (VALIDATION, TEST), (TRAIN, TEST)):
        if (splits == earlier).any() and (splits == later).any():
            assert times[splits == earlier].max() < times[splits == later].min()


def test_last_request_of_each_shopper_is_test_and_the_one_before_validation() -> None:
    users = np.array([0, 0, 0, 1, 1, -1, -1, -1, 2, 2, 2, 2])
    order = np.array([3, 1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 4])
    assert leave_last_out(users, order).tolist() == [TEST, TRAIN, VALIDATION, TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, VALIDATION, TEST]
    assert leave_last_out(np.zeros(0, dtype=int), np.zeros(0, dtype=int)).tolist() == []


def test_requests_of_a_shopper_at_one_place_in_time_stay_on_one_side() -> None:
    users = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    order = np.array([1, 2, 3, 3, 5, 5, 6, 7, 6])
    # Shopper 0 ends with two requests at once, shopper 1 with one after two at once; both have three places.
    assert leave_last_out(users, order).tolist() == [TRAIN, VALIDATION, TEST, TEST, TRAIN, TRAIN, VALIDATION, TEST, VALIDATION]
    # Three requests at two places: nothing is surely before the last but one.
    assert leave_last_out(np.zeros(3, dtype=int), np.array([1, 2, 2])).tolist() == [TRAIN] * 3


def test_spellings_of_one_query_fall_into_one_split() -> None:
    queries = [f"query {number}" for number in range(3_000)]
    splits = by_query(queries, seed=1, validation_fraction=0.1, test_fraction=0.1)
    shouted = by_query([f"  QUERY   {number} " for number in range(3_000)], seed=1, validation_fraction=0.1, test_fraction=0.1)
    assert splits.tolist() == shouted.tolist()
    shares = np.bincount(splits) / 3_000
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.03)  # four standard deviations of a tenth of 3,000
    assert by_query(queries, seed=2, validation_fraction=0.1, test_fraction=0.1).tolist() != splits.tolist()


def test_text_hash_is_fixed_for_all_time() -> None:
    # Published splits hang on these values.
    assert text_hash(["a", "b"], seed=0).tolist() == text_hash(["a", "b"], seed=0).tolist()
    assert text_hash(["a"], seed=0)[0] != text_hash(["a"], seed=1)[0]
    assert text_hash([], seed=0).tolist() == []
    assert normal_query(" Röd  KLÄNNING ") == "röd klänning"
