"""Which stage of the main variant is served: the aligned one only where the validation requests show no loss.

The choice is made on validation requests, so that the test numbers of the served channel stay honest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genrecall.evaluation.metrics import IntArray, Targets, ranking_positions, recall_at


def choose_served(rankings: Mapping[str, IntArray], targets: Targets, cuts: Sequence[int]) -> tuple[str, dict[str, dict[str, float | None]]]:
    """The row to serve and what was measured.

    Args:
        rankings: row name -> items int32 [R, K] (-1 padded) on the validation requests; the first is the stage to fall back to.
        targets: clicked items of those requests.
        cuts: k of recall@k; a later row is served only if it is not below the first at any of them.

    Returns:
        name of the row, and {row: {"recall@k": mean, None where no request has a target}}.
    """
    measured: dict[str, dict[str, float | None]] = {}
    for row, ranked in rankings.items():
        positions = ranking_positions(ranked, targets)
        per_cut = {f"recall@{cut}": recall_at(positions, targets, cut) for cut in cuts}
        measured[row] = {name: float(np.nanmean(values)) if not np.isnan(values).all() else None for name, values in per_cut.items()}
    first, *others = rankings
    served = first
    for row in others:
        pairs = [(measured[row][name], measured[served][name]) for name in measured[first]]
        if all(ours is None or theirs is None or ours >= theirs for ours, theirs in pairs):
            served = row
    return served, measured
