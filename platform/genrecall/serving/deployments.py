"""The Ray Serve deployment: engine, index, HTTP routes and gRPC calls in one replica, one hop from the proxy.

Requests are batched; torch runs in its own thread, so that the event loop goes on taking requests; the alias is followed in
another, and a verified other bundle replaces the present one between two batches.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ray import serve

from genrecall.registry.catalogue_log import CatalogueLogError
from genrecall.serving import recall_pb2
from genrecall.serving.answer_cache import AnswerCache, key_of
from genrecall.serving.api import LateError, OverloadedError, VersionNotLoadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.batcher import Batcher
from genrecall.serving.catalogue_gauges import CatalogueGauges
from genrecall.serving.challenger import Challenger, follow_forever
from genrecall.serving.grpc_routes import CallContext, GrpcRoutes
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.messages import ItemsAccepted, ItemsRequest, ModelInfo, RecallRequest, RecallResponse, Role
from genrecall.serving.open_ports import grpc_listens, http_binding, refuse_open_grpc, refuse_open_port
from genrecall.serving.recall_service import ServedBundle, Waiting, answer_batch, answer_waiting
from genrecall.serving.recall_settings import RecallSettings
from genrecall.serving.request_metrics import RequestMetrics
from genrecall.serving.thread_priority import LOADING, give_way

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

STUCK_AFTER_S = 60.0
"""A batch that takes longer than this fails the health check, and Serve replaces the replica."""

KEYS_AGAIN_S = 10.0
"""Between two looks at the key files where `follow_s` is 0."""

_LOCK_WAIT_S = 5.0


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
            refuse_open_port(*http_binding())
            refuse_open_grpc(grpc_listens())
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
        self._metrics = RequestMetrics()
        self._metrics.serves(self._served.version.number)
        self._catalogue = CatalogueGauges(self._settings.drift_limits())
        self._catalogue.show(self._served.bundle)
        self._change_lock = threading.Lock()  # who replaces what is served holds it
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        # Before the first request: the torch thread starts, and the widest beam's buffers are there.
        self._torch_thread.submit(answer_batch, self._served, [RecallRequest(query="")], self._settings.beam_sizes).result()
        logger.info("serving %s (%s)", self._served.version.text, self._follower.address)
        threading.Thread(target=self._follow_keys, name="key follower", daemon=True).start()
        if self._settings.follow_s:
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
            except VersionNotLoadedError as error:  # nothing failed
                logger.info("the champion answers: %s", error)
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
            self._metrics.looked_up(hit=kept is not None)
            if kept is not None:
                self._metrics.count("ok", role)
                return kept
        self._admit(1, role)
        started = time.perf_counter()
        outcome = "failed"
        try:
            response = await self._batcher.submit(role, Waiting(request, arrived))
            outcome = "late" if response is None else "ok"
        except asyncio.CancelledError:
            outcome = "gone"
            raise
        except VersionNotLoadedError:
            outcome = "not_loaded"
            raise
        finally:
            self._waiting -= 1
            self._metrics.count(outcome, role)
        if response is None:
            raise LateError("the deadline passed before the request's turn came")
        self._metrics.answered(response, (time.perf_counter() - started) * 1e3)
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
        except asyncio.CancelledError:
            outcome = "gone"
            raise
        finally:
            self._waiting -= len(requests)
            self._metrics.count(outcome, "champion", len(requests))
        for answer in answers:
            self._metrics.answered(answer, (time.perf_counter() - started) * 1e3)
        return answers

    def _admit(self, count: int, role: Role = "champion") -> None:
        """Count requests as waiting; a batch larger than the queue is taken where nothing else waits."""
        if self._waiting and self._waiting + count > self._settings.max_waiting:
            self._metrics.count("overloaded", role, count)
            raise OverloadedError("too many requests are waiting")
        self._waiting += count

    async def _answer_together(self, role: Role, waiting: Sequence[Waiting], load: int) -> list[RecallResponse | None]:
        served = self._served if role == "champion" else self._challenger.served  # one reference for the whole batch: no answer mixes versions
        if served is None:
            raise VersionNotLoadedError("the challenger was taken out of service")
        return await self._in_torch_thread(served, waiting, load)

    async def _in_torch_thread(self, served: ServedBundle, waiting: Sequence[Waiting], load: int) -> list[RecallResponse | None]:
        self._metrics.decoded_together(len(waiting))
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
        try:
            append = functools.partial(log.append, changes.records(), changes.delist, in_stock=changes.stock_flags(), wait_s=_LOCK_WAIT_S)
            sequence = await asyncio.get_running_loop().run_in_executor(self._log_thread, append)
        except CatalogueLogError as error:
            logger.error("the catalogue was not changed: %s", error)
            raise OverloadedError("the catalogue log cannot be written now; send the same changes again") from error
        return changes.accepted(sequence)

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

    def _follow_keys(self) -> None:
        """Look at the key files now and then, from the replica's start to its end, in a thread of its own: a key that was taken out must stop to open the API,
        also where no registry is followed and while one does not answer."""
        while True:
            time.sleep(self._settings.follow_s or KEYS_AGAIN_S)
            self._keys.refresh()
            self._admin_keys.refresh()

    def _follow(self) -> None:
        """Look at the registry now and then, from the replica's start to its end, in a thread of its own, which gives way to answers."""
        torch.set_num_threads(self._settings.torch_threads)
        give_way(LOADING)
        while True:
            time.sleep(self._settings.follow_s)
            found = self._follower.newer(self._served, self._challenger.served)
            self._metrics.refuses(self._follower.refused is not None)
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
        self._metrics.serves(found.version.number, swapped=True)

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
