"""The second version of a replica: the bundle of the alias `challenger`, kept loaded while a share of the traffic needs it, and its shadow answers.

Shadow answers are computed one at a time in a thread of the lowest priority, and recorded as metrics only. The queue before it is short; what does not fit is
dropped and counted, so that a shadow never holds up the champion.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pydantic import ValidationError
from ray.serve.metrics import Counter, Gauge, Histogram

from genrecall.registry.versions import redacted
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.messages import ChallengerInfo, RecallRequest, RecallResponse
from genrecall.serving.recall_service import ServedBundle, answer_batch
from genrecall.serving.thread_priority import LOADING, SHADOWS, give_way
from genrecall.serving.traffic_split import TrafficShares, is_chosen

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

MAX_SHADOWS = 8
"""Shadow answers that wait or run at a time; more are dropped."""

OVERLAP_AT = 10
_MILLISECONDS = [1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0]


class Challenger:
    """Follows the alias and the catalogue log, chooses requests, answers shadows. One thread may call `follow`, another `follow_log`, a third the rest.

    Args:
        follower: of the alias.
        beam_sizes: of shadow answers, widest first.
        torch_threads: of the shadow thread.
    """

    def __init__(self, follower: BundleFollower, beam_sizes: Sequence[int], torch_threads: int = 1) -> None:
        self.shares = TrafficShares()
        self.served: ServedBundle | None = None
        self.changed = threading.Event()
        self._follower = follower
        self._beam_sizes = beam_sizes
        self._wrong_config: str | None = None
        self._lock = threading.Lock()  # who replaces `served` holds it
        self._torch_threads = torch_threads
        self._shadow_thread = ThreadPoolExecutor(1, thread_name_prefix="shadow", initializer=self._start_shadow_thread)
        self._pending = threading.Semaphore(MAX_SHADOWS)
        self._version = Gauge("genrecall_challenger_version", "version number of the challenger that is loaded; 0: none")
        self._refused = Gauge("genrecall_challenger_refused", "1 while the challenger is refused, see GET /v1/model")
        self._share = Gauge("genrecall_canary_share", "share of the requests that the challenger answers while it is loaded")
        self._failures = Counter("genrecall_challenger_failures", "requests on which the challenger failed and the champion answered")
        self._shadows = Counter("genrecall_shadows", "shadow answers by outcome: ok, dropped or failed", tag_keys=("outcome",))
        self._overlap = Histogram(
            "genrecall_shadow_overlap_at_10", "share of the champion's first 10 items among the challenger's", boundaries=[tenth / 10 for tenth in range(1, 11)]
        )
        self._shadow_ms = Histogram("genrecall_shadow_ms", "milliseconds of a shadow answer, at the lowest priority", boundaries=_MILLISECONDS)

    def configure(self, user_config: Mapping[str, Any]) -> None:
        """Take other shares, a `TrafficShares`; the challenger they need, or no longer need, is loaded or dropped by the next `follow`, which `changed` asks for.

        Shares that cannot be used change nothing and are reported: an error here would have Ray Serve stop the replica.
        """
        try:
            self.shares = TrafficShares.model_validate(dict(user_config))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            self._wrong_config = f"user_config: {problems}; the shares stay at {self.shares.canary_share:g} (canary) and {self.shares.shadow_share:g} (shadow)"
            logger.error("%s", self._wrong_config)
        else:
            self._wrong_config = None
        self._share.set(self.shares.canary_share)
        self.changed.set()

    def follow(self, champion: ServedBundle) -> None:
        """Look at the alias: load, exchange or drop the challenger. A version that is the champion is none. One that is exchanged makes room before the other is
        loaded, and the champion answers meanwhile."""
        loaded = self.served.version if self.served is not None else None
        wanted = self._follower.wanted_challenger(loaded, champion.version) if self.shares.needs_challenger else None
        if wanted != loaded:  # else it stays what `follow_log` made of it meanwhile: a later state, or none where it cannot take the log
            self._exchange(None)
            found = self._follower.load_challenger(wanted) if wanted is not None else None
            if found is not None:
                answer_batch(found, [RecallRequest(query="")], self._beam_sizes)
                logger.info("challenger %s beside %s", found.version.text, champion.version.text)
                self._exchange(found)
        served = self.served
        if not self.shares.needs_challenger:
            self._follower.refused = None
        self._version.set(float(served.version.number) if served else 0.0)
        self._refused.set(float(self._follower.refused is not None))

    def _exchange(self, found: ServedBundle | None) -> None:
        with self._lock:
            self.served = found

    def follow_log(self) -> None:
        """Take in the next changes of the catalogue log. A challenger that cannot is let go: it would serve what has been delisted."""
        with self._lock:
            if self.served is None:
                return
            try:
                self.served = self._follower.up_to_date(self.served)
            except Exception as error:  # the edge: whatever is wrong with it, the champion is in service
                logger.error("no challenger: %s: %s", self.served.version.text, redacted(error))
                self.served = None

    def canary_of(self, request: RecallRequest) -> bool:
        """Whether the challenger is to answer a request that leaves the choice to us."""
        served, share = self.served, self.shares.canary_share
        return served is not None and is_chosen(request, share, served.version.number, "canary")

    def failed(self, error: Exception) -> None:
        """Count a request that the champion answered in the challenger's place."""
        logger.error("the challenger failed, the champion answers: %s: %s", type(error).__name__, error)
        self._failures.inc()

    def shadow(self, request: RecallRequest, answer: RecallResponse) -> bool:
        """Answer a request again, later, if it is chosen and there is room; returns at once. Whether it will be."""
        served, share = self.served, self.shares.shadow_share
        if served is None or not is_chosen(request, share, served.version.number, "shadow"):
            return False
        if not self._pending.acquire(blocking=False):
            self._shadows.inc(tags={"outcome": "dropped"})
            return False
        first = [item.item_id for item in answer.items[:OVERLAP_AT]]
        asked = request.model_copy(update={"beam_size": answer.beam_size, "explain": False, "deadline_ms": None})
        self._shadow_thread.submit(self._answer_shadow, served, asked, first)
        return True

    def _answer_shadow(self, served: ServedBundle, request: RecallRequest, first: list[str]) -> None:
        outcome, started = "failed", time.perf_counter()
        try:
            (answer,) = answer_batch(served, [request], self._beam_sizes)
            self._shadow_ms.observe((time.perf_counter() - started) * 1e3)
            share = overlap(first, [item.item_id for item in answer.items[:OVERLAP_AT]])
            if share is not None:
                self._overlap.observe(share)
            outcome = "ok"
        except Exception as error:  # the edge: whatever is wrong with a shadow, nobody waits for it
            logger.warning("a shadow answer failed: %s: %s", type(error).__name__, error)
        finally:
            self._pending.release()
            self._shadows.inc(tags={"outcome": outcome})

    def _start_shadow_thread(self) -> None:
        torch.set_num_threads(self._torch_threads)
        give_way(SHADOWS)

    def info(self) -> ChallengerInfo | None:
        """What `GET /v1/model` says; None where no challenger is asked for."""
        if not self.shares.needs_challenger and self._wrong_config is None:
            return None
        served = self.served
        return ChallengerInfo(
            versions=served.versions if served else None,
            canary_share=self.shares.canary_share,
            shadow_share=self.shares.shadow_share,
            refused=self._wrong_config or self._follower.refused,
        )


def overlap(first: Sequence[str], second: Sequence[str]) -> float | None:
    """The share of `first` that is in `second`; None where both are empty."""
    if not first:
        return 0.0 if second else None
    return len(set(first) & set(second)) / len(set(first))


def follow_forever(challenger: Challenger, champion: Callable[[], ServedBundle], follow_s: float) -> None:
    """Follow the alias from the replica's start to its end, in a thread of its own, which gives way to answers: every `follow_s` seconds (0: never) and whenever the
    shares change."""
    give_way(LOADING)
    while True:
        challenger.changed.wait(follow_s or None)
        challenger.changed.clear()
        try:
            challenger.follow(champion())
        except Exception as error:  # the edge: the champion serves whatever is wrong with the challenger
            logger.error("the challenger was not looked at: %s: %s", type(error).__name__, redacted(error))
