"""The alignment stage's own small parts; the whole stage runs in the pipeline's tests."""

from __future__ import annotations

import dataclasses
import logging
import math
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch

from genrecall.generator.lexicon import Lexicon
from genrecall.generator.log_probs import group_log_probs
from genrecall.ranking.ranker import RankerError
from genrecall.rl import eg_grpo
from genrecall.rl.align_config import AlignConfig, AlignError
from genrecall.rl.eg_grpo import align_generator
from genrecall.rl.experience import Experience
from genrecall.rl.learner import ObjectiveConfig
from genrecall.rl.reward import RewardConfig, Rewards
from genrecall.rl.rollout import RolloutWorker, weights_of
from genrecall.train_worker import TrainSettings


def test_ranker_reward_without_ranker_is_refused_before_ray_starts(toy_artifacts, tmp_path):
    anything = toy_artifacts["generator"]
    with pytest.raises(AlignError, match=r"reward\.mode='ranker' needs a ranker artifact; run jobs/train_ranker\.py"):
        align_generator(
            AlignConfig(reward=RewardConfig(mode="ranker")),
            dataset=anything,
            encoder=anything,
            sid_index=anything,
            generator=anything,
            ranker=None,
            uri=str(tmp_path / "aligned"),
            train=TrainSettings(),
        )


class Pickled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [0.0] * len(model_input)


def test_pickled_ranker_of_the_registry_is_refused_before_ray_starts(registry, toy_artifacts, tmp_path):
    with mlflow.start_run():
        mlflow.pyfunc.log_model(name="ranker", python_model=Pickled(), registered_model_name="ours", pip_requirements=[])
    registry.set_registered_model_alias("ours", "champion", 1)
    anything = toy_artifacts["generator"]
    reward = RewardConfig(mode="ranker", ranker_uri="models:/ours@champion", trust_pyfunc=True)
    with pytest.raises(RankerError, match=r"models:/ours/1: its model is pickled .* set reward\.trust_pickles=true"):
        align_generator(
            AlignConfig(reward=reward),
            dataset=anything,
            encoder=anything,
            sid_index=anything,
            generator=anything,
            ranker=None,
            uri=str(tmp_path / "aligned"),
            train=TrainSettings(tracking_uri=mlflow.get_tracking_uri()),
        )
    trusted = dataclasses.replace(reward, trust_pickles=True)
    pinned = eg_grpo._with_pinned_ranker(AlignConfig(reward=trusted), TrainSettings(tracking_uri=mlflow.get_tracking_uri()))
    assert pinned.reward.ranker_uri == "models:/ours/1"


class Still:
    """A learner whose loss is 1 and whose steps change nothing."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, model) -> None:
        self.model = model

    def loss(self, *batch):
        return torch.ones(()), {"kl": torch.tensor(0.25)}

    def step(self, loss):
        pass


@pytest.mark.parametrize(("world", "anchor"), [("toy", 0.0), ("toy", 1.0), ("guided_toy", 0.0)])
def test_updates_of_an_unguided_policy_say_its_mass_on_sids(request, world, anchor):
    world = request.getfixturevalue(world)
    objective = ObjectiveConfig(sft_anchor_weight=anchor)
    config = AlignConfig(group_size=4, num_experts=1, updates_per_rollout=2, objective=objective)
    rollout = RolloutWorker(world.model, world.trie, config.rollout_config()).sample(world.task(range(6)))
    experience = Experience(rollout, Rewards(np.ones((6, 4), dtype=np.float32), np.ones((6, 4), dtype=np.int8)), 0, 0.0)
    prompts = SimpleNamespace(of=world.prompts)
    parts = eg_grpo._update(config, Still(world.model), world.model, world.trie, prompts, world.feedback, world.sid_tokens, 0, experience)
    assert parts["kl"] == 0.25  # the mean over both updates
    if world.soft is not None:
        assert "valid_mass" not in parts
        return
    with torch.no_grad():
        sids = torch.from_numpy(world.sid_tokens).long().expand(6, -1, -1)
        exact = group_log_probs(world.model, world.prompts(range(6)), sids, support="level").sum(-1).exp().sum(1).mean()
    assert parts["valid_mass"] == pytest.approx(float(exact), rel=0.3)  # from three samples of each of six requests


def test_anchors_are_logged_sids_drawn_by_tier(toy):
    tokens, present = eg_grpo._anchors(AlignConfig(expert_draw=(1.0, 1.0, 0.0)), toy.feedback, toy.sid_tokens, 0, np.array([3, 0]))
    assert present.tolist() == [[True], [True]]
    assert tokens[:, 0].tolist() == toy.sid_tokens[[6, 0]].tolist()  # the clicked ones; exposed ones have no weight
    _, absent = eg_grpo._anchors(AlignConfig(expert_draw=(1.0, 0.0, 0.0)), toy.feedback, toy.sid_tokens, 0, np.array([3]))
    assert absent.tolist() == [[False]]


def test_several_anchors_are_different_logged_sids_and_missing_ones_are_marked(toy):
    config = AlignConfig(expert_draw=(1.0, 1.0, 1.0), objective=ObjectiveConfig(sft_anchor_weight=1.0, sft_anchors=3))
    tokens, present = eg_grpo._anchors(config, toy.feedback, toy.sid_tokens, 0, np.array([3, 0]))
    assert present.tolist() == [[True, True, False]] * 2  # each request has two SIDs with feedback
    for row, request in enumerate([3, 0]):
        assert sorted(tokens[row, :2].tolist()) == sorted(toy.sid_tokens[[2 * request, 2 * request + 1]].tolist())


def test_anchors_are_the_same_whichever_rank_draws_them(toy):
    config = AlignConfig(expert_draw=(1.0, 1.0, 1.0))
    whole, _ = eg_grpo._anchors(config, toy.feedback, toy.sid_tokens, 4, np.arange(6))
    half, _ = eg_grpo._anchors(config, toy.feedback, toy.sid_tokens, 4, np.array([1, 3, 5]))
    assert whole[1::2].tolist() == half.tolist()


def test_step_is_cut_to_the_requests_there_are_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert eg_grpo._batch_size(AlignConfig(requests_per_step=48), 31, 2, quiet=False) == 30
    assert "30 requests a step in place of 48" in caplog.text
    caplog.clear()
    assert eg_grpo._batch_size(AlignConfig(requests_per_step=48), 1000, 1, quiet=False) == 48
    assert not caplog.text


def test_too_few_requests_for_the_workers_are_refused():
    with pytest.raises(AlignError, match="requests_per_step: 48 of 1 requests with feedback cannot be split over 2 workers"):
        eg_grpo._batch_size(AlignConfig(requests_per_step=48), 1, 2, quiet=False)


def test_means_leave_out_what_is_not_finite():
    rows = [{"step": 0.0, "a": 1.0, "b": math.nan}, {"step": 1.0, "a": math.nan, "b": math.nan}, {"step": 2.0, "a": 3.0, "b": math.nan}]
    assert eg_grpo._mean_of(rows) == {"a": 2.0}
    assert eg_grpo._mean_of([]) == {}


def test_good_weights_come_back(toy):
    good = weights_of(toy.model)
    for parameter in toy.model.parameters():
        parameter.data.zero_()
    eg_grpo._load(toy.model, good)
    assert all(np.array_equal(value, good[name]) for name, value in weights_of(toy.model).items())


def test_good_weights_leave_the_lexicon_as_it_is(guided_toy):
    before = {name: getattr(guided_toy.model.guidance, name).clone() for name in Lexicon._fields}
    good = weights_of(guided_toy.model)
    with torch.no_grad():
        guided_toy.model.guidance.level_weights.zero_()
    eg_grpo._load(guided_toy.model, good)
    assert guided_toy.model.guidance.level_weights.tolist() == [1.0, 1.0, 1.0]
    assert all(torch.equal(getattr(guided_toy.model.guidance, name), part) for name, part in before.items())
