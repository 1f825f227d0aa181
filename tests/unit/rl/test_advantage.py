"""Group-relative advantages, worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrecall.rl.advantage import group_advantages, has_spread, reward_spread


def test_one_hit_among_four_valid_answers():
    # mean 0.325, deviations .675 and three times -.225; population variance (.675^2 + 3 * .225^2) / 4 = .151875
    std = math.sqrt(0.151875)
    advantages = group_advantages(torch.tensor([[1.0, 0.1, 0.1, 0.1]]), epsilon=0.0)
    assert advantages[0].tolist() == pytest.approx([0.675 / std, -0.225 / std, -0.225 / std, -0.225 / std], rel=1e-6)
    assert advantages[0, 0].item() == pytest.approx(math.sqrt(3), rel=1e-6)


def test_standard_deviation_is_the_populations():
    advantages = group_advantages(torch.tensor([[0.0, 1.0]]), epsilon=0.0)  # population std 0.5; the sample's would be 0.7071
    assert advantages[0].tolist() == pytest.approx([-1.0, 1.0])


def test_group_without_spread_has_advantage_zero():
    advantages = group_advantages(torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0]]))
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1, 2] > 0


def test_equal_rewards_that_do_not_sum_exactly_still_give_zero():
    assert group_advantages(torch.full((1, 7), 0.1)).abs().max() == 0.0


def test_epsilon_damps_small_spreads():
    advantages = group_advantages(torch.tensor([[0.0, 0.002]]), epsilon=0.001)  # std 0.001
    assert advantages[0].tolist() == pytest.approx([-0.5, 0.5], rel=1e-4)


def test_reward_that_is_not_finite_takes_no_part():
    advantages = group_advantages(torch.tensor([[0.0, math.nan, 1.0, math.inf]]), epsilon=0.0)
    assert advantages[0].tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])


def test_group_of_unusable_rewards_has_advantage_zero():
    assert group_advantages(torch.full((2, 3), math.nan)).tolist() == [[0.0] * 3] * 2


def test_spread_is_seen_per_group():
    assert reward_spread(torch.tensor([[0.1, 0.1], [0.0, 0.5], [math.nan, 0.5], [math.nan, math.inf]])).tolist() == [0.0, 0.5, 0.0, 0.0]
    assert has_spread(torch.tensor([[0.1, 0.1], [0.1, 0.5], [math.nan, 0.5]])).tolist() == [False, True, False]


def test_rewards_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"expected rewards \[B, G\], got shape \(3,\)"):
        group_advantages(torch.zeros(3))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=12))
def test_advantages_are_centred_bounded_and_ordered_like_rewards(rewards):
    advantages = group_advantages(torch.tensor([rewards]))[0]
    assert abs(float(advantages.sum())) < 1e-4
    assert float(advantages.abs().max()) <= math.sqrt(len(rewards) - 1) + 1e-4
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(advantages[a] <= advantages[b] for a, b in itertools.pairwise(order))
