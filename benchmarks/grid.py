"""Grids of cells: runs of a benchmark that train, each a process of its own with its own home, resumable, some sharing artifacts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from genrecall.storage import read_manifest

GRACE_S = 60.0
ROOT = Path(__file__).resolve().parents[1]


class GridCell(Protocol):
    """One run of a grid. Equal cells hash alike; `str` is what people read."""

    def artifact(self, root: Path, name: str) -> Path:
        """Where it writes an artifact, below the grid's root."""

    def log(self, root: Path) -> Path:
        """Where what it prints goes."""

    def reuses(self) -> Sequence[tuple[GridCell, str]]:
        """(cell, artifact) that it takes over from cells before it."""


Cell = TypeVar("Cell", bound=GridCell)


def take_over(cell: GridCell, root: Path) -> None:
    """Copy what earlier cells have made and this one has not; an artifact does not know its place, and one that does not match is made anew."""
    for source, name in cell.reuses():
        copy_artifact(source.artifact(root, name), cell.artifact(root, name))


def copy_artifact(origin: Path, target: Path) -> None:
    """Copy an artifact that is there to where none is yet."""
    if target.exists() or not (origin / "manifest.json").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    shutil.copytree(origin, partial)
    partial.rename(target)


def run_stages(stages: Iterable[tuple[str, Callable[[], object]]], uri: Callable[[str], str], file: Path) -> dict[str, float]:
    """Run stages one after the other and write the seconds of those that were made into `file`, beside what earlier runs wrote there.

    Args:
        stages: (artifact's name, what makes it unless it is there already).
        uri: artifact's name -> where it lies.

    Returns:
        name -> seconds of every stage that `file` knows.
    """
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for name, stage in stages:
        before, started = read_manifest(uri(name)), time.monotonic()
        stage()
        if read_manifest(uri(name)) != before:
            seconds[name] = round(time.monotonic() - started, 1)
            file.write_text(json.dumps(seconds, indent=1) + "\n")
    return seconds


def run_grid(cells: Sequence[Cell], root: Path, *, jobs: int, command: Callable[[Cell], Sequence[str]], poll_s: float = 1.0, grace_s: float = GRACE_S) -> None:
    """Run the cells, `jobs` at a time, each after the cells whose artifacts it takes over.

    After a failure no cell is started any more; those that run go on to their end. An interrupt ends them.

    Args:
        command: the cell's command line.
        grace_s: how long an interrupted cell may take to end by itself.

    Raises:
        SystemExit: a cell failed; says which log to read.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # side by side more threads than cores cost several times the work
    waiting, failed = list(cells), list[Cell]()
    running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}

    def is_ready(cell: Cell) -> bool:
        return all(source not in running and source not in waiting for source, _ in cell.reuses())

    try:
        while running or (waiting and not failed):
            while not failed and len(running) < jobs and (cell := next(filter(is_ready, waiting), None)) is not None:
                waiting.remove(cell)
                cell.log(root).parent.mkdir(parents=True, exist_ok=True)
                with cell.log(root).open("ab") as log:
                    process = subprocess.Popen(command(cell), stdout=log, stderr=subprocess.STDOUT, env={**threads, **os.environ}, start_new_session=True)
                running[cell] = process, time.monotonic()
                print(f"start  {cell}, log {cell.log(root)}", flush=True)
            for cell, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    failed += [cell] if process.returncode else []
                    outcome = f"failed with status {process.returncode}" if process.returncode else "done"
                    print(f"{outcome}  {cell}, {(time.monotonic() - started) / 60:.1f} min", flush=True)
            time.sleep(poll_s if running else 0.0)
    except BaseException:
        end([process for process, _ in running.values()], grace_s)
        raise
    if failed:
        logs = ", ".join(str(cell.log(root)) for cell in failed)
        raise SystemExit(f"failed: {', '.join(map(str, failed))}; {len(waiting)} cells not started. Read {logs}, then run the same command again")


def end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Interrupt processes, each the head of a session of its own, and kill what is left of it after the grace."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
