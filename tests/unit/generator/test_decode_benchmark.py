"""The search benchmark's quick mode: all sides answer alike and every figure is recorded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("decode")


def test_quick_mode_compares_all_sides_and_writes_records(benchmark: ModuleType, tmp_path: Path) -> None:
    records = benchmark.main(["--quick", "--threads", "1", "--output", str(tmp_path / "decode.json")])
    assert json.loads((tmp_path / "decode.json").read_text()) == records
    assert {record["metric"] for record in records} >= {"ours_ms", "generate_ms", "competent_ms", "speedup_vs_hf", "speedup_vs_competent_hf"}
    assert {(record["row"], record["batch"], record["beam"]) for record in records} == {
        (kind, batch, 5) for kind in ("uniform", "clustered") for batch in (1, 2)
    }
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}


def test_unequal_answers_are_not_compared(benchmark: ModuleType) -> None:
    tokens, scores = torch.zeros(1, 3, 3), torch.tensor([[-1.0, -2.0, -3.0]])
    reference = benchmark.Answer(tokens, scores)
    benchmark.require_equal("side", reference, reference)
    with pytest.raises(SystemExit, match=r"side: scores differ by 1.00e-01"):
        benchmark.require_equal("side", benchmark.Answer(tokens, scores + 0.1), reference)
    with pytest.raises(SystemExit, match="side: answers differ"):
        benchmark.require_equal("side", benchmark.Answer(tokens + 1, scores), reference)


def test_the_gpu_benchmark_runs_a_tiny_task_anywhere_and_the_full_one_on_a_gpu_only(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = importlib.import_module("decode_gpu")
    records = gpu.main(["--quick", "--output", str(tmp_path / "gpu.json")])
    assert {(record["metric"], record["batch"]) for record in records} == {
        (metric, batch) for metric in ("queries_per_s", "p50_ms", "p99_ms", "host_syncs") for batch in (1, 3)
    }
    monkeypatch.setattr(gpu, "default_device", lambda: torch.device("cpu"))
    with pytest.raises(SystemExit):
        gpu.main([])
