"""The server under load: what HTTP adds, how much of the engine is left, and what swaps, changes, failures and time do to answers.

The server is the application as it is deployed, on a local Ray, without its cache and with one beam whatever the load; the engine is `answer_batch` of
the same bundle in this process. Both have one torch thread; they take turns, and what counts are ratios and differences within a round. Before anything
is timed, the server's answers are compared with the engine's. Load comes from a process of its own (serving_load.py), over loopback.

Tables: `latency` (one client) and `throughput` (32 clients), over Serve's default proxy, HAProxy and its gRPC proxy; `swap` and `upsert` (constant load while
the alias moves, items come and go, a canary gets a share of the requests, and the alias moves back), `failures` (a replica, the proxy, the controller or the
`mlflow server` of the registry is gone), `soak` (mixed load for minutes). Every answer of `swap` and `upsert` is judged: wholly one version's, and no delisted item.

Run: python benchmarks/serving.py [--tables latency throughput swap upsert failures] [--model genrecall-home_depot] [--quick]
     python benchmarks/serving.py --tables soak --minutes 30
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from measurement import Recorder, ratios, seconds, write_tables
from serving_answers import ItemChange, KnownVersion, percentile, problem_of
from serving_load import Outcome, Plan, short_form
from serving_server import (
    CONTROLLER,
    HAPROXY,
    KEY,
    PROXY,
    REPLICA,
    RegistryServer,
    Server,
    again,
    copy_registry,
    cpu_by_process,
    cpu_by_thread,
    load,
)

from genrecall.config import places
from genrecall.registry.versions import CHAMPION, LATEST_CHAMPION, Version, open_registry, resolve
from genrecall.serving.hot_swap import REGISTRY_AWAY, BundleFollower
from genrecall.serving.messages import RecallRequest
from genrecall.serving.recall_service import ServedBundle, answer_batch

TABLES = ("latency", "throughput", "swap", "upsert", "failures", "soak")
PATHS = ("default", "haproxy", "grpc")
DEFAULT_TABLES = ("latency", "throughput", "swap", "upsert", "failures")
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
CLIENTS, BATCH, LIMIT = 32, 16, 100
CANARY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. requests: of a round's one client, and of its engine. seconds: of a round at 32 clients, and of each window under constant load.
    queries: distinct ones of the load whose answers are known. rounds: repeats. load_share: a constant load's, of the capacity of 32 clients.
    """

    requests: int = 60
    seconds: float = 10.0
    queries: int = 100
    rounds: int = 5
    minutes: float = 30.0
    load_share: float = 0.4


QUICK = Sizes(requests=3, seconds=0.6, queries=6, rounds=1, minutes=0.05)


@dataclass(frozen=True)
class Bench:
    """What all tables share."""

    record: Recorder
    sizes: Sizes
    beam: int
    row: str
    tracking_uri: str
    number: int
    other: int | None
    served: ServedBundle
    queries: list[str]
    grpc: bool = False

    @property
    def name(self) -> str:
        return self.served.version.name

    def figure(self, table: str, metric: str, values: Sequence[float], *, row: str | None = None, batch: int = 1) -> None:
        self.record(row or self.row, metric, values, threads=1, batch=batch, beam=self.beam, table=table)

    def server(self, folder: Path, *, replicas: int = 1) -> Server:
        return Server(folder, self.tracking_uri, self.name, beam=self.beam, replicas=replicas, grpc=self.grpc)

    def engine(self, queries: Sequence[str]) -> None:
        answer_batch(self.served, [RecallRequest(query=query, limit=LIMIT) for query in queries], (self.beam,) * 3)

    def plan(self, server: Server, queries: Sequence[str]) -> Plan:
        """A closed loop of one client, to be changed."""
        return Plan(port=server.grpc_port if self.grpc else server.port, key=KEY, queries=list(queries), limit=LIMIT, clients=1, grpc=self.grpc)


def queries_of(served: ServedBundle, count: int) -> list[str]:
    """Distinct queries: some words of titles, spread over the catalogue, with a number where there are too few."""
    rows = [place * served.bundle.num_listed // count for place in range(count)]
    found: dict[str, None] = {}
    for number, item in enumerate(served.bundle.shown(rows)):
        words = str(item["title"]).split()
        query = " ".join(words[number % 2 : number % 2 + 2 + number % 3]) or "item"
        found[query if query not in found else f"{query} {number}"] = None
    return list(found)


def fetched(tracking_uri: str, name: str, number: int, catalogues: Path | None = None) -> ServedBundle:
    """A version as a replica loads it."""
    return BundleFollower(f"models:/{name}/{number}", tracking_uri, None, catalogues).load()


def known_version(served: ServedBundle, queries: Sequence[str], beam: int) -> KnownVersion:
    """What the engine says of a version."""
    table = served.bundle.retriever.table
    texts = table.space.texts_of(table.tokens)
    ids = served.bundle.ids_of(list(range(len(table.item_sid))))
    reference = {}
    for query in queries:
        (answer,) = answer_batch(served, [RecallRequest(query=query, limit=LIMIT)], (beam,) * 3)
        reference[query] = frozenset(one.sid for one in answer.sids)
    named = served.versions
    sid_of = {item_id: texts[row] for item_id, row in zip(ids, table.item_sid.tolist(), strict=True) if row >= 0}
    return KnownVersion(model=named.model, bundle=named.bundle, sids=frozenset(texts), sid_of=sid_of, reference=reference)


def require_equal(server: Server, known: KnownVersion, queries: Sequence[str]) -> None:
    """Check that the server answers as the engine does.

    Raises:
        SystemExit: it does not.
    """
    for query in queries:
        status, answer = server.call("/v1/recall", {"query": query, "limit": LIMIT})
        problem = f"status {status}" if status != 200 else problem_of(query, short_form(answer), [known], [])
        if problem:
            raise SystemExit(f"the server does not answer {query!r} as the engine does: {problem}")


def answered(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, all 200.

    Raises:
        SystemExit: one is not.
    """
    failed = [one.status for one in outcomes if one.status != 200]
    if failed or not outcomes:
        raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed, with status {sorted(set(failed))}")
    return list(outcomes)


def latency(bench: Bench, server: Server) -> None:
    """One client, closed loop, against the bare engine. Medians, and 10th percentiles: what a request takes that other processes on the cores do not hold up."""
    sizes = bench.sizes
    known = known_version(bench.served, bench.queries[:8], bench.beam)
    require_equal(server, known, bench.queries[:8])
    figures: dict[str, list[float]] = {}
    for number in range(sizes.rounds + 1):
        queries = _part(bench.queries, number, sizes.requests)
        engine = [1e3 * seconds(functools.partial(bench.engine, [query])) for query in queries]
        with load(replace(bench.plan(server, queries), requests=len(queries))) as running:
            outcomes = answered(running.finish(at_once=False))
        if number:  # the first round warms up
            http = [1e3 * (one.done - one.sent) for one in outcomes]
            for name, share in (("p50", 0.5), ("p10", 0.1)):
                of_engine, of_http = percentile(engine, share), percentile(http, share)
                for metric, value in ((f"engine_{name}_ms", of_engine), (f"http_{name}_ms", of_http), (f"http_added_{name}_ms", of_http - of_engine)):
                    figures.setdefault(metric, []).append(value)
    for metric, values in figures.items():
        bench.figure("latency", metric, values)


def throughput(bench: Bench, server: Server) -> None:
    """32 clients, closed loop, against the engine with batches of 16; and where the processor's time goes."""
    sizes = bench.sizes
    known = known_version(bench.served, bench.queries[:8], bench.beam)
    require_equal(server, known, bench.queries[:8])
    (replica,) = server.pids(REPLICA)
    before_replica = server.pids(PROXY) + server.pids(HAPROXY)
    figures: dict[str, list[float]] = {}

    def add(metric: str, value: float) -> None:
        figures.setdefault(metric, []).append(value)

    for number in range(sizes.rounds):
        queries = _part(bench.queries, number, 50 * BATCH)
        add("engine_per_s", _engine_rate(bench, queries, sizes.seconds / 2))
        with load(replace(bench.plan(server, queries), clients=CLIENTS, keep_every=20)) as running:
            time.sleep(sizes.seconds / 5)
            began, of_threads, of_proxy = time.monotonic(), cpu_by_thread(replica), cpu_by_process(before_replica)
            time.sleep(sizes.seconds)
            ended, then_threads, then_proxy = time.monotonic(), cpu_by_thread(replica), cpu_by_process(before_replica)
            outcomes = answered(running.finish())
        within = [one for one in outcomes if began <= one.done <= ended]
        used = {thread: then_threads[thread] - of_threads.get(thread, 0.0) for thread in then_threads}
        add("server_per_s", len(within) / (ended - began))
        add("engine_cpu_share", max(used.values()) / max(sum(used.values()), 1e-9))
        add("engine_ms_per_request", 1e3 * max(used.values()) / max(len(within), 1))
        add("replica_ms_per_request", 1e3 * sum(used.values()) / max(len(within), 1))
        add("proxy_ms_per_request", 1e3 * (then_proxy - of_proxy) / max(len(within), 1))
        add("client_ms_per_request", 1e3 * running.cpu_s / len(outcomes))
        add("p99_ms", 1e3 * percentile([one.done - one.sent for one in within or outcomes], 0.99))
        add("batch_size", statistics.mean(one.kept["batch_size"] for one in outcomes if one.kept))
    figures["throughput_32_over_engine"] = ratios(figures["server_per_s"], figures["engine_per_s"])
    for metric, values in figures.items():
        bench.figure("throughput", metric, values, batch=CLIENTS)


def _engine_rate(bench: Bench, queries: Sequence[str], wanted_s: float) -> float:
    """Requests a second of the engine with batches of 16."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < wanted_s:
        first = done % len(queries)
        bench.engine(queries[first : first + BATCH])
        done += BATCH
    return done / (time.perf_counter() - began)


def _part(queries: Sequence[str], number: int, count: int) -> list[str]:
    """The queries of a round: others in each, while there are enough."""
    return [queries[(number * count + place) % len(queries)] for place in range(count)]


@dataclass(frozen=True)
class Window:
    """A stretch of constant load, in which something happened or nothing."""

    row: str
    began: float
    ended: float

    def of(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The requests that were under way in it."""
        return [one for one in outcomes if one.done >= self.began and one.due <= self.ended]


def swap(bench: Bench, server: Server, wanted: Sequence[str] = ("swap", "upsert")) -> None:
    """Constant load while the alias moves to a version that has to be loaded, items come and go, the version before has a share as challenger, and the alias
    moves back."""
    sizes = bench.sizes
    capacity = _capacity(bench, server)
    queries = bench.queries[: sizes.queries]
    assert bench.other is not None, "checked at the start"
    other = bench.other
    first = known_version(bench.served, queries, bench.beam)
    second = known_version(fetched(bench.tracking_uri, bench.name, other), queries, bench.beam)
    _require_distinct(first, second, queries)
    versions, windows = [first], list[Window]()
    changes: list[ItemChange] = []
    live_s: dict[str, list[float]] = {}
    visible_s: list[float] = []
    with load(replace(bench.plan(server, queries), clients=None, rate=sizes.load_share * capacity, keep_every=1)) as running:
        time.sleep(sizes.seconds / 5)

        def window(row: str, steps: Iterator[None] | None = None) -> None:
            began = time.monotonic()
            if steps is not None:
                for _ in steps:
                    pass
            time.sleep(max(0.0, began + sizes.seconds - time.monotonic()))
            windows.append(Window(row, began, time.monotonic()))

        def moved(row: str, number: int) -> Iterator[None]:
            server.champion(number)
            live_s.setdefault(row, []).append(server.wait_until(lambda: server.is_live(number)))
            yield

        def upserted(ids: Sequence[str]) -> Iterator[None]:
            began = time.monotonic()
            records = [{"item_id": one, "title": f"{queries[0]} {one}", "brand": one} for one in ids]
            sequence = server.change(upsert=records)
            changes.extend(ItemChange(sequence=sequence - len(ids) + 1 + place, item_id=one, listed=True) for place, one in enumerate(ids))
            yield
            server.wait_until(lambda: _holds(server, queries[0], ids[0]))
            visible_s.append(time.monotonic() - began)

        def delisted(ids: Sequence[str]) -> Iterator[None]:
            sequence = server.change(delist=list(ids))
            changes.extend(ItemChange(sequence=sequence - len(ids) + 1 + place, item_id=one, listed=False) for place, one in enumerate(ids))
            yield
            live_s.setdefault("delist", []).append(server.wait_until(lambda: server.call("/v1/model")[1]["versions"]["catalog_seq"] >= sequence))

        def canary_changed() -> Iterator[None]:
            server.challenger(bench.number)
            began = time.monotonic()
            server.canary(CANARY_SHARE)
            live_s.setdefault("canary change", []).append(time.monotonic() - began)
            yield
            time.sleep(sizes.seconds / 2)
            server.canary(0.0)

        for number in range(sizes.rounds):
            fresh = again(server.registry, bench.name, other)
            versions.append(replace(second, model=f"{bench.name}/{fresh}"))
            ids = [f"benchmark-{number}-{place}" for place in range(10)]
            published = list(first.sid_of)[number]
            window("before")
            window("hot swap", moved("hot swap", fresh))
            window("upsert", upserted(ids))
            window("delist", delisted([*ids[5:], published]))
            window("canary change", canary_changed())
            window("rollback", moved("rollback", bench.number))
        outcomes = running.finish()
    _judge(bench, outcomes, windows, versions, changes, wanted)
    if "upsert" in wanted:
        bench.figure("upsert", "upsert_visible_s", visible_s)
        bench.figure("upsert", "delist_live_s", live_s["delist"])
    if "swap" in wanted:
        for row in ("hot swap", "canary change", "rollback"):
            bench.figure("swap", "swap_live_s", live_s[row], row=row)


def _holds(server: Server, query: str, item_id: str) -> bool:
    """Whether a new item is in an answer; only its brand is admitted, so that a search finds it wherever it was placed."""
    time.sleep(0.1)
    _, answer = server.call("/v1/recall", {"query": query, "limit": 1, "filters": {"brands": [item_id]}})
    return answer is not None and any(item["item_id"] == item_id for item in answer["items"])


def _capacity(bench: Bench, server: Server) -> float:
    """Requests a second of 32 clients, short and for setting a load alone."""
    require_equal(server, known_version(bench.served, bench.queries[:2], bench.beam), bench.queries[:2])
    with load(replace(bench.plan(server, bench.queries), clients=CLIENTS, seconds=max(1.0, bench.sizes.seconds / 2))) as running:
        outcomes = answered(running.finish(at_once=False))
    return float(len(outcomes) / (outcomes[-1].done - outcomes[0].sent))


def _require_distinct(first: KnownVersion, second: KnownVersion, queries: Sequence[str]) -> None:
    """Check that an answer of one version under the other's name would be seen.

    Raises:
        SystemExit: the versions answer too much alike.
    """
    seen = sum(len(first.reference[query] & second.reference[query]) < 0.8 * len(first.reference[query]) for query in queries)
    if seen < 0.5 * len(queries):
        raise SystemExit(f"{first.model} and {second.model} answer {len(queries) - seen} of {len(queries)} queries alike; name another version by --other")


def _judge(
    bench: Bench, outcomes: Sequence[Outcome], windows: Sequence[Window], versions: Sequence[KnownVersion], changes: Sequence[ItemChange], wanted: Sequence[str]
) -> None:
    """Record failed requests, mixed answers and the 99th percentiles of the windows."""
    wrong = [problem for one in outcomes if one.kept and (problem := problem_of(one.query, one.kept, versions, changes))]
    for problem in wrong[:10]:
        print(problem, file=sys.stderr)
    failed = [one for one in outcomes if one.status != 200]
    for one in failed[:10]:
        print(f"status {one.status} after {one.done - one.due:.2f} s", file=sys.stderr)
    befores = [_p99(window.of(outcomes)) for window in windows if window.row == "before"]
    table_of = {"hot swap": "swap", "rollback": "swap", "canary change": "swap", "upsert": "upsert", "delist": "upsert"}
    during: dict[str, list[float]] = {}
    for window in windows:
        during.setdefault(window.row, []).append(_p99(window.of(outcomes)))
    for table in wanted:
        bench.figure(table, "requests", [len(outcomes)])
        bench.figure(table, f"{table}_failed_requests", [len(failed)])
        bench.figure(table, "mixed_version_answers", [len(wrong)])
        bench.figure(table, "p99_before_ms", befores)
    for row, found in during.items():
        if (table := table_of.get(row, "")) in wanted:
            bench.figure(table, "p99_ms", found, row=row)
            bench.figure(table, f"{table}_p99_ratio", ratios(found, befores), row=row)
    if "swap" in wanted:
        canaries = [window for window in windows if window.row == "canary change"]
        roles = [[one.kept["versions"]["role"] for one in window.of(outcomes) if one.kept] for window in canaries]
        shares = [found.count("challenger") / max(1, len(found)) for found in roles]
        bench.figure("swap", "answered_by_challenger", shares, row="canary change")


def _p99(outcomes: Sequence[Outcome]) -> float:
    """Milliseconds from when requests were due, of those that were answered."""
    times: list[float] = [1e3 * (one.done - one.due) for one in outcomes if one.status == 200]
    return float(percentile(times or [0.0], 0.99))


def failures(bench: Bench, folder: Path) -> None:
    """Two replicas over a registry behind `mlflow server`; one, the proxy, the controller or the registry goes away under load, with and without the client's
    retries. Once the registry is back, the alias moves."""
    with RegistryServer(bench.tracking_uri, folder / "registry") as registry, replace(bench, tracking_uri=registry.uri).server(folder, replicas=2) as server:
        capacity = _capacity(bench, server)
        for row, retries in (("client retries", 2), ("no retries", None)):
            killed = server.pids(REPLICA)[0]
            replaced = functools.partial(_replaced, server, killed)
            _fail(bench, server, f"replica killed, {row}", retries, capacity, functools.partial(server.kill, killed), replaced)
        if proxies := server.pids(PROXY):
            _fail(bench, server, "proxy killed, no retries", None, capacity, lambda: server.kill(proxies[0]), lambda: server.call("/v1/model")[0] == 200)
        controllers = server.pids(CONTROLLER)
        _fail(bench, server, "controller killed", None, capacity, lambda: server.kill(controllers[0]), lambda: server.pids(CONTROLLER) not in ([], controllers))
        _registry_away(bench, server, registry, capacity)


def _registry_away(bench: Bench, server: Server, registry: RegistryServer, capacity: float) -> None:
    """The registry's server is killed and started again; whole again are the replicas here once each says in its log that the registry does not answer.

    Raises:
        RuntimeError: a replica did not notice, or does not follow the alias once the registry is back.
    """
    before = server.replicas_that_logged(REGISTRY_AWAY)

    def noticed() -> int:
        return sum(count > before.get(name, 0) for name, count in server.replicas_that_logged(REGISTRY_AWAY).items())

    _fail(bench, server, "registry away", None, capacity, registry.stop, lambda: noticed() == 2)
    bench.figure("failures", "replicas_that_noticed", [noticed()], row="registry away")
    fresh = again(open_registry(bench.tracking_uri), bench.name, bench.number)  # in the file: the server takes no source on its own disk
    registry.start()
    server.champion(fresh)
    live_s = server.wait_until(lambda: server.is_live_everywhere(fresh), wait_s=120.0)
    bench.figure("failures", "swap_live_s", [live_s], row="registry back")
    server.champion(bench.number)  # as other tables expect it


def _replaced(server: Server, killed: int) -> bool:
    """Whether Serve has missed a killed replica and sends requests to another in its place."""
    pids = server.pids(REPLICA)
    return killed not in pids and len(pids) == 2 and server.healthy_replicas() == 2


def _fail(bench: Bench, server: Server, row: str, retries: int | None, capacity: float, fault: Any, whole: Any) -> None:
    """A fault under constant load: what the clients saw, and how long until everything was there again."""
    sizes = bench.sizes
    plan = replace(bench.plan(server, bench.queries), clients=None, rate=sizes.load_share * capacity, retries=retries)
    with load(plan) as running:
        time.sleep(sizes.seconds / 2)
        began = time.monotonic()
        fault()
        struck = time.monotonic()
        server.wait_until(whole)
        back = time.monotonic()
        time.sleep(sizes.seconds / 2)
        outcomes = running.finish()
    failed = [one for one in outcomes if one.status != 200]
    bench.figure("failures", "requests", [len(outcomes)], row=row)
    bench.figure("failures", "errors_seen", [len(failed)], row=row)
    bench.figure("failures", "errors_sent_later", [sum(one.sent > struck for one in failed)], row=row)  # not in flight when the fault struck
    _by_status(bench, "failures", "errors_seen", failed, row)
    bench.figure("failures", "last_error_s", [max((one.done - began for one in failed), default=0.0)], row=row)
    bench.figure("failures", "whole_again_s", [back - began], row=row)
    bench.figure("failures", "p99_ms", [_p99([one for one in outcomes if one.done >= began])], row=row)


SAME_SIDS = frozenset({"explain", "deadline_ms"})
"""Fields of a request that do not move its SIDs while the beam is fixed."""


def variants_of(served: ServedBundle) -> list[dict[str, Any]]:
    """What requests of the mixed load have beyond query and limit; half of them nothing. Filters, history and exclusions name what the catalogue holds."""
    bundle = served.bundle
    tokenizer = bundle.retriever.prompt_builder.tokenizer
    rows = [place * bundle.num_listed // 10 for place in range(10)]
    items, ids = bundle.shown(rows), list(bundle.ids_of(rows))
    shopper = {name: values[0] for name, values in (("gender", sorted(tokenizer.genders)), ("age_band", sorted(tokenizer.age_bands))) if values}
    category = next((list(item["category_path"][:1]) for item in items if item["category_path"]), None)
    brands = sorted({item["brand"] for item in items if item["brand"]})
    special: list[dict[str, Any]] = [
        {"filters": {"categories": [category], "in_stock": True}} if category else {"filters": {"in_stock": True}},
        {"history": ids[:5]},
        {"shopper": shopper or {"gender": "unseen"}},
        {"explain": True},
        {"deadline_ms": 5000},
        {"filters": {"brands": brands, "excluded": ids[:3]}} if brands else {"filters": {"excluded": ids[:3]}},
        {"history": ids, "shopper": shopper, "explain": True, "deadline_ms": 10_000, "filters": {"in_stock": True}},
        {"beam_size": 10, "limit": 10},
    ]
    return [one for more in special for one in ({}, more)]


def _by_status(bench: Bench, table: str, metric: str, failed: Sequence[Outcome], row: str) -> None:
    """Record failures once more, a row for each status of HTTP that there was (0: no answer)."""
    for status, count in sorted(Counter(one.status for one in failed).items()):
        bench.figure(table, metric, [count], row=f"{row}, status {status}")


def soak(bench: Bench, folder: Path) -> None:
    """Mixed load: requests of many kinds and batches at a constant rate, changes of the catalogue, and swaps now and then; memory, file handles and the 99th
    percentile over time. Where the model has one version, the swaps are to the same bundle under another number."""
    sizes = bench.sizes
    whole_s = 60 * sizes.minutes
    with bench.server(folder) as server:
        capacity = _capacity(bench, server)
        queries = bench.queries[: sizes.queries]
        first = known_version(bench.served, queries, bench.beam)
        other = bench.other or again(server.registry, bench.name, bench.number)
        second = (
            known_version(fetched(bench.tracking_uri, bench.name, other), queries, bench.beam) if bench.other else replace(first, model=f"{bench.name}/{other}")
        )
        (replica,) = server.pids(REPLICA)
        process, samples, changes = psutil.Process(replica), [], []
        swaps, step, target = 0, 0, bench.number
        rate = 0.75 * sizes.load_share * capacity
        plan = replace(bench.plan(server, queries), clients=None, rate=rate, keep_every=10, batch_every=50, variants=variants_of(bench.served))
        with load(plan) as running:
            began = time.monotonic()
            while (gone := time.monotonic() - began) < whole_s:
                samples.append((gone, process.memory_info().rss, process.num_fds()))
                # Swaps begin at once, so that both versions are loaded when memory is first looked at.
                if gone >= swaps * min(60.0, whole_s / 10):
                    target = other if target == bench.number else bench.number
                    server.champion(target)
                    swaps += 1
                ids = [f"benchmark-{(step + place) % 200}" for place in range(5)]
                gone_ids = [f"benchmark-{(step + place) % 200}" for place in range(100, 105)]
                last = server.change(upsert=[{"item_id": one, "title": f"{queries[step % len(queries)]} {one}"} for one in ids], delist=gone_ids)
                changes += [ItemChange(sequence=last - 9 + place, item_id=one, listed=place < 5) for place, one in enumerate([*ids, *gone_ids])]
                step += 5
                time.sleep(min(5.0, whole_s / 30))
            outcomes = running.finish()
        survived = server.pids(REPLICA) == [replica]
    # The reference answers are to bare queries.
    judged = [(one.query if SAME_SIDS.issuperset(one.fields) else "", one.kept) for one in outcomes if one.kept]
    wrong = [problem for query, kept in judged if (problem := problem_of(query, kept, [first, second], changes))]
    failed = [one for one in outcomes if one.status != 200]
    for problem in wrong[:10]:
        print(problem, file=sys.stderr)
    settled = [one for one in samples if one[0] >= whole_s / 5]
    fifth = max(1, len(settled) // 4)
    bench.figure("soak", "soak_minutes", [sizes.minutes])
    bench.figure("soak", "requests", [len(outcomes)])
    bench.figure("soak", "failed_requests", [len(failed)])
    _by_status(bench, "soak", "failed_requests", failed, bench.row)
    bench.figure("soak", "requests", [sum(bool(one.fields) for one in outcomes)], row="with further fields")
    bench.figure("soak", "failed_requests", [sum(bool(one.fields) for one in failed)], row="with further fields")
    bench.figure("soak", "mixed_version_answers", [len(wrong)])
    bench.figure("soak", "swaps", [swaps])
    bench.figure("soak", "replica_restarts", [0 if survived else 1])
    for metric, place in (("soak_rss_growth", 1), ("soak_handles_growth", 2)):
        base = statistics.median(one[place] for one in settled[:fifth])
        bench.figure("soak", metric, [one[place] / base - 1 for one in settled[-fifth:]])
    bench.figure("soak", "rss_mib", [one[1] / 2**20 for one in settled[-fifth:]])
    bench.figure("soak", "handles", [float(one[2]) for one in settled[-fifth:]])
    for part in range(5):
        of_part = Window("", began + part * whole_s / 5, began + (part + 1) * whole_s / 5).of(outcomes)
        bench.figure("soak", "p99_ms", [_p99(of_part)], row=f"part {part + 1} of 5")


def champion_of(tracking_uri: str, model: str | None) -> Version:
    """The champion of a model, or the one promoted last."""
    return resolve(LATEST_CHAMPION if model is None else f"models:/{model}@{CHAMPION}", open_registry(tracking_uri))


def another_version(tracking_uri: str, version: Version) -> int | None:
    """The newest other version of the model; None where there is none."""
    known = open_registry(tracking_uri).search_model_versions(f"name='{version.name}'")
    return max((int(one.version) for one in known if int(one.version) != version.number), default=None)


def behind_haproxy(arguments: Sequence[str], tables: Sequence[str], folder: Path, common: dict[str, str]) -> list[dict[str, Any]]:
    """The records of the same tables behind Ray Serve's HAProxy, measured in a process whose Ray is started for it; a row with the reason where that cannot be.

    Args:
        common: what every record of this run says; the command among it is the one that a reader gives.
    """
    output = folder / "haproxy.json"
    command = [sys.executable, __file__, *arguments, "--paths", "haproxy", "--tables", *tables, "--output", str(output)]
    done = subprocess.run(command, env=os.environ | {HAPROXY_VARIABLE: "1", "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0"}, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return [record | {"command": common["command"]} for record in json.loads(output.read_text())]
    print(done.stderr, file=sys.stderr)
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    return [{"table": table, "row": "HAProxy", "metric": "unavailable", "value": 1.0, "low": 1.0, "high": 1.0, "reason": reason, **common} for table in tables]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(DEFAULT_TABLES))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="to the replica, for latency and throughput")
    parser.add_argument("--model", help="name in the registry; default: the champion that was promoted last")
    parser.add_argument("--tracking-uri", help="a sqlite registry, of which a copy is used; default: as jobs find it")
    parser.add_argument("--other", type=int, help="version to swap to; default: the newest beside the champion")
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=Sizes.rounds)
    parser.add_argument(
        "--load-share", type=float, default=Sizes.load_share, help="constant load over capacity; less where other processes take the cores now and then"
    )
    parser.add_argument("--minutes", type=float, default=Sizes.minutes, help="of soak")
    parser.add_argument("--quick", action="store_true", help="for correctness only; writes no file unless --output is given")
    parser.add_argument("--output", type=Path)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    sizes = QUICK if options.quick else replace(Sizes(), rounds=options.repeats, minutes=options.minutes, load_share=options.load_share)
    recorder = Recorder("latency", ["benchmarks/serving.py", *given], "ray", "mlflow")
    print(f"{recorder.common['machine']}, one torch thread on each side")
    torch.set_num_threads(1)
    source = options.tracking_uri or places().tracking_uri
    version = champion_of(source, options.model)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        on_paths = [table for table in options.tables if table in ("latency", "throughput")]
        in_haproxy = os.environ.get(HAPROXY_VARIABLE) == "1"
        if "haproxy" in options.paths and not in_haproxy and on_paths:
            records += behind_haproxy(given, on_paths, folder, recorder.common)
        if {"default", "grpc"} & set(options.paths) or in_haproxy:
            other = options.other or another_version(source, version)
            if other is None and (compared := {"swap", "upsert"} & set(options.tables)):
                tables = " and ".join(sorted(compared))
                raise SystemExit(
                    f"{version.name} has one version: {tables} need one more that answers otherwise; train one with other settings, or leave them out"
                )
            tracking_uri = copy_registry(source, folder)
            served = fetched(tracking_uri, version.name, version.number, folder / "no catalogue")
            count = max(sizes.requests * (sizes.rounds + 1), sizes.queries, 50 * BATCH)
            bench = Bench(
                recorder, sizes, options.beam, "HAProxy" if in_haproxy else "default", tracking_uri, version.number, other, served, queries_of(served, count)
            )
            if "grpc" in options.paths and on_paths:
                _run(replace(bench, row="gRPC", grpc=True), on_paths, folder / "gRPC")
            if "default" in options.paths or in_haproxy:
                _run(bench, options.tables, folder)
    records += recorder.records
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / "serving.json")
    if output:
        write_tables(output, records)
    return records


def _run(bench: Bench, tables: Sequence[str], folder: Path) -> None:
    """Measure the tables, in their order."""
    if {"latency", "throughput", "swap", "upsert"} & set(tables):
        with bench.server(folder / "one replica") as server:
            if "latency" in tables:
                latency(bench, server)
            if "throughput" in tables:
                throughput(bench, server)
            if under_load := [table for table in tables if table in ("swap", "upsert")]:
                swap(bench, server, under_load)
    if "failures" in tables:
        failures(bench, folder / "failures")
    if "soak" in tables:
        soak(bench, folder / "soak")


if __name__ == "__main__":
    main()
