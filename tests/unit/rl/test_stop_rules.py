"""Stop rules: which collapse ends a run, when, and with which reason."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from genrecall.config import ConfigError, from_dict
from genrecall.rl.feedback import CLICKED, VALID
from genrecall.rl.learner import rollout_health
from genrecall.rl.reward import Rewards
from genrecall.rl.rollout import Rollout
from genrecall.rl.stop_rules import StopConfig, StopRules

HEALTHY = {
    "valid_mass": 0.8,
    "unique_sids": 6.0,
    "entropy_1": 3.0,
    "entropy_2": 2.0,
    "entropy_3": 1.0,
    "kl": 0.01,
    "reward": 0.4,
    "unusable_rewards": 0.0,
}


def run(rules, *healths):
    return [rules.observe(health) for health in healths]


def fresh(**kwargs) -> StopRules:
    rules = StopRules(StopConfig(patience=2, baseline_steps=2, **kwargs))
    run(rules, HEALTHY, HEALTHY)
    return rules


def test_healthy_run_goes_on():
    assert run(fresh(), *[HEALTHY] * 50) == [None] * 50


@pytest.mark.parametrize(
    ("metric", "value", "rule"),
    [
        ("valid_mass", 0.1, "valid_answers"),  # below 0.2 * 0.8
        ("unique_sids", 2.0, "diverse_groups"),  # below 1 + 0.25 * (6 - 1)
        ("entropy_2", 0.4, "entropy_2"),  # below 0.25 * 2
        ("kl", 1.5, "near_reference"),
        ("reward", 0.1, "reward_holds"),  # below 0.5 * 0.4
        ("unusable_rewards", 0.6, "usable_rewards"),
        ("kl", math.nan, "near_reference"),
    ],
)
def test_each_collapse_stops_the_run_with_its_reason(metric, value, rule):
    sick = {**HEALTHY, metric: value}
    first, second = run(fresh(), sick, sick)
    assert first is None
    assert second.startswith(f"{rule}: {metric} was")


def sampled(own: list[list[int]]) -> dict[str, float]:
    """The health of groups of eight: six samples of the policy and two experts, SIDs 90 and 91."""
    rows = np.array([[*sids, 90, 91] for sids in own], dtype=np.int32)
    experts = np.tile(np.arange(8) >= 6, (len(rows), 1))
    rollout = Rollout(0, np.arange(len(rows)), np.zeros((*rows.shape, 3), dtype=np.int32), rows, np.zeros((*rows.shape, 3), dtype=np.float32), experts, 0)
    rewards = Rewards(np.where(experts, 1.0, 0.1).astype(np.float32), np.where(experts, CLICKED, VALID).astype(np.int8))
    return {**HEALTHY, **rollout_health(rollout, rewards, np.ones(len(rows), dtype=bool)), "reward": HEALTHY["reward"]}


def test_a_policy_that_repeats_one_sid_beside_experts_is_stopped_and_a_diverse_one_is_not():
    diverse = sampled([[1, 2, 3, 3, 3, 3], [4, 4, 4, 5, 6, 4]])  # three different ones each
    repeating = sampled([[1] * 6, [4] * 6])
    assert (diverse["unique_sids"], repeating["unique_sids"]) == (3.0, 1.0)
    rules = StopRules(StopConfig(patience=2, baseline_steps=2))
    assert run(rules, *[diverse] * 10) == [None] * 10
    assert rules.limits()["unique_sids"] == ("least", 1.5)  # 1 + 0.25 * (3 - 1)
    less = sampled([[1, 2, 1, 1, 1, 1], [4, 5, 4, 4, 4, 4]])
    assert run(rules, *[less] * 10) == [None] * 10
    assert run(rules, repeating, repeating) == [None, "diverse_groups: unique_sids was 1, below its bound 1.5, for 2 steps in a row"]


def test_reason_names_value_bound_and_steps():
    sick = {**HEALTHY, "reward": 0.1}
    assert run(fresh(), sick, sick)[1] == "reward_holds: reward was 0.1, below its bound 0.2, for 2 steps in a row"


def test_a_bound_on_negative_rewards_lies_below_them():
    punished = {**HEALTHY, "reward": -0.4}  # reward.invalid may be negative
    rules = StopRules(StopConfig(patience=2, baseline_steps=2))
    assert run(rules, *[punished] * 10) == [None] * 10
    assert rules.limits()["reward"] == ("least", pytest.approx(-0.4 - 0.5 * 0.4))
    sick = {**HEALTHY, "reward": -0.7}
    assert run(rules, sick, sick)[1] == "reward_holds: reward was -0.7, below its bound -0.6, for 2 steps in a row"


def test_a_step_without_a_reward_says_nothing_of_its_height():
    without = {**HEALTHY, "reward": math.nan}
    rules = StopRules(StopConfig(patience=2, baseline_steps=2))
    assert run(rules, without, HEALTHY, without, {**HEALTHY, "reward": 0.6}, *[without] * 5) == [None] * 9
    assert rules.limits()["reward"] == ("least", pytest.approx(0.5 * (0.4 + 0.6) / 2))
    assert rules.healthy
    sick = {**HEALTHY, "reward": 0.1}
    assert run(rules, sick, without, sick)[2].startswith("reward_holds: reward was 0.1")


def test_a_guided_run_has_no_mass_outside_the_trie_and_a_rule_less():
    guided = {name: value for name, value in HEALTHY.items() if name != "valid_mass"}
    rules = StopRules(StopConfig(patience=2, baseline_steps=2))
    assert run(rules, *[guided] * 10) == [None] * 10
    assert set(rules.limits()) == set(guided)
    with pytest.raises(KeyError, match="kl"):
        rules.observe({name: value for name, value in guided.items() if name != "kl"})


def test_recovery_resets_the_patience():
    sick = {**HEALTHY, "kl": 2.0}
    assert run(fresh(), sick, HEALTHY, sick, HEALTHY, sick) == [None] * 5


def test_a_breach_is_seen_before_the_run_ends():
    rules = fresh()
    rules.observe({**HEALTHY, "kl": 2.0})
    assert not rules.healthy
    rules.observe(HEALTHY)
    assert rules.healthy


def test_disabled_rules_never_stop():
    assert run(fresh(enabled=False), *[{**HEALTHY, "kl": 99.0}] * 5) == [None] * 5


def test_state_survives_json():
    rules = fresh()
    rules.observe({**HEALTHY, "kl": 2.0})
    again = StopRules(rules.config, **json.loads(json.dumps(rules.state())))
    assert again.observe({**HEALTHY, "kl": 2.0}) is not None


def test_impossible_bounds_are_listed_together():
    with pytest.raises(ConfigError, match=r"(?s)patience: expected at least 1, got 0.*min_reward: expected a share between 0 and 1, got 2.*max_kl"):
        from_dict(StopConfig, {"patience": 0, "min_reward": 2.0, "max_kl": 0.0})


def test_limits_are_those_that_the_rules_compare_with():
    limits = fresh().limits()
    assert limits["kl"] == ("most", 1.0)
    assert limits["reward"] == ("least", pytest.approx(0.5 * 0.4))
    assert limits["entropy_3"] == ("least", pytest.approx(0.25 * 1.0))
    assert set(limits) == set(HEALTHY)
    assert fresh(enabled=False).limits() == {}
    assert set(StopRules(StopConfig()).limits()) == {"kl", "unusable_rewards"}  # no baseline yet
