"""Tables `swap` and `upsert` of the serving benchmark: constant load while versions and the catalogue change, every answer judged."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from measurement import ratios
from serving_answers import ItemChange, KnownVersion, problem_of
from serving_bench import Bench, Window, capacity_of, fetched, known_version, p99
from serving_load import Outcome
from serving_server import Server, again, load

CANARY_SHARE = 0.5


def swap(bench: Bench, server: Server, wanted: Sequence[str] = ("swap", "upsert")) -> None:
    """Constant load while the alias moves to a version that has to be loaded, items come and go, the version before has a share as challenger, and the alias
    moves back."""
    sizes = bench.sizes
    capacity = capacity_of(bench, server)
    queries = bench.queries[: sizes.queries]
    assert bench.other is not None, "checked at the start"
    other = bench.other
    first = known_version(bench.served, queries, bench.beam)
    second = known_version(fetched(bench.tracking_uri, bench.name, other), queries, bench.beam)
    require_distinct(first, second, queries)
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


def require_distinct(first: KnownVersion, second: KnownVersion, queries: Sequence[str]) -> None:
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
    befores = [p99(window.of(outcomes)) for window in windows if window.row == "before"]
    table_of = {"hot swap": "swap", "rollback": "swap", "canary change": "swap", "upsert": "upsert", "delist": "upsert"}
    during: dict[str, list[float]] = {}
    for window in windows:
        during.setdefault(window.row, []).append(p99(window.of(outcomes)))
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
