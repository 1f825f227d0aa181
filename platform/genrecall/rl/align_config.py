"""Settings of the alignment stage, and the check that a cluster can hold all of its parts at once.

Source: EG-GRPO (arXiv:2605.14434, section 3.4): there 512 rollouts of 8 a step, learning rate 1e-6, KL weight 1.0, 1,000 steps, K = 2. The
defaults here are for the built-in marketplace and its small decoder on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from genrecall.rl.learner import ObjectiveConfig
from genrecall.rl.reward import RewardConfig
from genrecall.rl.rollout import RolloutConfig
from genrecall.rl.stop_rules import StopConfig
from genrecall.train_worker import TrainSettings


class AlignError(ValueError):
    """An alignment that cannot start; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """EG-GRPO. It starts from stage 3, which is also the reference of the KL.

    Args:
        requests_per_step, group_size: B and G.
        num_experts: K places of a group for logged SIDs; 0 is plain GRPO.
        expert_draw: weights of a purchased, clicked and exposed SID in the draw of experts (and of the anchor).
        support: "trie" samples SIDs only, and is what a guided generator needs; "level" samples without the trie, an answer that is no SID
            earns `reward.invalid`.
        distinct_samples: a group's samples are drawn without replacement, so that no place is spent twice on one answer. They are then not independent:
            unlikely answers are in more groups than their probability says, so group means (reward, KL, entropy, and the baseline of the
            advantage) lean toward them and the gradient is no unbiased estimate of the policy's. The ratio stays that of one independent draw; the
            reweighting of arXiv:1903.06059 (section 4.2) is left out. `unique_sids` then says nothing about collapse.
        query_vector_drop: the encoder reads a copy of each request's query with words missing and misspelt at this rate, as in `GeneratorConfig`; 0: the query.
        updates_per_rollout: optimizer steps on each step's groups.
        max_staleness: steps by which rollouts may lag behind the weights they update; 0 is synchronous.
        rollout_actors, cpus_per_rollout, gpus_per_rollout, cpus_for_reward: the actors and what each reserves.
        requests_per_call: requests of one task; tasks do not depend on the number of actors, so neither do the samples.
        actor_timeout_s: an actor that takes longer for a task is replaced.
    """

    seed: int = 0
    steps: int = 60
    requests_per_step: int = 48
    group_size: int = 8
    num_experts: int = 2
    expert_draw: tuple[float, float, float] = (4.0, 2.0, 0.1)
    support: Literal["level", "trie"] = "trie"
    distinct_samples: bool = False
    query_vector_drop: float = 0.0
    learning_rate: float = 5e-5
    warmup_steps: int = 5
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0
    updates_per_rollout: int = 1
    max_staleness: int = 0
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    rollout_actors: int = 2
    cpus_per_rollout: float = 0.25
    gpus_per_rollout: float = 0.0
    cpus_for_reward: float = 0.25
    requests_per_call: int = 16
    actor_timeout_s: float = 300.0

    def problems(self) -> list[str]:
        least = {"steps": 1, "requests_per_step": 1, "group_size": 2, "num_experts": 0, "updates_per_rollout": 1, "max_staleness": 0}
        least |= {"warmup_steps": 0, "rollout_actors": 1, "requests_per_call": 1}
        found = [f"{name}: expected at least {bound}, got {getattr(self, name)}" for name, bound in least.items() if getattr(self, name) < bound]
        positive = ("learning_rate", "gradient_clipping", "actor_timeout_s")
        found += [f"{name}: expected above 0, got {getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        resources = ("cpus_per_rollout", "gpus_per_rollout", "cpus_for_reward", "weight_decay")
        found += [f"{name}: expected at least 0, got {getattr(self, name)}" for name in resources if getattr(self, name) < 0]
        if not 0 <= self.query_vector_drop <= 1:
            found.append(f"query_vector_drop: expected between 0 and 1, got {self.query_vector_drop}")
        if self.num_experts >= self.group_size:
            found.append(f"num_experts: expected fewer than group_size ({self.group_size}), so that the policy samples too, got {self.num_experts}")
        if min(self.expert_draw) < 0 or max(self.expert_draw) == 0:
            found.append(f"expert_draw: expected weights of at least 0, one of them above 0, got {list(self.expert_draw)}")
        if self.objective.expert_decay_steps and not self.num_experts:
            found.append("objective.expert_decay_steps: has no effect without experts; set num_experts above 0 or leave it out")
        found += [
            f"objective.{name}: has no effect without experts; set num_experts above 0 or leave it out"
            for name in ("expert_weight", "expert_ratio")
            if not self.num_experts and getattr(self.objective, name) != getattr(ObjectiveConfig, name)
        ]
        if self.reward.needs_ranker and self.reward.timeout_s >= self.actor_timeout_s:
            found.append(
                f"reward.timeout_s: expected less than actor_timeout_s ({self.actor_timeout_s:g}), or the reward actor is replaced before its ranking model is "
                f"given up, got {self.reward.timeout_s:g}"
            )
        if self.num_experts and not self.objective.policy_weight:
            found.append(f"num_experts: {self.num_experts} have no effect with objective.policy_weight=0; set num_experts=0")
        return found

    def rollout_config(self) -> RolloutConfig:
        return RolloutConfig(seed=self.seed, group_size=self.group_size, num_experts=self.num_experts, support=self.support, distinct=self.distinct_samples)

    def cpu_requests(self, train: TrainSettings) -> dict[str, float]:
        """CPUs that each part of the alignment reserves."""
        return {
            f"learner ({train.num_workers} x {train.cpus_per_worker})": float(train.num_workers * train.cpus_per_worker),
            f"rollouts ({self.rollout_actors} x {self.cpus_per_rollout:g})": self.rollout_actors * self.cpus_per_rollout,
            "reward": self.cpus_for_reward,
        }


def check_cluster(config: AlignConfig, train: TrainSettings, cluster: Mapping[str, float]) -> None:
    """Check that the cluster can hold learner, rollouts and reward at once; without it they would wait for each other for ever.

    Raises:
        AlignError: adding up what is asked for and what there is.
    """
    requests = config.cpu_requests(train)
    needed, available = sum(requests.values()), float(cluster.get("CPU", 0.0))
    if needed > available:
        parts = " + ".join(f"{name} {cpus:g}" for name, cpus in requests.items())
        raise AlignError(
            f"alignment asks for {needed:g} CPUs ({parts}), the cluster has {available:g}; "
            "lower align.rollout_actors, align.cpus_per_rollout or train.num_workers, or add a node"
        )
    gpus = config.rollout_actors * config.gpus_per_rollout + (train.num_workers if train.use_gpu else 0)
    if gpus > float(cluster.get("GPU", 0.0)):
        raise AlignError(
            f"alignment asks for {gpus:g} GPUs (learner {train.num_workers if train.use_gpu else 0}, rollouts {config.rollout_actors} x {config.gpus_per_rollout:g}), "
            f"the cluster has {float(cluster.get('GPU', 0.0)):g}; lower align.gpus_per_rollout or set train.use_gpu=false"
        )
