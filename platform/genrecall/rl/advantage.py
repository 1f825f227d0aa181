"""Group-relative advantages: how much better each answer of a group is than the group itself.

Source: GRPO (Shao et al., arXiv:2402.03300, section 4.1) as used by EG-GRPO (arXiv:2605.14434, section 3.4).
Deviations: the standard deviation is the population's (divide by G) over the mixed group of samples and experts; a group
without spread has advantage exactly 0 instead of noise divided by epsilon; a reward that is not finite takes no part.

Shapes: B requests, G answers per request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """(r - mean) / (std + epsilon) within each group.

    Args:
        rewards: float [B, G]. Entries that are not finite are left out of mean and std and get advantage 0.
        epsilon: added to the standard deviation.

    Returns:
        float [B, G]; 0 throughout a group whose finite rewards are all equal.

    Raises:
        ValueError: rewards are not a matrix.
    """
    if rewards.ndim != 2:
        raise ValueError(f"group_advantages: expected rewards [B, G], got shape {tuple(rewards.shape)}; stack one row per request")
    usable = torch.isfinite(rewards)
    values = torch.where(usable, rewards, torch.zeros_like(rewards)).double()
    count = usable.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    centred = torch.where(usable, values - mean, torch.zeros_like(values))
    std = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    advantages = centred / (std + epsilon)
    return torch.where(has_spread(rewards)[:, None], advantages, torch.zeros_like(advantages)).to(rewards.dtype)


def has_spread(rewards: Tensor) -> Tensor:
    """Which groups can teach anything: bool [B], true where two finite rewards [B, G] differ."""
    return reward_spread(rewards) > 0


def reward_spread(rewards: Tensor) -> Tensor:
    """The highest less the lowest finite reward of each group: [B] of [B, G]; 0 where none is finite."""
    usable = torch.isfinite(rewards)
    highest = rewards.masked_fill(~usable, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(~usable, torch.inf).amin(dim=1)
    return torch.where(usable.any(dim=1), highest - lowest, torch.zeros_like(highest))
