"""The stage that finds most on validation is served."""

from __future__ import annotations

import numpy as np
import pytest

from genrecall.evaluation.metrics import Targets
from genrecall.evaluation.served_stage import choose_served

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
