"""The quantiser benchmark's quick mode: both sides take the same step, and every figure is recorded."""

from __future__ import annotations

import dataclasses
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
        yield importlib.import_module("quantize")


def test_quick_mode_compares_both_sides_and_writes_records(benchmark: ModuleType, tmp_path: Path) -> None:
    records = benchmark.main(["--quick", "--threads", "1", "--output", str(tmp_path / "quantize.json")])
    assert json.loads((tmp_path / "quantize.json").read_text()) == records
    assert {record["metric"] for record in records} >= {"ours_ms", "lucidrains_ms", "speedup_vs_lucidrains", "speedup_quantizer"}
    assert {(record["table"], record["row"], record["batch"], record["threads"]) for record in records} == {("quantize", "16x8x8", 32, 1)}
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}


def test_unequal_steps_are_not_compared(benchmark: ModuleType) -> None:
    step = benchmark.Step(torch.zeros(4, 3), torch.ones(4, 2), torch.tensor(1.0), [torch.ones(2)], [torch.ones(3, 2)])
    benchmark.require_equal(step, step)
    for change, message in (
        ({"codes": torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])}, "codes of 2 rows differ"),
        ({"quantized": step.quantized + 0.1}, r"quantised vectors differ by 1\.00e-01"),
        ({"loss": step.loss + 0.1}, "losses differ"),
        ({"gradients": [torch.zeros(2)]}, r"gradients differ by 1\.00e\+00"),
        ({"codebooks": [torch.zeros(3, 2)]}, "codebooks differ"),
    ):
        with pytest.raises(SystemExit, match=message):
            benchmark.require_equal(step, dataclasses.replace(step, **change))


def test_embeddings_have_length_one_and_loud_directions(benchmark: ModuleType) -> None:
    x = benchmark.embeddings(500, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.norm(dim=1), torch.ones(500))
    spread = torch.linalg.svdvals(x)
    assert spread[0] > 4 * spread[-1]
