"""What all benchmarks share: timing, spreads, and a line that says where a figure was measured."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def seconds(side: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    side()
    return time.perf_counter() - started


def cpu_seconds(side: Callable[[], Any]) -> float:
    """Seconds of processor time, of all threads of this process, of one call: with one thread what a core of one's own would take, however busy the machine."""
    started = time.process_time()
    side()
    return time.process_time() - started


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def machine(*libraries: ModuleType | str) -> str:
    """The processor, cores, load and versions (of Python, torch and the given modules or distributions), in a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    load = f"load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(
        f"{library} {importlib.metadata.version(library)}" if isinstance(library, str) else f"{library.__name__} {library.__version__}"
        for library in (torch, *libraries)
    )
    return f"{model}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}, {versions}"


def commit() -> str:
    """The repository's commit, with `+changes` where files beyond results and documents differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str | None:
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)docs")
    return "unknown" if head is None else head + ("+changes" if changes else "")


def commits(cells: Iterable[str | None]) -> str:
    """The commits that cells say they were measured at, each once and in order; a cell that says none was measured before cells did, and counts as of now."""
    now = commit()
    return ", ".join(dict.fromkeys(one or now for one in cells))


class Recorder:
    """Collects the figures of a run, prints each and writes them as JSON records.

    Args:
        table: where the figures belong, unless a call says otherwise.
        command: the benchmark's path in the repository and its arguments.
        libraries: named in the line about the machine, with their versions.
    """

    def __init__(self, table: str, command: Sequence[str], *libraries: ModuleType | str) -> None:
        self.table = table
        self.common = {"machine": machine(*libraries), "command": " ".join(["python", *command]), "commit": commit()}
        self.records: list[dict[str, Any]] = []

    def __call__(self, row: str, metric: str, values: Sequence[float], *, threads: int, batch: int, beam: int | None = None, table: str | None = None) -> None:
        """Record the median and quartiles of `values`, one per repeat."""
        low, middle, high = quartiles(values)
        figures = {"value": middle, "low": low, "high": high, "batch": batch, "beam": beam, "threads": threads}
        self.records.append({"table": table or self.table, "row": row, "metric": metric, **figures, **self.common})
        print(f"{row:32} batch {batch:5} threads {threads} {metric:36} {middle:10.2f} ({low:.2f} to {high:.2f})", flush=True)

    def write(self, path: Path, *, by: Sequence[str] = ("table",)) -> None:
        """Write all records, see `write_tables`."""
        write_tables(path, self.records, by=by)


Measure = Callable[[Callable[..., None]], None]
"""Measures and records: gets what takes a figure as `Recorder` does, but for `threads`."""


def run_recorded(
    parser: argparse.ArgumentParser,
    name: str,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, int], Measure],
    *libraries: ModuleType | str,
    repeats: int,
    parts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A benchmark's command line: `measure` runs once for each number of threads, and the records are written to `benchmarks/results/NAME.json`.

    Args:
        parser: --quick, --threads, --repeats and --output are added to it.
        name: of the table, and of the benchmark's file.
        arguments: of the command line; None: the process's.
        measure: (options, repeats) -> what measures.
        libraries: named in the line about the machine.
        repeats: without --repeats.
        parts: what --parts chooses from, if anything; a run of some of them replaces their rows in the file and leaves the others.
    """
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny task, for correctness only; writes no file unless --output is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1], help="thread counts, measured one after the other")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    repeats = 1 if options.quick else options.repeats
    recorder = Recorder(name, [f"benchmarks/{name}.py", *(sys.argv[1:] if arguments is None else arguments)], *libraries)
    print(f"{recorder.common['machine']}, medians of {repeats} (quartiles)")
    before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            measure(options, repeats)(functools.partial(recorder, threads=threads))
    finally:
        torch.set_num_threads(before)
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / f"{name}.json")
    if output:
        recorder.write(output, by=("table", "row") if parts and set(options.parts) != set(parts) else ("table",))
    return recorder.records


def clock() -> Callable[[Callable[[], Any]], float]:
    """What times a call: processor time where torch has one thread, which other processes hardly change, else wall-clock time."""
    return cpu_seconds if torch.get_num_threads() == 1 else seconds


def interleaved(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side by `clock`, one call of each after the other in every repeat, so that a slow moment of the machine meets all of them."""
    timed = clock()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(side))
    return times


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """slower / faster, within each repeat."""
    return [slow / fast for slow, fast in zip(slower, faster, strict=True)]


ONE_NUMBER = ("table", "row", "metric", "batch", "beam", "threads")
"""What tells one record of a table from another."""


def write_tables(path: Path, records: Sequence[Mapping[str, Any]], *, by: Sequence[str] = ("table",)) -> None:
    """Write records into a file that several runs share: what agrees with one of them in all fields of `by` is replaced, the rest stays.

    Args:
        by: whole tables by default; ("table", "row") where a part of a table was measured again, `ONE_NUMBER` where some of its numbers were.
    """
    kept = json.loads(path.read_text()) if path.exists() else []

    def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in by)

    gone = {place(record) for record in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record for record in kept if place(record) not in gone] + list(records), indent=1) + "\n")
