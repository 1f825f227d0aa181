from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.evaluation.fusion import fuse, fuse_by_budget, gather_candidates, rrf, tune_weights
from genrecall.evaluation.metrics import Targets

FIRST = np.array([[4, 2, 7]], dtype=np.int32)
SECOND = np.array([[2, 9, -1]], dtype=np.int32)


def test_rrf_worked_by_hand() -> None:
    # Item 2: 1/62 + 1/61 = .0325; item 4: 1/61 = .0164; item 9: 1/62 = .0161; item 7: 1/63 = .0159.
    assert rrf([FIRST, SECOND], 5).tolist() == [[2, 4, 9, 7, -1]]


def test_weights_shift_the_fusion() -> None:
    # With weight 4 on the second channel item 9 gets 4/62 and passes item 4.
    assert rrf([FIRST, SECOND], 3, [1.0, 4.0]).tolist() == [[2, 9, 4]]


def test_depth_is_the_same_for_all_channels() -> None:
    assert rrf([FIRST, SECOND], 1).shape == (1, 1)
    assert set(gather_candidates([FIRST, SECOND], 1).items[0].tolist()) == {2, 4}


def test_rankings_of_other_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="same requests"):
        rrf([FIRST, np.zeros((2, 3), dtype=np.int32)], 3)


def test_tuning_finds_the_channel_that_knows() -> None:
    rng = np.random.default_rng(0)
    targets = Targets.from_lists([np.array([row]) for row in range(40)])
    junk = rng.integers(100, 200, size=(40, 10)).astype(np.int32)
    good = np.concatenate([rng.integers(200, 300, size=(40, 3)), np.arange(40)[:, None]], axis=1).astype(np.int32)
    weights = tune_weights({"junk": junk, "good": good}, targets, depth=10, cuts=(5, 10))
    assert weights[5]["junk"] == weights[10]["junk"] == 1.0
    assert weights[5]["good"] > 1.0  # rank 4 of the good channel must come before two junk items
    assert weights[10]["good"] == 1.0  # which it does among ten whatever the weights are, near ones first


def test_each_budget_has_its_own_weights_and_one_list_serves_all() -> None:
    # The targets are the first channel's best two and the second's second: two items are best filled by the first alone, four by both.
    first, second = np.array([[1, 2, 3, 4]] * 3, dtype=np.int32), np.array([[5, 6, 7, 8]] * 3, dtype=np.int32)
    rankings = {"first": first, "second": second}
    weights = {2: {"first": 1.0, "second": 0.1}, 4: {"first": 1.0, "second": 4.0}}
    assert fuse_by_budget(rankings, weights, 8).tolist() == [[1, 2, 5, 6, 7, 8, 3, 4]] * 3
    assert fuse_by_budget(rankings, {4: weights[4]}, 8).tolist() == fuse(gather_candidates([first, second], 8), [1.0, 4.0], 8).tolist()
    tuned = tune_weights(rankings, Targets.from_lists([np.array([1, 2, 6])] * 3), depth=4, cuts=(2, 4))
    assert tuned[2]["second"] < 1.0
    found = fuse_by_budget(rankings, tuned, 4)
    assert set(found[0, :2].tolist()) == {1, 2}
    assert 6 in found[0].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.permutations(range(6)), min_size=2, max_size=2), st.lists(st.sampled_from([0.1, 1.0, 10.0]), min_size=2, max_size=2), st.integers(1, 8))
def test_every_budgets_items_are_listed_up_to_it(orders: list[list[int]], second: list[float], depth: int) -> None:
    rankings = {name: np.array([order], dtype=np.int32) for name, order in zip("ab", orders, strict=True)}
    weights = {budget: {"a": 1.0, "b": weight} for budget, weight in zip((2, 5), second, strict=True)}
    found = fuse_by_budget(rankings, weights, depth)[0].tolist()
    candidates = gather_candidates(list(rankings.values()), depth)
    small, large = (fuse(candidates, [1.0, weight], depth)[0].tolist() for weight in second)
    assert found[:2] == small[:2]
    kept = [item for item in found if item >= 0]
    assert len(set(kept)) == len(kept) == len([item for item in large if item >= 0])
    rest = [item for item in large if item not in small[:2]]
    assert [item for item in found[2:] if item >= 0] == [item for item in rest if item >= 0][: max(depth - 2, 0)]


def test_without_validation_requests_all_weights_are_one() -> None:
    nothing = np.zeros((0, 5), dtype=np.int32)
    assert tune_weights({"a": nothing, "b": nothing, "c": nothing}, Targets.from_lists([]), depth=5) == {
        10: {"a": 1.0, "b": 1.0, "c": 1.0},
        100: {"a": 1.0, "b": 1.0, "c": 1.0},
    }


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 12), min_size=4, max_size=4), min_size=2, max_size=3), st.lists(st.sampled_from([0.25, 1.0, 4.0]), min_size=3, max_size=3)
)
def test_fusion_equals_plain_python(lists: list[list[int]], weights: list[float]) -> None:
    unique = [[item if item not in one[:place] else -1 for place, item in enumerate(one)] for one in lists]
    scores: dict[int, float] = {}
    for weight, one in zip(weights, unique, strict=False):
        for rank, item in enumerate(one):
            if item >= 0:
                scores[item] = scores.get(item, 0.0) + weight / (60 + rank + 1)
    got = fuse(gather_candidates([np.array([one], dtype=np.int32) for one in unique], 4), weights[: len(unique)], 8)[0]
    ranked = [item for item in got.tolist() if item >= 0]
    assert len(ranked) == min(8, len(scores))
    np.testing.assert_allclose([scores[item] for item in ranked], sorted(scores.values(), reverse=True)[:8], rtol=1e-5)
