from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.evaluation.fusion import fuse, gather_candidates, rrf, tune_weights
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
    assert weights["junk"] == 1.0
    assert weights["good"] > 1.0  # rank 4 of the good channel must come before five junk items


def test_without_validation_requests_all_weights_are_one() -> None:
    nothing = np.zeros((0, 5), dtype=np.int32)
    assert tune_weights({"a": nothing, "b": nothing, "c": nothing}, Targets.from_lists([]), depth=5) == {"a": 1.0, "b": 1.0, "c": 1.0}


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
