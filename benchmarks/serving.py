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
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measurement import Recorder, write_tables
from serving_bench import BATCH, QUICK, Bench, Sizes, fetched, queries_of
from serving_changes import swap
from serving_failures import failures
from serving_server import copy_registry
from serving_soak import soak
from serving_speed import latency, throughput

from genrecall.config import places
from genrecall.registry.versions import CHAMPION, LATEST_CHAMPION, Version, open_registry, resolve

TABLES = ("latency", "throughput", "swap", "upsert", "failures", "soak")
PATHS = ("default", "haproxy", "grpc")
DEFAULT_TABLES = ("latency", "throughput", "swap", "upsert", "failures")
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"


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
