"""What all benchmarks share: timing, spreads, and a line that says where a figure was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def seconds(side: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    side()
    return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, middle, high


def machine(*libraries: ModuleType) -> str:
    """The processor, cores, load and versions (of Python, torch and the given libraries), in a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    load = f"load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, *libraries))
    return f"{model}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}, {versions}"


def commit() -> str:
    """The repository's commit, "unknown" outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"
