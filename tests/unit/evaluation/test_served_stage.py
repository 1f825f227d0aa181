"""The stage that finds most on validation is served, the aligned one only if no guarded metric falls beyond noise."""

from __future__ import annotations

import numpy as np
import pytest

from genrecall.evaluation.metrics import Targets
from genrecall.evaluation.results_table import barred_line, served_line
from genrecall.evaluation.served_stage import GUARDED, choose_served, falls_beyond_noise

TARGETS = Targets(request=np.array([0, 1]), item=np.array([7, 8]), num_requests=2)


def ranked(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def test_the_stage_that_finds_more_is_served() -> None:
    rankings = {"stage3": ranked([7, 1], [1, 8]), "stage4": ranked([7, 1], [8, 1])}
    served, measured = choose_served(rankings, TARGETS, (1, 2))
    assert served == "stage4"
    assert measured == {"stage3": {"recall@1": 0.5, "recall@2": 1.0}, "stage4": {"recall@1": 1.0, "recall@2": 1.0}}


def test_an_alignment_that_lost_stays_behind() -> None:
    rankings = {"stage3": ranked([7, 1], [1, 8]), "stage4": ranked([7, 1], [2, 1])}
    assert choose_served(rankings, TARGETS, (1, 2))[0] == "stage3"


@pytest.mark.filterwarnings("error")
def test_without_any_validation_target_the_later_stage_is_served_and_nothing_is_claimed() -> None:
    nothing = Targets(request=np.zeros(0, int), item=np.zeros(0, int), num_requests=2)
    served, measured = choose_served({"stage3": ranked([1], [1]), "stage4": ranked([2], [2])}, nothing, (1,))
    assert served == "stage4"
    assert measured["stage3"] == {"recall@1": None}


def test_a_barred_stage_is_measured_and_the_best_of_the_others_is_served() -> None:
    rankings = {"stage2": ranked([7, 1], [8, 1]), "stage3": ranked([7, 1], [1, 8]), "stage4": ranked([7, 8], [8, 7])}
    served, measured = choose_served(rankings, TARGETS, (1, 2), barred=["stage4"])
    assert served == "stage2"
    assert measured["stage4"] == {"recall@1": 1.0, "recall@2": 1.0}
    assert choose_served(rankings, TARGETS, (1, 2))[0] == "stage4"


def columns(**values: float) -> dict[str, np.ndarray]:
    """Of 1,000 requests: a metric's share of them, the first ones, found."""
    return {metric: (np.arange(1000) < 1000 * values.get(metric, 0.5)).astype(np.float64) for metric in GUARDED}


def test_only_a_metric_whose_whole_interval_lies_below_zero_falls() -> None:
    # Paired, 20 fewer of 500 is -4 % with a standard error of 0.9 %; 1 fewer is -0.2 %, and a resample without that request has none.
    aligned = columns(**{"clk@1": 0.48, "clk@10": 0.499, "exp@1": 0.52})
    falls = falls_beyond_noise(aligned, columns(), samples=500, seed=0)
    assert list(falls) == ["clk@1"]
    assert falls["clk@1"].value == pytest.approx(-0.04)
    assert -0.07 < falls["clk@1"].low < -0.04 < falls["clk@1"].high < -0.01  # type: ignore[operator]
    assert falls_beyond_noise(columns(), columns(), samples=500, seed=0) == {}
    assert falls_beyond_noise(columns(**{"clk@1": 0.52}), columns(), samples=500, seed=0) == {}


@pytest.mark.parametrize("metric", GUARDED)
def test_every_guarded_metric_can_bar_the_aligned_stage(metric: str) -> None:
    assert list(falls_beyond_noise(columns(**{metric: 0.4}), columns(), samples=200, seed=0)) == [metric]


def test_metrics_without_a_target_or_a_hit_bar_nothing() -> None:
    nothing, none_found = dict.fromkeys(GUARDED, np.full(4, np.nan)), dict.fromkeys(GUARDED, np.zeros(4))
    assert falls_beyond_noise(nothing, nothing, samples=50, seed=0) == {}
    assert falls_beyond_noise(none_found, none_found, samples=50, seed=0) == {}
    empty = dict.fromkeys(GUARDED, np.zeros(0))
    assert falls_beyond_noise(empty, empty, samples=50, seed=0) == {}


def test_results_say_which_metric_barred_the_aligned_stage() -> None:
    metrics = {"served": "stage3", "validation_recall": {"stage3": {"recall@10": 0.5}, "stage4": {"recall@10": 0.5001}}}
    assert barred_line(metrics) == barred_line(metrics | {"stage4_falls": {}}) == ""
    line = served_line(metrics | {"stage4_falls": {"clk@1": {"value": -0.04, "low": -0.06, "high": -0.02}}})
    assert line.startswith("Served: stage 3 (query and shopper), by recall on the validation requests (")
    assert line.endswith(
        "Not served: stage 4 (EG-GRPO), because on the validation requests it falls beyond noise against stage 3: clk@1 by -4.0 % (-6.0 to -2.0)."
    )
