"""Rollouts: groups of sampled answers with experts seated among them, and the log-probabilities under which they were made.

Source: EG-GRPO (arXiv:2605.14434, section 3.4). A group is one batched call: answers have three tokens, so there is nothing to resume or
to page. Every random number depends on (seed, step, request, place) alone, so a rerun, a resubmission or a pool of another
size gives the same answers. An expert's log-probability is that of the rollout policy forced along it.

Shapes: b requests of one task, L prompt tokens, G answers per request, S SIDs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.config import from_dict
from genrecall.device import default_device
from genrecall.generator.distinct_samples import sample_distinct
from genrecall.generator.group_sampling import GroupSamples, sample_group
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder, PromptState
from genrecall.generator.prompts import Prompts
from genrecall.rl.experts import counter_streams, counter_uniforms, seat_experts
from genrecall.sid.index import load_trie
from genrecall.sid.trie import Trie
from genrecall.storage import open_artifact

START_STAGE = "stage3"
"""The generator's stage that alignment starts from and stays near; every generator has it, and it reads the prompts with the shopper that are sampled for."""
_EXPERT_STREAM = 0x5EED_E8BE  # keeps the luck of experts apart from that of samples


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How groups are made."""

    seed: int
    group_size: int
    num_experts: int
    support: Literal["level", "trie"]
    distinct: bool = False  # samples without replacement in place of independent ones


@dataclass(frozen=True)
class RolloutTask:
    """Requests to sample for, as plain arrays."""

    step: int
    request_rows: NDArray[np.int64]  # [b]
    token_ids: NDArray[np.int64]  # [b, L]
    lengths: NDArray[np.int64]  # [b]
    soft: NDArray[np.float32] | None  # [b, d]
    expert_offsets: NDArray[np.int64]  # [b + 1]: request i's possible experts are entries expert_offsets[i]:expert_offsets[i + 1]
    expert_sids: NDArray[np.int32]  # distinct within a request
    expert_weights: NDArray[np.float64]

    def prompts(self, device: torch.device) -> Prompts:
        """The prompts as tensors."""
        soft = None if self.soft is None else torch.tensor(self.soft, device=device)
        return Prompts(torch.tensor(self.token_ids, device=device), torch.tensor(self.lengths, device=device), soft)


@dataclass(frozen=True)
class Rollout:
    """Groups of answers."""

    version: int  # of the weights that made them
    request_rows: NDArray[np.int64]  # [b]
    tokens: NDArray[np.int32]  # [b, G, 3]; -1 where distinct answers have run out
    sid_rows: NDArray[np.int32]  # [b, G]; -1 where the answer is no SID
    log_probs: NDArray[np.float32]  # [b, G, 3], of the weights that made them
    experts: NDArray[np.bool_]  # [b, G]
    stale_experts: int  # possible experts that the trie does not hold, left out

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Places [b, G] without an answer: there are fewer different ones than places."""
        return self.tokens[..., 0] < 0

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """The groups of several tasks, in order; the version is the oldest."""
        return cls(
            version=min(part.version for part in parts),
            request_rows=np.concatenate([part.request_rows for part in parts]),
            tokens=np.concatenate([part.tokens for part in parts]),
            sid_rows=np.concatenate([part.sid_rows for part in parts]),
            log_probs=np.concatenate([part.log_probs for part in parts]),
            experts=np.concatenate([part.experts for part in parts]),
            stale_experts=sum(part.stale_experts for part in parts),
        )


class RolloutWorker:
    """Samples groups with one copy of the policy.

    Args:
        model: the policy, on its device.
        trie: of the SID index, on the same device.
        config: group size, experts, support and seed.
    """

    def __init__(self, model: Decoder, trie: Trie, config: RolloutConfig) -> None:
        self._model = model.eval()
        self._trie = trie
        self._config = config
        self.version = -1  # no weights received yet

    @torch.no_grad()
    def load(self, version: int, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over the weights of a version (see `weights_of`); nothing happens when it is in place already.

        Raises:
            ValueError: the weights are not those of this model.
        """
        if version == self.version:
            return
        own = dict(self._model.named_parameters())
        if set(own) != set(weights):
            raise ValueError(f"weights of version {version}: expected those of the rollout model, got other names: {sorted(set(own) ^ set(weights))[:4]}")
        for name, parameter in own.items():
            parameter.copy_(torch.tensor(weights[name]))
        self.version = version

    @torch.no_grad()
    def sample(self, task: RolloutTask) -> Rollout:
        """Sample groups, seat experts and work out the experts' log-probabilities."""
        config, device = self._config, self._model.device
        prompts = task.prompts(device)
        state = self._model.prefill(prompts)  # read once, for samples and experts
        samples = self._samples(task, prompts, state)
        sampled_rows = samples.sid_rows.cpu().numpy().astype(np.int32)

        known = (task.expert_sids >= 0) & (task.expert_sids < len(self._trie))
        spans = [np.arange(start, end)[known[start:end]] for start, end in zip(task.expert_offsets[:-1], task.expert_offsets[1:], strict=True)]
        luck = counter_uniforms(config.seed ^ _EXPERT_STREAM, task.step, task.request_rows, max(1, int(np.diff(task.expert_offsets).max(initial=0))))
        places = seat_experts(
            sampled_rows,
            [task.expert_sids[span] for span in spans],
            [task.expert_weights[span] for span in spans],
            [luck[row, span - task.expert_offsets[row]] for row, span in enumerate(spans)],
            num_experts=config.num_experts,
        )
        experts = places.expert_sid >= 0
        picked = torch.from_numpy(np.maximum(places.sample, 0).astype(np.int64)).to(device)
        tokens = samples.tokens.gather(1, picked[..., None].expand(-1, -1, 3))
        log_probs = samples.log_probs.gather(1, picked[..., None].expand(-1, -1, 3))
        if experts.any():
            seats = torch.from_numpy(experts).to(device)[..., None]
            forced_tokens = self._trie.tokens_of(torch.from_numpy(np.maximum(places.expert_sid, 0)).to(device))
            tokens = torch.where(seats, forced_tokens, tokens)
            columns = slice(config.group_size - config.num_experts, None)  # experts sit in the last places only
            trie = self._trie if config.support == "trie" else None
            forced = group_log_probs(self._model, prompts, tokens[:, columns], support=config.support, trie=trie, state=state)
            log_probs[:, columns] = torch.where(seats[:, columns], forced, log_probs[:, columns])
        sid_rows = np.where(experts, places.expert_sid, np.take_along_axis(sampled_rows, np.maximum(places.sample, 0), axis=1))
        return Rollout(
            version=self.version,
            request_rows=task.request_rows,
            tokens=tokens.cpu().numpy().astype(np.int32),
            sid_rows=sid_rows.astype(np.int32),
            log_probs=log_probs.float().cpu().numpy(),
            experts=experts,
            stale_experts=int((~known).sum()),
        )

    def _samples(self, task: RolloutTask, prompts: Prompts, state: PromptState) -> GroupSamples:
        config, device = self._config, self._model.device
        if config.distinct:
            streams = torch.from_numpy(counter_streams(config.seed, task.step, task.request_rows)).to(device)
            return sample_distinct(self._model, prompts, self._trie, group_size=config.group_size, streams=streams, support=config.support, state=state)
        uniforms = torch.from_numpy(counter_uniforms(config.seed, task.step, task.request_rows, config.group_size, 3)).to(device)
        return sample_group(self._model, prompts, self._trie, group_size=config.group_size, support=config.support, uniforms=uniforms, state=state)


class RolloutActor:
    """A `RolloutWorker` in a process of its own; `spec` holds artifact URIs and the rollout config as JSON."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        device = default_device() if spec["use_gpu"] else torch.device("cpu")
        model = Decoder.from_pretrained(open_artifact(spec["generator"]).file(START_STAGE), device=device)
        trie = load_trie(open_artifact(spec["sid_index"]).path, device)
        self._worker = RolloutWorker(model, trie, from_dict(RolloutConfig, spec["rollout"]))

    def sample(self, version: int, weights: Mapping[str, NDArray[np.float32]], task: RolloutTask) -> Rollout:
        """Sample with the weights of a version."""
        self._worker.load(version, weights)
        return self._worker.sample(task)


def weights_of(model: Decoder) -> dict[str, NDArray[np.float32]]:
    """What training changes, as float32 arrays, the form in which it travels to the rollout actors; they have the lexicon with the decoder."""
    return {name: parameter.detach().float().cpu().numpy().copy() for name, parameter in model.named_parameters()}
