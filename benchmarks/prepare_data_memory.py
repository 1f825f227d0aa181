"""Peak memory of `prepare_data` at 1e5 and at 1e6 events: is it flat?

Writes canonical Parquet tables of a made-up shop (20,000 items, shoppers in proportion to events, 10 rows a request), prepares
each in a fresh process with its own local Ray, and samples the memory of that process and everything below it. Two measures:
PSS (proportional set size: shared pages are counted once over all processes) and, within it, the processes of this job alone
(the driver and the Ray workers, without Ray's own daemons). Prints both and their ratios.

Usage: python benchmarks/prepare_data_memory.py [--events 100000 1000000] [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS = 20_000
ROWS_PER_REQUEST = 10
START_US = 1_767_225_600_000_000  # 2026-01-01
SPAN_US = 30 * 86_400_000_000


def write_shop(folder: Path, num_events: int) -> None:
    """Items, users and `num_events` events, written in chunks; about a tenth of the rows are clicks."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    numbers = np.arange(NUM_ITEMS)
    titles = [f"product {n} of kind {n % 97} in colour {n % 13}" for n in numbers]
    categories = pa.array([["shop", f"department {n % 20}", f"shelf {n % 200}"] for n in numbers])
    pq.write_table(pa.table({"item_id": [f"item-{n:06d}" for n in numbers], "title": titles, "category_path": categories}), folder / "items.parquet")
    num_users = num_events // 100
    pq.write_table(pa.table({"user_id": [f"user-{n:08d}" for n in range(num_users)], "gender": ["f", "m"] * (num_users // 2)}), folder / "users.parquet")
    writer = None
    for first in range(0, num_events // ROWS_PER_REQUEST, 10_000):
        count = min(10_000, num_events // ROWS_PER_REQUEST - first)
        request = np.repeat(np.arange(first, first + count), ROWS_PER_REQUEST)
        user = np.repeat(rng.integers(0, num_users, count), ROWS_PER_REQUEST)
        time_us = START_US + (request * (SPAN_US / (num_events // ROWS_PER_REQUEST))).astype(np.int64)
        table = pa.table(
            {
                "request_id": [f"request-{n:09d}" for n in request],
                "user_id": [f"user-{n:08d}" for n in user],
                "timestamp": pa.array(time_us, pa.timestamp("us", tz="UTC")),
                "query": [f"kind {n % 97} colour {n % 13}" for n in request],
                "item_id": [f"item-{n:06d}" for n in rng.integers(0, NUM_ITEMS, len(request))],
                "action": np.where(rng.random(len(request)) < 0.1, "click", "exposure"),
                "position": pa.array(np.tile(np.arange(ROWS_PER_REQUEST), count), pa.int32()),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "events.parquet", table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def prepare(folder: Path) -> None:
    """Runs in the measured process."""
    from genrecall.data.search_logs import PrepareDataConfig, prepare_data
    from genrecall.local_ray import ensure_ray

    ensure_ray(num_cpus=2)
    print("ready", flush=True)
    config = PrepareDataConfig(source="canonical", items="items.parquet", users="users.parquet", events="events.parquet")
    dataset = prepare_data(config, uri=str(folder / "dataset"), data_root=str(folder))
    print(json.dumps(dataset.json("stats.json")["requests"]), flush=True)


def family(pid: int) -> list[int]:
    """`pid` and all its descendants (Linux)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def sample(pid: int) -> tuple[float, float]:
    """(all, job only) PSS in MiB of `pid` and its descendants now."""
    total = job = 0.0
    for one in family(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            name = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        pss = next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) / 1024
        total += pss
        job += pss if one == pid or name.startswith("ray::") else 0.0
    return total, job


def measure(folder: Path, num_events: int) -> dict[str, float]:
    """Prepare one shop in a process of its own and return its peaks."""
    environment = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, "--prepare", str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    peaks = [0.0, 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks[:] = [max(pair) for pair in zip(peaks, sample(process.pid), strict=True)]

    process.stdout.readline()  # Ray is up
    before = sample(process.pid)[0]
    started = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    requests = process.stdout.readline().strip()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.wait() != 0:
        raise SystemExit(f"prepare_data failed at {num_events} events")
    print(
        f"{num_events:>9} events: all processes {peaks[0]:7.0f} MiB (Ray idle {before:.0f}), driver and workers {peaks[1]:7.0f} MiB, {seconds:6.1f} s, {requests}",
        flush=True,
    )
    return {"events": num_events, "peak_mib": peaks[0], "job_peak_mib": peaks[1], "ray_idle_mib": before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_events in arguments.events:
            shop = Path(folder) / str(num_events)
            write_shop(shop, num_events)
            results.append(measure(shop, num_events))
    first, last = results[0], results[-1]
    print(f"ratio: all processes {last['peak_mib'] / first['peak_mib']:.3f}, driver and workers {last['job_peak_mib'] / first['job_peak_mib']:.3f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
