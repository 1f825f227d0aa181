"""Reciprocal rank fusion of recall channels, with weights tuned on validation requests from one grid of values.

Source: Cormack, Clarke & Buettcher (SIGIR 2009): score = sum over channels of w / (k + rank), k = 60, rank from 1. All channels enter
with the same depth. Deviation: channel weights, chosen on validation requests from one grid of values for every channel but the first, for each item
budget by the recall there: what orders the first ten best is not what fills a hundred best. So a hybrid of two channels has 7 sets of weights to choose
from and one of three 49: the larger hybrid is tuned more, which no test request pays for.

Shapes: R requests, C channels, K depth, U <= C * K distinct candidates of a request. Rankings are [R, K] item rows, -1 padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genrecall.evaluation.metrics import Targets, mean_over_requests, ranking_positions, recall_at

RRF_K = 60
WEIGHT_GRID = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)


@dataclass(frozen=True)
class Candidates:
    """Distinct candidates of each request with every channel's vote.

    Attributes:
        items: int32 [R, U], ascending, -1 padded (padding last).
        votes: float32 [R, U, C], `1 / (60 + rank)` with rank from 1; 0 where the channel does not list the item.
    """

    items: np.ndarray
    votes: np.ndarray


def gather_candidates(rankings: Sequence[np.ndarray], depth: int) -> Candidates:
    """Merge the first `depth` items of each channel's ranking.

    Raises:
        ValueError: no ranking, or rankings of different numbers of requests.
    """
    if not rankings or len({len(one) for one in rankings}) != 1:
        raise ValueError(f"fusion: expected rankings of the same requests, got {[len(one) for one in rankings]} rows")
    cut = [one[:, :depth] for one in rankings]
    items = np.concatenate(cut, axis=1).astype(np.int64)
    channel = np.concatenate([np.full(one.shape[1], number) for number, one in enumerate(cut)])
    vote = np.concatenate([1.0 / (RRF_K + 1 + np.arange(one.shape[1])) for one in cut])
    keys = np.where(items < 0, np.iinfo(np.int64).max, items)
    order = np.argsort(keys, axis=1, kind="stable")
    keys = np.take_along_axis(keys, order, axis=1)
    fresh = np.ones(keys.shape, dtype=bool)
    fresh[:, 1:] = keys[:, 1:] != keys[:, :-1]
    fresh &= keys != np.iinfo(np.int64).max
    slot = np.cumsum(fresh, axis=1) - 1
    width = int(fresh.sum(axis=1).max(initial=0))
    merged = np.full((len(items), width), -1, dtype=np.int32)
    votes = np.zeros((len(items), width, len(cut)), dtype=np.float32)
    request, place = np.nonzero(fresh)
    merged[request, slot[request, place]] = keys[request, place]
    request, place = np.nonzero(keys != np.iinfo(np.int64).max)
    source = order[request, place]
    votes[request, slot[request, place], channel[source]] = vote[source]
    return Candidates(merged, votes)


def fuse(candidates: Candidates, weights: Sequence[float], depth: int) -> np.ndarray:
    """The fused ranking, int32 [R, depth], -1 padded; equal scores fall to the lower item row."""
    scores = candidates.votes @ np.asarray(weights, dtype=np.float32)
    scores = np.where(candidates.items < 0, -1.0, scores)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    kept = np.where(np.take_along_axis(scores, order, axis=1) > 0, np.take_along_axis(candidates.items, order, axis=1), -1)
    return np.pad(kept, ((0, 0), (0, depth - kept.shape[1])), constant_values=-1).astype(np.int32)


def rrf(rankings: Sequence[np.ndarray], depth: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Fuse rankings [R, K] into one, int32 [R, depth]; equal weights when none are given."""
    return fuse(gather_candidates(rankings, depth), [1.0] * len(rankings) if weights is None else weights, depth)


def fuse_by_budget(rankings: Mapping[str, np.ndarray], weights: Mapping[int, Mapping[str, float]], depth: int) -> np.ndarray:
    """One ranking for all item budgets, int32 [R, depth], -1 padded: up to each budget it goes on with the items of that budget's fusion that are not in it yet.

    Args:
        rankings: channel name -> [R, K]. weights: item budget -> channel name -> weight; the last one's fusion fills what is left.
    """
    candidates = gather_candidates(list(rankings.values()), depth)
    budgets = sorted(weights)
    fusions = [fuse(candidates, [weights[budget][name] for name in rankings], depth) for budget in budgets]
    ends = [*budgets[:-1], depth]
    ranked = np.full_like(fusions[0], -1)
    for row, lists in enumerate(zip(*fusions, strict=True)):
        chosen: dict[int, None] = {}
        for end, items in zip(ends, lists, strict=True):
            fresh = [item for item in items.tolist() if item >= 0 and item not in chosen]
            chosen |= dict.fromkeys(fresh[: max(end - len(chosen), 0)])
        ranked[row, : len(chosen)] = list(chosen)
    return ranked


def tune_weights(rankings: Mapping[str, np.ndarray], targets: Targets, *, depth: int, cuts: Sequence[int] = (10, 100)) -> dict[int, dict[str, float]]:
    """For each item budget of `cuts` the weights of `WEIGHT_GRID` with the best recall there on validation requests.

    The first channel keeps weight 1 (only ratios matter), every other takes each value of the grid. Among equals the weights nearest 1 win.

    Args:
        rankings: channel name -> [R, K] on the validation requests.
        targets: their clicked items.
    """
    names = list(rankings)
    candidates = gather_candidates(list(rankings.values()), depth)
    combinations = sorted(itertools.product(WEIGHT_GRID, repeat=len(names) - 1), key=lambda weights: sum(abs(np.log(weight)) for weight in weights))
    best, chosen = dict.fromkeys(cuts, -1.0), dict.fromkeys(cuts, combinations[0])
    for weights in combinations:
        positions = ranking_positions(fuse(candidates, [1.0, *weights], max(cuts)), targets)
        for cut in cuts:
            score = mean_over_requests(recall_at(positions, targets, cut)) or 0.0
            if score > best[cut] + 1e-9:
                best[cut], chosen[cut] = score, weights
    return {cut: dict(zip(names, [1.0, *weights], strict=True)) for cut, weights in chosen.items()}
