"""Table `soak` of the serving benchmark: mixed load, catalogue changes and swaps for minutes, and what they leave of memory, handles and p99."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from serving_answers import ItemChange, problem_of
from serving_bench import Bench, Window, by_status, capacity_of, fetched, known_version, p99
from serving_server import REPLICA, again, load

from genrecall.serving.recall_service import ServedBundle

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


def soak(bench: Bench, folder: Path) -> None:
    """Mixed load: requests of many kinds and batches at a constant rate, changes of the catalogue, and swaps now and then; memory, file handles and the 99th
    percentile over time. Where the model has one version, the swaps are to the same bundle under another number."""
    sizes = bench.sizes
    whole_s = 60 * sizes.minutes
    with bench.server(folder) as server:
        capacity = capacity_of(bench, server)
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
    by_status(bench, "soak", "failed_requests", failed, bench.row)
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
        bench.figure("soak", "p99_ms", [p99(of_part)], row=f"part {part + 1} of 5")
