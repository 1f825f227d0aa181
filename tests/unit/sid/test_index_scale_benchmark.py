"""The index benchmark's quick mode: every step runs, its answers are checked, and every figure is recorded and drawn."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from genrecall.sid.index import SidIndex
from genrecall.sid.segments import SegmentedIndex

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("index_scale")


def test_quick_mode_records_every_figure(benchmark: ModuleType, tmp_path: Path, ray_cluster: None) -> None:
    records = benchmark.main(["--quick", "--threads", "1", "--output", str(tmp_path / "index_scale.json"), "--pictures", str(tmp_path / "pictures")])
    assert json.loads((tmp_path / "index_scale.json").read_text()) == records
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}
    found = {(record["row"], record["metric"]): record["value"] for record in records}
    rows = [f"items_{items}" for items in (400, 2_000)]
    storage = ("build_s", "build_peak_bytes", "open_s", "resident_bytes", "filters_build_s", "disk_bytes_with_filters")
    costs = ("request_ms", "request_ms_prompt_8", "cost_ratio_vs_1e5", "expand_us", "expand_with_changes_us", "delta_add_s")
    lookup = ("mask_us", "serve_expand_us", "mask_cpu_ratio_vs_1e5_sids", "mask_expand_cpu_ratio_vs_1e5_sids")
    assert found.keys() >= {(row, metric) for row in rows for metric in (*storage, *costs, *lookup)}
    assert found.keys() >= {("items_2000_pairs", "cost_ratio_vs_no_pairs"), ("placement", "ray_share_of_bare_rate"), ("placement", "bare_items_per_s")}
    assert found["items_400", "cost_ratio_vs_1e5"] == found["items_2000", "mask_expand_cpu_ratio_vs_1e5_sids"] == 1.0
    parts = [found["items_2000", f"disk_bytes_{part}"] for part in ("trie", "postings", "item_sid", "prior", "item_logits", "item_ids")]
    assert found["items_2000", "disk_bytes"] == sum(parts)
    assert found["items_2000", "disk_bytes_item_logits"] == 128 + 2 * 2_000
    assert found["items_2000", "disk_bytes_with_filters"] > found["items_2000", "disk_bytes"] + 10 * 2_000  # two lists of four bytes, and two of the category
    assert found["items_2000", "disk_bytes_item_ids"] == 128 + 10 * 2_000
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"index_scale_{name}.png" for name in ("beam", "catalogue", "prompt")]


def test_changes_that_answer_otherwise_are_not_timed(benchmark: ModuleType) -> None:
    base = SidIndex.build(np.array([0, 0, 1], np.int32), 2, np.zeros(3))
    sids, prior, gone = np.array([1, 0], np.int32), np.array([1.0, 2.0]), np.array([0])
    changed = SegmentedIndex(base).added(sids, prior).without(gone)
    benchmark.check_changes(base, changed, sids, prior, gone, 3, "side")
    with pytest.raises(SystemExit, match="side: SID 0 with changes expands to other items"):
        benchmark.check_changes(base, changed.without(np.array([1])), sids, prior, gone, 3, "side")
