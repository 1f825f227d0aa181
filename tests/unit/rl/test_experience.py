"""Tasks of a step: fixed cuts, whatever the number of actors; sharing between ranks; actors that die in the middle of their work, on Ray."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from genrecall.config import to_dict
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.encoders.text_encoder import load_encoder
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.model import Decoder
from genrecall.rl import experience
from genrecall.rl.actors import NamedActor
from genrecall.rl.align_config import AlignConfig
from genrecall.rl.experience import Experiences, shared
from genrecall.rl.feedback import build_feedback
from genrecall.rl.learner import RequestPrompts, draw_requests
from genrecall.rl.reward import RewardActor, RewardConfig
from genrecall.rl.rollout import Rollout, RolloutActor, RolloutWorker, weights_of
from genrecall.sid.index import load_sid_table


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
    rewards = Rewards(np.array([[0.5, np.nan, 1.0, 0.0]] * 3, dtype=np.float32), np.full((3, 4), 2, dtype=np.int8), failed_calls=2)
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    on_rank_0 = shared(Experience(rollout, rewards, 1, 2.5), batch=3, group=4, device=torch.device("cpu"))
    waiting = iter(sent.copy())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.copy_(next(waiting)))
    on_rank_1 = shared(None, batch=3, group=4, device=torch.device("cpu"))
    for got in (on_rank_0, on_rank_1):
        assert (got.replaced, got.seconds, got.rollout.version) == (1, 2.5, -1)
        for name in ("request_rows", "tokens", "sid_rows", "log_probs", "experts"):
            np.testing.assert_array_equal(getattr(got.rollout, name), getattr(rollout, name))
        np.testing.assert_array_equal(got.rewards.values, rewards.values)
        np.testing.assert_array_equal(got.rewards.tiers, rewards.tiers)
        assert got.rewards.failed_calls == 2


def _die_once(marker: Path, fatal_call: int) -> None:
    """End this process, the first time that its `fatal_call`-th call (counted over all processes by the marker's length) is under way."""
    marker.write_text((marker.read_text() if marker.exists() else "") + ".")
    if len(marker.read_text()) == fatal_call:
        os._exit(1)


class MortalRollouts(RolloutActor):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self._marker = Path(spec["marker"])

    def sample(self, version, weights, task):
        done = super().sample(version, weights, task)
        _die_once(self._marker, 2)  # with the work done and not handed over
        return done


class MortalRewards(RewardActor):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self._marker = Path(spec["marker"])

    def score(self, request_rows, sid_rows):
        done = super().score(request_rows, sid_rows)
        _die_once(self._marker, 2)
        return done


@pytest.mark.timeout(400)
def test_actors_that_die_in_the_middle_of_their_work_change_nothing_and_are_counted(ray_cluster, untrained_line, tmp_path, monkeypatch):
    parts, run = untrained_line.parts(), uuid.uuid4().hex[:8]
    catalog, table = load_catalog(parts["dataset"]), load_sid_table(parts["sid_index"].path)
    requests = load_requests(parts["dataset"], "train", catalog)
    feedback = build_feedback(requests, table.item_sid, len(table))
    prompts = RequestPrompts(PromptBuilder.load(parts["generator"].path), table, load_encoder(parts["encoder"].path), requests)
    config = AlignConfig(group_size=4, num_experts=1, requests_per_call=2)
    uris = {name: parts[name].uri for name in ("dataset", "encoder", "sid_index", "generator")}
    rollout_spec = {**uris, "rollout": to_dict(config.rollout_config()), "use_gpu": False, "marker": str(tmp_path / "rollouts")}
    reward_spec = {**uris, "reward": to_dict(RewardConfig()), "marker": str(tmp_path / "rewards")}
    named = {"namespace": "genrecall-test", "cpus": 0.1}
    pool = [NamedActor(MortalRollouts, rollout_spec, name=f"test-{run}-rollouts", **named)]
    rewards = NamedActor(MortalRewards, reward_spec, name=f"test-{run}-rewards", **named)
    monkeypatch.setattr(experience, "rollout_actors", lambda config, names: pool)
    monkeypatch.setattr(experience, "reward_actor", lambda config, names: rewards)
    weights = weights_of(Decoder.from_pretrained(parts["generator"].file("stage3")))
    worker, scorer = RolloutActor(rollout_spec), RewardActor(reward_spec)
    try:
        for actor in (*pool, rewards):
            _ = actor.handle  # they start side by side
        built = Experiences(config, {}, prompts, feedback)
        seen = []
        for step in range(3):
            built.publish(step, weights)
            built.submit(step, np.array([3, 1, 0]))
            got = built.collect()
            expected = Rollout.joined([worker.sample(step, weights, task) for task in built.tasks(step, np.array([3, 1, 0]))])
            assert got.rollout.version == step
            for name in ("request_rows", "tokens", "sid_rows", "log_probs", "experts"):
                np.testing.assert_array_equal(getattr(got.rollout, name), getattr(expected, name))
            np.testing.assert_array_equal(got.rewards.values, scorer.score(expected.request_rows, expected.sid_rows).values)
            seen.append(got.replaced)
        assert seen == [1, 2, 2]  # the rollout actor at its second task, the reward actor at its second batch
        assert len((tmp_path / "rewards").read_text()) == 4  # three batches, one of them twice
    finally:
        for actor in (*pool, rewards):
            actor.kill()
