"""Tables `latency` and `throughput` of the serving benchmark: one client and 32 of them against the bare engine."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from measurement import ratios, seconds
from serving_answers import percentile
from serving_bench import BATCH, CLIENTS, Bench, answered, known_version, require_equal
from serving_server import HAPROXY, PROXY, REPLICA, Server, cpu_by_process, cpu_by_thread, load


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
