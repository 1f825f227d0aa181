"""Rollouts: samples that depend on their place alone, experts with the policy's own log-probabilities."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from genrecall.generator.lexicon import Lexicon
from genrecall.generator.log_probs import group_log_probs
from genrecall.rl.rollout import Rollout, RolloutActor, RolloutConfig, RolloutWorker, weights_of


def worker_of(toy, *, seed=5, group_size=6, num_experts=2, support="level") -> RolloutWorker:
    return RolloutWorker(toy.model, toy.trie, RolloutConfig(seed=seed, group_size=group_size, num_experts=num_experts, support=support))


@pytest.fixture(params=["level", "trie", "guided"])
def world(request):
    """A toy world and the support that it is sampled with."""
    return (request.getfixturevalue("guided_toy"), "trie") if request.param == "guided" else (request.getfixturevalue("toy"), request.param)


def test_log_probs_are_the_policys_own_for_samples_and_experts(world):
    toy, support = world
    rollout = worker_of(toy, support=support).sample(toy.task(range(6)))
    assert rollout.experts.any()
    again = group_log_probs(
        toy.model, toy.prompts(range(6)), torch.from_numpy(rollout.tokens).long(), support=support, trie=toy.trie if support == "trie" else None
    )
    np.testing.assert_allclose(rollout.log_probs, again.detach().numpy(), atol=1e-5)


def test_sid_rows_are_those_of_the_tokens(world):
    toy, support = world
    rollout = worker_of(toy, support=support).sample(toy.task(range(6)))
    assert np.array_equal(rollout.sid_rows, toy.trie.find(torch.from_numpy(rollout.tokens)).numpy())
    assert (rollout.sid_rows >= 0).all() == (support == "trie")


def test_experts_come_from_the_requests_own_feedback(toy):
    rollout = worker_of(toy).sample(toy.task(range(6)))
    for row in range(6):
        experts = rollout.sid_rows[row][rollout.experts[row]].tolist()
        assert set(experts) <= {2 * row, 2 * row + 1}
        assert len(set(experts)) == len(experts)
    assert not rollout.experts[:, :4].any()


def test_a_request_gets_the_same_group_in_any_company(world):
    toy, support = world
    worker = worker_of(toy, support=support)
    together = worker.sample(toy.task([4, 1, 3]))
    alone = worker.sample(toy.task([1]))
    assert np.array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(together.log_probs[1], alone.log_probs[0], atol=1e-6)
    assert not np.array_equal(worker.sample(toy.task([1], step=1)).tokens, alone.tokens)
    assert not np.array_equal(worker_of(toy, seed=6, support=support).sample(toy.task([1])).tokens, alone.tokens)


def test_experts_outside_the_trie_are_left_out_and_counted(toy):
    rollout = worker_of(toy).sample(toy.task([0, 1], expert_sids=[[99, 3], [-1]], weights=(1.0, 1.0)))
    assert rollout.stale_experts == 2
    assert set(rollout.sid_rows[rollout.experts].tolist()) <= {3}
    assert not rollout.experts[1].any()


def test_request_without_feedback_gets_samples_only(toy):
    rollout = worker_of(toy).sample(toy.task([0], expert_sids=[[]]))
    assert not rollout.experts.any()
    plain = worker_of(toy, num_experts=0).sample(toy.task([0], expert_sids=[[]]))
    assert np.array_equal(rollout.tokens, plain.tokens)


def distinct_worker(toy, support, **settings) -> RolloutWorker:
    return RolloutWorker(toy.model, toy.trie, RolloutConfig(seed=5, support=support, distinct=True, **settings))


@pytest.mark.parametrize("group_size", [6, 11])
def test_distinct_samples_and_experts_hold_no_sid_twice(world, group_size):
    toy, support = world
    seen = 0
    for step in range(12):
        rollout = distinct_worker(toy, support, group_size=group_size, num_experts=2).sample(toy.task(range(6), step=step))
        numbers = (rollout.tokens @ np.array([16, 4, 1])).tolist()
        assert all(len(set(row)) == group_size for row in numbers)
        seen += int(rollout.experts.sum())
        again = group_log_probs(
            toy.model, toy.prompts(range(6)), torch.from_numpy(rollout.tokens).long(), support=support, trie=toy.trie if support == "trie" else None
        )
        np.testing.assert_allclose(rollout.log_probs, again.detach().numpy(), atol=1e-5)
        assert np.array_equal(rollout.sid_rows, toy.trie.find(torch.from_numpy(rollout.tokens)).numpy())
        for row in range(6):
            assert set(rollout.sid_rows[row][rollout.experts[row]].tolist()) <= {2 * row, 2 * row + 1}
    assert seen > 0


def test_distinct_samples_are_the_same_in_any_company_and_end_where_the_trie_does(toy):
    worker = distinct_worker(toy, "trie", group_size=14, num_experts=1)
    together, alone = worker.sample(toy.task([4, 1, 3])), worker.sample(toy.task([1]))
    assert np.array_equal(together.tokens[1], alone.tokens[0])
    assert not np.array_equal(worker.sample(toy.task([1], step=1)).tokens, alone.tokens)
    assert together.missing.sum(axis=1).tolist() == [2, 2, 2]  # 14 places, 12 SIDs
    for row in together.sid_rows:
        assert sorted(row.tolist()) == [-1, -1, *range(12)]
    assert (together.log_probs[together.missing] == 0).all()


def test_weights_travel_and_change_the_samples(toy):
    worker = worker_of(toy)
    before = worker.sample(toy.task(range(6)))
    weights = weights_of(toy.model)
    worker.load(1, {name: value * 0 for name, value in weights.items()})
    flat = worker.sample(toy.task(range(6)))
    assert (before.version, flat.version) == (-1, 1)
    np.testing.assert_allclose(flat.log_probs, np.log(0.25), atol=1e-5)
    worker.load(2, weights)
    np.testing.assert_array_equal(worker.sample(toy.task(range(6))).log_probs, before.log_probs)


def test_a_guided_actor_gets_items_from_the_index_and_level_weights_with_the_others(guided_toy, guided_spec):
    actor, task = RolloutActor(guided_spec), guided_toy.task(range(6))
    worker = worker_of(guided_toy, group_size=4, num_experts=1, support="trie")
    weights = weights_of(guided_toy.model)
    assert weights["guidance.level_weights"].tolist() == [1.0, 1.0, 1.0]
    first = actor.sample(1, weights, task)
    np.testing.assert_array_equal(first.log_probs, worker.sample(task).log_probs)
    weights["guidance.level_weights"] = np.array([3.0, 0.5, 0.5], dtype=np.float32)
    worker.load(2, weights)
    second = actor.sample(2, weights, task)
    np.testing.assert_array_equal(second.log_probs, worker.sample(task).log_probs)
    assert not np.array_equal(first.log_probs, second.log_probs)


def test_a_lexicon_does_not_travel_and_stays_whole(guided_toy):
    # The 2^24 + 1st entry of a large catalogue's lexicon is no float32: offsets that travelled as weights would not come back.
    guidance, worker = guided_toy.model.guidance, worker_of(guided_toy, group_size=4, num_experts=1, support="trie")
    weights = weights_of(guided_toy.model)
    assert set(weights) == set(dict(guided_toy.model.named_parameters()))
    guidance.item_offsets[-1] = 2**24 + 1
    worker.load(1, weights)
    assert worker.version == 1
    assert int(guidance.item_offsets[-1]) == 2**24 + 1


def test_weights_in_half_precision_travel_and_leave_the_actors_lexicon_alone(guided_toy):
    policy = copy.deepcopy(guided_toy.model).to(torch.bfloat16)
    before = {name: getattr(guided_toy.model.guidance, name).clone() for name in Lexicon._fields}
    worker_of(guided_toy, support="trie").load(1, weights_of(policy))
    for name, parameter in guided_toy.model.named_parameters():
        assert torch.equal(parameter, policy.get_parameter(name).float())
    assert all(torch.equal(getattr(guided_toy.model.guidance, name), part) for name, part in before.items())


def test_weights_of_another_model_are_refused(toy):
    with pytest.raises(ValueError, match="weights of version 3: expected those of the rollout model"):
        worker_of(toy).load(3, {"nothing": np.zeros(1, dtype=np.float32)})


def test_a_version_in_place_is_not_loaded_again(toy):
    worker = worker_of(toy)
    worker.load(1, weights_of(toy.model))
    worker.load(1, {})
    assert worker.version == 1


def test_joined_rollouts_keep_order_and_the_oldest_version(toy):
    worker = worker_of(toy)
    first, second = worker.sample(toy.task([0, 1])), worker.sample(toy.task([2]))
    joined = Rollout.joined([first, second])
    assert joined.request_rows.tolist() == [0, 1, 2]
    assert joined.tokens.shape == (3, 6, 3)
    assert joined.version == -1
