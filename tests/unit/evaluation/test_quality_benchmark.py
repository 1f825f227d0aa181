"""The quality benchmark: its grid with made-up cells, its tables from small evaluations worked out by hand."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from genrecall.config import Places, apply_overrides
from genrecall.recipes import RECIPES
from genrecall.storage import Artifact

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
    folder: Path,
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ids: Sequence[str] = ("a", "b", "c", "d"),
    records: Sequence[dict[str, Any]] = (),
    query_kind: str = "real",
) -> Path:
    """An evaluation of four requests, the first three of them headline, the last two a uniform sample; `rows` is `table.row` -> metric -> values."""
    (folder / "per_request").mkdir(parents=True, exist_ok=True)
    masks = {"primary": np.array([True, True, True, False]), "uniform": np.array([False, False, True, True])}
    np.savez(folder / "per_request" / "requests.npz", request_id=np.array(ids), **masks)
    np.savez(folder / "per_request" / "sid_lists.npz", **{"semantic.cqsid": np.zeros((4, 2), dtype=np.int32)})
    for name, columns in rows.items():
        np.savez(folder / "per_request" / f"{name}.npz", **{metric: np.array(values, dtype=np.float32) for metric, values in columns.items()})
    (folder / "metrics.json").write_text(json.dumps({"query_kind": query_kind, "records": list(records)}))
    return folder


def sid_evaluation(folder: Path, rqvae: Sequence[float], cqsid: Sequence[float], items_per_sid: float = 2.0, **more: Any) -> Path:
    """An evaluation of `sids` with one metric; nothing is known of the shoppers, so stage 3 is stage 2."""
    rows = {f"{table}.{row}": {"clk@100": values} for table in ("semantic", "personalised") for row, values in (("rqvae", rqvae), ("cqsid", cqsid))}
    sizes = [{"table": table, "row": "cqsid", "metric": "items_per_sid", "slice": "", "value": items_per_sid} for table in ("semantic", "personalised")]
    return write_evaluation(folder, rows | more.pop("rows", {}), records=sizes, **more)


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


def test_derived_queries_have_tables_over_the_uniform_sample_too(tables: ModuleType, tmp_path: Path) -> None:
    # Over all queries, the last two requests: RQ-VAE finds 1 of 2, CQ-SID 2 of 2; with the shopper CQ-SID finds 1 of 2.
    rows = {"personalised.cqsid": {"clk@100": [1, 1, 1, 0]}}
    values: dict[str, Any] = {"rqvae": [1, 1, 0, 1], "cqsid": [1, 0, 1, 1], "items_per_sid": 1.25}
    folder = sid_evaluation(tmp_path / "0", **values, rows=rows, query_kind="derived")
    records = collected(tables, {"amazon_scientific 0 sids": folder})
    found = values_of(records)
    assert {table for table, _, _ in found} == set(tables.TABLES_OF["sids"])
    by_row = {(table, row): value for (table, row, metric), value in found.items() if metric == "clk@100"}
    thirds = pytest.approx(2 / 3, abs=1e-6)
    assert by_row == {
        ("semantic", "rqvae"): thirds,
        ("semantic", "cqsid"): thirds,
        ("personalised", "rqvae"): thirds,
        ("personalised", "cqsid"): 1.0,
        ("semantic_all_queries", "rqvae"): 0.5,
        ("semantic_all_queries", "cqsid"): 1.0,
        ("personalised_all_queries", "rqvae"): 0.5,
        ("personalised_all_queries", "cqsid"): 0.5,
    }
    assert found["semantic_all_queries", "cqsid", "clk@100_gain_vs_rqvae"] == 1.0
    assert (found["semantic", "all", "requests"], found["semantic_all_queries", "all", "requests"]) == (3, 2)
    for table in tables.TABLES_OF["sids"]:  # the same rows and metrics
        assert {(row, metric) for one, row, metric in found if one == table} == {(row, metric) for one, row, metric in found if one == "semantic"}

    text = tables.markdown(records)
    assert text.count(tables.REQUESTS_NOTE) == 1
    assert [line for line in text.splitlines() if line.startswith("### ")] == [f"### {tables.TITLES[table]}" for table in tables.TABLES_OF["sids"]]
    assert text.count("|  | items/SID | clk@1 |") == 4
    assert text.count("| CQ-SID | 1.25 |") == 4

    real = sid_evaluation(tmp_path / "1", **values, rows=rows)
    records = collected(tables, {"marketplace 0 sids": real})
    assert {record["table"] for record in records} == {"semantic", "personalised"}
    assert tables.REQUESTS_NOTE not in tables.markdown(records)


def test_channels_of_derived_queries_have_a_table_over_the_uniform_sample_too(tables: ModuleType, tmp_path: Path) -> None:
    rows = {
        "channels.rrf_bm25_dense": {"recall@10": [1, 0, 0, 1]},
        "channels.rrf_all": {"recall@10": [1, 0, 1, 1]},
        "channels.generative": {"marginal@100": [0, 0, 1, 0]},
        "semantic.cqsid": {"clk@100": [1, 0, 1, 0]},
    }
    folder = write_evaluation(tmp_path / "0", rows, query_kind="derived")
    records = collected(tables, {"amazon_scientific 0 channels": folder}, "channels")
    found = values_of(records)
    assert {table for table, _, _ in found} == {"channels", "channels_all_queries", "semantic_guided"}
    assert found["channels_all_queries", "rrf_all", "recall@10_gain_vs_rrf_bm25_dense"] == 1.0  # 2 of 2 after 1 of 2
    assert found["channels_all_queries", "generative", "marginal@100"] == 0.5
    text = tables.markdown(records)
    assert text.count("|  | recall@10 | recall@100 | marginal@100 | missed_found@100 |") == 2
    assert text.count(tables.REQUESTS_NOTE) == 1


def test_cut_curve_is_collected_for_the_rows_of_the_paper(tables: ModuleType, tmp_path: Path) -> None:
    columns = {"clk@1": [1, 0, 1, 0], "cut1000@beam10": [1, 0, 0, 0], "cut1000@beam20": [1, 1, 0, 0]}
    folder = write_evaluation(tmp_path / "0", {f"semantic.{row}": columns for row in ("rqvae", "rqvae_resized", "rqkmeans", "cqsid")})
    found = values_of(collected(tables, {"marketplace 0 sids": folder}))
    assert {row for _, row, metric in found if metric == "cut1000@beam20"} == {"rqvae", "rqvae_resized", "cqsid"}
    assert found["semantic", "cqsid", "cut1000@beam10"] == pytest.approx(1 / 3, abs=1e-6)
    bases = {(row, metric) for _, row, metric in found if metric.startswith("clk@1_gain")}
    versus_rqvae = {(row, "clk@1_gain_vs_rqvae") for row in ("rqvae_resized", "rqkmeans", "cqsid")}
    assert bases == versus_rqvae | {("cqsid", "clk@1_gain_vs_rqvae_resized"), ("cqsid", "clk@1_gain_vs_rqkmeans")}


def test_beam_needed_is_read_between_the_beams_measured(tables: ModuleType) -> None:
    beams, curve = np.array([10.0, 20.0, 40.0]), [0.2, 0.6, 0.8]
    wanted = [0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9]
    found = tables.beam_needed(beams, np.array([curve] * len(wanted)), np.array(wanted))
    assert found == pytest.approx([10, 10, 15, 20, 30, 40, np.inf])
    past_its_best = tables.beam_needed(beams, np.array([[0.2, 0.6, 0.4]]), np.array([0.4]))
    assert past_its_best == pytest.approx([15])  # the first time, not where it falls again


def test_beams_that_cqsid_needs_for_the_best_of_rqvae(tables: ModuleType, tmp_path: Path) -> None:
    # RQ-VAE is best at beam 20 with a third of its targets; CQ-SID has none at 10 and all at 20, so a third at 10 + 10 / 3.
    third, none, whole = [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]
    columns = {
        "rqvae": {"cut1000@beam10": none, "cut1000@beam20": third, "cut1000@beam40": none},
        "rqvae_resized": {"cut1000@beam10": whole, "cut1000@beam20": whole, "cut1000@beam40": whole},
        "cqsid": {"cut1000@beam10": none, "cut1000@beam20": whole, "cut1000@beam40": whole},
    }
    folder = write_evaluation(tmp_path / "0", {f"semantic.{row}": found for row, found in columns.items()})
    records = collected(tables, {"marketplace 0 large": folder}, "large")
    found = values_of(records)
    assert {table for table, _, _ in found} == {"semantic_large"}
    assert (found["semantic_large", "rqvae", "best_cut1000_beam"], found["semantic_large", "rqvae_resized", "best_cut1000_beam"]) == (20, 10)
    assert found["semantic_large", "cqsid", "beam_for_best_cut1000_of_rqvae"] == pytest.approx(10 + 10 / 3)
    assert found["semantic_large", "cqsid", "beam_saved_vs_rqvae"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["semantic_large", "cqsid", "beam_saved_vs_rqvae_resized"] == -1.0
    text = tables.markdown(records)
    assert "RQ-VAE is best at beam 20 (10 to 20); CQ-SID is as good at beam 13: +33 %" in text
    assert "RQ-VAE, books resized is best at beam 10 (10 to 10); CQ-SID is as good at beam 20: -100 %" in text


def test_channels_have_their_gains_and_their_slices_averaged_over_seeds(tables: ModuleType, tmp_path: Path) -> None:
    folders = {}
    for seed, head in ((0, 0.25), (1, 0.75)):
        rows = {
            "channels.rrf_bm25_dense": {"recall@10": [1, 0, 1, 0]},
            "channels.rrf_all": {"recall@10": [1, 1, 1, 0]},
            "channels.guidance": {"recall@10": [1, 1, 0, 1]},
            "channels.generative": {"recall@10": [0, 1, 0, 0], "missed_found@100": [NAN, 1, seed, 0]},
        }
        named = {"table": "channels", "row": "generative", "metric": "missed_found@100"}
        found = (("", 0.9, 9), ("head", head, 2 + seed), ("tail", 0.5 if seed else None, 4 * seed), ("torso", None, 0))
        slices = [named | {"slice": name, "value": value, "n": n} for name, value, n in found]
        slices.append(named | {"metric": "marginal@100", "slice": "head", "value": 0.25, "n": 1200})
        folders[f"marketplace {seed} channels"] = write_evaluation(tmp_path / str(seed), rows, records=slices)
    records = collected(tables, folders, "channels")
    found = values_of(records)
    assert found["channels", "rrf_all", "recall@10_gain_vs_rrf_bm25_dense"] == 0.5
    assert found["channels", "generative", "recall@10_gain_vs_guidance"] == -0.5  # 1 of 3 headline requests after 2 of 3
    text = tables.markdown(records)
    assert "| guidance alone (no decoder) | .667 (" in text
    assert "| generative (ours) over guidance alone (no decoder) | -50.0 %" in text
    assert found["channels", "generative", "missed_found@100"] == 0.75
    by_slice = {metric: value for (table, _, metric), value in found.items() if table == "channels_by_slice"}
    assert by_slice == {
        "missed_found@100[head]": 0.5,
        "missed_found@100[tail]": 0.5,  # of the one seed with misses there
        "missed_found@100[torso]": None,
        "requests_with_misses[head]": 2.5,
        "requests_with_misses[tail]": 2,
        "requests_with_misses[torso]": 0,
        "marginal@100[head]": 0.25,
        "requests[head]": 1200,
    }
    assert "| slice | requests | marginal@100 | requests_with_misses | missed_found@100 |" in text
    assert "| head | 1,200 | .250 | 2.5 | .500 |" in text
    assert "| tail |  | n/a | 2 | .500 |" in text
    older = tables.markdown([record for record in records if "requests" not in record["metric"]])
    assert "| head |  | .250 |  | .500 |" in older


def test_other_requests_name_the_cell_to_rerun(tables: ModuleType, tmp_path: Path) -> None:
    folders = {f"marketplace {seed} sids": sid_evaluation(tmp_path / str(seed), [1, 0, 1, 0], [1, 1, 1, 0]) for seed in (1, 2)}
    odd = sid_evaluation(tmp_path / "0", [1, 0, 1, 0], [1, 1, 1, 0], ids=("a", "b", "x", "d"))
    with pytest.raises(
        sys.modules["paired_records"].CollectionError,
        match=r"^`marketplace 0 sids` measured other requests than `marketplace 1 sids`, `marketplace 2 sids`: delete .*/0 and run "
        r"`python benchmarks/quality.py --cell marketplace 0 sids` again$",
    ):
        tables.read_evaluations({"marketplace 0 sids": odd} | folders)


def test_missing_row_names_the_cell_to_rerun(tables: ModuleType, tmp_path: Path) -> None:
    whole = sid_evaluation(tmp_path / "0", [1, 0, 1, 0], [1, 1, 1, 0], rows={"semantic.rqkmeans": {"clk@100": [1, 1, 1, 1]}})
    part = sid_evaluation(tmp_path / "1", [1, 0, 1, 0], [1, 1, 1, 0])
    with pytest.raises(sys.modules["paired_records"].CollectionError, match="`marketplace 1 sids` has other rows than `marketplace 0 sids`"):
        tables.read_evaluations({"marketplace 0 sids": whole, "marketplace 1 sids": part})


def test_collecting_rewrites_only_the_tables_that_were_rebuilt(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, output = tmp_path / "home", tmp_path / "results"
    with pytest.raises(SystemExit, match="nothing to collect under"):
        quality.collect(["marketplace"], [0], quality.EXPERIMENTS, home, output)
    for dataset in ("marketplace", "amazon_scientific"):
        sid_evaluation(quality.Cell(dataset, 0, "sids").artifact(home, "evaluation"), rqvae=[1, 0, 1, 0], cqsid=[1, 1, 1, 0])
    quality.collect(["marketplace", "amazon_scientific"], [0], quality.EXPERIMENTS, home, output)
    records = json.loads((output / "quality.json").read_text())
    assert "left out: marketplace channels, not finished: marketplace 0 channels" in capsys.readouterr().err
    commands = {record["command"] for record in records if record["dataset"] == "amazon_scientific"}
    assert commands == {"python benchmarks/quality.py --datasets amazon_scientific --seeds 0"}
    lines = (output / "quality.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == records  # one a line
    assert "| CQ-SID over RQ-VAE | +50.0 %" in (output / "quality.md").read_text()

    kept = [record | {"commit": "0ld"} if record["dataset"] == "amazon_scientific" else record for record in records]
    (output / "quality.json").write_text(json.dumps([*kept, records[0] | {"dataset": "marketplace", "metric": "no longer measured"}]))
    quality.collect(["marketplace"], [0], quality.EXPERIMENTS, home, output)
    assert json.loads((output / "quality.json").read_text()) == kept
    quality.collect(["marketplace"], [0], ["sids"], home, output)
    commands = {record["command"] for record in json.loads((output / "quality.json").read_text()) if record["dataset"] == "marketplace"}
    assert commands == {"python benchmarks/quality.py --datasets marketplace --experiments sids --seeds 0"}


def test_every_cell_is_a_valid_recipe_whose_seeds_share_data_and_requests(quality: ModuleType) -> None:
    for cell in quality.grid(quality.DATASETS, [0, 7], tuple(quality.VARIANTS)):
        recipe, changed = RECIPES[cell.dataset](), apply_overrides(RECIPES[cell.dataset](), cell.overrides())
        assert {part.seed for part in (changed.encoder, changed.quantizer, changed.sid, changed.generator)} == {cell.seed}
        assert (changed.evaluation.seed, changed.ranker) == (recipe.evaluation.seed, recipe.ranker)
        assert (changed.data == recipe.data) == (cell.dataset != "marketplace" or cell.experiment == "channels")
        assert (changed.evaluation.max_requests, changed.align, changed.variants[0]) == (1500, None, "cqsid")
        asked = (changed.encoder.steps, changed.generator.guided, changed.generator.soft_prompt)
        recommended = (recipe.encoder.steps, recipe.generator.guided, recipe.generator.soft_prompt)
        assert asked == (recommended if cell.experiment == "channels" else (0, False, False))


def test_sids_are_compared_only_where_there_are_categories(quality: ModuleType) -> None:
    cells = {str(cell) for cell in quality.grid(quality.DATASETS, [0])}
    channels = {"marketplace 0 channels", "amazon_scientific 0 channels", "home_depot 0 channels"}
    assert cells == channels | {"marketplace 0 sids", "amazon_scientific 0 sids", "marketplace 0 large"}
    assert [str(cell) for cell in quality.grid(quality.DATASETS, [0, 1], ["large"])] == ["marketplace 0 large", "marketplace 1 large"]


def test_the_papers_codebooks_are_the_large_experiment_on_a_gpu_and_run_only_when_asked_for(quality: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    [cell] = quality.grid(quality.DATASETS, [0], ["large_paper"])
    paper, large = (apply_overrides(RECIPES["marketplace"](), one.overrides()) for one in (cell, quality.Cell("marketplace", 0, "large")))
    assert paper.quantizer.level_sizes == RECIPES["paper"]().quantizer.level_sizes
    assert replace(paper, quantizer=large.quantizer, train=replace(paper.train, use_gpu=False)) == large
    assert replace(paper.quantizer, level_sizes=large.quantizer.level_sizes) == large.quantizer
    columns = {"cut1000@beam10": [1, 0, 0, 0], "cut1000@beam20": [1, 1, 0, 0]}
    folder = write_evaluation(tmp_path / "0", {f"semantic.{row}": columns for row in ("rqvae", "cqsid")})
    records = collected(tables, {"marketplace 0 large_paper": folder}, "large_paper")
    assert {record["table"] for record in records} == {"semantic_large_paper"} <= set(tables.TABLES_OF["large_paper"])
    assert "the paper's codebooks, query alone" in tables.markdown(records)


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
    monkeypatch.setattr(quality, "Pipeline", PretendPipeline)
    monkeypatch.setattr(quality, "use_tracking", lambda where: None)
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


def test_records_name_the_commits_that_evaluated_and_not_the_one_that_collects(quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "Pipeline", PretendPipeline)
    monkeypatch.setattr(quality, "use_tracking", lambda where: None)
    where, cells = (
        Places(home=str(tmp_path), data="/nowhere", tracking_uri="sqlite:///nowhere.db"),
        [quality.Cell("marketplace", seed, "sids") for seed in (0, 1)],
    )
    monkeypatch.setattr(quality, "resize", lambda pipeline: None)

    def at(commit: str) -> None:
        monkeypatch.setattr(quality, "commit", lambda: commit)
        monkeypatch.setattr(sys.modules["measurement"], "commit", lambda: commit)

    def collected_at() -> set[str]:
        quality.collect(["marketplace"], [0, 1], ["sids"], tmp_path, tmp_path / "results")
        return {record["commit"] for record in json.loads((tmp_path / "results" / "quality.json").read_text())}

    for number, cell in enumerate(cells):
        at(f"{number}+changes")
        quality.run_cell(cell, where)
        sid_evaluation(cell.artifact(tmp_path, "evaluation"), rqvae=[1, 0, 1, 0], cqsid=[1, 1, 1, 0])
    at("2")
    quality.run_cell(cells[0], where)  # makes nothing
    assert collected_at() == {"0+changes, 1+changes"}
    # An evaluation that the file is not about, and one without a file, are as before: of the commit now.
    (cells[0].artifact(tmp_path, "evaluation") / "manifest.json").write_text('{"format_version": 1, "created": "later"}')
    assert collected_at() == {"2, 1+changes"}
    cells[1].evaluated(tmp_path).unlink()
    assert collected_at() == {"2"}


def test_resized_books_are_fitted_after_both_sizes_are_known_and_before_their_generator(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "Pipeline", PretendPipeline)
    monkeypatch.setattr(quality, "use_tracking", lambda where: None)
    monkeypatch.setattr(quality, "resize", lambda pipeline: pipeline.asked.append("resize"))
    quality.run_cell(quality.Cell("marketplace", 0, "sids"), Places(home=str(tmp_path), data="/nowhere", tracking_uri="sqlite:///nowhere.db"))
    made = [[f"{variant}/{stage}" for stage in ("quantizer", "sid_index", "generator")] for variant in quality.SID_VARIANTS if variant != "rqvae_resized"]
    sized, others = [*made[0], *made[1], "resize", "rqvae_resized/generator"], [name for names in made[2:] for name in names]
    assert PretendPipeline.asked == ["dataset", "encoder", *sized, *others, "ranker", "evaluation"]


class ResizablePipeline:
    """A pipeline whose RQ-VAE has clusters of a mean size that its last two books decide; CQ-SID's hold four items on average."""

    def __init__(self, root: Path, size_of: Callable[[int, int], float], *, second: int = 10, third: int = 10) -> None:
        recipe = RECIPES["marketplace"]()
        self.recipe = replace(recipe, quantizer=replace(recipe.quantizer, level_sizes=(64, second, third)))
        self.root, self.size_of = root, size_of
        self.fitted: list[tuple[int, int, int]] = []
        self.published: tuple[int, int, int] | None = None

    def uri(self, name: str) -> str:
        return str(self.root / name)

    def quantizer(self, variant: str) -> None:
        """As the stage does, nothing where the artifact has these books already."""
        assert variant == "rqvae_resized"
        levels = self.recipe.resized_levels
        assert levels is not None
        if not self.fitted or self.fitted[-1] != levels:
            self.fitted.append(levels)

    def sid_index(self, variant: str) -> None:
        assert variant == "rqvae_resized"
        (self.root / variant).mkdir(exist_ok=True)
        self.published = self.fitted[-1]

    def existing(self, name: str) -> Artifact:
        variant, kind = name.split("/")
        levels = self.published if variant == "rqvae_resized" else self.recipe.quantizer.level_sizes
        assert levels is not None
        size = 4.0 if variant == "cqsid" else self.size_of(*levels[1:])
        return Artifact(
            name, self.root, {"kind": kind, "row_counts": {"items": 1_000_000, "sids": round(1_000_000 / size)}, "identity": self.recipe.quantizer.seed}
        )

    @property
    def size(self) -> float:
        assert self.published is not None
        return self.size_of(*self.published[1:])


@pytest.mark.parametrize("size", [1.5, 3.0, 9.0, 30.0])
@pytest.mark.parametrize("power", [0.5, 0.7, 0.9])  # a code more brings less than a cluster more
def test_resizing_reaches_the_wanted_size_within_five_percent(quality: ModuleType, tmp_path: Path, size: float, power: float) -> None:
    pipeline = ResizablePipeline(tmp_path, lambda second, third: size * (30 * 30 / (second * third)) ** power, second=30, third=30)
    quality.resize(pipeline)
    assert pipeline.size == pytest.approx(4.0, rel=0.05)
    assert pipeline.published == pipeline.recipe.resized_levels == pipeline.fitted[-1]
    assert pipeline.recipe.resized_levels[0] == 64
    assert len(pipeline.fitted) < quality.RESIZE_TRIES
    assert pipeline.recipe.quantizer.level_sizes == (64, 30, 30)  # the other variants' books


@pytest.mark.parametrize("size", [3.9, 4.0, 4.15])
def test_resizing_keeps_the_own_books_where_they_are_near_enough(quality: ModuleType, tmp_path: Path, size: float) -> None:
    pipeline = ResizablePipeline(tmp_path, lambda second, third: size)
    quality.resize(pipeline)
    assert pipeline.fitted == [(64, 10, 10)]
    assert pipeline.published == (64, 10, 10)


def test_own_books_take_over_what_was_made_for_rqvae(quality: ModuleType, tmp_path: Path) -> None:
    for name in ("quantizer", "sid_index", "generator"):
        (tmp_path / "rqvae" / name).mkdir(parents=True)
        (tmp_path / "rqvae" / name / "manifest.json").write_text(name)
    quality.resize(ResizablePipeline(tmp_path, lambda second, third: 4.0))
    assert {path.parent.name: path.read_text() for path in (tmp_path / "rqvae_resized").glob("*/manifest.json")} == {
        name: name for name in ("quantizer", "sid_index", "generator")
    }


def test_resizing_changes_one_book_where_both_go_too_far(quality: ModuleType, tmp_path: Path) -> None:
    sizes = {(8, 8): 3.4, (7, 7): 4.8, (8, 7): 4.1}
    pipeline = ResizablePipeline(tmp_path, lambda second, third: sizes[second, third], second=8, third=8)
    quality.resize(pipeline)
    assert pipeline.fitted == [(64, 7, 7), (64, 8, 7)]
    assert pipeline.published == (64, 8, 7)


@pytest.mark.parametrize(("size", "tried"), [(9.0, (64, 18, 18)), (2.0, (64, 6, 6))])
def test_resizing_stops_where_other_books_change_nothing(quality: ModuleType, tmp_path: Path, size: float, tried: tuple[int, int, int]) -> None:
    # 10 * (9 / 4) ** 0.75 = 18.4 and 10 * (2 / 4) ** 0.75 = 5.9 codes.
    pipeline = ResizablePipeline(tmp_path, lambda second, third: size)
    quality.resize(pipeline)
    assert pipeline.fitted == [tried, (64, 10, 10)]
    assert pipeline.published == (64, 10, 10)


def test_resizing_ends_with_the_best_of_its_tries(quality: ModuleType, tmp_path: Path) -> None:
    # 10 * (8 / 4) ** 0.75 = 16.8 codes give 5 items a SID; the 17 * (5 / 4) ** 0.75 = 20.1 after them give 6, and 5 is the nearest.
    pipeline = ResizablePipeline(tmp_path, lambda second, third: {10: 8.0, 17: 5.0, 20: 6.0}[third])
    quality.resize(pipeline)
    assert pipeline.fitted == [(64, 17, 17), (64, 20, 20), (64, 17, 17)]
    assert pipeline.published == pipeline.recipe.resized_levels == (64, 17, 17)


@pytest.mark.parametrize(("second", "third"), [(2, 2), (2, 3), (3, 2), (5, 5)])
def test_resizing_ends_where_no_books_fit(quality: ModuleType, tmp_path: Path, second: int, third: int) -> None:
    for number, size_of in enumerate((lambda a, b: 8.0 if a * b < 9 else 3.5, lambda a, b: a * b / 100, lambda a, b: 1e5 / (a * b))):
        root = tmp_path / str(number)
        root.mkdir()
        pipeline = ResizablePipeline(root, size_of, second=second, third=third)
        quality.resize(pipeline)
        assert len(pipeline.fitted) <= quality.RESIZE_TRIES
        assert pipeline.recipe.resized_levels == pipeline.published
        assert min(pipeline.published) >= 2
        distances = {levels: max(size / 4, 4 / size) for levels in [*pipeline.fitted, (64, second, third)] if (size := size_of(*levels[1:]))}
        assert distances[pipeline.published] == min(distances.values())


def test_resizing_again_fits_nothing_again(quality: ModuleType, tmp_path: Path) -> None:
    first = ResizablePipeline(tmp_path, lambda second, third: {10: 8.0, 17: 5.0, 20: 6.0}[third])
    quality.resize(first)
    again = ResizablePipeline(tmp_path, first.size_of)
    again.fitted, again.published = [(64, 17, 17)], (64, 17, 17)
    quality.resize(again)
    assert again.fitted == [(64, 17, 17)]
    assert again.recipe.resized_levels == (64, 17, 17)
    other = ResizablePipeline(tmp_path, first.size_of)
    other.recipe = replace(other.recipe, quantizer=replace(other.recipe.quantizer, seed=1))  # other SIDs: what was tried for the first says nothing
    quality.resize(other)
    assert other.fitted == first.fitted


def test_cells_take_over_the_data_alone_and_keep_their_own(quality: ModuleType, tmp_path: Path) -> None:
    channels = quality.Cell("amazon_scientific", 0, "channels")
    for name in ("dataset", "encoder", "cqsid/quantizer", "cqsid/generator"):
        channels.artifact(tmp_path, name).mkdir(parents=True)
        (channels.artifact(tmp_path, name) / "manifest.json").write_text(name)

    def found(cell: Any) -> dict[str, str]:
        quality.take_over(cell, tmp_path)
        top = cell.artifact(tmp_path, "dataset").parent
        return {path.parent.relative_to(top).as_posix(): path.read_text() for path in top.rglob("manifest.json")}

    assert found(quality.Cell("amazon_scientific", 0, "sids")) == found(quality.Cell("amazon_scientific", 1, "channels")) == {"dataset": "dataset"}
    own = quality.Cell("amazon_scientific", 1, "sids")
    own.artifact(tmp_path, "dataset").mkdir(parents=True)
    (own.artifact(tmp_path, "dataset") / "manifest.json").write_text("own")
    assert found(own) == {"dataset": "own"}
    assert len(found(channels)) == 4


@pytest.mark.parametrize("experiment", ["sids", "large"])
def test_sids_compared_on_other_data_than_the_channels_share_that(quality: ModuleType, experiment: str) -> None:
    assert any(change.startswith("data.") for change in quality.TASKS[experiment]["marketplace"])
    assert quality.Cell("marketplace", 2, experiment).reuses() == [(quality.Cell("marketplace", 0, experiment), "dataset")]
    assert quality.Cell("marketplace", 0, experiment).reuses() == []


def test_sids_compared_on_the_channels_data_take_that_over(quality: ModuleType) -> None:
    assert quality.Cell("amazon_scientific", 0, "sids").reuses() == [(quality.Cell("amazon_scientific", 0, "channels"), "dataset")]
    assert quality.Cell("marketplace", 2, "channels").reuses() == [(quality.Cell("marketplace", 0, "channels"), "dataset")]


def pretend(quality: ModuleType, root: Path, *, failing: Sequence[str] = ()) -> Any:
    """A cell's command that notes its start and end in `root/order`; a cell that ended well before does nothing."""

    def command(cell: Any) -> list[str]:
        done = root / f"{cell}.done".replace(" ", "-")
        order = root / "order"
        work = f"test -f {done} && exit 0; echo 'start {cell}' >> {order}; sleep 0.02; "
        return ["sh", "-c", work + (f"echo trouble with {cell}; exit 3" if str(cell) in failing else f"echo 'end {cell}' >> {order}; touch {done}")]

    return command


def test_grid_starts_a_cell_after_those_it_takes_over_from(quality: ModuleType, tmp_path: Path) -> None:
    cells = quality.grid(["amazon_scientific", "home_depot"], [0, 1])
    quality.run_grid(cells, tmp_path, jobs=3, command=pretend(quality, tmp_path), poll_s=0.005)
    order = (tmp_path / "order").read_text().splitlines()
    assert sorted(order) == sorted(f"{what} {cell}" for what in ("start", "end") for cell in cells)
    for dataset in ("amazon_scientific", "home_depot"):
        first, *others = [cell for cell in cells if cell.dataset == dataset]
        assert (first.seed, first.experiment) == (0, "channels")
        assert all(order.index(f"end {first}") < order.index(f"start {other}") for other in others)


def test_grid_stops_after_a_failure_and_goes_on_where_it_stopped(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = quality.grid(["marketplace"], [0, 1])
    with pytest.raises(SystemExit, match=r"failed: marketplace 0 sids; 4 cells not started. Read .*/quality/marketplace/seed0/sids.log, then run the same"):
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
        quality.run_grid(quality.grid(["amazon_scientific", "home_depot"], [0]), tmp_path, jobs=2, command=command, poll_s=0.005, grace_s=5.0)
    assert time.monotonic() - started < 30  # it waited for the first cell's process, which an interrupt ended


def test_unknown_cell_is_refused(quality: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--cell", "marketplace", "first", "sids"])
    assert "--cell: expected a data set, a seed and one of channels, sids, large, large_paper, got marketplace first sids" in capsys.readouterr().err
