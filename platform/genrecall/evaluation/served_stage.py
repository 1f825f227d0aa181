"""Which stage of the main variant is served: the one that finds most on the validation requests.

Chosen there and not on the test requests, so that the test numbers of the served channel stay honest. It also is what keeps an
alignment that lost, or a personalised stage that learned nothing from the shoppers, out of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genrecall.evaluation.metrics import IntArray, Targets, ranking_positions, recall_at


def choose_served(rankings: Mapping[str, IntArray], targets: Targets, cuts: Sequence[int]) -> tuple[str, dict[str, dict[str, float | None]]]:
    """The stage to serve and what was measured.

    Args:
        rankings: stage -> items int32 [R, K] (-1 padded) on the validation requests, earlier stages first.
        targets: clicked items of those requests.
        cuts: k of recall@k; the highest mean over them wins, a later stage where they are equal.

    Returns:
        name of the stage, and {stage: {"recall@k": mean, None where no request has a target}}.
    """
    measured: dict[str, dict[str, float | None]] = {}
    for stage, ranked in rankings.items():
        positions = ranking_positions(ranked, targets)
        per_cut = {f"recall@{cut}": recall_at(positions, targets, cut) for cut in cuts}
        measured[stage] = {name: float(np.nanmean(values)) if not np.isnan(values).all() else None for name, values in per_cut.items()}
    served, best = "", -1.0
    for stage, recalls in measured.items():
        mean = sum(value or 0.0 for value in recalls.values()) / len(recalls)
        if mean >= best:
            served, best = stage, mean
    return served, measured
