"""Everything measured of one SID list or one item ranking, as named per-request columns.

Names as printed: `clk@N`, `exp@N`, `pvr@N`, `buy@N` (clk@N of purchases), `sid_clk@N` (SID level), `hit@itemsM`, `hit@items_randomM`,
`cut1000@beamN`, `items@N` (size of the expansion), `invalid@N`; `recall@k`, `hit@k`, `junk@k`, `judged@k`, `ndcg@k`, `condensed_recall@k`,
`condensed_ndcg@k`, `marginal@k`, `missed_found@k` (share found of what the others miss), `union@k`.

Shapes: R requests, B beam size, K depth, N items. Columns are float64 [R], `nan` where a request has no target of the tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genrecall.data.interactions import Requests
from genrecall.evaluation import metrics
from genrecall.evaluation.metrics import ClusterOrder, Targets, cluster_order
from genrecall.generator.retriever import GeneratedSids, Retriever
from genrecall.sid.index import SidIndex

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tiers:
    """Targets by tier, and human judgements where there are any: `judged` pairs with `grades` [P] beside them."""

    clicked: Targets
    purchased: Targets
    exposed: Targets
    judged: Targets
    grades: np.ndarray

    @classmethod
    def of(cls, requests: Requests) -> Tiers:
        """The targets of requests. Where judgements and clicks are both logged, each tier counts every item once."""
        judged_lists, grade_lists = [], []
        for exposed, grades in zip(requests.exposed, requests.grades, strict=True):
            items, first = np.unique(exposed[~np.isnan(grades)], return_index=True)
            judged_lists.append(items)
            grade_lists.append(grades[~np.isnan(grades)][first])
        return cls(
            Targets.from_lists(requests.clicked),
            Targets.from_lists(requests.purchased),
            Targets.from_lists(requests.exposed),
            Targets.from_lists(judged_lists),
            np.concatenate(grade_lists).astype(np.float64) if grade_lists else np.zeros(0),
        )

    def only_items(self, keep: np.ndarray) -> Tiers:
        """The targets among the items marked in `keep` [N]; judgements stay whole."""
        clicked, purchased, exposed = (tier.where(keep[tier.item]) for tier in (self.clicked, self.purchased, self.exposed))
        return Tiers(clicked, purchased, exposed, self.judged, self.grades)


def sid_columns(
    sid_rows: np.ndarray,
    index: SidIndex,
    tiers: Tiers,
    ranked: np.ndarray | None = None,
    *,
    beams: Sequence[int],
    budgets: Sequence[int],
    cut_items: int,
    cut_beams: Sequence[int],
) -> Columns:
    """Columns of a generator's SID lists.

    Args:
        sid_rows: int32 [R, B], best first, -1 padded; the top N of it stand for beam N.
        index: of the same SID space.
        ranked: int32 [R, >= M], the items as they are served; None where the SIDs' order and the order inside a cluster say it, ties shared.
        beams: N of the metrics, each at most B.
        budgets: M of hit@items.
        cut_items: the cut of cut-to-M; cut_beams: its beams.
    """
    item_sid, prior = np.asarray(index.item_sid), np.asarray(index.prior, dtype=np.float64)
    order: ClusterOrder = cluster_order(item_sid, len(index), prior)
    ranks = {
        name: metrics.sid_ranks(sid_rows, item_sid, tier) for name, tier in (("click", tiers.clicked), ("buy", tiers.purchased), ("exposed", tiers.exposed))
    }
    columns: Columns = {}
    for n in beams:
        columns[f"clk@{n}"] = metrics.click_hit_rate(ranks["click"], tiers.clicked, n)
        columns[f"exp@{n}"] = metrics.exposure_hit_rate(ranks["exposed"], tiers.exposed, n)
        columns[f"pvr@{n}"] = metrics.page_view_recall(ranks["exposed"], tiers.exposed, n)
        columns[f"buy@{n}"] = metrics.click_hit_rate(ranks["buy"], tiers.purchased, n)
        columns[f"sid_clk@{n}"] = metrics.sid_hit_rate(sid_rows, item_sid, tiers.clicked, n)
        columns[f"items@{n}"] = index.sizes(sid_rows[:, :n]).sum(axis=1).astype(np.float64)
    for name, random_order in (("hit@items", False), ("hit@items_random", True)):
        if ranked is not None and not random_order:
            positions = metrics.ranking_positions(ranked, tiers.clicked)
            shares = [metrics.recall_at(positions, tiers.clicked, budget) for budget in budgets]
        else:
            shares = metrics.hit_items(sid_rows, item_sid, order, tiers.clicked, budgets, random_order=random_order)
        columns |= {f"{name}{budget}": one for budget, one in zip(budgets, shares, strict=True)}
    cuts = metrics.cut_hit_rate(sid_rows, item_sid, np.asarray(index.offsets), np.asarray(index.item_rows), prior, tiers.clicked, cut_beams, cut_items)
    columns |= {f"cut{cut_items}@beam{beam}": one for beam, one in zip(cut_beams, cuts, strict=True)}
    columns[f"invalid@{sid_rows.shape[1]}"] = invalid_share(sid_rows, len(index))
    return columns


def invalid_share(sid_rows: np.ndarray, num_sids: int) -> np.ndarray:
    """Share of a request's SIDs that do not exist or repeat an earlier one, float64 [R]; `nan` where there is no SID at all."""
    ordered = np.sort(sid_rows, axis=1)
    given = (ordered != -1).sum(axis=1)
    wrong = ((ordered < -1) | (ordered >= num_sids)).sum(axis=1)
    wrong = wrong + ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0) & (ordered[:, 1:] < num_sids)).sum(axis=1)
    return np.asarray(np.divide(wrong, given, out=np.full(len(sid_rows), np.nan), where=given > 0))


def item_lists(retriever: Retriever, found: GeneratedSids, depth: int) -> np.ndarray:
    """The first `depth` items served for each of R requests: int32 [R, depth], -1 padded."""
    ranked = np.full((len(found.sid_rows), depth), -1, dtype=np.int32)
    for row in range(len(ranked)):
        items = retriever.expand(*found.of(row), depth).item_rows
        ranked[row, : len(items)] = items
    return ranked


def channel_columns(
    rankings: Mapping[str, np.ndarray], tiers: Tiers, *, num_items: int, cuts: Sequence[int], existing: Sequence[str], ours: str
) -> dict[str, Columns]:
    """Columns of every channel.

    Args:
        rankings: channel -> int32 [R, K] item rows.
        num_items: N.
        cuts: k of the metrics.
        existing: channels that the site already has; `ours` is measured by what it adds to them.
    """
    positions = {name: metrics.ranking_positions(ranked, tiers.clicked) for name, ranked in rankings.items()}
    found: dict[str, Columns] = {}
    for name, ranked in rankings.items():
        columns: Columns = {}
        for k in cuts:
            columns[f"recall@{k}"] = metrics.recall_at(positions[name], tiers.clicked, k)
            columns[f"hit@{k}"] = metrics.hit_at(positions[name], tiers.clicked, k)
        if len(tiers.judged.request):
            columns |= judged_columns(ranked, tiers, num_items=num_items, cuts=cuts)
        found[name] = columns
    others = [positions[name] for name in existing if name in positions]
    if others and ours in rankings:
        for k in cuts:
            found[ours][f"marginal@{k}"] = metrics.marginal_recall(positions[ours], others, tiers.clicked, k)
            found[ours][f"missed_found@{k}"] = metrics.marginal_of_missed(positions[ours], others, tiers.clicked, k)
            found[ours][f"union@{k}"] = metrics.union_recall([positions[ours], *others], tiers.clicked, k)
    return found


def judged_columns(ranked: np.ndarray, tiers: Tiers, *, num_items: int, cuts: Sequence[int]) -> Columns:
    """Columns that need human grades: junk and judged shares, nDCG, and the condensed-list versions without unjudged items."""
    grades = metrics.grades_of(ranked, tiers.judged, tiers.grades, num_items)
    short, short_grades = metrics.condensed(ranked, grades)
    short_positions = metrics.ranking_positions(short, tiers.clicked)
    has_judgement = tiers.judged.counts() > 0
    columns: Columns = {}
    for k in cuts:
        columns[f"judged@{k}"] = np.where(has_judgement, metrics.judged_at(ranked, grades, k), np.nan)
        columns[f"junk@{k}"] = metrics.junk_at(grades, k)
        columns[f"ndcg@{k}"] = metrics.ndcg_at(grades, tiers.judged, tiers.grades, k)
        columns[f"condensed_recall@{k}"] = metrics.recall_at(short_positions, tiers.clicked, k)
        columns[f"condensed_ndcg@{k}"] = metrics.ndcg_at(short_grades, tiers.judged, tiers.grades, k)
    return columns
