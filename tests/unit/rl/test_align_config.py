"""Settings of the alignment and the preflight check of the cluster."""

from __future__ import annotations

import pytest

from genrecall.config import ConfigError, apply_overrides, from_dict, to_dict
from genrecall.generator.generator_config import GeneratorConfig
from genrecall.rl.align_config import AlignConfig, AlignError, check_cluster
from genrecall.train_worker import TrainSettings

LEARNER = TrainSettings(num_workers=1, cpus_per_worker=1)


def test_defaults_fit_two_cores():
    assert AlignConfig().problems() == []
    assert AlignConfig().rollout_config().support == GeneratorConfig().support  # stage 4 of what stage 3 trains
    check_cluster(AlignConfig(), LEARNER, {"CPU": 2.0})
    assert sum(AlignConfig().cpu_requests(LEARNER).values()) == pytest.approx(1.75)


def test_cluster_that_cannot_hold_all_parts_is_refused_with_the_sum():
    config = AlignConfig(rollout_actors=4, cpus_per_rollout=0.5)
    expected = r"asks for 3\.25 CPUs \(learner \(1 x 1\) 1 \+ rollouts \(4 x 0\.5\) 2 \+ reward 0\.25\), the cluster has 2; lower align\.rollout_actors"
    with pytest.raises(AlignError, match=expected):
        check_cluster(config, LEARNER, {"CPU": 2.0})


def test_missing_gpus_are_refused():
    with pytest.raises(AlignError, match=r"asks for 1 GPUs \(learner 0, rollouts 2 x 0\.5\), the cluster has 0"):
        check_cluster(AlignConfig(gpus_per_rollout=0.5), LEARNER, {"CPU": 8.0})


def test_config_survives_json_and_overrides():
    config = apply_overrides(AlignConfig(), ["reward.mode=mixed", "objective.kl_weight=0.5", "num_experts=1", "stop.patience=3"])
    assert from_dict(AlignConfig, to_dict(config)) == config
    assert (config.reward.mode, config.objective.kl_weight, config.num_experts, config.stop.patience) == ("mixed", 0.5, 1, 3)


def test_impossible_settings_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        from_dict(AlignConfig, {"group_size": 2, "num_experts": 2, "steps": 0, "expert_draw": [0.0, 0.0, 0.0], "reward": {"valid": 2.0}})
    text = str(caught.value)
    assert "num_experts: expected fewer than group_size (2)" in text
    assert "steps: expected at least 1, got 0" in text
    assert "expert_draw: expected weights of at least 0, one of them above 0" in text
    assert "reward.expected invalid <= valid" in text


def test_setting_without_effect_is_an_error():
    with pytest.raises(ConfigError, match="expert_decay_steps: has no effect without experts"):
        from_dict(AlignConfig, {"num_experts": 0, "objective": {"expert_decay_steps": 10}})
    for objective in ({"expert_weight": 0.5}, {"expert_ratio": "one"}):
        with pytest.raises(ConfigError, match=rf"objective\.{next(iter(objective))}: has no effect without experts; set num_experts above 0"):
            from_dict(AlignConfig, {"num_experts": 0, "objective": objective})
        from_dict(AlignConfig, {"objective": objective})
    with pytest.raises(ConfigError, match=r"num_experts: 2 have no effect with objective\.policy_weight=0; set num_experts=0"):
        from_dict(AlignConfig, {"objective": {"policy_weight": 0.0}})


def test_a_ranker_is_given_up_before_its_actor_is_replaced():
    with pytest.raises(ConfigError, match=r"reward\.timeout_s: expected less than actor_timeout_s \(30\), or the reward actor is replaced"):
        from_dict(AlignConfig, {"actor_timeout_s": 30.0, "reward": {"mode": "ranker"}})
    from_dict(AlignConfig, {"actor_timeout_s": 30.0})  # logged feedback asks no ranker


def test_plain_supervised_training_is_a_setting_of_the_objective():
    supervised = {"policy_weight": 0.0, "kl_weight": 0.0, "sft_anchor_weight": 1.0, "sft_anchors": 8}
    assert from_dict(AlignConfig, {"num_experts": 0, "objective": supervised}).problems() == []
