"""A ranking model that hangs or raises: its call gives no scores, the run goes on, and ends after several in a row."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from genrecall.rl.bounded_scorer import BoundedScorer, RankerFailedError

PAIRS = np.array([0, 0, 1]), np.array([4, 5, 6], dtype=np.int32)


class Scripted:
    """Does what its script says, call by call: a number is the score, an exception is raised, an event is waited for."""

    def __init__(self, *script) -> None:
        self.script = list(script)
        self.calls = 0

    def __call__(self, request_rows, item_rows):
        act = self.script[self.calls]
        self.calls += 1
        if isinstance(act, threading.Event):
            act.wait(30)
            act = -1.0
        if isinstance(act, Exception):
            raise act
        return np.full(len(item_rows), act)


def test_an_error_costs_its_call_and_is_counted():
    scorer = BoundedScorer(Scripted(0.2, ValueError("no features"), 0.4), timeout_s=10, max_failures=2)
    assert scorer(*PAIRS).tolist() == [0.2] * 3
    assert np.isnan(scorer(*PAIRS)).tolist() == [True] * 3
    assert scorer(*PAIRS).tolist() == [0.4] * 3
    assert scorer.failed_calls == 1


def test_failures_in_a_row_end_the_run_and_say_what_to_do():
    scorer = BoundedScorer(Scripted(KeyError("a"), 0.1, KeyError("b"), KeyError("c")), timeout_s=10, max_failures=2)
    for _ in range(3):
        scorer(*PAIRS)
    expected = r"failed 2 times in a row, the last time with: KeyError: 'c'\. Mend it and rerun the same job, .* or set align\.reward\.mode=feedback"
    with pytest.raises(RankerFailedError, match=expected):
        scorer(*PAIRS)
    assert scorer.failed_calls == 3


def test_a_call_over_time_gives_nothing_and_no_other_starts_while_it_runs():
    stuck = threading.Event()
    scripted = Scripted(stuck, 0.3)
    scorer = BoundedScorer(scripted, timeout_s=0.1, max_failures=5)
    started = time.monotonic()
    assert np.isnan(scorer(*PAIRS)).all()
    assert np.isnan(scorer(*PAIRS)).all()
    assert time.monotonic() - started < 5
    assert (scripted.calls, scorer.failed_calls) == (1, 2)
    stuck.set()
    scorer = BoundedScorer(Scripted(0.3), timeout_s=10, max_failures=5)
    assert scorer(*PAIRS).tolist() == [0.3] * 3  # and never the late answer of another call


def test_a_late_answer_is_not_taken_for_the_next_calls():
    stuck = threading.Event()
    scorer = BoundedScorer(Scripted(stuck, 0.3), timeout_s=0.2, max_failures=5)
    assert np.isnan(scorer(*PAIRS)).all()
    stuck.set()
    assert scorer(*PAIRS).tolist() == [0.3] * 3
    assert scorer.failed_calls == 1


def test_too_few_scores_are_a_failure():
    scorer = BoundedScorer(lambda requests, items: np.zeros(1), timeout_s=10, max_failures=1)
    with pytest.raises(RankerFailedError, match=r"expected 3 scores, got \[1\]"):
        scorer(*PAIRS)
