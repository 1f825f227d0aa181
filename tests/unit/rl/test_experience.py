"""Tasks of a step: fixed cuts, whatever the number of actors; sharing between ranks is covered by the actors' test on Ray."""

from __future__ import annotations

import numpy as np
import torch

from genrecall.rl.align_config import AlignConfig
from genrecall.rl.experience import Experiences, shared
from genrecall.rl.learner import draw_requests
from genrecall.rl.rollout import Rollout, RolloutWorker


class ToyPrompts:
    def __init__(self, toy) -> None:
        self._toy = toy

    def of(self, rows):
        return self._toy.prompts(rows)


def experiences(toy, **settings) -> Experiences:
    config = AlignConfig(**settings)
    names = {"rollout_names": [], "reward_name": "reward", "namespace": "test", "generator": "", "sid_index": ""}
    return Experiences(config, names, ToyPrompts(toy), toy.feedback)


def test_tasks_have_a_fixed_number_of_requests_and_their_own_experts(toy):
    tasks = experiences(toy, requests_per_call=4).tasks(7, np.array([5, 0, 3, 1, 2]))
    assert [task.request_rows.tolist() for task in tasks] == [[5, 0, 3, 1], [2]]
    assert [task.step for task in tasks] == [7, 7]
    assert tasks[0].expert_sids.tolist() == [10, 11, 0, 1, 6, 7, 2, 3]
    assert tasks[0].expert_offsets.tolist() == [0, 2, 4, 6, 8]
    assert tasks[1].expert_weights.tolist() == [2.0, 0.1]


def test_samples_do_not_depend_on_who_takes_which_task(toy):
    built = experiences(toy, requests_per_call=2)
    rows = draw_requests(np.arange(6), seed=0, step=0, count=6)
    tasks = built.tasks(0, rows)
    config = AlignConfig().rollout_config()
    one = RolloutWorker(toy.model, toy.trie, config)
    alone = Rollout.joined([one.sample(task) for task in tasks])
    pool = [RolloutWorker(toy.model, toy.trie, config) for _ in range(3)]
    spread = [pool[number % 3].sample(task) for number, task in reversed(list(enumerate(tasks)))]
    many = Rollout.joined(spread[::-1])
    assert np.array_equal(alone.tokens, many.tokens)
    assert np.array_equal(alone.log_probs, many.log_probs)


def test_shared_experience_keeps_every_value(toy, monkeypatch):
    from genrecall.rl.experience import Experience
    from genrecall.rl.reward import Rewards

    rollout = RolloutWorker(toy.model, toy.trie, AlignConfig(group_size=4).rollout_config()).sample(toy.task([0, 1, 2]))
    rewards = Rewards(np.array([[0.5, np.nan, 1.0, 0.0]] * 3, dtype=np.float32), np.full((3, 4), 2, dtype=np.int8))
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    on_rank_0 = shared(Experience(rollout, rewards, 3, 1, 2.5), batch=3, group=4, device=torch.device("cpu"))
    waiting = iter(sent.copy())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.copy_(next(waiting)))
    on_rank_1 = shared(None, batch=3, group=4, device=torch.device("cpu"))
    for got in (on_rank_0, on_rank_1):
        assert (got.dropped, got.replaced, got.seconds, got.rollout.version) == (3, 1, 2.5, -1)
        for name in ("request_rows", "tokens", "sid_rows", "log_probs", "experts"):
            np.testing.assert_array_equal(getattr(got.rollout, name), getattr(rollout, name))
        np.testing.assert_array_equal(got.rewards.values, rewards.values)
        np.testing.assert_array_equal(got.rewards.tiers, rewards.tiers)
