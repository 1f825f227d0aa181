"""Experts: logged SIDs that take places in a group of samples, so that a sparse reward has something to point at.

Source: EG-GRPO's expert injection (arXiv:2605.14434, section 3.4). Our rules where the paper is silent: experts are drawn
without replacement with probability proportional to the weight of their tier; a SID that the kept samples already hold is no
expert; places that no expert takes go to further samples, those that are not experts of the group first.

Shapes: B requests, G answers per request, K expert places, L = 3 levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genrecall.rl.feedback import CLICKED, EXPOSED, PURCHASED

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Places:
    """Who sits where in each group."""

    sample: NDArray[np.int32]  # [B, G]: number of the sample in this place, -1 where an expert sits
    expert_sid: NDArray[np.int32]  # [B, G]: SID row of the expert in this place, -1 where a sample sits


def counter_uniforms(seed: int, step: int, rows: NDArray[np.integer], *shape: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on (seed, step, row, place) alone, whoever draws them and in whatever company.

    Args:
        rows: int [B], e.g. request rows.
        shape: trailing shape drawn for each row.

    Returns:
        float64 [B, *shape].
    """
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = _mix(_streams(seed, step, rows)[:, None] + np.arange(1, count + 1, dtype=np.uint64)[None, :])
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(len(rows), *shape)


def counter_streams(seed: int, step: int, rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """One random stream int64 [B] per row, from (seed, step, row) alone; see `sample_distinct`."""
    return _streams(seed, step, rows).view(np.int64)


def _streams(seed: int, step: int, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        stream = _mix(_mix(np.uint64(seed & int(_MASK))) + np.uint64(step))
        return _mix(stream + rows.astype(np.uint64))


def _mix(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit changes about half of the output bits."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(values, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result


def tier_weights(tiers: NDArray[np.int8], draw: Sequence[float]) -> NDArray[np.float64]:
    """The weight of each tier in the draw of experts; `draw` = weights of (purchased, clicked, exposed)."""
    table = np.zeros(PURCHASED + 1)
    table[[PURCHASED, CLICKED, EXPOSED]] = draw
    return table[tiers]


def seat_experts(
    sampled: NDArray[np.int32],
    candidates: Sequence[NDArray[np.int32]],
    weights: Sequence[NDArray[np.float64]],
    uniforms: Sequence[NDArray[np.float64]],
    *,
    num_experts: int,
) -> Places:
    """Give up to K places of each group to experts.

    Args:
        sampled: int32 [B, G] SID rows of G samples per request, -1 where a sample is no SID.
        candidates: B arrays of distinct SID rows with feedback.
        weights: B arrays beside `candidates`; a weight of 0 is never drawn.
        uniforms: B arrays beside `candidates`, in [0, 1): the luck of each candidate.
        num_experts: K.

    Returns:
        the first G - K places hold samples, the rest experts as far as there are any, then samples.
    """
    batch, group = sampled.shape
    kept = group - num_experts
    sample = np.tile(np.arange(group, dtype=np.int32), (batch, 1))
    expert_sid = np.full((batch, group), -1, dtype=np.int32)
    for row in range(batch):
        chosen = draw_weighted(candidates[row], weights[row], uniforms[row], barred=sampled[row, :kept], count=num_experts)
        if not len(chosen):
            continue
        spare = np.arange(kept, group, dtype=np.int32)
        repeats = np.isin(sampled[row, kept:], chosen)
        spare = np.concatenate([spare[~repeats], spare[repeats]])
        expert_sid[row, kept : kept + len(chosen)] = chosen
        sample[row, kept : kept + len(chosen)] = -1
        sample[row, kept + len(chosen) :] = spare[: num_experts - len(chosen)]
    return Places(sample=sample, expert_sid=expert_sid)


def draw_weighted(
    candidates: NDArray[np.int32], weights: NDArray[np.float64], uniforms: NDArray[np.float64], *, count: int, barred: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """Up to `count` of the candidates without replacement, by weight: the largest u ** (1 / w) (Efraimidis and Spirakis, 2006).

    Args:
        candidates: int32 [m]; those in `barred` or of weight 0 are never drawn.
        weights: float64 [m]. uniforms: float64 [m] in [0, 1).
    """
    open_ = weights > 0 if barred is None else (weights > 0) & ~np.isin(candidates, barred)
    candidates, weights, uniforms = candidates[open_], weights[open_], uniforms[open_]
    luck = np.log(np.maximum(uniforms, 1e-300)) / weights
    return candidates[np.argsort(-luck, kind="stable")[:count]]
