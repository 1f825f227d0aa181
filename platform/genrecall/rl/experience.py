"""Experience: the groups and rewards of each step, asked for from the actors by rank 0 and shared with the other ranks.

Tasks are cut to a fixed number of requests whatever the number of actors, so that every answer is computed in the same batch and comes out
the same to the last bit.

Shapes: B requests of a step, G answers per request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.config import to_dict
from genrecall.rl.actors import NamedActor, RolloutPool, Supervisor
from genrecall.rl.align_config import AlignConfig
from genrecall.rl.experts import tier_weights
from genrecall.rl.feedback import Feedback
from genrecall.rl.learner import RequestPrompts
from genrecall.rl.reward import RewardActor, Rewards
from genrecall.rl.rollout import Rollout, RolloutActor, RolloutTask


def rollout_actors(config: AlignConfig, loop_config: Mapping[str, Any]) -> list[NamedActor]:
    """The rollout actors of an alignment; they are made when first used."""
    spec = {
        "generator": loop_config["generator"],
        "sid_index": loop_config["sid_index"],
        "rollout": to_dict(config.rollout_config()),
        "use_gpu": config.gpus_per_rollout > 0,
    }
    return [
        NamedActor(RolloutActor, spec, name=name, namespace=loop_config["namespace"], cpus=config.cpus_per_rollout, gpus=config.gpus_per_rollout)
        for name in loop_config["rollout_names"]
    ]


def reward_actor(config: AlignConfig, loop_config: Mapping[str, Any]) -> NamedActor:
    """The reward actor of an alignment; it is made when first used."""
    uris = {name: loop_config[name] for name in ("dataset", "sid_index", "encoder", "ranker") if name in loop_config}
    spec = {**uris, "reward": to_dict(config.reward), "tracking_uri": loop_config.get("tracking_uri")}
    return NamedActor(RewardActor, spec, name=loop_config["reward_name"], namespace=loop_config["namespace"], cpus=config.cpus_for_reward)


@dataclass(frozen=True)
class Experience:
    """The groups of one step with their rewards, and what it took to get them."""

    rollout: Rollout
    rewards: Rewards
    replaced: int  # actors replaced so far
    seconds: float  # waited for it


class Experiences:
    """Asks the actors for the groups and rewards of each step (rank 0 only).

    Args:
        config: the alignment's.
        loop_config: actor names and namespace.
        prompts: makes the prompts of request rows.
        feedback: where experts come from.
    """

    def __init__(self, config: AlignConfig, loop_config: Mapping[str, Any], prompts: RequestPrompts, feedback: Feedback) -> None:
        self._config = config
        self._prompts = prompts
        self._feedback = feedback
        self._supervisor = Supervisor(timeout_s=config.actor_timeout_s)
        self._pool = RolloutPool(rollout_actors(config, loop_config), self._supervisor)
        self._reward = reward_actor(config, loop_config)
        self._under_way: deque[Any] = deque()

    def publish(self, version: int, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Rollouts submitted from now on use these weights."""
        self._pool.publish(version, weights)

    def submit(self, step: int, rows: NDArray[np.int64]) -> None:
        """Start the rollouts of a step."""
        self._under_way.append(self._pool.submit(self.tasks(step, rows)))

    @property
    def submitted(self) -> int:
        """Steps under way."""
        return len(self._under_way)

    def collect(self) -> Experience:
        """The oldest step under way, with rewards; its rollouts are of the weights that were published when it was submitted."""
        started = time.monotonic()
        rollout = self._pool.collect(self._under_way.popleft())
        call = self._supervisor.call(self._reward, lambda handle: handle.score.remote(rollout.request_rows, rollout.sid_rows))
        rewards: Rewards = self._supervisor.result(call)
        return Experience(rollout, rewards, self._supervisor.replaced, time.monotonic() - started)

    def tasks(self, step: int, rows: NDArray[np.int64]) -> list[RolloutTask]:
        """The step's requests cut into calls of fixed size."""
        size = self._config.requests_per_call
        return [self._task(step, rows[start : start + size]) for start in range(0, len(rows), size)]

    def _task(self, step: int, rows: NDArray[np.int64]) -> RolloutTask:
        prompts = self._prompts.of(rows)
        sids, tiers = zip(*(self._feedback.of(int(row)) for row in rows), strict=True)
        return RolloutTask(
            step=step,
            request_rows=rows,
            token_ids=prompts.token_ids.numpy(),
            lengths=prompts.lengths.numpy(),
            soft=None if prompts.soft is None else prompts.soft.numpy(),
            expert_offsets=np.concatenate([[0], np.cumsum([len(one) for one in sids])]).astype(np.int64),
            expert_sids=np.concatenate(sids),
            expert_weights=tier_weights(np.concatenate(tiers), self._config.expert_draw),
        )


def shared(experience: Experience | None, *, batch: int, group: int, device: torch.device) -> Experience:
    """Rank 0's experience on every rank; the others pass None. B = `batch` and G = `group` are known to all of them."""
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((batch,), torch.int64),
        ((batch, group, 3), torch.int32),
        ((batch, group), torch.int32),
        ((batch, group, 3), torch.float32),
        ((batch, group), torch.uint8),
        ((batch, group), torch.float32),
        ((batch, group), torch.int8),
        ((5,), torch.float64),
    ]
    if experience is None:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    else:
        rollout, rewards = experience.rollout, experience.rewards
        numbers = np.array([rollout.version, rollout.stale_experts, experience.replaced, rewards.failed_calls, experience.seconds], dtype=np.float64)
        arrays = [
            rollout.request_rows,
            rollout.tokens,
            rollout.sid_rows,
            rollout.log_probs,
            rollout.experts.astype(np.uint8),
            rewards.values,
            rewards.tiers,
            numbers,
        ]
        tensors = [torch.tensor(array, dtype=dtype, device=device) for array, (_, dtype) in zip(arrays, shapes, strict=True)]
    for tensor in tensors:
        torch.distributed.broadcast(tensor, src=0)
    rows, tokens, sids, log_probs, experts, values, tiers, scalars = (tensor.cpu().numpy() for tensor in tensors)
    version, stale, replaced, failed = (int(number) for number in scalars[:4])
    rollout = Rollout(version, rows, tokens, sids, log_probs, experts.astype(bool), stale)
    return Experience(rollout, Rewards(values, tiers, failed), replaced, float(scalars[4]))
