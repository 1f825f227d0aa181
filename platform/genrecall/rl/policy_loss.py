"""The terms of the EG-GRPO objective: clipped ratio, exact KL to the reference, entropy, SFT anchor, expert weights, gate.

Source: the clipped objective is PPO's (arXiv:1707.06347, equation 7) per token as in GRPO (arXiv:2402.03300, equation 3);
experts in the group follow EG-GRPO (arXiv:2605.14434, section 3.4). Deviations: the KL is the exact sum over a level's
codes, not a one-sample estimate, because a level has few codes; experts take no part in it, since their prefixes are not the
policy's own. A group of three-token answers has no padding, so all means run over whole tensors.

Shapes: B requests, G answers per request, L = 3 levels, A codes of a level. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genrecall.rl.advantage import reward_spread


@dataclass(frozen=True)
class ClippedObjective:
    """The clipped objective of a batch."""

    loss: Tensor  # scalar, to be minimised
    per_answer: Tensor  # [B, G]: each answer's unweighted loss, mean over its levels
    clipped: Tensor  # bool [B, G, L]: where the clip cut the gradient off
    ratio: Tensor  # [B, G, L], no gradient


def clipped_objective(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, weights: Tensor | None = None
) -> ClippedObjective:
    """-mean over answers and levels of weight * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    Args:
        log_probs: [B, G, L] of the policy being trained, with gradient.
        old_log_probs: [B, G, L] of the policy that made the rollout; for an expert, of the same policy forced along it.
        advantages: [B, G].
        clip_low, clip_high: how far the ratio may fall below and rise above 1 before the gradient stops.
        weights: [B, G] factor of each answer's term, 1 if left out.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if log_probs.shape != old_log_probs.shape or log_probs.shape[:-1] != advantages.shape:
        raise ValueError(
            f"clipped_objective: expected log_probs and old_log_probs [B, G, L] with advantages [B, G], "
            f"got {tuple(log_probs.shape)}, {tuple(old_log_probs.shape)} and {tuple(advantages.shape)}"
        )
    ratio = torch.exp(log_probs - old_log_probs)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantage = advantages[..., None]
    unclipped_term, clipped_term = ratio * advantage, bounded * advantage
    per_answer = -torch.minimum(unclipped_term, clipped_term).mean(dim=-1)
    loss = (per_answer if weights is None else per_answer * weights).mean()
    return ClippedObjective(loss=loss, per_answer=per_answer.detach(), clipped=(clipped_term < unclipped_term).detach(), ratio=ratio.detach())


def ratio_one_for(experts: Tensor, log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Old log-probabilities [B, G, L] under which experts (bool [B, G]) have ratio 1 whatever the policy: the ablation "experts at ratio 1"."""
    return torch.where(experts[..., None], log_probs.detach(), old_log_probs)


def decayed_expert_weight(step: int, *, start: float, decay_steps: int) -> float:
    """The experts' weight at a step: `start`, falling linearly to 0 at `decay_steps`; constant when `decay_steps` is 0."""
    if decay_steps == 0:
        return start
    return start * max(0.0, 1.0 - step / decay_steps)


def exact_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """KL(policy || reference) over the last dimension, in nats.

    Args:
        log_policy, log_reference: [..., A] normalised log-probabilities over the same support; -inf in both marks a code outside it.

    Returns:
        [...], with gradient through `log_policy`.
    """
    inside = torch.isfinite(log_policy)
    log_p = log_policy.masked_fill(~inside, 0.0)
    log_q = log_reference.masked_fill(~inside, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~inside, 0.0).sum(dim=-1)


def mean_over_samples(values: Tensor, experts: Tensor) -> Tensor:
    """Mean of `values` [B, G] or [B, G, L] over the policy's own samples (`experts` bool [B, G] false); 0 when there are none."""
    own = (~experts).to(values.dtype)
    own = own if values.ndim == 2 else own[..., None].expand_as(values)
    return (values * own).sum() / own.sum().clamp(min=1.0)


def entropy(log_policy: Tensor) -> Tensor:
    """Entropy in nats over the last dimension of [..., A] normalised log-probabilities; -inf marks a code outside the support."""
    inside = torch.isfinite(log_policy)
    log_p = log_policy.masked_fill(~inside, 0.0)
    return -(log_p.exp() * log_p).masked_fill(~inside, 0.0).sum(dim=-1)


def inside_mass(levels: Sequence[Tensor], inside: Sequence[Tensor]) -> Tensor:
    """What a policy over whole alphabets gives to codes inside a support, along each answer: the product over its levels, [B, G].

    The mean of it over answers drawn within the support is the probability that an answer drawn without it lies inside, an answer drawn within having the
    probability p / inside_mass, where p is that over whole alphabets.

    Args:
        levels: [B, G or 1, A1].. log-probabilities over whole alphabets, at the answers' prefixes. inside: bool, beside them.
    """
    shares = [level.exp().masked_fill(~codes, 0.0).sum(dim=-1) for level, codes in zip(levels, inside, strict=True)]
    product = shares[0]
    for share in shares[1:]:
        product = product * share
    return product


def sft_anchor(log_probs: Tensor, present: Tensor) -> Tensor:
    """Supervised loss on logged answers: minus the mean log-probability per level.

    Args:
        log_probs: [B, T, L] of the request's own logged SIDs, with gradient.
        present: bool [B, T]; false marks a filler.

    Returns:
        scalar; 0 when no answer is present.
    """
    return -mean_over_samples(log_probs, ~present)


def open_groups(entropy: Tensor, rewards: Tensor, *, min_entropy: float, min_spread: float) -> Tensor:
    """The gate: which groups the clipped objective learns from, those where the policy is uncertain and the reward tells answers apart.

    Args:
        entropy: [B] nats of the policy's answers to each request, see `answer_entropy`.
        rewards: [B, G]; those that are not finite are left out.
        min_entropy: nats; 0 lets every group pass.
        min_spread: highest minus lowest reward of the group; 0 lets every group pass, also one without a reward.

    Returns:
        bool [B].
    """
    return (entropy >= min_entropy) & (reward_spread(rewards) >= min_spread)


def answer_entropy(by_level: Tensor, left_out: Tensor) -> Tensor:
    """Entropy [B] in nats of a policy's whole answers, estimated as the sum over levels of the mean entropy at the prefixes that it sampled.

    Args:
        by_level: [B, G, L] entropy of each level's codes after each answer's prefix.
        left_out: bool [B, G], answers that are not the policy's own; a request without any other has entropy 0.
    """
    own = (~left_out).to(by_level.dtype)[..., None]
    return ((by_level * own).sum(dim=1) / own.sum(dim=1).clamp(min=1.0)).sum(dim=-1)
