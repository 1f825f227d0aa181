"""The learner's step: the EG-GRPO loss of a batch of groups, the batches it draws, and the health of each step.

Source: EG-GRPO (arXiv:2605.14434, section 3.4); the terms are in `policy_loss.py` and `advantage.py`. A group is scored packed, behind
one copy of its prompt. KL and entropy come from the same pass, over the support that the rollouts were sampled from.

Shapes: B requests, G answers per request, T anchors per request (0 without an anchor), A1..A3 alphabet sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrecall.data.interactions import Requests
from genrecall.encoders.text_encoder import TextEncoder
from genrecall.generator.corruption import corrupt
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.rl.advantage import group_advantages, has_spread
from genrecall.rl.feedback import CLICKED, TIER_NAMES
from genrecall.rl.policy_loss import (
    answer_entropy,
    clipped_objective,
    entropy,
    exact_kl,
    inside_mass,
    mean_over_samples,
    open_groups,
    ratio_one_for,
    sft_anchor,
)
from genrecall.rl.reward import Rewards
from genrecall.rl.rollout import Rollout
from genrecall.sid.semantic_id import SidTable
from genrecall.sid.trie import Trie

LEVELS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The weights and bounds of the loss."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    policy_weight: float = 1.0  # of the clipped objective; 0 with an anchor and no KL is plain supervised training on logged SIDs
    kl_weight: float = 1.0
    sft_anchor_weight: float = 0.0
    sft_anchors: int = 1  # different logged SIDs per request for the anchor, as far as a request has so many
    advantage_epsilon: float = 1e-6
    expert_weight: float = 1.0  # of an expert's term in the loss
    expert_decay_steps: int = 0  # the weight falls linearly to 0 over so many steps; 0 keeps it
    expert_ratio: Literal["policy", "one"] = "policy"  # "one" is an ablation: experts as if the rollout policy had just produced them
    gate_min_entropy: float = 0.0  # nats per answer; groups of a policy surer than this take no part in the clipped objective
    gate_min_spread: float = 0.0  # highest less lowest reward of a group; groups below take no part either. Both 0: no gate

    def problems(self) -> list[str]:
        found = [f"{name}: expected between 0 and 1, got {getattr(self, name)}" for name in ("clip_low",) if not 0 < getattr(self, name) < 1]
        found += [f"{name}: expected above 0, got {getattr(self, name)}" for name in ("clip_high", "advantage_epsilon") if getattr(self, name) <= 0]
        found += [
            f"{name}: expected at least 0, got {getattr(self, name)}"
            for name in ("policy_weight", "kl_weight", "sft_anchor_weight", "expert_weight", "expert_decay_steps", "gate_min_entropy", "gate_min_spread")
            if getattr(self, name) < 0
        ]
        if self.sft_anchors < 1:
            found.append(f"sft_anchors: expected at least 1, got {self.sft_anchors}")
        elif self.sft_anchors > 1 and not self.sft_anchor_weight:
            found.append(f"sft_anchors: {self.sft_anchors} have no effect without sft_anchor_weight; set it above 0 or leave sft_anchors out")
        if not (self.policy_weight or self.kl_weight or self.sft_anchor_weight):
            found.append("policy_weight, kl_weight, sft_anchor_weight: all are 0, so nothing is trained; set one of them above 0")
        if self.gated and not self.policy_weight:
            found.append("gate_min_entropy, gate_min_spread: have no effect with policy_weight 0; leave them at 0")
        return found

    @property
    def gated(self) -> bool:
        """Whether some groups may be kept out of the clipped objective."""
        return self.gate_min_entropy > 0 or self.gate_min_spread > 0


def alignment_loss(
    model: Decoder,
    token_ids: Tensor,
    lengths: Tensor,
    soft: Tensor | None,
    answers: Tensor,
    old_log_probs: Tensor,
    rewards: Tensor,
    experts: Tensor,
    reference_levels: tuple[Tensor, Tensor, Tensor],
    expert_weight: Tensor,
    anchor_present: Tensor | None = None,
    *,
    objective: ObjectiveConfig,
    support: Literal["level", "trie"],
    trie: Trie | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its parts.

    Args:
        token_ids, lengths, soft: the prompts, see `Prompts`.
        answers: int64 [B, G + T, 3]: the group, then the anchors where there are any. An answer of -1 is missing: it has no reward and no part in
            KL and entropy.
        old_log_probs: [B, G, 3]. rewards: [B, G]; not finite = no reward. experts: bool [B, G].
        reference_levels: the reference's log-probabilities [B, 1, A1], [B, G, A2], [B, G, A3] at the same prefixes.
        expert_weight: scalar tensor.
        anchor_present: bool [B, T].
        support, trie: as in the rollouts.

    Returns:
        scalar loss; {"policy_loss", "kl", "kl_1".., "entropy_1".., "clip_fraction", "expert_loss", "ratio", "anchor_loss", "gate_open"} as
        scalars, the last two where there are anchors and a gate. A closed group keeps its place in the mean (its term is 0) and its KL.
    """
    group = rewards.shape[1]
    scored = group_log_probs(model, Prompts(token_ids, lengths, soft), answers, support=support, trie=trie, return_level_log_probs=True)
    log_probs = scored.log_probs[:, :group]
    levels = [level if level.shape[1] == 1 else level[:, :group] for level in scored.levels]
    missing = answers[:, :group, 0] < 0
    rewards = rewards.masked_fill(missing, torch.nan)
    foreign = experts | missing
    old = ratio_one_for(experts, log_probs, old_log_probs) if objective.expert_ratio == "one" else old_log_probs
    advantages = group_advantages(rewards, epsilon=objective.advantage_epsilon)
    entropies = torch.stack([entropy(level.detach()).expand(-1, group) for level in levels], dim=-1)
    weights = torch.where(experts, expert_weight.to(log_probs.dtype), torch.ones_like(advantages))
    parts: dict[str, Tensor] = {}
    if objective.gated:
        open_ = open_groups(answer_entropy(entropies, foreign), rewards, min_entropy=objective.gate_min_entropy, min_spread=objective.gate_min_spread)
        weights = weights * open_[:, None]
        parts["gate_open"] = open_.float().mean()
    clipped = clipped_objective(log_probs, old, advantages, clip_low=objective.clip_low, clip_high=objective.clip_high, weights=weights)
    by_level = [exact_kl(level, reference).expand(-1, group) for level, reference in zip(levels, reference_levels, strict=True)]
    kl = mean_over_samples(torch.stack(by_level, dim=-1), foreign)
    terms = [(objective.policy_weight, clipped.loss), (objective.kl_weight, kl)]
    parts |= {
        "policy_loss": clipped.loss,
        "kl": kl,
        "clip_fraction": clipped.clipped.float().mean(),
        "ratio": clipped.ratio.mean(),
        "expert_loss": mean_over_samples(clipped.per_answer, ~experts),
        **{f"kl_{number}": mean_over_samples(value, foreign) for number, value in zip(LEVELS, by_level, strict=True)},
        **{f"entropy_{number}": mean_over_samples(entropies[..., place], foreign) for place, number in enumerate(LEVELS)},
    }
    if anchor_present is not None:
        anchor = sft_anchor(scored.log_probs[:, group:], anchor_present)
        terms.append((objective.sft_anchor_weight, anchor))
        parts["anchor_loss"] = anchor
    loss = torch.stack([weight * term for weight, term in terms if weight]).sum()  # a term of weight 0 is left out: 0 times infinity is no number
    return loss, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def valid_mass(model: Decoder, prompts: Prompts, answers: Tensor, foreign: Tensor, trie_levels: Sequence[Tensor]) -> Tensor:
    """The probability that an answer sampled without the trie is a SID, estimated from answers that were sampled with it: scalar.

    Only of a decoder without guidance: a guided one has no score for what is no SID.

    Args:
        answers: int64 [B, G, 3]. foreign: bool [B, G], those that the policy did not sample: experts and missing ones.
        trie_levels: any decoder's log-probabilities [B, 1, A1], [B, G, A2], [B, G, A3] of these answers under support "trie": -inf outside it.
    """
    levels = group_log_probs(model, prompts, answers, support="level", return_level_log_probs=True).levels
    return mean_over_samples(inside_mass(levels, [level.isfinite() for level in trie_levels]), foreign)


def draw_requests(eligible: NDArray[np.int64], *, seed: int, step: int, count: int) -> NDArray[np.int64]:
    """The request rows of a step: `count` different ones of `eligible`, from (seed, step) alone."""
    return np.random.default_rng((seed, 3, step)).choice(eligible, size=count, replace=False)


class RequestPrompts:
    """Prompts of training requests, as the retriever makes them when it serves but for `vector_drop`.

    Args:
        builder, table, encoder: of the generator, its SID index and its encoder.
        requests: the training requests.
        vector_drop: a query's vector is that of a copy of it with each word missing (and misspelt) at this rate, as in supervised training: the
            encoder knows the training queries by heart. 0: as served.
        seed: of these copies, the same one whenever a request comes.
    """

    def __init__(self, builder: PromptBuilder, table: SidTable, encoder: TextEncoder, requests: Requests, *, vector_drop: float = 0.0, seed: int = 0) -> None:
        self._builder, self._table, self._encoder, self._requests = builder, table, encoder, requests
        self._vector_drop, self._seed = vector_drop, seed

    def of(self, rows: NDArray[np.int64]) -> Prompts:
        """The prompts of some requests, on the CPU."""
        chosen = self._requests.take(rows)
        uses_vectors = self._builder.soft_prompt or self._builder.level1_centroids is not None
        vectors = self._encoder.encode_queries(self._seen(rows, chosen.queries)) if uses_vectors else None
        histories = [self._table.tokens_of_items(history) for history in chosen.history]
        return self._builder.request_prompts(chosen.queries, chosen.genders, chosen.age_bands, histories, vectors)

    def _seen(self, rows: NDArray[np.int64], queries: Sequence[str]) -> Sequence[str]:
        """What the encoder reads in place of the queries."""
        if not self._vector_drop:
            return queries
        randoms = (np.random.default_rng((self._seed, 17, int(row))) for row in rows)
        return [corrupt(query, random, drop=self._vector_drop, misspelling_rate=self._vector_drop) for query, random in zip(queries, randoms, strict=True)]


def frequent_queries(queries: list[str]) -> NDArray[np.bool_]:
    """Which requests ask a head query: bool [R], the most frequent queries that together make up half of the requests."""
    distinct, inverse, counts = np.unique(np.array(queries, dtype=object).astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    head = np.zeros(len(distinct), dtype=bool)
    head[order[before < len(queries) / 2]] = True
    return head[inverse]


def rollout_health(rollout: Rollout, rewards: Rewards, head: NDArray[np.bool_]) -> dict[str, float]:
    """What a step's rollouts say about the policy; shares are of its own samples, experts and missing places left out. Mean rewards are of the answers that
    have one, nan where none has.

    Args:
        head: bool [B], whether each request asks a head query.
    """
    there = ~rollout.missing
    own = ~rollout.experts & there
    count = max(1, int(own.sum()))
    finite = np.isfinite(rewards.values) & there
    tiers = np.bincount(rewards.tiers[own], minlength=len(TIER_NAMES)) / count
    hits = own & (rewards.tiers >= CLICKED)
    values = torch.tensor(np.where(there, rewards.values, np.nan), dtype=torch.float32)
    return {
        "reward": _mean(rewards.values[own & finite]),
        "group_reward": _mean(rewards.values[finite]),
        "valid_rate": float((rollout.sid_rows[own] >= 0).mean()) if own.any() else 0.0,
        "unique_sids": float(np.mean([len({*sids[mine].tolist()} - {-1}) for sids, mine in zip(rollout.sid_rows, own, strict=True)])),
        "zero_spread": float((~has_spread(values)).float().mean()),
        "empty_groups": float((~finite.any(axis=1)).mean()),
        "unusable_rewards": float((~finite & there).sum() / max(1, there.sum())),
        "missing_answers": float((~there).mean()),
        "failed_ranker_calls": float(rewards.failed_calls),
        "expert_share": float(rollout.experts.mean()),
        "stale_experts": float(rollout.stale_experts),
        "hit_rate": float(hits.sum() / count),
        "hit_rate_head": _share(hits, own & head[:, None]),
        "hit_rate_tail": _share(hits, own & ~head[:, None]),
        **{f"tier_{name}": float(share) for name, share in zip(TIER_NAMES, tiers, strict=True)},
    }


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def _share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
    return float((hits & among).sum() / among.sum()) if among.any() else float("nan")
