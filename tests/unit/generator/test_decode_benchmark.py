"""The search benchmark's quick mode: all sides answer alike and every figure is recorded."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
    with pytest.raises(SystemExit, match="side: answers differ at 3 places"):
        benchmark.require_equal("side", benchmark.Answer(tokens + 1, scores), reference)


def test_near_ties_are_no_excuse_for_another_order(benchmark: ModuleType) -> None:
    tokens, scores = torch.tensor([[[1, 2, 3], [4, 5, 6]]]), torch.tensor([[-1.0, -1.00001]])
    with pytest.raises(SystemExit, match="side: answers differ at 2 places"):
        benchmark.require_equal("side", benchmark.Answer(tokens.flip(1), scores), benchmark.Answer(tokens, scores))
    others = torch.tensor([[-1.0, -2.0, -2.1], [-1.0, -1.1, -1.1], [-1.0, -math.inf, -math.inf]])
    assert benchmark.has_tie(torch.cat([scores, scores - 1])).tolist() == [True, True]
    assert benchmark.has_tie(others).tolist() == [False, True, False]


def test_generate_gets_scores_over_the_level(benchmark: ModuleType) -> None:
    config = SimpleNamespace(level_offsets=(2, 4, 6), alphabet_sizes=(2, 2, 2))
    over = benchmark.OverLevel(lambda _, scores: scores, config, prompt_tokens=3)
    probabilities = torch.tensor([[0.2, 0.1, 0.1, 0.1, 0.1, 0.3, 0.05, 0.05]])
    found = over(torch.zeros(1, 4, dtype=torch.int64), probabilities.log())  # one token after the prompt: level 2, columns 4 and 5
    torch.testing.assert_close(found.exp()[:, 4:6], torch.tensor([[0.25, 0.75]]))


def test_a_part_measured_again_replaces_its_own_records_only(benchmark: ModuleType, tmp_path: Path) -> None:
    def record(beam: int, value: float, table: str = "decode") -> dict[str, Any]:
        return {"table": table, "row": "uniform", "metric": "ours_ms", "value": value, "batch": 1, "beam": beam, "threads": 1}

    measurement = importlib.import_module("measurement")
    for records in ([record(20, 1.0), record(50, 2.0), record(20, 3.0, "filters")], [record(10, 4.0), record(20, 5.0)]):
        measurement.write_tables(tmp_path / "results.json", records, by=measurement.ONE_NUMBER)
    assert json.loads((tmp_path / "results.json").read_text()) == [record(50, 2.0), record(20, 3.0, "filters"), record(10, 4.0), record(20, 5.0)]


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
