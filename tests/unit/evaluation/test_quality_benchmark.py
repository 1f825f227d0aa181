"""The quality benchmark: its grid with made-up cells, its tables from small evaluations worked out by hand."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import genrecall.pipeline
import genrecall.tracking
from genrecall.config import Places, apply_overrides
from genrecall.recipes import RECIPES

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NAN = float("nan")
KEYS = {"table", "dataset", "row", "metric", "value", "low", "high", "seeds", "command", "commit"}


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("quality")


@pytest.fixture(scope="module")
def tables(quality: ModuleType) -> ModuleType:
    return sys.modules["quality_tables"]


def write_evaluation(
    folder: Path, rows: Mapping[str, Mapping[str, Sequence[float]]], *, ids: Sequence[str] = ("a", "b", "c", "d"), records: Sequence[dict[str, Any]] = ()
) -> Path:
    """An evaluation of four requests, the first three of them headline; `rows` is `table.row` -> metric -> values."""
    (folder / "per_request").mkdir(parents=True)
    np.savez(folder / "per_request" / "requests.npz", request_id=np.array(ids), primary=np.array([True, True, True, False]))
    np.savez(folder / "per_request" / "sid_lists.npz", **{"semantic.cqsid": np.zeros((4, 2), dtype=np.int32)})
    for name, columns in rows.items():
        np.savez(folder / "per_request" / f"{name}.npz", **{metric: np.array(values, dtype=np.float32) for metric, values in columns.items()})
    (folder / "metrics.json").write_text(json.dumps({"records": list(records)}))
    return folder


def sid_evaluation(folder: Path, rqvae: Sequence[float], cqsid: Sequence[float], items_per_sid: float = 2.0, **more: Any) -> Path:
    """An evaluation of `sids` with one metric; nothing is known of the shoppers, so stage 3 is stage 2."""
    rows = {f"{table}.{row}": {"clk@100": values} for table in ("semantic", "personalised") for row, values in (("rqvae", rqvae), ("cqsid", cqsid))}
    size = {"table": "semantic", "row": "cqsid", "metric": "items_per_sid", "slice": "", "value": items_per_sid}
    return write_evaluation(folder, rows | more.pop("rows", {}), records=[size], **more)


def values_of(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Any]:
    return {(record["table"], record["row"], record["metric"]): record["value"] for record in records}


def collected(tables: ModuleType, folders: Mapping[str, Path], experiment: str = "sids") -> list[dict[str, Any]]:
    seen = tables.read_evaluations(folders)
    found: list[dict[str, Any]] = tables.Collector("marketplace", seen, "python benchmarks/quality.py", "abc1234", samples=200).records(experiment)
    return found


def test_means_and_gains_are_over_headline_requests_and_seeds_together(tables: ModuleType, tmp_path: Path) -> None:
    # Headline requests with a target: two at seed 0, three at seed 1. RQ-VAE finds 2 of 5, CQ-SID 3 of 5: a gain of a half; of 3 misses 1 is gone.
    first = sid_evaluation(tmp_path / "0", rqvae=[1, 0, NAN, 1], cqsid=[1, 1, NAN, 0], items_per_sid=1.5)
    second = sid_evaluation(tmp_path / "1", rqvae=[0, 0, 1, 1], cqsid=[1, 0, 0, 0], items_per_sid=2.0)
    records = collected(tables, {"marketplace 0 sids": first, "marketplace 1 sids": second})
    assert values_of(records) == {
        ("semantic", "all", "requests"): 3,
        ("semantic", "rqvae", "clk@100"): 0.4,
        ("semantic", "cqsid", "clk@100"): 0.6,
        ("semantic", "cqsid", "items_per_sid"): 1.75,
        ("semantic", "cqsid", "clk@100_gain_vs_rqvae"): 0.5,
        ("semantic", "cqsid", "clk@100_misses_gone_vs_rqvae"): pytest.approx(1 / 3, abs=1e-6),
    }
    assert all(set(record) == KEYS for record in records)
    assert {record["seeds"] for record in records} == {2}
    gone = next(record for record in records if "misses_gone" in record["metric"])
    assert gone["low"] <= gone["value"] <= gone["high"]


def test_personalised_table_is_left_out_only_where_stage_3_is_a_copy(tables: ModuleType, tmp_path: Path) -> None:
    copy = sid_evaluation(tmp_path / "copy", rqvae=[1, 0, NAN, 1], cqsid=[1, 1, NAN, 0])
    assert {record["table"] for record in collected(tables, {"marketplace 0 sids": copy})} == {"semantic"}
    other = sid_evaluation(tmp_path / "other", rqvae=[1, 0, NAN, 1], cqsid=[1, 1, NAN, 0], rows={"personalised.cqsid": {"clk@100": [1, 0, NAN, 0]}})
    found = values_of(collected(tables, {"marketplace 0 sids": other}))
    assert (found["semantic", "cqsid", "clk@100"], found["personalised", "cqsid", "clk@100"]) == (1.0, 0.5)


def test_cut_curve_is_collected_for_the_rows_of_the_paper(tables: ModuleType, tmp_path: Path) -> None:
    columns = {"clk@1": [1, 0, 1, 0], "cut1000@beam10": [1, 0, 0, 0], "cut1000@beam20": [1, 1, 0, 0]}
    folder = write_evaluation(tmp_path / "0", {f"semantic.{row}": columns for row in ("rqvae", "rqvae_resized", "rqkmeans", "cqsid")})
    found = values_of(collected(tables, {"marketplace 0 sids": folder}))
    assert {row for _, row, metric in found if metric == "cut1000@beam20"} == {"rqvae", "rqvae_resized", "cqsid"}
    assert found["semantic", "cqsid", "cut1000@beam10"] == pytest.approx(1 / 3, abs=1e-6)
    bases = {(row, metric) for _, row, metric in found if metric.startswith("clk@1_gain")}
    versus_rqvae = {(row, "clk@1_gain_vs_rqvae") for row in ("rqvae_resized", "rqkmeans", "cqsid")}
    assert bases == versus_rqvae | {("cqsid", "clk@1_gain_vs_rqvae_resized"), ("cqsid", "clk@1_gain_vs_rqkmeans")}


def test_channels_have_their_gains_and_their_slices_averaged_over_seeds(tables: ModuleType, tmp_path: Path) -> None:
    folders = {}
    for seed, head in ((0, 0.25), (1, 0.75)):
        rows = {
            "channels.rrf_bm25_dense": {"recall@10": [1, 0, 1, 0]},
            "channels.rrf_all": {"recall@10": [1, 1, 1, 0]},
            "channels.generative": {"recall@10": [0, 1, 0, 0], "missed_found@100": [NAN, 1, seed, 0]},
        }
        named = {"table": "channels", "row": "generative", "metric": "missed_found@100"}
        slices = [named | {"slice": name, "value": value} for name, value in (("", 0.9), ("head", head), ("tail", 0.5 if seed else None), ("torso", None))]
        folders[f"marketplace {seed} channels"] = write_evaluation(tmp_path / str(seed), rows, records=slices)
    found = values_of(collected(tables, folders, "channels"))
    assert found["channels", "rrf_all", "recall@10_gain_vs_rrf_bm25_dense"] == 0.5
    assert found["channels", "generative", "missed_found@100"] == 0.75
    by_slice = {metric: value for (table, _, metric), value in found.items() if table == "channels_by_slice"}
    assert by_slice == {"missed_found@100[head]": 0.5, "missed_found@100[tail]": 0.5, "missed_found@100[torso]": None}


def test_other_requests_name_the_cell_to_rerun(tables: ModuleType, tmp_path: Path) -> None:
    folders = {f"marketplace {seed} sids": sid_evaluation(tmp_path / str(seed), [1, 0, 1, 0], [1, 1, 1, 0]) for seed in (1, 2)}
    odd = sid_evaluation(tmp_path / "0", [1, 0, 1, 0], [1, 1, 1, 0], ids=("a", "b", "x", "d"))
    with pytest.raises(
        tables.CollectionError,
        match=r"^`marketplace 0 sids` measured other requests than `marketplace 1 sids`, `marketplace 2 sids`: delete .*/0 and run "
        r"`python benchmarks/quality.py --cell marketplace 0 sids` again$",
    ):
        tables.read_evaluations({"marketplace 0 sids": odd} | folders)


def test_missing_row_names_the_cell_to_rerun(tables: ModuleType, tmp_path: Path) -> None:
    whole = sid_evaluation(tmp_path / "0", [1, 0, 1, 0], [1, 1, 1, 0], rows={"semantic.rqkmeans": {"clk@100": [1, 1, 1, 1]}})
    part = sid_evaluation(tmp_path / "1", [1, 0, 1, 0], [1, 1, 1, 0])
    with pytest.raises(tables.CollectionError, match="`marketplace 1 sids` has other rows than `marketplace 0 sids`"):
        tables.read_evaluations({"marketplace 0 sids": whole, "marketplace 1 sids": part})


def test_collecting_rewrites_only_the_tables_that_were_rebuilt(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, output = tmp_path / "home", tmp_path / "results"
    with pytest.raises(SystemExit, match="nothing to collect under"):
        quality.collect(["marketplace"], [0], home, output)
    for dataset in ("marketplace", "home_depot"):
        sid_evaluation(quality.Cell(dataset, 0, "sids").artifact(home, "evaluation"), rqvae=[1, 0, 1, 0], cqsid=[1, 1, 1, 0])
    quality.collect(["marketplace", "home_depot"], [0], home, output)
    records = json.loads((output / "quality.json").read_text())
    assert "left out: marketplace channels, not finished: marketplace 0 channels" in capsys.readouterr().err
    assert {record["command"] for record in records if record["dataset"] == "home_depot"} == {"python benchmarks/quality.py --datasets home_depot --seeds 0"}
    lines = (output / "quality.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == records  # one a line
    assert "| CQ-SID over RQ-VAE | +50.0 %" in (output / "quality.md").read_text()

    kept = [record | {"commit": "0ld"} if record["dataset"] == "home_depot" else record for record in records]
    (output / "quality.json").write_text(json.dumps([*kept, records[0] | {"dataset": "marketplace", "metric": "no longer measured"}]))
    quality.collect(["marketplace"], [0], home, output)
    assert json.loads((output / "quality.json").read_text()) == kept


def test_every_cell_is_a_valid_recipe_whose_seeds_share_data_and_requests(quality: ModuleType) -> None:
    for cell in quality.grid(quality.DATASETS, [0, 7]):
        recipe, changed = RECIPES[cell.dataset](), apply_overrides(RECIPES[cell.dataset](), cell.overrides())
        assert {part.seed for part in (changed.encoder, changed.quantizer, changed.sid, changed.generator)} == {cell.seed}
        assert (changed.data, changed.evaluation.seed, changed.ranker) == (recipe.data, recipe.evaluation.seed, recipe.ranker)
        assert (changed.evaluation.max_requests, changed.align, changed.variants[0]) == (3000, None, "cqsid")
        recommended = (recipe.generator.guided, recipe.generator.soft_prompt)
        assert (changed.generator.guided, changed.generator.soft_prompt) == (recommended if cell.experiment == "channels" else (False, False))
    assert quality.Cell("home_depot", 0, "sids").variants() == ("cqsid", "rqvae", "rqvae_resized", "rqkmeans")


class PretendPipeline:
    """Stages that write a manifest where there is none, and note what they were asked for."""

    asked: list[str]

    def __init__(self, recipe: Any, where: Places) -> None:
        self.recipe, self.root = recipe, Path(where.home) / recipe.name
        type(self).asked = []

    def uri(self, name: str) -> str:
        return str(self.root / name)

    def _made(self, name: str) -> None:
        self.asked.append(name)
        if not (self.root / name).exists():
            (self.root / name).mkdir(parents=True)
            (self.root / name / "manifest.json").write_text('{"format_version": 1}')

    def __getattr__(self, stage: str) -> Any:
        return lambda variant=None: self._made(stage if variant is None else f"{variant}/{stage}")


def test_cell_runs_its_stages_in_order_and_times_only_what_it_made(quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genrecall.pipeline, "Pipeline", PretendPipeline)
    monkeypatch.setattr(genrecall.tracking, "use_tracking", lambda where: None)
    cell, before = quality.Cell("marketplace", 1, "channels"), quality.Cell("marketplace", 0, "channels")
    taken_over = before.artifact(tmp_path, "dataset")
    taken_over.mkdir(parents=True)
    (taken_over / "manifest.json").write_text('{"format_version": 1}')
    where = Places(home=str(tmp_path), data="/nowhere", tracking_uri="sqlite:///nowhere.db")
    quality.run_cell(cell, where)
    assert PretendPipeline.asked == ["dataset", "encoder", "cqsid/quantizer", "cqsid/sid_index", "cqsid/generator", "ranker", "evaluation"]
    file = tmp_path / "quality/marketplace/seed1/channels/seconds.json"
    assert list(json.loads(file.read_text())) == PretendPipeline.asked[1:]
    file.write_text('{"encoder": 12.5}')
    quality.run_cell(cell, where)
    assert json.loads(file.read_text()) == {"encoder": 12.5}


def test_sids_take_over_what_channels_made_and_keep_their_own(quality: ModuleType, tmp_path: Path) -> None:
    channels, sids = quality.Cell("marketplace", 1, "channels"), quality.Cell("marketplace", 1, "sids")
    for name in ("dataset", "encoder", "cqsid/quantizer", "cqsid/generator"):
        channels.artifact(tmp_path, name).mkdir(parents=True)
        (channels.artifact(tmp_path, name) / "manifest.json").write_text(name)
    own = sids.artifact(tmp_path, "encoder")
    own.mkdir(parents=True)
    (own / "manifest.json").write_text("own")
    quality.take_over(sids, tmp_path)
    found = {path.parent.relative_to(own.parent).as_posix(): path.read_text() for path in own.parent.rglob("manifest.json")}
    assert found == {"dataset": "dataset", "encoder": "own", "cqsid/quantizer": "cqsid/quantizer"}


def pretend(quality: ModuleType, root: Path, *, failing: Sequence[str] = ()) -> Any:
    """A cell's command that notes its start and end in `root/order`; a cell that ended well before does nothing."""

    def command(cell: Any) -> list[str]:
        done = root / f"{cell}.done".replace(" ", "-")
        order = root / "order"
        work = f"test -f {done} && exit 0; echo 'start {cell}' >> {order}; sleep 0.02; "
        return ["sh", "-c", work + (f"echo trouble with {cell}; exit 3" if str(cell) in failing else f"echo 'end {cell}' >> {order}; touch {done}")]

    return command


def test_grid_starts_a_cell_after_those_it_takes_over_from(quality: ModuleType, tmp_path: Path) -> None:
    cells = quality.grid(["marketplace", "home_depot"], [0, 1])
    quality.run_grid(cells, tmp_path, jobs=3, command=pretend(quality, tmp_path), poll_s=0.005)
    order = (tmp_path / "order").read_text().splitlines()
    assert sorted(order) == sorted(f"{what} {cell}" for what in ("start", "end") for cell in cells)
    for dataset in ("marketplace", "home_depot"):
        assert order.index(f"end {dataset} 0 channels") < order.index(f"start {dataset} 1 channels")
        for seed in (0, 1):
            assert order.index(f"end {dataset} {seed} channels") < order.index(f"start {dataset} {seed} sids")


def test_grid_stops_after_a_failure_and_goes_on_where_it_stopped(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = quality.grid(["marketplace"], [0, 1])
    with pytest.raises(SystemExit, match=r"failed: marketplace 0 sids; 2 cells not started. Read .*/quality/marketplace/seed0/sids.log, then run the same"):
        quality.run_grid(cells, tmp_path, jobs=1, command=pretend(quality, tmp_path, failing=["marketplace 0 sids"]), poll_s=0.005)
    assert (tmp_path / "quality/marketplace/seed0/sids.log").read_text() == "trouble with marketplace 0 sids\n"
    assert "failed with status 3  marketplace 0 sids" in capsys.readouterr().out
    quality.run_grid(cells, tmp_path, jobs=1, command=pretend(quality, tmp_path), poll_s=0.005)
    started = [line for line in (tmp_path / "order").read_text().splitlines() if line.startswith("start")]
    assert started == [f"start {name}" for name in ("marketplace 0 channels", "marketplace 0 sids", *map(str, cells[1:]))]


def test_interrupted_grid_ends_the_cells_that_it_started(quality: ModuleType, tmp_path: Path) -> None:
    def command(cell: Any) -> list[str]:
        if cell.dataset == "home_depot":
            raise KeyboardInterrupt
        return ["sleep", "60"]

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        quality.run_grid(quality.grid(["marketplace", "home_depot"], [0]), tmp_path, jobs=2, command=command, poll_s=0.005)
    assert time.monotonic() - started < 30  # it waited for the first cell's process, which an interrupt ended


def test_unknown_cell_is_refused(quality: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--cell", "marketplace", "first", "sids"])
    assert "--cell: expected a data set, a seed and one of channels, sids, got marketplace first sids" in capsys.readouterr().err
