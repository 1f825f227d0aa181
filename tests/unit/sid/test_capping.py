"""Capping: nothing dropped, nothing over the cap, neighbours together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.capping import CappingError, balanced_split, split_clusters


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8), st.integers(1, 5), st.sampled_from(["residual", "random"]))
def test_groups_are_as_many_as_needed_and_even(clusters, max_items, max_groups, method):
    codes = np.array([[cluster, 1, 2] for cluster in clusters], dtype=np.int32).reshape(-1, 3)
    residuals = np.random.default_rng(0).normal(size=(len(codes), 3))
    group = split_clusters(codes, residuals, max_items=max_items, max_groups=max_groups, method=method)
    assert len(group) == len(codes)
    for cluster in set(clusters):
        members = codes[:, 0] == cluster
        count = int(members.sum())
        wanted = min(-(-count // max_items), max_groups)
        sizes = np.bincount(group[members])
        assert len(sizes) == wanted
        assert sizes.max() - sizes.min() <= 1
        if count <= max_items * max_groups:
            assert sizes.max() <= max_items
        else:
            assert sizes.max() == -(-count // max_groups)  # the groups grow; nothing is dropped


def test_the_paper_limits_are_the_default():
    codes = np.zeros((51, 3), np.int32)
    assert np.bincount(split_clusters(codes, np.random.default_rng(0).normal(size=(51, 2)))).tolist() == [26, 25]


def test_a_residual_split_keeps_neighbours_together():
    line = np.stack([np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0]), np.zeros(6)], axis=1)
    assert set(map(tuple, [np.flatnonzero(balanced_split(line, 3) == group) for group in range(3)])) == {(0, 2), (1, 3), (4, 5)}


def test_a_residual_split_is_tighter_than_a_random_one():
    rng = np.random.default_rng(1)
    codes, residuals = np.zeros((300, 3), np.int32), rng.normal(size=(300, 4))

    def spread(method):
        group = split_clusters(codes, residuals, max_items=50, method=method)
        return sum(np.square(residuals[group == one] - residuals[group == one].mean(axis=0)).sum() for one in range(6))

    assert spread("residual") < 0.8 * spread("random")


def test_equal_residuals_can_be_split():
    assert np.bincount(split_clusters(np.zeros((7, 3), np.int32), np.ones((7, 2)), max_items=2)).tolist() == [2, 2, 2, 1]


def test_the_split_does_not_depend_on_other_clusters_or_their_order():
    rng = np.random.default_rng(2)
    codes = np.repeat(np.array([[1, 0, 0], [0, 0, 0]], dtype=np.int32), 20, axis=0)
    residuals = rng.normal(size=(40, 3))
    together = split_clusters(codes, residuals, max_items=6)
    alone = split_clusters(codes[:20], residuals[:20], max_items=6)
    assert together[:20].tolist() == alone.tolist()


def test_bad_limits_are_refused():
    with pytest.raises(CappingError, match="at least 1, got 0 and 5"):
        split_clusters(np.zeros((1, 3), np.int32), np.zeros((1, 2)), max_items=0, max_groups=5)
    with pytest.raises(CappingError, match=r"one residual per item \(2\), got 1"):
        split_clusters(np.zeros((2, 3), np.int32), np.zeros((1, 2)))
