"""The Ray Serve deployment: engine, index and HTTP routes in one replica, one hop from the proxy.

Requests are batched; torch runs in its own thread, so that the event loop goes on taking requests; the alias is followed in
another, and a verified other bundle replaces the present one between two batches.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram

from genrecall.registry.versions import is_address
from genrecall.serving.api import OverloadedError, create_app
from genrecall.serving.api_keys import KEYS_VARIABLE, ApiKeyError, ApiKeys
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.messages import MAX_BEAM_SIZE, ModelInfo, RecallRequest, RecallResponse
from genrecall.serving.recall_service import answer_batch

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

STUCK_AFTER_S = 60.0
"""A batch that takes longer than this fails the health check, and Serve replaces the replica."""

_MILLISECONDS = [1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0]
_BeamSize = Annotated[int, Field(ge=1, le=MAX_BEAM_SIZE)]


class RecallSettings(BaseModel):
    """`args` of `serve_apps/recall.yaml`; unknown ones are errors.

    Attributes:
        model: `models:/NAME@champion`, `models:/NAME/NUMBER` or `latest-champion`.
        tracking_uri: of the MLflow registry; default: `MLFLOW_TRACKING_URI`, else the sqlite file in `GENRECALL_HOME`.
        bundle_cache: folder for bundles downloaded from a remote store.
        beam_sizes: widest, middle, narrowest; which one depends on how many requests wait.
        max_batch_size, batch_wait_s: of the request batches.
        max_waiting: requests a replica holds at a time; more get 503 with Retry-After. Below `max_ongoing_requests`.
        follow_s: seconds between two looks at the registry; 0: never.
        api_keys_file: one key a line; default: the environment's `GENRECALL_API_KEYS`.
        torch_threads: at most the replica's CPUs.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "latest-champion"
    tracking_uri: str | None = None
    bundle_cache: str | None = None
    beam_sizes: tuple[_BeamSize, _BeamSize, _BeamSize] = (100, 50, 20)
    max_batch_size: int = Field(default=16, ge=1, le=256)
    batch_wait_s: float = Field(default=0.001, ge=0, le=1)
    max_waiting: int = Field(default=64, ge=1)
    follow_s: float = Field(default=10.0, ge=0)
    api_keys_file: str | None = None
    torch_threads: int = Field(default=1, ge=1)

    @field_validator("model")
    @classmethod
    def _can_be_resolved(cls, model: str) -> str:
        if not is_address(model):
            raise ValueError(f"expected models:/NAME@ALIAS, models:/NAME/NUMBER or latest-champion, got {model!r}")
        return model

    @field_validator("beam_sizes")
    @classmethod
    def _widest_first(cls, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        if list(sizes) != sorted(sizes, reverse=True):
            raise ValueError(f"expected the widest beam first, got {list(sizes)}")
        return sizes


@serve.deployment(name="recall", max_ongoing_requests=128, max_queued_requests=256, ray_actor_options={"num_cpus": 1})
@serve.ingress()
class RecallDeployment:
    """One replica: a bundle in service, its batcher and its routes.

    Args:
        settings: a `RecallSettings` as JSON values.
        tracking_uri: of the registry.
    """

    def __init__(self, settings: dict[str, Any], tracking_uri: str) -> None:
        self._settings = RecallSettings(**settings)
        self._keys = ApiKeys(self._settings.api_keys_file)
        if not self._keys.required:
            refuse_open_port(*_http_binding())
        threads = self._settings.torch_threads
        torch.set_num_threads(threads)
        cache = Path(self._settings.bundle_cache) if self._settings.bundle_cache else None
        self._follower = BundleFollower(self._settings.model, tracking_uri, cache)
        self._served = self._follower.load()
        self._torch_thread = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=torch.set_num_threads, initargs=(threads,))
        self._waiting = 0
        self._batch_began: float | None = None
        self._answer_together.set_max_batch_size(self._settings.max_batch_size)  # type: ignore[attr-defined]  # added by serve.batch
        self._answer_together.set_batch_wait_timeout_s(self._settings.batch_wait_s)  # type: ignore[attr-defined]
        self._requests = Counter("genrecall_requests", "requests by outcome: ok, overloaded or failed", tag_keys=("outcome",))
        self._latency = Histogram("genrecall_latency_ms", "milliseconds by phase: whole, generate or expand", boundaries=_MILLISECONDS, tag_keys=("phase",))
        self._batch_size = Histogram("genrecall_batch_size", "requests decoded together", boundaries=[1, 2, 4, 8, 16, 32, 64, 128])
        self._empty = Counter("genrecall_empty_answers", "answers without an item")
        self._swaps = Counter("genrecall_swaps", "bundles taken into service after the first")
        self._refused = Gauge("genrecall_refused", "1 while another version is refused, see GET /v1/model")
        self._version = Gauge("genrecall_model_version", "version number in service")
        self._version.set(float(self._served.version.number))
        logger.info("serving %s (%s)", self._served.version.text, self._follower.address)
        if self._settings.follow_s > 0:
            threading.Thread(target=self._follow, name="follower", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """The routes; Ray Serve asks for them once the replica is up."""
        return create_app(lambda: self, self._keys)

    async def recall(self, request: RecallRequest) -> RecallResponse:
        """Answer one request, in a batch with those waiting beside it."""
        if self._waiting >= self._settings.max_waiting:
            self._requests.inc(tags={"outcome": "overloaded"})
            raise OverloadedError("too many requests are waiting")
        self._waiting += 1
        started = time.perf_counter()
        outcome = "failed"
        try:
            response: RecallResponse = await self._answer_together(request)
            outcome = "ok"
        finally:
            self._waiting -= 1
            self._requests.inc(tags={"outcome": outcome})
        for phase, milliseconds in (
            ("whole", (time.perf_counter() - started) * 1e3),
            ("generate", response.timings.generate_ms),
            ("expand", response.timings.expand_ms),
        ):
            self._latency.observe(milliseconds, tags={"phase": phase})
        if not response.items:
            self._empty.inc()
        return response

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.001)
    async def _answer_together(self, requests: list[RecallRequest]) -> list[RecallResponse]:
        served = self._served  # one reference for the whole batch: no answer mixes versions
        self._batch_size.observe(len(requests))
        self._batch_began = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._torch_thread, answer_batch, served, requests, self._settings.beam_sizes)
        finally:
            self._batch_began = None

    def info(self) -> ModelInfo:
        """What is being served."""
        return self._served.info(self._follower.address, self._follower.refused)

    async def check_health(self) -> None:
        """Ray Serve's probe: fails where the engine hangs.

        Raises:
            RuntimeError: a batch has been running for longer than `STUCK_AFTER_S`.
        """
        began = self._batch_began
        if began is not None and time.monotonic() - began > STUCK_AFTER_S:
            raise RuntimeError(f"a batch has been running for more than {STUCK_AFTER_S:.0f} s")

    def _follow(self) -> None:
        """Look at the registry and the key file now and then, from the replica's start to its end, in a thread of its own."""
        torch.set_num_threads(self._settings.torch_threads)
        while True:
            time.sleep(self._settings.follow_s)
            self._keys.refresh()
            found = self._follower.newer(self._served)
            self._refused.set(float(self._follower.refused is not None))
            if found is not None:
                logger.info("serving %s instead of %s", found.version.text, self._served.version.text)
                self._served = found
                self._swaps.inc()
                self._version.set(float(found.version.number))


def refuse_open_port(host: str, behind_haproxy: bool) -> None:
    """Check that a server without keys answers loopback only.

    Raises:
        ApiKeyError: the host is open to the network.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if behind_haproxy or not loopback:
        where = "RAY_SERVE_ENABLE_HA_PROXY opens its ports on all interfaces" if behind_haproxy else f"http_options.host is {host}, open to the network"
        raise ApiKeyError(f"{where}, and there are no API keys; set api_keys_file or {KEYS_VARIABLE}, or bind 127.0.0.1")


def _http_binding() -> tuple[str, bool]:
    """The host that Serve's HTTP proxy binds, and whether HAProxy stands before it."""
    from ray.serve.context import _get_global_client  # Ray 2.60 has no public way to ask from inside a replica

    client = _get_global_client()
    assert client is not None, "a replica always has a controller"
    return str(client.http_config.host), os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
