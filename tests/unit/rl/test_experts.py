"""Who sits in a group: experts without repeats, samples elsewhere; uniforms that depend on their place alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.rl.experts import counter_uniforms, seat_experts, tier_weights
from genrecall.rl.feedback import CLICKED, EXPOSED, PURCHASED


def seat(sampled, candidates, weights=None, uniforms=None, num_experts=2):
    weights = [1.0] * len(candidates) if weights is None else weights
    uniforms = [0.5] * len(candidates) if uniforms is None else uniforms
    return seat_experts(
        np.array([sampled], dtype=np.int32), [np.array(candidates, dtype=np.int32)], [np.array(weights)], [np.array(uniforms)], num_experts=num_experts
    )


def test_experts_take_the_last_places():
    places = seat([1, 2, 3, 4], [10, 11])
    assert places.sample.tolist() == [[0, 1, -1, -1]]
    assert places.expert_sid.tolist() == [[-1, -1, 10, 11]]


def test_a_sid_already_sampled_is_no_expert():
    places = seat([10, 2, 3, 4], [10, 11])
    assert places.expert_sid.tolist() == [[-1, -1, 11, -1]]
    assert places.sample.tolist() == [[0, 1, -1, 2]]


def test_missing_experts_are_filled_by_samples_that_repeat_none():
    places = seat([1, 2, 10, 4], [10])  # sample 2 would repeat the expert, so sample 3 takes the place
    assert places.expert_sid.tolist() == [[-1, -1, 10, -1]]
    assert places.sample.tolist() == [[0, 1, -1, 3]]


def test_no_feedback_means_samples_only():
    places = seat([1, 2, 3, 4], [])
    assert places.sample.tolist() == [[0, 1, 2, 3]]
    assert (places.expert_sid == -1).all()


def test_no_expert_places_is_plain_grpo():
    assert seat([1, 2, 3, 4], [10, 11], num_experts=0).sample.tolist() == [[0, 1, 2, 3]]


def test_draw_takes_the_largest_u_to_the_one_over_w():
    # 0.5^(1/1) = 0.5, 0.4^(1/4) = 0.795, 0.9^(1/0.1) = 0.349; weight 0 never
    places = seat([1, 2, 3, 4], [10, 11, 12, 13], weights=[1.0, 4.0, 0.1, 0.0], uniforms=[0.5, 0.4, 0.9, 0.999])
    assert places.expert_sid.tolist() == [[-1, -1, 11, 10]]


def test_draw_follows_the_weights():
    uniforms = counter_uniforms(0, 0, np.arange(4000), 2)
    places = seat_experts(
        np.full((4000, 2), -1, dtype=np.int32), [np.array([7, 8], dtype=np.int32)] * 4000, [np.array([3.0, 1.0])] * 4000, list(uniforms), num_experts=1
    )
    assert abs((places.expert_sid == 7).sum() / 4000 - 0.75) < 0.03


def test_tier_weights():
    assert tier_weights(np.array([EXPOSED, CLICKED, PURCHASED], dtype=np.int8), (4.0, 2.0, 0.1)).tolist() == [0.1, 2.0, 4.0]


@settings(max_examples=60)
@given(
    st.lists(st.integers(-1, 9), min_size=4, max_size=8),
    st.lists(st.integers(0, 9), unique=True, max_size=6),
    st.integers(0, 3),
)
def test_every_place_is_taken_once_and_experts_never_repeat_kept_samples(sampled, candidates, num_experts):
    places = seat(sampled, candidates, num_experts=num_experts)
    sample, expert = places.sample[0], places.expert_sid[0]
    assert ((sample >= 0) ^ (expert >= 0)).all()
    used = sample[sample >= 0]
    assert len(set(used.tolist())) == len(used)
    experts = expert[expert >= 0].tolist()
    kept = sampled[: len(sampled) - num_experts]
    assert len(set(experts)) == len(experts) <= num_experts
    assert not set(experts) & set(kept)
    assert len(experts) == min(num_experts, len(set(candidates) - set(kept)))


def test_uniforms_depend_on_seed_step_row_and_place_alone():
    whole = counter_uniforms(3, 7, np.array([5, 9, 2]), 4, 3)
    assert whole.shape == (3, 4, 3)
    assert np.array_equal(counter_uniforms(3, 7, np.array([9]), 4, 3)[0], whole[1])
    assert np.array_equal(counter_uniforms(3, 7, np.array([2]), 6, 3)[0, :4], whole[2])
    assert not np.isin(counter_uniforms(3, 8, np.array([5]), 4, 3), whole).any()
    assert not np.isin(counter_uniforms(4, 7, np.array([5]), 4, 3), whole).any()


def test_uniforms_are_uniform():
    values = counter_uniforms(0, 0, np.arange(2000), 8, 3)
    assert 0.0 <= values.min() <= values.max() < 1.0
    assert np.abs(np.histogram(values, bins=10, range=(0, 1))[0] / values.size - 0.1).max() < 0.01
    assert np.abs(np.corrcoef(values.reshape(2000, -1).T) - np.eye(24)).max() < 0.12
