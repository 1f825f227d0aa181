"""Recall metrics of SID lists and of item rankings, vectorised over (request, target) pairs.

Source: the evaluation of CQ-SID and EG-GRPO (arXiv:2605.14434, section 4), which counts hits per generated cluster ID.
Deviations: hits are counted on items by default (a target counts when its item lies in an expanded cluster), SID-level shares stand
beside them; the paper does not define `pvr`, we read it as the share of a request's exposed items that the top N SIDs cover; budgets of
items (`hit@items`) are added because larger clusters buy better beam metrics.

Shapes: R requests, P (request, target item) pairs, N catalogue items, S SIDs, B beam size, K ranking depth. Arrays of item or SID rows are
padded with -1. Per-request results are float64 [R], `nan` where a request has no target of the tier; means leave those out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NOT_FOUND = int(np.iinfo(np.int32).max)  # rank of a target that is in no list: beyond every cut
JUNK_BELOW = 2.0  # human grades run from 1 (irrelevant) to 3 (perfect)
_CHUNK_ELEMENTS = 1 << 24  # largest temporary matrix, in elements


@dataclass(frozen=True)
class Targets:
    """The targets of one tier (clicked, purchased or exposed items) as pairs sorted by request.

    Attributes:
        request: int64 [P], request of each pair, ascending.
        item: int64 [P], item row of each pair.
        num_requests: R; requests without a pair have no target of the tier.
    """

    request: IntArray
    item: IntArray
    num_requests: int

    @classmethod
    def from_lists(cls, items: Sequence[IntArray]) -> Targets:
        """Targets from one array of item rows per request; a repeated item counts once."""
        unique = [np.unique(rows[rows >= 0]) if len(rows) else np.zeros(0, dtype=np.int64) for rows in items]
        lengths = np.array([len(rows) for rows in unique], dtype=np.int64)
        request = np.repeat(np.arange(len(items)), lengths)
        return cls(request, np.concatenate(unique).astype(np.int64) if unique else np.zeros(0, dtype=np.int64), len(items))

    def where(self, keep: BoolArray) -> Targets:
        """Only the pairs marked in `keep` [P]; requests stay numbered as they are."""
        return Targets(self.request[keep], self.item[keep], self.num_requests)

    def counts(self) -> IntArray:
        """int64 [R], targets of each request."""
        return np.bincount(self.request, minlength=self.num_requests)


@dataclass(frozen=True)
class ClusterOrder:
    """Where items stand inside their clusters, with ties.

    Attributes:
        sizes: int64 [S], items in each SID.
        tie_start: int64 [N], items of the cluster with a strictly higher score.
        tie_size: int64 [N], items of the cluster with the same score, the item itself included.
    """

    sizes: IntArray
    tie_start: IntArray
    tie_size: IntArray


def cluster_order(item_sid: IntArray, num_sids: int, scores: FloatArray) -> ClusterOrder:
    """Order each cluster's items by `scores` [N], highest first; `nan` counts as the lowest.

    Args:
        item_sid: [N], SID row of each item, -1 for items without one.
        num_sids: S.
        scores: [N], what the index orders by (prior score or popularity).
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    sids = np.where(item_sid < 0, num_sids, item_sid)
    order = np.lexsort((-scores, sids))
    sid_sorted, score_sorted = sids[order], scores[order]
    places = np.arange(len(order))
    new_cluster = np.r_[True, sid_sorted[1:] != sid_sorted[:-1]] if len(order) else np.zeros(0, dtype=bool)
    new_tie = new_cluster | np.r_[True, score_sorted[1:] != score_sorted[:-1]] if len(order) else new_cluster
    cluster_begin = np.maximum.accumulate(np.where(new_cluster, places, 0))
    tie_begin = np.maximum.accumulate(np.where(new_tie, places, 0))
    group = np.cumsum(new_tie) - 1
    tie_start, tie_size = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
    tie_start[order] = tie_begin - cluster_begin
    tie_size[order] = np.bincount(group)[group] if len(order) else group
    return ClusterOrder(np.bincount(sids, minlength=num_sids + 1)[:num_sids], tie_start, tie_size)


# Per-request aggregation ---------------------------------------------------------------------------------------------


def share(found: npt.NDArray[Any], targets: Targets) -> FloatArray:
    """Mean of `found` [P] (booleans or shares) over each request's targets: float64 [R]."""
    counts = targets.counts()
    sums = np.bincount(targets.request, weights=found.astype(np.float64), minlength=targets.num_requests)
    return np.asarray(np.divide(sums, counts, out=np.full(targets.num_requests, np.nan), where=counts > 0), dtype=np.float64)


def any_found(found: npt.NDArray[Any], targets: Targets) -> FloatArray:
    """1.0 where a request has at least one found target, 0.0 where it has none among its targets: float64 [R]."""
    counts = targets.counts()
    hit = np.bincount(targets.request, weights=found.astype(np.float64), minlength=targets.num_requests) > 0
    return np.where(counts > 0, hit.astype(np.float64), np.nan)


def mean_over_requests(per_request: FloatArray) -> float | None:
    """Mean over the requests that have a target; None (printed n/a) where none has."""
    valid = ~np.isnan(per_request)
    return float(per_request[valid].mean()) if valid.any() else None


# SID lists -----------------------------------------------------------------------------------------------------------


def sid_ranks(sid_rows: IntArray, item_sid: IntArray, targets: Targets) -> IntArray:
    """Rank (0-based) of each target's SID in its request's list.

    Args:
        sid_rows: [R, B], SIDs best first, -1 padded.
        item_sid: [N], SID row of each item, -1 where it has none.

    Returns:
        int64 [P]; `NOT_FOUND` where the SID is not in the list.
    """
    wanted = item_sid[targets.item]
    return _positions(sid_rows, targets.request, np.where(wanted < 0, -2, wanted))


def click_hit_rate(ranks: IntArray, clicked: Targets, n: int) -> FloatArray:
    """clk@N: share of a request's clicked items that lie in the expansion of its top `n` SIDs, float64 [R]. Also for purchases."""
    return share(ranks < n, clicked)


def exposure_hit_rate(ranks: IntArray, exposed: Targets, n: int) -> FloatArray:
    """exp@N: 1.0 where any exposed item of the request lies in its top `n` SIDs, float64 [R]."""
    return any_found(ranks < n, exposed)


def page_view_recall(ranks: IntArray, exposed: Targets, n: int) -> FloatArray:
    """pvr@N: share of a request's exposed items that its top `n` SIDs cover, float64 [R]."""
    return share(ranks < n, exposed)


def sid_hit_rate(sid_rows: IntArray, item_sid: IntArray, targets: Targets, n: int) -> FloatArray:
    """The SID-level view of clk@N: share of the distinct SIDs of a request's targets among its top `n` SIDs, float64 [R]."""
    sids = item_sid[targets.item].astype(np.int64)
    keys = targets.request.astype(np.int64) * (int(item_sid.max(initial=0)) + 2) + sids + 1
    _, first = np.unique(keys, return_index=True)
    distinct = Targets(targets.request[first], targets.item[first], targets.num_requests)
    return share(sid_ranks(sid_rows[:, :n], item_sid, distinct) < n, distinct)


def hit_items(
    sid_rows: IntArray, item_sid: IntArray, order: ClusterOrder, targets: Targets, budgets: Sequence[int], *, random_order: bool = False
) -> list[FloatArray]:
    """hit@items M: share of a request's targets among the first M items of its expanded list, for each M in `budgets`.

    Items are served by SID rank, then by their order inside the cluster. A target in a run of equal scores counts with the part of the run
    that fits into the budget (its expected share under a random order of the run). `random_order` treats whole clusters as such runs.

    Returns:
        one float64 [R] per budget.
    """
    ranks = sid_ranks(sid_rows, item_sid, targets)
    found = ranks != NOT_FOUND
    sizes = np.where(sid_rows >= 0, order.sizes[np.maximum(sid_rows, 0)], 0) if sid_rows.size else np.zeros(sid_rows.shape, dtype=np.int64)
    before = np.cumsum(sizes, axis=1) - sizes
    place = np.where(found, ranks, 0)
    start = before[targets.request, place].astype(np.float64)
    if random_order:
        run = order.sizes[np.maximum(item_sid[targets.item], 0)].astype(np.float64)
    else:
        start += order.tie_start[targets.item]
        run = order.tie_size[targets.item].astype(np.float64)
    return [share(np.where(found, np.clip((budget - start) / np.maximum(run, 1), 0.0, 1.0), 0.0), targets) for budget in budgets]


def cut_hit_rate(
    sid_rows: IntArray, item_sid: IntArray, offsets: IntArray, cluster_items: IntArray, scores: FloatArray, targets: Targets, beams: Sequence[int], cut: int
) -> list[FloatArray]:
    """Share of targets left when the expansion of the top `beam` SIDs is cut to its `cut` best items by `scores`, for each beam.

    This is the paper's trade-off: a wider beam finds more targets and pushes more of them out of the cut. Ties at the cut count with
    their expected share.

    Args:
        offsets, cluster_items: the SID -> items index, [S + 1] and [N]; cluster s holds `cluster_items[offsets[s]:offsets[s + 1]]`.
        scores: [N], prior score of each item; `nan` counts as the lowest.

    Returns:
        one float64 [R] per beam.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ranks = sid_ranks(sid_rows, item_sid, targets)
    lists = np.maximum(sid_rows, 0)
    sizes = np.where(sid_rows >= 0, offsets[lists + 1] - offsets[lists], 0) if sid_rows.size else np.zeros(sid_rows.shape, dtype=np.int64)
    ends = np.cumsum(sizes, axis=1)
    kept = np.zeros((len(beams), len(targets.request)))
    found = np.flatnonzero(ranks != NOT_FOUND)
    for pairs in np.split(found, np.flatnonzero(np.diff(targets.request[found])) + 1) if len(found) else []:
        row = int(targets.request[pairs[0]])
        expansion = np.concatenate([cluster_items[offsets[sid] : offsets[sid + 1]] for sid in sid_rows[row] if sid >= 0])
        theirs, own = scores[expansion], scores[targets.item[pairs]][:, None]
        higher = np.pad(np.cumsum(theirs > own, axis=1), ((0, 0), (1, 0)))
        equal = np.pad(np.cumsum(theirs == own, axis=1), ((0, 0), (1, 0)))
        for number, beam in enumerate(beams):
            end = ends[row, min(beam, ends.shape[1]) - 1]
            fits = np.clip((cut - higher[:, end]) / np.maximum(equal[:, end], 1), 0.0, 1.0)
            kept[number, pairs] = np.where(ranks[pairs] < beam, fits, 0.0)
    return [share(one, targets) for one in kept]


# Item rankings -------------------------------------------------------------------------------------------------------


def ranking_positions(ranked: IntArray, targets: Targets) -> IntArray:
    """Position (0-based) of each target in its request's ranking [R, K] (-1 padded); `NOT_FOUND` where absent: int64 [P]."""
    return _positions(ranked, targets.request, targets.item)


def recall_at(positions: IntArray, targets: Targets, k: int) -> FloatArray:
    """recall@k: share of a request's targets among the first `k` items, float64 [R]."""
    return share(positions < k, targets)


def hit_at(positions: IntArray, targets: Targets, k: int) -> FloatArray:
    """hit@k: 1.0 where any target is among the first `k` items, float64 [R]."""
    return any_found(positions < k, targets)


def union_recall(positions: Sequence[IntArray], targets: Targets, k: int) -> FloatArray:
    """union@k: share of a request's targets that at least one of the channels finds in its first `k` items, float64 [R]."""
    return share(np.minimum.reduce(list(positions)) < k, targets)


def marginal_recall(positions: IntArray, others: Sequence[IntArray], targets: Targets, k: int) -> FloatArray:
    """marginal@k: share of a request's targets that the channel finds in its first `k` items and none of `others` does, float64 [R]."""
    return share((positions < k) & (np.minimum.reduce(list(others)) >= k), targets)


def marginal_of_missed(positions: IntArray, others: Sequence[IntArray], targets: Targets, k: int) -> FloatArray:
    """Of a request's targets that all `others` miss at `k`, the share that the channel finds; `nan` where they miss none. float64 [R]."""
    missed = np.minimum.reduce(list(others)) >= k
    return share(positions[missed] < k, targets.where(missed))


# Judged sets ---------------------------------------------------------------------------------------------------------


def grades_of(ranked: IntArray, judged: Targets, grades: FloatArray, num_items: int) -> FloatArray:
    """The human grade of each ranked item, float64 [R, K]; `nan` where it was not judged for that request.

    Args:
        judged: the judged pairs, `grades` [P] beside them.
        num_items: N.
    """
    keys = judged.request.astype(np.int64) * num_items + judged.item
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], np.asarray(grades, dtype=np.float64)[order]
    asked = np.arange(len(ranked))[:, None] * num_items + ranked.astype(np.int64)
    if not len(keys):
        return np.full(ranked.shape, np.nan)
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where((ranked >= 0) & (keys[place] == asked), values[place], np.nan)


def judged_at(ranked: IntArray, ranked_grades: FloatArray, k: int) -> FloatArray:
    """judged@k: share of a request's first `k` answers that a human judged, float64 [R]; `nan` where there is no answer."""
    answers = (ranked[:, :k] >= 0).sum(axis=1)
    judged = (~np.isnan(ranked_grades[:, :k])).sum(axis=1)
    return np.asarray(np.divide(judged, answers, out=np.full(len(ranked), np.nan), where=answers > 0), dtype=np.float64)


def junk_at(ranked_grades: FloatArray, k: int) -> FloatArray:
    """junk@k: share of the judged answers among the first `k` with a grade below 2.0, float64 [R]; `nan` where none is judged."""
    top = ranked_grades[:, :k]
    judged = (~np.isnan(top)).sum(axis=1)
    return np.asarray(np.divide((top < JUNK_BELOW).sum(axis=1), judged, out=np.full(len(top), np.nan), where=judged > 0), dtype=np.float64)


def condensed(ranked: IntArray, ranked_grades: FloatArray) -> tuple[IntArray, FloatArray]:
    """The ranking without its unjudged items (Sakai, SIGIR 2007): judged items keep their order, -1 and `nan` fill up. Both [R, K]."""
    unjudged = np.isnan(ranked_grades)
    order = np.argsort(unjudged, axis=1, kind="stable")
    gone = np.take_along_axis(unjudged, order, axis=1)
    return np.where(gone, -1, np.take_along_axis(ranked, order, axis=1)), np.take_along_axis(ranked_grades, order, axis=1)


def ndcg_at(ranked_grades: FloatArray, judged: Targets, grades: FloatArray, k: int) -> FloatArray:
    """nDCG@k with gain `grade - 1` and discount log2(rank + 2), float64 [R]; unjudged answers gain nothing.

    The ideal ranking holds all judged items of the request; `nan` where none of them gains anything.
    """
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    top = np.nan_to_num(ranked_grades[:, :k] - 1.0, nan=0.0)
    gained = (top * discount[: top.shape[1]]).sum(axis=1)
    gains = np.asarray(grades, dtype=np.float64) - 1.0
    order = np.lexsort((-gains, judged.request))
    request = judged.request[order]
    begin = np.searchsorted(request, np.arange(judged.num_requests))
    rank = np.arange(len(order)) - begin[request]
    counted = rank < k
    ideal = np.bincount(request[counted], weights=gains[order][counted] * discount[rank[counted]], minlength=judged.num_requests)
    return np.asarray(np.divide(gained, ideal, out=np.full(judged.num_requests, np.nan), where=ideal > 0), dtype=np.float64)


def _positions(lists: IntArray, request: IntArray, wanted: IntArray) -> IntArray:
    """First column of `lists[request]` that equals `wanted`, in chunks of bounded memory: int64 [P]."""
    result = np.full(len(request), NOT_FOUND, dtype=np.int64)
    if lists.shape[1] == 0:
        return result
    step = max(1, _CHUNK_ELEMENTS // lists.shape[1])
    for begin in range(0, len(request), step):
        part = slice(begin, begin + step)
        equal = lists[request[part]] == wanted[part, None]
        first = equal.argmax(axis=1)
        result[part] = np.where(equal[np.arange(len(first)), first], first, NOT_FOUND)
    return result
