"""Stop rules: end an alignment run that collapses, while the last good weights are still at hand.

Reinforcement learning on sparse rewards fails in known ways: answers stop being valid, every group repeats one answer,
entropy drains, the policy leaves its reference, the reward sinks. Each rule watches one of them in the health of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_COLLAPSED = {"unique_sids": 1.0}
"""What a metric comes to where all is lost, if that is not 0: a group that repeats one answer has one SID, which no share of a baseline below 4 would call too few."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Bounds of a healthy run; a rule breaks when its bound is crossed at `patience` steps in a row."""

    enabled: bool = True
    patience: int = 5
    baseline_steps: int = 5  # the first steps, whose mean b the relative bounds refer to: a share s of it allows b - (1 - s) |b|, so s * b where b is positive
    min_valid_mass: float = 0.2  # probability that an answer sampled without the trie is a SID, relative to the baseline; nothing of guided decoders
    min_unique_sids: float = 0.25  # distinct SIDs among a group's own samples beyond the first one, relative to the baseline
    min_entropy: float = 0.25  # of each level, relative to the baseline
    max_kl: float = 1.0  # nats per level, to the reference
    min_reward: float = 0.5  # mean reward of the policy's own samples, relative to the baseline
    max_unusable_rewards: float = 0.5  # share of rewards that are not finite

    def problems(self) -> list[str]:
        found = [f"{name}: expected at least 1, got {getattr(self, name)}" for name in ("patience", "baseline_steps") if getattr(self, name) < 1]
        relative = ("min_valid_mass", "min_unique_sids", "min_entropy", "min_reward", "max_unusable_rewards")
        found += [f"{name}: expected a share between 0 and 1, got {getattr(self, name)}" for name in relative if not 0 <= getattr(self, name) <= 1]
        if self.max_kl <= 0:
            found.append(f"max_kl: expected a positive number of nats, got {self.max_kl}")
        return found


@dataclass
class StopRules:
    """Watches the health of a run step by step. `state()` and `StopRules(config, **state)` carry it over a restart."""

    config: StopConfig
    seen: dict[str, int] = field(default_factory=dict)  # finite values in each baseline
    baseline: dict[str, float] = field(default_factory=dict)
    breaches: dict[str, int] = field(default_factory=dict)

    def observe(self, health: Mapping[str, float]) -> str | None:
        """Take in one step's health; the reason to stop, or None. A step without any reward says nothing of its height and breaks no rule about that,
        nor does one without `valid_mass`, which guided decoders do not have.

        Raises:
            KeyError: another watched metric is missing from `health`.
        """
        silent = {name for name, says in (("reward", math.isfinite(health["reward"])), ("valid_mass", "valid_mass" in health)) if not says}
        rules = [rule for rule in self._rules() if rule[1] not in silent]
        for _, metric, _, _ in rules:
            seen = self.seen.get(metric, 0)
            if seen < self.config.baseline_steps and math.isfinite(health[metric]):
                self.baseline[metric] = (self.baseline.get(metric, 0.0) * seen + health[metric]) / (seen + 1)
                self.seen[metric] = seen + 1
        if not self.config.enabled:
            return None
        for rule, metric, bound, kind in rules:
            limit = self._limit(metric, bound, kind)
            value = health[metric]
            broken = not math.isfinite(value) or (value > limit if kind == "most" else value < limit)
            self.breaches[rule] = self.breaches.get(rule, 0) + 1 if broken else 0
            if self.breaches[rule] >= self.config.patience:
                relation = "above" if kind == "most" else "below"
                return f"{rule}: {metric} was {value:.4g}, {relation} its bound {limit:.4g}, for {self.breaches[rule]} steps in a row"
        return None

    def limits(self) -> dict[str, tuple[str, float]]:
        """The bound of each watched metric, "least" or "most" with its value; those relative to a baseline from its first step on."""
        limits = {}
        for _, metric, bound, kind in self._rules():
            if kind == "most" or metric in self.baseline:
                limits[metric] = ("most" if kind == "most" else "least", self._limit(metric, bound, kind))
        return limits if self.config.enabled else {}

    @property
    def healthy(self) -> bool:
        """Whether the last step observed broke no rule."""
        return not self.broken

    @property
    def broken(self) -> list[str]:
        """The rules that the last step observed broke."""
        return [rule for rule, count in self.breaches.items() if count]

    def state(self) -> dict[str, object]:
        """JSON-able; pass it back as keyword arguments."""
        return {"seen": dict(self.seen), "baseline": dict(self.baseline), "breaches": dict(self.breaches)}

    def _limit(self, metric: str, bound: float, kind: str) -> float:
        if kind == "most":
            return bound
        baseline = self.baseline.get(metric, math.nan)
        return baseline - (1.0 - bound) * abs(baseline - _COLLAPSED.get(metric, 0.0))

    def _rules(self) -> list[tuple[str, str, float, str]]:
        c = self.config
        relative = "least_of_baseline"
        return [
            ("valid_answers", "valid_mass", c.min_valid_mass, relative),
            ("diverse_groups", "unique_sids", c.min_unique_sids, relative),
            *[(f"entropy_{level}", f"entropy_{level}", c.min_entropy, relative) for level in (1, 2, 3)],
            ("near_reference", "kl", c.max_kl, "most"),
            ("reward_holds", "reward", c.min_reward, relative),
            ("usable_rewards", "unusable_rewards", c.max_unusable_rewards, "most"),
        ]
