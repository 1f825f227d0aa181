"""A ranking model whose calls end: after a time limit, or with an error, a call gives no scores and the run goes on without them.

A site's own ranking model may hang or raise. One such call costs its rewards (nan, so these answers take no part in the update); several in a row mean that
the model is down, and end the run, because it would go on without a reward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Scorer = Callable[[NDArray[np.int64], NDArray[np.int32]], NDArray[np.float64]]
"""(request rows [P], item rows [P]) -> probability [P] that the item is clicked when shown."""


class RankerFailedError(RuntimeError):
    """The ranking model failed so often in a row that the run cannot go on; the message says how."""


class BoundedScorer:
    """A scorer that gives nan for a whole call that fails.

    A call that is over time goes on in its thread, since a thread cannot be ended; while it does, no other is started, so there is at most one.

    Args:
        scorer: the ranking model.
        timeout_s: of one call.
        max_failures: failed calls in a row that end the run.
    """

    def __init__(self, scorer: Scorer, *, timeout_s: float, max_failures: int) -> None:
        self._scorer = scorer
        self._timeout_s = timeout_s
        self._max_failures = max_failures
        self._in_a_row = 0
        self._last: _Call | None = None
        self.failed_calls = 0

    def __call__(self, request_rows: NDArray[np.int64], item_rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Scores float64 [P]; nan throughout where the call failed.

        Raises:
            RankerFailedError: `max_failures` calls in a row have failed.
        """
        scores, failure = self._answer(request_rows, item_rows)
        if failure is None:
            self._in_a_row = 0
            return scores
        self.failed_calls += 1
        self._in_a_row += 1
        logger.warning("ranking model: no scores for %d pairs: %s (%d in a row)", len(item_rows), failure, self._in_a_row)
        if self._in_a_row >= self._max_failures:
            raise RankerFailedError(
                f"the ranking model failed {self._in_a_row} times in a row, the last time with: {failure}. Mend it and rerun the same job, which goes on from its "
                "last checkpoint; or raise align.reward.timeout_s or align.reward.max_failures, or set align.reward.mode=feedback"
            )
        return scores

    def _answer(self, request_rows: NDArray[np.int64], item_rows: NDArray[np.int32]) -> tuple[NDArray[np.float64], str | None]:
        nothing = np.full(len(item_rows), np.nan)
        deadline = time.monotonic() + self._timeout_s
        if self._last is not None and not self._last.done.wait(self._timeout_s):
            return nothing, f"the call before has not come back for another {self._timeout_s:g} s"
        self._last = _Call(self._scorer, request_rows, item_rows)
        if not self._last.done.wait(max(0.0, deadline - time.monotonic())):
            return nothing, f"no answer in {self._timeout_s:g} s"
        if self._last.error is not None:
            return nothing, f"{type(self._last.error).__name__}: {self._last.error}"
        scores = self._last.scores
        if scores is None or scores.shape != (len(item_rows),):
            return nothing, f"expected {len(item_rows)} scores, got {None if scores is None else list(scores.shape)}"
        return scores, None


class _Call:
    """One call of a scorer in a thread of its own."""

    def __init__(self, scorer: Scorer, request_rows: NDArray[np.int64], item_rows: NDArray[np.int32]) -> None:
        self.done = threading.Event()
        self.scores: NDArray[np.float64] | None = None
        self.error: Exception | None = None
        threading.Thread(target=self._run, args=(scorer, request_rows, item_rows), name="ranking-model", daemon=True).start()

    def _run(self, scorer: Scorer, request_rows: NDArray[np.int64], item_rows: NDArray[np.int32]) -> None:
        try:
            self.scores = np.asarray(scorer(request_rows, item_rows), dtype=np.float64)
        except Exception as error:  # somebody else's model: whatever it raises costs its call only
            self.error = error
        finally:
            self.done.set()
