"""Which stage of the main variant is served: the one that finds most on the validation requests, the aligned one only where it harms nothing.

Chosen there and not on the test requests, so that the test numbers of the served channel stay honest. It also is what keeps an
alignment that lost, or a personalised stage that learned nothing from the shoppers, out of the bundle. Recall of items alone would let
through an alignment that gains a little of it and loses clicks or exposures among its first SIDs, the trade that plain GRPO makes (EG-GRPO,
arXiv:2605.14434), so those are guarded too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from genrecall.evaluation.bootstrap import Bootstrap, FloatArray, Interval
from genrecall.evaluation.metrics import IntArray, Targets, ranking_positions, recall_at

GUARDED = ("clk@1", "clk@10", "exp@1", "exp@10", "pvr@10")


def choose_served(
    rankings: Mapping[str, IntArray], targets: Targets, cuts: Sequence[int], *, barred: Collection[str] = ()
) -> tuple[str, dict[str, dict[str, float | None]]]:
    """The stage to serve and what was measured.

    Args:
        rankings: stage -> items int32 [R, K] (-1 padded) on the validation requests, earlier stages first.
        targets: clicked items of those requests.
        cuts: k of recall@k; the highest mean over them wins, a later stage where they are equal.
        barred: stages that are measured and not served; not all of them.

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
        if mean >= best and stage not in barred:
            served, best = stage, mean
    return served, measured


def falls_beyond_noise(aligned: Mapping[str, FloatArray], supervised: Mapping[str, FloatArray], *, samples: int, seed: int) -> dict[str, Interval]:
    """The guarded metrics that fall from stage 3 to stage 4: those whose paired gain's upper bound lies below 0.

    Args:
        aligned, supervised: metric -> float64 [R] for all of `GUARDED`, of one set of requests.
        samples, seed: of the bootstrap.

    Returns:
        metric -> its relative gain with the 95 % interval; empty where none falls.
    """
    ours, theirs = (np.stack([columns[metric] for metric in GUARDED], axis=1) for columns in (aligned, supervised))
    gains = Bootstrap(len(ours), samples=samples, seed=seed).gains(ours, theirs)
    return {metric: gain for metric, gain in zip(GUARDED, gains, strict=True) if gain.high is not None and gain.high < 0}
