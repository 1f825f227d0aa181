"""The metrics of requests, batches and versions in service: what one replica counts, with few values a label."""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from genrecall.serving.messages import RecallResponse, Role

_MILLISECONDS = [1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0]
_BEAM_SIZES = [5.0, 10.0, 20.0, 50.0, 100.0, 150.0, 200.0]


def _tags(*names: str) -> Any:
    """Several tags of a metric: Ray declares `tuple[str]` and means any number."""
    return names


class RequestMetrics:
    """The counters, gauges and histograms of one replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "genrecall_requests",
            "requests by outcome: ok, overloaded, late, gone (nobody waits for the answer), not_loaded (the challenger was taken out) or failed",
            tag_keys=_tags("outcome", "version"),
        )
        self._degraded = Counter("genrecall_degraded", "answers that are less than was asked for, by reason", tag_keys=("reason",))
        self._looked_up = Counter("genrecall_cache", "requests looked up in the cache by outcome: hit or miss", tag_keys=("outcome",))
        self._latency = Histogram(
            "genrecall_latency_ms", "milliseconds by phase: whole, generate or expand", boundaries=_MILLISECONDS, tag_keys=_tags("phase", "version")
        )
        self._batch_size = Histogram("genrecall_batch_size", "requests decoded together", boundaries=[1, 2, 4, 8, 16, 32, 64, 128])
        self._beam_size = Histogram("genrecall_beam_size", "beam of an answer, however it was chosen", boundaries=_BEAM_SIZES, tag_keys=("version",))
        self._empty = Counter("genrecall_empty_answers", "answers without an item", tag_keys=("version",))
        self._swaps = Counter("genrecall_swaps", "bundles taken into service after the first")
        self._refused = Gauge("genrecall_refused", "1 while another version is refused, see GET /v1/model")
        self._version = Gauge("genrecall_model_version", "version number in service")

    def count(self, outcome: str, role: Role, requests: int = 1) -> None:
        """Count requests that ended so."""
        self._requests.inc(requests, tags={"outcome": outcome, "version": role})

    def looked_up(self, *, hit: bool) -> None:
        """Count a request that was looked up in the cache."""
        self._looked_up.inc(tags={"outcome": "hit" if hit else "miss"})

    def decoded_together(self, requests: int) -> None:
        """Record the size of a batch."""
        self._batch_size.observe(requests)

    def answered(self, response: RecallResponse, whole_ms: float) -> None:
        """Record an answer that was computed, `whole_ms` after its request came."""
        timings, role = response.timings, response.versions.role
        for phase, milliseconds in (("whole", whole_ms), ("generate", timings.generate_ms), ("expand", timings.expand_ms)):
            self._latency.observe(milliseconds, tags={"phase": phase, "version": role})
        self._beam_size.observe(response.beam_size, tags={"version": role})
        for reason in response.degraded_by:
            self._degraded.inc(tags={"reason": reason})
        if not response.items:
            self._empty.inc(tags={"version": role})

    def serves(self, version: int, *, swapped: bool = False) -> None:
        """Show the version in service, and count the swap that brought it."""
        self._version.set(float(version))
        if swapped:
            self._swaps.inc()

    def refuses(self, refused: bool) -> None:
        """Show whether another version is refused."""
        self._refused.set(float(refused))
