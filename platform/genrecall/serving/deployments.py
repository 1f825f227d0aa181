"""The Ray Serve deployment: engine, index, HTTP routes and gRPC calls in one replica, one hop from the proxy.

Requests are batched; torch runs in its own thread, so that the event loop goes on taking requests; the alias is followed in
another, and a verified other bundle replaces the present one between two batches.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram

from genrecall.registry.catalogue_log import CatalogueLogError
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.versions import is_address
from genrecall.serving import recall_pb2
from genrecall.serving.answer_cache import AnswerCache, key_of
from genrecall.serving.api import LateError, OverloadedError, VersionNotLoadedError, create_app
from genrecall.serving.api_keys import KEYS_VARIABLE, ApiKeyError, ApiKeys
from genrecall.serving.batcher import Batcher
from genrecall.serving.catalogue_gauges import CatalogueGauges
from genrecall.serving.challenger import Challenger, follow_forever
from genrecall.serving.grpc_routes import CallContext, GrpcRoutes
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.live_catalogue import DriftLimits
from genrecall.serving.messages import MAX_BEAM_SIZE, ItemsAccepted, ItemsRequest, ModelInfo, RecallRequest, RecallResponse, Role
from genrecall.serving.recall_service import ServedBundle, Waiting, answer_batch, answer_waiting

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

STUCK_AFTER_S = 60.0
"""A batch that takes longer than this fails the health check, and Serve replaces the replica."""

_LOCK_WAIT_S = 5.0
_MILLISECONDS = [1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0]
_BeamSize = Annotated[int, Field(ge=1, le=MAX_BEAM_SIZE)]


class RecallSettings(BaseModel):
    """`args` of `serve_apps/recall.yaml`; unknown ones are errors.

    Attributes:
        model: `models:/NAME@champion`, `models:/NAME/NUMBER` or `latest-champion`.
        tracking_uri: of the MLflow registry; default: `MLFLOW_TRACKING_URI`, else the sqlite file in `GENRECALL_HOME`.
        bundle_cache: folder for bundles downloaded from a remote store.
        beam_sizes: widest, middle, narrowest; which one depends on how many requests wait.
        max_batch_size: requests decoded together.
        max_waiting: requests a replica holds at a time; more get 503 with Retry-After. Below `max_ongoing_requests`.
        follow_s: seconds between two looks at the registry; 0: never.
        catalogue_folder: folder of the catalogue logs, one of each model's name, on a file system that all replicas share; default: `catalogue` in
            `GENRECALL_HOME` where that is a folder.
        catalogue_follow_s: seconds between two looks at the log.
        drift_error_ratio, drift_oversize_share, drift_unknown_categories, drift_min_items: the alarm's limits, see `DriftLimits`.
        cache_entries, cache_mb: answers (and their size) that a replica keeps for requests that come again; 0 entries: none.
        api_keys_file: one key a line; default: the environment's `GENRECALL_API_KEYS`.
        admin_keys_file: likewise, of who may change the catalogue; default: `GENRECALL_ADMIN_KEYS`.
        torch_threads: at most the replica's CPUs.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "latest-champion"
    tracking_uri: str | None = None
    bundle_cache: str | None = None
    beam_sizes: tuple[_BeamSize, _BeamSize, _BeamSize] = (100, 50, 20)
    max_batch_size: int = Field(default=16, ge=1, le=256)
    max_waiting: int = Field(default=64, ge=1)
    follow_s: float = Field(default=10.0, ge=0)
    cache_entries: int = Field(default=0, ge=0, le=10_000_000)
    cache_mb: float = Field(default=64.0, gt=0)
    catalogue_folder: str | None = None
    catalogue_follow_s: float = Field(default=1.0, ge=0.05, le=4)
    drift_error_ratio: float = Field(default=DriftLimits.error_ratio, gt=0)
    drift_oversize_share: float = Field(default=DriftLimits.oversize_share, ge=0, le=1)
    drift_unknown_categories: float = Field(default=DriftLimits.unknown_categories, ge=0, le=1)
    drift_min_items: int = Field(default=DriftLimits.min_items, ge=1)
    api_keys_file: str | None = None
    admin_keys_file: str | None = None
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

    def drift_limits(self) -> DriftLimits:
        """When the drift alarm is raised."""
        return DriftLimits(
            error_ratio=self.drift_error_ratio,
            oversize_share=self.drift_oversize_share,
            unknown_categories=self.drift_unknown_categories,
            min_items=self.drift_min_items,
        )


def _tags(*names: str) -> Any:
    """Several tags of a metric: Ray declares `tuple[str]` and means any number."""
    return names


@serve.deployment(name="recall", max_ongoing_requests=128, max_queued_requests=256, ray_actor_options={"num_cpus": 1})
@serve.ingress()
class RecallDeployment:
    """One replica: a bundle in service, its batcher and its routes.

    Args:
        settings: a `RecallSettings` as JSON values.
        tracking_uri: of the registry.
        catalogues: folder of the catalogue logs; None: there are none, and nobody changes the catalogue.
    """

    def __init__(self, settings: dict[str, Any], tracking_uri: str, catalogues: str | None = None) -> None:
        self._settings = RecallSettings(**settings)
        self._keys = ApiKeys(self._settings.api_keys_file)
        self._admin_keys = ApiKeys.for_admins(self._settings.admin_keys_file)
        if self._admin_keys.required and catalogues is None:
            raise CatalogueLogError("there are admin keys and no place for the catalogue log: GENRECALL_HOME is no folder; set catalogue_folder")
        if not self._keys.required:
            refuse_open_port(*_http_binding())
            refuse_open_grpc(_grpc_listens())
        self._grpc = GrpcRoutes(lambda: self, self._keys, self._admin_keys)
        threads = self._settings.torch_threads
        torch.set_num_threads(threads)
        cache = Path(self._settings.bundle_cache) if self._settings.bundle_cache else None
        self._follower = BundleFollower(self._settings.model, tracking_uri, cache, Path(catalogues) if catalogues else None)
        self._served = self._follower.load()
        self._challenger = Challenger(self._follower.of_challenger(self._served.version.name), self._settings.beam_sizes, threads)
        self._torch_thread = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=torch.set_num_threads, initargs=(threads,))
        self._cache = AnswerCache(self._settings.cache_entries, int(self._settings.cache_mb * 2**20))
        self._waiting = 0
        self._batch_began: float | None = None
        self._batcher: Batcher[Role, Waiting, RecallResponse | None] = Batcher(self._answer_together, self._settings.max_batch_size)
        self._requests = Counter("genrecall_requests", "requests by outcome: ok, overloaded, late or failed", tag_keys=_tags("outcome", "version"))
        self._degraded = Counter("genrecall_degraded", "answers that are less than was asked for, by reason", tag_keys=("reason",))
        self._looked_up = Counter("genrecall_cache", "requests looked up in the cache by outcome: hit or miss", tag_keys=("outcome",))
        self._latency = Histogram(
            "genrecall_latency_ms", "milliseconds by phase: whole, generate or expand", boundaries=_MILLISECONDS, tag_keys=_tags("phase", "version")
        )
        self._batch_size = Histogram("genrecall_batch_size", "requests decoded together", boundaries=[1, 2, 4, 8, 16, 32, 64, 128])
        self._empty = Counter("genrecall_empty_answers", "answers without an item", tag_keys=("version",))
        self._swaps = Counter("genrecall_swaps", "bundles taken into service after the first")
        self._refused = Gauge("genrecall_refused", "1 while another version is refused, see GET /v1/model")
        self._version = Gauge("genrecall_model_version", "version number in service")
        self._version.set(float(self._served.version.number))
        self._catalogue = CatalogueGauges(self._settings.drift_limits())
        self._catalogue.show(self._served.bundle)
        self._change_lock = threading.Lock()  # who replaces what is served holds it
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        # Before the first request: the torch thread starts, and the widest beam's buffers are there.
        self._torch_thread.submit(answer_batch, self._served, [RecallRequest(query="")], self._settings.beam_sizes).result()
        logger.info("serving %s (%s)", self._served.version.text, self._follower.address)
        if self._settings.follow_s > 0:
            threading.Thread(target=self._follow, name="follower", daemon=True).start()
        threading.Thread(
            target=follow_forever, args=(self._challenger, lambda: self._served, self._settings.follow_s), name="challenger follower", daemon=True
        ).start()
        if self._follower.log is not None:
            threading.Thread(target=self._follow_log, name="log follower", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """The routes; Ray Serve asks for them once the replica is up."""
        return create_app(lambda: self, self._keys, self._admin_keys)

    async def Recall(self, request: recall_pb2.RecallRequest, grpc_context: CallContext) -> recall_pb2.RecallResponse:
        """The call of `recall.proto`; Ray Serve finds it by its name, and likewise the next three."""
        return await self._grpc.recall(request, grpc_context)

    async def RecallBatch(self, request: recall_pb2.RecallBatchRequest, grpc_context: CallContext) -> recall_pb2.RecallBatchResponse:
        return await self._grpc.recall_batch(request, grpc_context)

    async def Model(self, request: recall_pb2.ModelRequest, grpc_context: CallContext) -> recall_pb2.ModelInfo:
        return await self._grpc.model(request, grpc_context)

    async def ChangeItems(self, request: recall_pb2.ItemsRequest, grpc_context: CallContext) -> recall_pb2.ItemsAccepted:
        return await self._grpc.change_items(request, grpc_context)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray Serve's call with a new `user_config`, while requests go on."""
        self._challenger.configure(user_config)

    async def recall(self, request: RecallRequest) -> RecallResponse:
        """Answer one request by the version that it names or its share gives it to; where the challenger fails on a share's request, the champion answers."""
        arrived = time.monotonic()
        if request.version == "challenger":
            if self._challenger.served is None:
                raise VersionNotLoadedError("no challenger is loaded; leave the field out, or see challenger in GET /v1/model")
            try:
                return await self._recall("challenger", request, arrived)
            except (OverloadedError, VersionNotLoadedError):
                raise
            except Exception as error:
                logger.error("the challenger failed: %s: %s", type(error).__name__, error)
                raise OverloadedError("the challenger failed; the server's log says more") from error
        if request.version is None and self._challenger.canary_of(request):
            try:
                return await self._recall("challenger", request, arrived)
            except OverloadedError:
                raise
            except Exception as error:  # the edge: whatever is wrong with the challenger, the champion answers
                self._challenger.failed(error)
        response = await self._recall("champion", request, arrived)
        if request.version is None:
            self._challenger.shadow(request, response)
        return response

    async def _recall(self, role: Role, request: RecallRequest, arrived: float) -> RecallResponse:
        """Answer one request by the version in a role, from the cache or in a batch with those waiting beside it."""
        key = None
        served = self._served if role == "champion" else self._challenger.served
        if self._cache.entries and served is not None:
            key = key_of(served, request)
            kept = self._cache.get(key)
            self._looked_up.inc(tags={"outcome": "miss" if kept is None else "hit"})
            if kept is not None:
                self._requests.inc(tags={"outcome": "ok", "version": role})
                return kept
        self._admit(1, role)
        started = time.perf_counter()
        outcome = "failed"
        try:
            response = await self._batcher.submit(role, Waiting(request, arrived))
            outcome = "late" if response is None else "ok"
        finally:
            self._waiting -= 1
            self._requests.inc(tags={"outcome": outcome, "version": role})
        if response is None:
            raise LateError("the deadline passed before the request's turn came")
        self._observe(response, (time.perf_counter() - started) * 1e3)
        if key is not None:
            self._cache.put(key, response)
        return response

    async def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        """Answer requests in order, all by the champion in service now; the batcher's other batches may run in between."""
        if any(request.version == "challenger" for request in requests):
            raise VersionNotLoadedError("expected champion in a batch; ask /v1/recall for the challenger's answers")
        self._admit(len(requests))
        served, arrived, started = self._served, time.monotonic(), time.perf_counter()
        outcome = "failed"
        answers: list[RecallResponse] = []
        try:
            for first in range(0, len(requests), self._settings.max_batch_size):
                part = [Waiting(request, arrived) for request in requests[first : first + self._settings.max_batch_size]]
                found = await self._in_torch_thread(served, part, len(part))
                answers += [answer for answer in found if answer is not None]
                if len(answers) < first + len(part):
                    outcome = "late"
                    raise LateError("the deadline of a request of the batch passed before its turn came")
            outcome = "ok"
        finally:
            self._waiting -= len(requests)
            self._requests.inc(len(requests), tags={"outcome": outcome, "version": "champion"})
        for answer in answers:
            self._observe(answer, (time.perf_counter() - started) * 1e3)
        return answers

    def _admit(self, count: int, role: Role = "champion") -> None:
        """Count requests as waiting; a batch larger than the queue is taken where nothing else waits."""
        if self._waiting and self._waiting + count > self._settings.max_waiting:
            self._requests.inc(count, tags={"outcome": "overloaded", "version": role})
            raise OverloadedError("too many requests are waiting")
        self._waiting += count

    def _observe(self, response: RecallResponse, whole_ms: float) -> None:
        timings, role = response.timings, response.versions.role
        for phase, milliseconds in (("whole", whole_ms), ("generate", timings.generate_ms), ("expand", timings.expand_ms)):
            self._latency.observe(milliseconds, tags={"phase": phase, "version": role})
        for reason in response.degraded_by:
            self._degraded.inc(tags={"reason": reason})
        if not response.items:
            self._empty.inc(tags={"version": role})

    async def _answer_together(self, role: Role, waiting: Sequence[Waiting], load: int) -> list[RecallResponse | None]:
        served = self._served if role == "champion" else self._challenger.served  # one reference for the whole batch: no answer mixes versions
        if served is None:
            raise VersionNotLoadedError("the challenger was taken out of service")
        return await self._in_torch_thread(served, waiting, load)

    async def _in_torch_thread(self, served: ServedBundle, waiting: Sequence[Waiting], load: int) -> list[RecallResponse | None]:
        self._batch_size.observe(len(waiting))
        return await asyncio.get_running_loop().run_in_executor(self._torch_thread, self._answer, served, waiting, load)

    def _answer(self, served: ServedBundle, waiting: Sequence[Waiting], load: int) -> list[RecallResponse | None]:
        self._batch_began = time.monotonic()
        try:
            return answer_waiting(served, waiting, self._settings.beam_sizes, load=load)
        finally:
            self._batch_began = None

    async def change_items(self, changes: ItemsRequest) -> ItemsAccepted:
        """Append changes to the catalogue log, which every replica follows.

        Replicas take turns by the log's lock: it needs no actor that has to live, and a job or another cluster may append beside them.
        """
        log = self._follower.log
        assert log is not None, "checked at the start"
        records = [ItemRecord(**{**one.model_dump(), "category_path": tuple(one.category_path)}) for one in changes.upsert]
        flags = {**dict.fromkeys(changes.out_of_stock, False), **dict.fromkeys(changes.in_stock, True)}
        try:
            append = functools.partial(log.append, records, changes.delist, in_stock=flags, wait_s=_LOCK_WAIT_S)
            sequence = await asyncio.get_running_loop().run_in_executor(self._log_thread, append)
        except CatalogueLogError as error:
            logger.error("the catalogue was not changed: %s", error)
            raise OverloadedError("the catalogue log cannot be written now; send the same changes again") from error
        return ItemsAccepted(catalog_seq=sequence, upserted=len(records), delisted=len(changes.delist), stock_flags=len(flags))

    def ready(self) -> bool:
        """Whether requests get answered: the bundle was verified and warmed up before the replica started, so only a batch that hangs can stand in the way."""
        began = self._batch_began
        return began is None or time.monotonic() - began <= STUCK_AFTER_S

    def info(self) -> ModelInfo:
        """What is being served."""
        served = self._served
        more = {"catalogue": self._catalogue.info(served.bundle), "challenger": self._challenger.info()}
        return served.info(self._follower.address, self._follower.refused).model_copy(update=more)

    async def check_health(self) -> None:
        """Ray Serve's probe: fails where the engine hangs.

        Raises:
            RuntimeError: a batch has been running for longer than `STUCK_AFTER_S`.
        """
        if not self.ready():
            raise RuntimeError(f"a batch has been running for more than {STUCK_AFTER_S:.0f} s")

    def _follow(self) -> None:
        """Look at the registry and the key file now and then, from the replica's start to its end, in a thread of its own."""
        torch.set_num_threads(self._settings.torch_threads)
        while True:
            time.sleep(self._settings.follow_s)
            self._keys.refresh()
            self._admin_keys.refresh()
            found = self._follower.newer(self._served)
            self._refused.set(float(self._follower.refused is not None))
            if found is not None:
                self._swap(found)

    def _swap(self, found: ServedBundle) -> None:
        """Serve another version, once it has what the present one took from the log meanwhile."""
        with self._change_lock:
            try:
                found = self._follower.up_to_date(found)
            except Exception as error:  # the edge: the version in service knows more of the catalogue
                self._catalogue.failed(error)
                return
            logger.info("serving %s instead of %s", found.version.text, self._served.version.text)
            self._served = found
            self._catalogue.show(found.bundle)
        self._swaps.inc()
        self._version.set(float(found.version.number))

    def _follow_log(self) -> None:
        """Take in what is appended to the catalogue log, from the replica's start to its end, in a thread of its own: loading a version takes longer."""
        torch.set_num_threads(self._settings.torch_threads)
        while True:
            time.sleep(self._settings.catalogue_follow_s)
            with self._change_lock:
                try:
                    while (further := self._follower.caught_up(self._served)) is not self._served:
                        self._served = further
                        self._catalogue.show(further.bundle)
                    self._catalogue.followed()
                except Exception as error:  # the edge: whatever is wrong with the log, what is loaded goes on serving
                    self._catalogue.failed(error)
            self._challenger.follow_log()


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


def refuse_open_grpc(listens: bool) -> None:
    """Check that there are keys where Serve's gRPC proxy listens: it always binds all interfaces.

    Raises:
        ApiKeyError: it listens.
    """
    if listens:
        message = "grpc_options opens a port on all interfaces, and there are no API keys"
        raise ApiKeyError(f"{message}; set api_keys_file or {KEYS_VARIABLE}, or take the servicer functions out of grpc_options")


def _grpc_listens() -> bool:
    """Whether Serve has a gRPC proxy."""
    from ray.serve.context import _get_global_client  # as below

    client = _get_global_client()
    assert client is not None, "a replica always has a controller"
    options = ray.get(client._controller.get_grpc_config.remote())
    return bool(options.port > 0 and options.grpc_servicer_functions)


def _http_binding() -> tuple[str, bool]:
    """The host that Serve's HTTP proxy binds, and whether HAProxy stands before it."""
    from ray.serve.context import _get_global_client  # Ray 2.60 has no public way to ask from inside a replica

    client = _get_global_client()
    assert client is not None, "a replica always has a controller"
    return str(client.http_config.host), os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
