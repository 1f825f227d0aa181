"""The alignment benchmark: its rows as configs, its cells with made-up stages, its tables from small measurements worked out by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.config import Places, apply_overrides
from genrecall.data.marketplace_catalog import SIZES, build_catalog
from genrecall.recipes import RECIPES
from genrecall.rl.align_config import AlignConfig
from genrecall.storage import Artifact

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NAN = float("nan")
KEYS = {"table", "dataset", "row", "metric", "value", "low", "high", "seeds", "command", "commit"}
COLUMNS = ("clk@1", "clk@10", "exp@1", "exp@10", "pvr@10", "recall@10")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("eg_grpo")


@pytest.fixture(scope="module")
def tables(bench: ModuleType) -> ModuleType:
    return sys.modules["eg_grpo_tables"]


def aligned_configs(bench: ModuleType, rows: Mapping[str, tuple[str, ...]], dataset: str = "marketplace") -> dict[str, AlignConfig]:
    recipe = bench.Cell(dataset, 0).recipe()
    found = {row: apply_overrides(recipe, changes).align for row, changes in rows.items()}
    assert all(config is not None for config in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dataset", ["marketplace", "home_depot", "tiny"])
def test_rows_are_the_recipes_alignment_but_for_what_they_are_about(bench: ModuleType, dataset: str) -> None:
    recommended = apply_overrides(RECIPES[dataset](), bench.DATA[dataset]).align
    assert recommended is not None
    found = aligned_configs(bench, bench.ROWS, dataset)
    assert list(found) == [
        "stage3",
        "guidance",
        "stage3_continued",
        "grpo_k0",
        "eg_grpo_k1",
        "eg_grpo_k2",
        "eg_grpo_k4",
        "eg_grpo_k2_ranker",
        "eg_grpo_k2_mixed",
    ]
    for row, experts in {"grpo_k0": 0, "eg_grpo_k1": 1, "eg_grpo_k2": 2, "eg_grpo_k4": 4}.items():
        assert found[row] == replace(recommended, num_experts=experts), row
    for row, mode in {"eg_grpo_k2_ranker": "ranker", "eg_grpo_k2_mixed": "mixed"}.items():
        assert found[row] == replace(recommended, num_experts=2, reward=replace(recommended.reward, mode=mode)), row
    supervised = replace(recommended.objective, policy_weight=0.0, kl_weight=0.0, sft_anchor_weight=1.0, sft_anchors=2)
    assert found["stage3_continued"] == replace(recommended, num_experts=0, objective=supervised)


def test_cells_differ_in_their_seeds_alone_and_share_the_data(bench: ModuleType) -> None:
    for dataset in (*bench.DATASETS, "tiny"):
        first, other = bench.Cell(dataset, 0).recipe(), bench.Cell(dataset, 7).recipe()
        assert {part.seed for part in (other.encoder, other.quantizer, other.sid, other.generator, other.align)} == {7}
        assert (other.data, other.ranker, other.evaluation) == (first.data, first.ranker, first.evaluation)
        parts = {name: replace(getattr(other, name), seed=0) for name in ("encoder", "quantizer", "sid", "generator", "align")}
        assert replace(other, **parts) == first
        assert bench.Cell(dataset, 7).reuses() == [(bench.Cell(dataset, 0), "dataset")]
        assert bench.Cell(dataset, 0).reuses() == []


def test_busy_marketplace_is_the_small_ones_catalogue_with_enough_test_requests(bench: ModuleType) -> None:
    data = bench.Cell("marketplace", 0).recipe().data
    busy, small = SIZES[data.marketplace_size], SIZES["small"]
    assert build_catalog(replace(busy, items=50), 0).titles == build_catalog(replace(small, items=50), 0).titles
    assert (busy.items, busy.departments, busy.brands_per_department) == (small.items, small.departments, small.brands_per_department)
    assert data.test_fraction * busy.requests >= 20_000
    assert (1 - data.test_fraction - data.validation_fraction) * busy.requests >= 0.8 * small.requests
    assert busy.requests / busy.users == pytest.approx(small.requests / small.users, rel=0.1)  # histories as long


def test_tuning_tries_different_settings_of_eg_grpo_on_validation_requests(bench: ModuleType) -> None:
    assert (bench.TUNE.split, bench.GRID.split) == ("validation", "test")
    assert {bench.TUNE.alignments, bench.TUNE.measured}.isdisjoint({bench.GRID.alignments, bench.GRID.measured})
    tried = aligned_configs(bench, {row: changes for row, changes in bench.TUNING.items() if row != "stage3"})
    assert len(set(tried.values())) == len(tried)
    assert {one.num_experts for one in tried.values()} == {2}
    assert {one.learning_rate for one in tried.values()} == {2e-5, 5e-5, 1e-4, 2e-4}
    assert tried["kl0.1_rate0.0002_60x48"].objective.kl_weight == 0.1
    one = tried["half_read_rate0.0001_300x96"]
    assert (one.learning_rate, one.steps, one.requests_per_step, one.query_vector_drop) == (1e-4, 300, 96, 0.35)


class PretendPipeline:
    """Stages that write a manifest where there is none, and note what was asked of all pipelines."""

    asked: list[str]

    def __init__(self, recipe: Any, where: Places, alignment: str = "aligned") -> None:
        self.recipe, self.root, self.alignment = recipe, Path(where.home) / recipe.name, alignment

    def uri(self, name: str) -> str:
        return str(self.root / (self.alignment if name == "aligned" else name))

    def _make(self, name: str) -> None:
        self.asked.append(name)
        folder = Path(self.uri(name))
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "kind": name.rpartition("/")[2], "config": {"source": "made up"}}))

    def aligned(self) -> None:
        assert self.recipe.align.num_experts == (0 if self.alignment.endswith("grpo_k0") else 2)
        self._make("aligned")
        self.asked[-1] = self.alignment

    def existing(self, name: str) -> Artifact:
        folder = Path(self.uri(name))
        return Artifact(str(folder), folder, json.loads((folder / "manifest.json").read_text()))

    def __getattr__(self, stage: str) -> Any:
        name = f"cqsid/{stage}" if stage in ("quantizer", "sid_index", "generator") else stage
        return lambda: self._make(name)


class TwoRequests:
    """What a cell needs to know of its requests."""

    request_ids = ("a", "b")

    def __len__(self) -> int:
        return 2


@pytest.fixture
def run(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a pretended cell and returns what it measured; `run.asked` are the stages it went through."""
    measured: list[str] = []

    def measure(parts: Any, aligned: Artifact | None, requests: Any, *, decoder_weight: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
        assert decoder_weight in (0.0, 1.0)
        unaligned = "stage3" if decoder_weight else "guidance"
        measured.append(unaligned if aligned is None else Path(aligned.uri).name)
        return {name: np.array([1.0, NAN], dtype=np.float32) for name in COLUMNS}, np.zeros((2, 1), dtype=np.int32)

    monkeypatch.setattr(bench, "Pipeline", PretendPipeline)
    monkeypatch.setattr(bench, "RowPipeline", PretendPipeline)
    monkeypatch.setattr(bench, "use_tracking", lambda where: None)
    monkeypatch.setattr(bench, "check_no_leaks", lambda dataset: None)
    monkeypatch.setattr(bench, "measured_requests", lambda dataset, split: TwoRequests())
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "alignment_facts", lambda aligned: {})

    def run_cell(rows: Sequence[str] = ("stage3", "grpo_k0", "eg_grpo_k2"), plan: Any = None) -> list[str]:
        measured.clear()
        PretendPipeline.asked = []
        bench.run_cell(bench.Cell("marketplace", 0), plan or bench.GRID, rows, Places(home=str(tmp_path), data="/nowhere", tracking_uri="sqlite:///nowhere.db"))
        return list(measured)

    return run_cell


def test_cell_aligns_and_measures_row_after_row_and_skips_what_is_there(bench: ModuleType, run: Any, tmp_path: Path) -> None:
    assert run(["stage3", "grpo_k0"]) == ["stage3", "grpo_k0"]
    assert PretendPipeline.asked == ["dataset", "encoder", "cqsid/quantizer", "cqsid/sid_index", "cqsid/generator", "ranker", "aligned/grpo_k0"]
    home = tmp_path / "eg_grpo/marketplace/seed0"
    assert list(json.loads((home / "seconds.json").read_text())) == PretendPipeline.asked
    with np.load(home / "measured/grpo_k0.npz") as file:
        assert set(file.files) == {"request_id", *COLUMNS}
        assert file["request_id"].tolist() == ["a", "b"]
    assert run() == ["eg_grpo_k2"]
    assert run() == []


def test_guidance_is_stage_3_without_its_decoder_and_no_alignment(run: Any) -> None:
    assert run(["stage3", "guidance", "grpo_k0"]) == ["stage3", "guidance", "grpo_k0"]
    assert [name for name in PretendPipeline.asked if name.startswith("aligned")] == ["aligned/grpo_k0"]


def test_row_is_measured_again_where_its_artifacts_changed_or_its_file_was_left_unfinished(bench: ModuleType, run: Any, tmp_path: Path) -> None:
    run()
    home = tmp_path / "eg_grpo/marketplace/seed0"
    (home / "measured/stage3.json").unlink()  # it is written last
    assert run() == ["stage3"]
    manifest = home / "marketplace/aligned/eg_grpo_k2/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "identity": "other"}))
    assert run() == ["eg_grpo_k2"]
    manifest = home / "marketplace/cqsid/generator/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "identity": "other"}))
    assert run() == ["stage3", "grpo_k0", "eg_grpo_k2"]


def test_rows_say_at_which_commit_they_were_measured(bench: ModuleType, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, rows in (("a1b2c3d", ["stage3"]), ("d4e5f6a+changes", ["stage3", "grpo_k0"])):
        monkeypatch.setattr(bench, "commit", lambda commit=commit: commit)
        run(rows)
    measured = tmp_path / "eg_grpo/marketplace/seed0/measured"
    assert {path.stem: json.loads(path.read_text())["commit"] for path in measured.glob("*.json")} == {"stage3": "a1b2c3d", "grpo_k0": "d4e5f6a+changes"}


def test_tuning_leaves_the_grids_files_alone(bench: ModuleType, run: Any, tmp_path: Path) -> None:
    run()
    row = "plain_rate0.0002_60x48"
    assert run(["stage3", row], bench.TUNE) == ["stage3", row]
    home = tmp_path / "eg_grpo/marketplace/seed0"
    assert {path.stem for path in (home / "measured").glob("*.json")} == {"stage3", "grpo_k0", "eg_grpo_k2"}
    assert {path.stem for path in (home / "measured_validation").glob("*.json")} == {"stage3", row}
    assert sorted(path.name for path in (home / "marketplace/aligned").iterdir()) == ["eg_grpo_k2", "grpo_k0"]


def test_seconds_of_an_interrupted_alignment_count_the_steps_before(bench: ModuleType, tmp_path: Path) -> None:
    # Six steps of 2 + 1 seconds; the run that ended it made some of them in 10 of these 18 seconds.
    pq.write_table(pa.table({"seconds_experience": [2.0] * 6, "seconds_update": [1.0] * 6, "kl": [0.0] * 6}), tmp_path / "health.parquet")
    facts = {"steps_run": 6, "kept_step": 4, "stopped": "kl: too far", "seconds": 10.0}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    aligned = Artifact("aligned", tmp_path, {})
    assert bench.alignment_facts(aligned) == {"steps_run": 6, "kept_step": 4, "stopped": "kl: too far", "earlier_seconds": 8.0}
    (tmp_path / "training.json").write_text(json.dumps(facts | {"seconds": 19.5}))
    assert bench.alignment_facts(aligned)["earlier_seconds"] == 0.0
    assert bench.alignment_facts(None) == {}


def write_row(
    home: Path,
    row: str,
    clicks: Sequence[float],
    *,
    ids: Sequence[str] = ("a", "b", "c"),
    start: str = "one generator",
    outcome: Mapping[str, Sequence[float]] | None = None,
    folder: str = "measured",
    **facts: Any,
) -> None:
    """A row's files: `clicks` is every column."""
    (home / folder).mkdir(parents=True, exist_ok=True)
    np.savez(home / folder / f"{row}.npz", request_id=np.array(ids), **{name: np.array(clicks, dtype=np.float32) for name in COLUMNS})
    if outcome is not None:
        columns = {f"{arm}.{name}": np.array(values, dtype=np.float64) for arm, values in outcome.items() for name in ("gmv", "uctcvr", "purchases", "clicks")}
        np.savez(home / folder / f"{row}.outcome.npz", shopper=np.arange(2), **columns)
    (home / folder / f"{row}.json").write_text(json.dumps({"start": {"generator": start}, "aligned": None, **facts}))


ALIGNED = {"steps_run": 60, "kept_step": 60, "stopped": None, "earlier_seconds": 0.0}


def records_of(bench: ModuleType, homes: Mapping[str, Path], plan: Any = None) -> list[dict[str, Any]]:
    tables, plan = sys.modules["eg_grpo_tables"], plan or bench.GRID
    seen, _ = tables.read_measured(plan, homes)
    maker = sys.modules["paired_records"].PairedRecords("marketplace", len(homes), "python benchmarks/eg_grpo.py", "abc1234", samples=200)
    found: list[dict[str, Any]] = tables.records_of(plan, seen, maker)
    return found


def values_of(records: Sequence[Mapping[str, Any]], table: str) -> dict[tuple[str, str], Any]:
    return {(record["row"], record["metric"]): record["value"] for record in records if record["table"] == table}


def test_means_and_gains_are_paired_over_requests_and_seeds(bench: ModuleType, tmp_path: Path) -> None:
    # Requests with a target: two at seed 0, three at seed 1. Stage 3 finds 2 of 5, its guidance 1 of 5, further training 4 of 5, plain GRPO 1 of 5, two experts 3 of 5.
    found = {
        "stage3": ([1, 0, NAN], [0, 0, 1]),
        "guidance": ([0, 0, NAN], [0, 0, 1]),
        "stage3_continued": ([1, 1, NAN], [0, 1, 1]),
        "grpo_k0": ([1, 0, NAN], [0, 0, 0]),
        "eg_grpo_k2": ([1, 1, NAN], [0, 0, 1]),
    }
    homes = {f"marketplace {seed}": tmp_path / str(seed) for seed in (0, 1)}
    for row, by_seed in found.items():
        for home, clicks in zip(homes.values(), by_seed, strict=True):
            write_row(home, row, clicks, **({} if row in ("stage3", "guidance") else ALIGNED))
    records = records_of(bench, homes)
    assert not [record for record in records if (record["table"], record["row"]) == ("cost", "guidance")]
    assert all(set(record) == KEYS and record["seeds"] == 2 for record in records)
    values = values_of(records, "alignment")
    assert values["all", "requests"] == 3
    assert {row: values[row, "clk@10"] for row in found} == {"stage3": 0.4, "guidance": 0.2, "stage3_continued": 0.8, "grpo_k0": 0.2, "eg_grpo_k2": 0.6}
    gains = {key: value for key, value in values.items() if key[1].startswith("pvr@10_gain")}
    assert gains == {
        ("stage3", "pvr@10_gain_vs_guidance"): 1.0,
        ("stage3_continued", "pvr@10_gain_vs_stage3"): 1.0,
        ("grpo_k0", "pvr@10_gain_vs_stage3"): -0.5,
        ("grpo_k0", "pvr@10_gain_vs_stage3_continued"): -0.75,
        ("eg_grpo_k2", "pvr@10_gain_vs_stage3"): 0.5,
        ("eg_grpo_k2", "pvr@10_gain_vs_stage3_continued"): -0.25,
        ("eg_grpo_k2", "pvr@10_gain_vs_grpo_k0"): 2.0,
    }
    assert {metric.partition("_gain")[0] for row, metric in values if row == "eg_grpo_k2"} == set(COLUMNS)
    one = next(record for record in records if (record["row"], record["metric"]) == ("eg_grpo_k2", "clk@1_gain_vs_stage3"))
    assert one["low"] <= one["value"] <= one["high"]


def test_costs_run_from_the_least_to_the_most_seed(bench: ModuleType, tmp_path: Path) -> None:
    homes = {f"marketplace {seed}": tmp_path / str(seed) for seed in (0, 1)}
    facts = (ALIGNED, ALIGNED | {"kept_step": 40, "stopped": "entropy: it drained", "earlier_seconds": 30.0})
    for home, seconds, fact in zip(homes.values(), (600.0, 650.0), facts, strict=True):
        write_row(home, "stage3", [1, 0, 0])
        write_row(home, "eg_grpo_k2", [1, 0, 0], **fact)
        (home / "seconds.json").write_text(json.dumps({"ranker": 5.0, "aligned/eg_grpo_k2": seconds, "tuned/eg_grpo_k2": 1.0}))
    records = [record for record in records_of(bench, homes) if record["table"] == "cost"]
    found = {record["metric"]: (record["value"], record["low"], record["high"]) for record in records}
    assert found == {"seconds": (640.0, 600.0, 680.0), "steps_run": (60.0, 60, 60), "kept_step": (50.0, 40, 60), "stopped": (0.5, 0.0, 1.0)}
    (tmp_path / "1/seconds.json").unlink()  # an artifact that was brought here says nothing of its time
    assert values_of(records_of(bench, homes), "cost")["eg_grpo_k2", "seconds"] == 600.0


def test_outcome_compares_before_and_after_with_and_without_the_sites_channels(bench: ModuleType, tmp_path: Path) -> None:
    shares = {"click_share": 0.5}
    write_row(tmp_path, "stage3", [1, 0, 0], outcome={"": [2.0, 4.0], "without_channel": [1.0, 3.0], "alone": [1.0, 1.0]}, shares=shares)
    after = {"": [3.0, 6.0], "without_channel": [1.0, 3.0], "alone": [2.0, 1.0]}
    write_row(tmp_path, "eg_grpo_k2", [1, 0, 0], outcome=after, shares={"click_share": 0.75}, **ALIGNED)
    records = records_of(bench, {"marketplace 0": tmp_path})
    values = {key: value for key, value in values_of(records, "outcome").items() if key[1].startswith(("gmv", "click_share", "shoppers"))}
    assert values == {
        ("all", "shoppers"): 2,
        ("without_channel", "gmv"): 2.0,
        ("stage3", "gmv"): 3.0,
        ("stage3", "gmv_gain_vs_without_channel"): 0.5,
        ("stage3", "click_share"): 0.5,
        ("eg_grpo_k2", "gmv"): 4.5,
        ("eg_grpo_k2", "gmv_gain_vs_stage3"): 0.5,
        ("eg_grpo_k2", "gmv_gain_vs_without_channel"): 1.25,
        ("eg_grpo_k2", "click_share"): 0.75,
    }
    assert values_of(records, "outcome_alone")["eg_grpo_k2", "purchases_gain_vs_stage3"] == 0.5


def test_collecting_refuses_seeds_measured_on_different_requests(bench: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    homes = {f"marketplace {seed}": tmp_path / str(seed) for seed in (0, 1)}
    for home in homes.values():
        for row in ("stage3", "grpo_k0"):
            write_row(home, row, [1, 0, 1])
    assert tables.read_measured(bench.GRID, homes)[0].requests == 3
    write_row(tmp_path / "1", "grpo_k0", [1, 0, 1], ids=("a", "x", "c"))
    with pytest.raises(
        sys.modules["paired_records"].CollectionError,
        match=r"^`marketplace 1: grpo_k0` measured other requests than .*: delete .*/1/measured/grpo_k0.json and run "
        r"`python benchmarks/eg_grpo.py --cell marketplace 1` again$",
    ):
        tables.read_measured(bench.GRID, homes)
    write_row(tmp_path / "1", "grpo_k0", [1, 0, 1], start="another generator")
    write_row(tmp_path / "1", "eg_grpo_k2", [1, 0, 1])
    write_row(tmp_path / "0", "eg_grpo_k2", [1, 0, 1])
    with pytest.raises(sys.modules["paired_records"].CollectionError, match=r"^`marketplace 1: grpo_k0` started from other artifacts than"):
        tables.read_measured(bench.GRID, homes)


def test_whole_steps_are_taken_over_from_the_benchmark_that_times_them(bench: ModuleType, tmp_path: Path) -> None:
    for row, more in (("stage3", {}), ("grpo_k0", ALIGNED)):
        write_row(bench.Cell("marketplace", 0).home(tmp_path / "home"), row, [1, 0, 1], **more)
    figures = {"value": 9.5, "low": 9.0, "high": 10.0, "command": "python benchmarks/rl.py", "commit": "abc1234"}
    timed = [
        {"table": "throughput", "row": "16 prompts", "metric": "step_speedup_vs_trl_style", "machine": "any", **figures},
        {"table": "rl", "row": "16 prompts", "metric": "ours_ms", "machine": "any", **figures},
    ]
    output = tmp_path / "results"
    output.mkdir()
    (output / "rl.json").write_text(json.dumps(timed))
    for _ in range(2):
        bench.collect(bench.GRID, ["marketplace"], [0], tmp_path / "home", output)
    found = [record for record in json.loads((output / "eg_grpo.json").read_text()) if record["table"] == "throughput"]
    assert found == [{"table": "throughput", "row": "16 prompts", "metric": "step_speedup_vs_trl_style", "dataset": "synthetic", "seeds": 1, **figures}]
    assert set(found[0]) == KEYS
    bench.collect(bench.GRID, ["home_depot"], [0], tmp_path / "nowhere", output)  # without any cell they are taken over all the same
    assert [record for record in json.loads((output / "eg_grpo.json").read_text()) if record["table"] == "throughput"] == found


def test_collecting_takes_the_rows_that_every_seed_has_and_keeps_other_tables(
    bench: ModuleType, tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, output = tmp_path / "home", tmp_path / "results"
    with pytest.raises(SystemExit, match="nothing to collect under"):
        bench.collect(bench.GRID, ["marketplace"], [0], home, output)
    for seed in (0, 1):
        cell = bench.Cell("marketplace", seed).home(home)
        write_row(cell, "stage3", [1, 0, 1], commit="a1b2c3d")
        write_row(cell, "grpo_k0", [1, 1, 1], commit="d4e5f6a" if seed else "a1b2c3d", **ALIGNED)
    write_row(bench.Cell("marketplace", 0).home(home), "eg_grpo_k2", [1, 1, 1], **ALIGNED)
    kept = [
        {"table": "other", "row": "packed", "metric": "speedup", "value": 9.5},  # another benchmark's
        {"table": "alignment", "dataset": "home_depot", "row": "stage3", "metric": "clk@1", "value": 0.1, "low": None, "high": None, "seeds": 3},
    ]
    kept[1] |= {"command": "python benchmarks/eg_grpo.py --datasets home_depot", "commit": "abc1234"}
    gone = kept[1] | {"dataset": "marketplace", "row": "no longer there"}
    output.mkdir()
    (output / "eg_grpo.json").write_text(json.dumps([*kept, gone]))
    bench.collect(bench.GRID, ["marketplace"], [0, 1], home, output)
    assert "left out: marketplace, not measured: marketplace 0: guidance, marketplace 0: stage3_continued" in capsys.readouterr().err
    records = json.loads((output / "eg_grpo.json").read_text())
    assert [record for record in records if record.get("dataset") != "marketplace"] == kept
    assert {record["row"] for record in records if record.get("dataset") == "marketplace"} == {"all", "stage3", "grpo_k0"}
    assert {record["commit"] for record in records if record.get("dataset") == "marketplace"} == {"a1b2c3d, d4e5f6a"}
    assert {record["command"] for record in records if record.get("dataset") == "marketplace"} == {
        "python benchmarks/eg_grpo.py --datasets marketplace --seeds 0 1"
    }
    text = (output / "eg_grpo.md").read_text()
    assert text.index("## Marketplace") < text.index("## Home Depot")
    assert "speedup" not in text
    assert "| GRPO (K = 0) | +50.00 % (" in text

    tuned = "plain_rate5e-05_60x48"
    write_row(bench.Cell("marketplace", 0).home(home), "stage3", [1, 0, 1], folder="measured_validation")
    write_row(bench.Cell("marketplace", 0).home(home), tuned, [1, 0, 0], folder="measured_validation", **ALIGNED)
    bench.collect(bench.TUNE, ["marketplace"], [0], home, output)
    both = json.loads((output / "eg_grpo.json").read_text())
    assert [record for record in both if record["table"] != "tuning"] == records
    assert values_of(both, "tuning")[tuned, "clk@1_gain_vs_stage3"] == -0.5
    assert f"| {tuned} | -50.00 % (" in (output / "eg_grpo.md").read_text()


@pytest.mark.parametrize(
    ("dataset", "clk", "pvr", "verdict"),
    [
        ("marketplace", (0.001, 0.02), (-0.002, 0.001), "met"),
        ("marketplace", (-0.001, 0.02), (0.0, 0.001), "not met"),
        ("marketplace", (0.001, 0.02), (-0.004, 0.001), "not met"),
        ("home_depot", (-0.009, 0.02), (-0.008, 0.001), "met"),  # no gain is asked, and a loss of less than a hundredth is none
        ("home_depot", (-0.011, 0.02), (0.001, 0.002), "not met"),
        ("home_depot", (0.001, 0.02), (-0.011, 0.001), "not met"),
        ("home_depot", (0.001, 0.02), (None, None), "not measured"),
    ],
)
def test_bar_asks_more_clicks_of_the_marketplace_and_no_loss_of_home_depot(
    tables: ModuleType, dataset: str, clk: tuple[float, float], pvr: tuple[float | None, float | None], verdict: str
) -> None:
    common = {"table": "alignment", "dataset": dataset, "seeds": 3, "command": "python", "commit": "abc1234"}
    bounds = dict.fromkeys(("clk@1", "clk@10"), clk) | dict.fromkeys(("exp@1", "exp@10", "pvr@10"), pvr)
    records = [common | {"row": row, "metric": metric, "value": 0.5, "low": None, "high": None} for row in ("stage3", "eg_grpo_k2") for metric in bounds]
    records += [
        common | {"row": "eg_grpo_k2", "metric": f"{metric}_gain_vs_stage3", "value": 0.001, "low": low, "high": high} for metric, (low, high) in bounds.items()
    ]
    text = tables.markdown(records)
    line = next(line for line in text.splitlines() if line.startswith("| EG-GRPO, K = 2 |") and line.count("|") == 9)
    assert line.endswith(f"| {verdict} |")
    said = {
        "marketplace": "(bar: lower bounds above 0 % for clk@1, clk@10; -0.3 % for exp@1, exp@10, pvr@10)",
        "home_depot": "(bar: lower bounds above -1 % for clk@1, clk@10, exp@1, exp@10, pvr@10)",
    }
    assert f"Paired gains over stage 3 {said[dataset]}:" in text


def test_unknown_row_and_tuning_on_home_depot_are_refused(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--rows", "grpo"], "--rows: expected some of stage3, guidance, stage3_continued"),
        (["--tune", "--datasets", "home_depot"], "--tune: hyperparameters are chosen on the marketplace alone"),
        (["--cell", "marketplace", "first"], "--cell: expected one of marketplace, home_depot, tiny and a seed, got marketplace first"),
    ):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert said in capsys.readouterr().err


def test_cells_process_gets_the_rows_and_the_plan(bench: ModuleType) -> None:
    command = bench.cell_command(bench.Cell("tiny", 3), plan=bench.TUNE, rows=["stage3", "plain_rate5e-05_60x48"])
    assert command[2:] == ["--cell", "tiny", "3", "--tune", "--rows", "stage3", "plain_rate5e-05_60x48"]
    assert "--tune" not in bench.cell_command(bench.Cell("tiny", 3), plan=bench.GRID, rows=["stage3"])
