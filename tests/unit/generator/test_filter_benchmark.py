"""The filter benchmark's quick mode: answers are exact before they are timed, and every figure is recorded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("filters")


def test_quick_mode_measures_every_selectivity_and_writes_records(benchmark: ModuleType, tmp_path: Path) -> None:
    records = benchmark.main(["--quick", "--threads", "1", "--output", str(tmp_path / "filters.json")])
    assert json.loads((tmp_path / "filters.json").read_text()) == records
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}
    names = {f"quick, {kind} {percent} %" for kind in ("category", "brand") for percent in ("50", "5", "0.1")}
    assert {record["row"] for record in records if record["metric"] == "cold_ms"} == names
    compared = {(record["row"], record["batch"]) for record in records if record["metric"] == "filtered_cost_ratio"}
    assert compared == {(f"{name}, {state}", batch) for name in names for state in ("cached", "cold", "rest cached") for batch in (1, 2)}
    for record in records:
        if record["metric"] == "passing_percent":
            expected = float(record["row"].split()[-2])
            assert record["value"] == pytest.approx(expected, rel=0.35), record["row"]


def test_an_answer_that_is_not_exact_is_not_timed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = benchmark.Shop(benchmark.QUICK, np.random.default_rng(0))
    filters = benchmark.some_filters("brand", 5.0, 2, np.random.default_rng(1))
    benchmark.require_exact(shop, filters)
    monkeypatch.setattr(shop, "passes", lambda wanted, rows: np.zeros(len(rows), dtype=bool))
    with pytest.raises(SystemExit, match="the filtered answer is not exact; not measuring what it costs"):
        benchmark.require_exact(shop, filters)
