"""The command that rebuilds the alignment's tables: EG-GRPO, plain GRPO and continued supervised training against stage 3, over data sets and seeds.

    python benchmarks/eg_grpo.py [--datasets marketplace home_depot] [--seeds 0 1 2] [--rows ...] [--jobs 1] [--collect-only]
    python benchmarks/eg_grpo.py --tune [--seeds 0 1]

The row `guidance` is stage 3 with its decoder's logits at 0: what the gain of stage 3 over it says is what training the decoder has brought.

A cell is one (dataset, seed), a process of its own with its own home `GENRECALL_HOME/eg_grpo/DATASET/seedK/` and its own MLflow store there;
its log lies beside that folder. It trains encoder, SIDs, generator and ranker once and then, row by row, aligns the same generator and measures
it on the test requests, those of one search with ten beams. All hyperparameters are the recipe's but for what `DATA` and `ROWS` say. Run the command
again after an interrupt or an error: finished stages, alignments and measurements are not redone. All seeds share the data and the requests.

The marketplace is the small one's catalogue under more traffic, its last 35 % of the requests for testing, so that 21,000 are measured. On it the
outcome is simulated too: pages of the site's channels and ours behind the site's ranker, and of ours alone, the same shoppers with the same luck
in every arm.

`--tune` chooses hyperparameters, on the marketplace's validation requests alone: it aligns `eg_grpo_k2` with each of `TUNING` and says what that
gains over stage 3. Results go to `benchmarks/results/eg_grpo.json` and `eg_grpo.md`, where tables that were not rebuilt stay as they were.
`--collect-only` reads the measurements that are there without checking that they are current. A record's commit is the one that was checked out
when the cells that measured began; where a dataset's cells and rows differ in it, all are named. The data set `tiny` is for trying the command only.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import functools
import json
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import eg_grpo_tables
import numpy as np
import pyarrow.parquet as pq
from eg_grpo_tables import ALONE, COLUMNS, GUIDANCE, OUTCOME_ROWS, START, UNALIGNED, WITHOUT, Plan
from grid import ROOT, run_grid, run_stages, take_over
from measurement import commit
from paired_records import CollectionError

from genrecall.config import ConfigError, Places, apply_overrides, places
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import Requests, load_requests
from genrecall.data.marketplace import Marketplace
from genrecall.evaluation.ab_simulation import OUTCOMES, build_pages, play
from genrecall.evaluation.leaks import check_no_leaks
from genrecall.evaluation.request_metrics import Tiers, item_lists, sid_columns
from genrecall.evaluation.slices import sample_requests
from genrecall.generator.calibration import weighted_decoder
from genrecall.generator.retriever import load_retriever
from genrecall.pipeline import Pipeline, quiet_libraries
from genrecall.recipes import MAIN_VARIANT, RECIPES, Recipe
from genrecall.sid.index import load_index
from genrecall.storage import Artifact
from genrecall.tracking import use_tracking

DATASETS = ("marketplace", "home_depot")
SEEDS = (0, 1, 2)
DATA: Mapping[str, tuple[str, ...]] = {
    "marketplace": (
        *("data.marketplace_size=busy", "data.validation_fraction=0.2", "data.test_fraction=0.35"),
        *("align.learning_rate=1e-4", "align.steps=150", "align.requests_per_step=96"),
    ),
    "home_depot": (),
    "tiny": (),
}
"""What each data set changes in the recipe. Of the busy marketplace's 60,000 requests 27,000 train, 12,000 tune and 21,000 test. Its alignment is longer
than that of the recipe, whose small marketplace has a quarter of the training requests: chosen on those 12,000 (`--tune`), between 150 steps of 48 requests and 300 of 96."""
ROWS: Mapping[str, tuple[str, ...]] = {
    START: (),
    GUIDANCE: (),
    "stage3_continued": (
        "align.num_experts=0",
        "align.objective.policy_weight=0",
        "align.objective.kl_weight=0",
        "align.objective.sft_anchor_weight=1",
        "align.objective.sft_anchors=2",
    ),
    "grpo_k0": ("align.num_experts=0",),
    "eg_grpo_k1": ("align.num_experts=1",),
    "eg_grpo_k2": ("align.num_experts=2",),
    "eg_grpo_k4": ("align.num_experts=4",),
    "eg_grpo_k2_ranker": ("align.num_experts=2", "align.reward.mode=ranker"),
    "eg_grpo_k2_mixed": ("align.num_experts=2", "align.reward.mode=mixed"),
}
"""What each row changes in the recipe's alignment; `stage3` and `guidance` are none. `stage3_continued` trains on as many logged SIDs a request as `eg_grpo_k2` has experts."""
_DISTINCT_16 = ("align.group_size=16", "align.distinct_samples=true")
_HALF_READ = ("align.query_vector_drop=0.35",)
TUNING: Mapping[str, tuple[str, ...]] = {
    START: (),
    **{
        f"{name}_rate{rate:g}_{steps}x{requests}": (
            "align.num_experts=2",
            f"align.learning_rate={rate:g}",
            f"align.steps={steps}",
            f"align.requests_per_step={requests}",
            "align.group_size=8",
            "align.distinct_samples=false",
            *changes,
        )
        for name, rate, steps, requests, changes in (
            ("plain", 2e-5, 60, 48, ()),
            ("plain", 5e-5, 60, 48, ()),
            ("plain", 1e-4, 60, 48, ()),
            ("plain", 2e-4, 60, 48, ()),
            ("kl0.1", 1e-4, 60, 48, ("align.objective.kl_weight=0.1",)),
            ("kl0.1", 2e-4, 60, 48, ("align.objective.kl_weight=0.1",)),
            ("plain", 1e-4, 150, 48, ()),
            ("distinct16", 1e-4, 150, 48, _DISTINCT_16),
            ("anchor0.3", 1e-4, 150, 48, ("align.objective.sft_anchor_weight=0.3", "align.objective.sft_anchors=2")),
            ("half_read", 1e-4, 150, 48, _HALF_READ),
            ("plain", 1e-4, 500, 48, ()),
            ("anchor0.1", 1e-4, 150, 96, ("align.objective.sft_anchor_weight=0.1", "align.objective.sft_anchors=2")),
            ("plain", 1e-4, 300, 96, ()),
            ("half_read", 1e-4, 300, 96, _HALF_READ),
            ("distinct16", 1e-4, 300, 96, _DISTINCT_16),
            ("plain", 1e-4, 150, 96, ()),
            ("exposed0.25", 1e-4, 150, 96, ("align.reward.exposed=0.25",)),
            ("exposed0.1", 1e-4, 150, 96, ("align.reward.exposed=0.1",)),
            ("distinct16_anchor0.2", 1e-4, 300, 96, (*_DISTINCT_16, "align.objective.sft_anchor_weight=0.2", "align.objective.sft_anchors=2")),
        )
    },
}
"""What `--tune` changes in the recipe's alignment: the learning rate, the KL, more steps and requests, and what one may hope raises clk@10, as a smaller
reward of what was shown and not clicked."""
TUNING_SEEDS = (0,)
GRID = Plan(name="rows", rows=tuple(ROWS), split="test", alignments="aligned", measured="measured")
TUNE = Plan(name="tuning", rows=tuple(TUNING), split="validation", alignments="tuned", measured="measured_validation")

BEAMS = (1, 10)
DEPTH = 100  # items that the channel hands to the ranker
OUTCOME_REQUESTS = 6_000
OUTCOME_REPEATS = 4
_MEASUREMENT = 1  # raise it with what `measure` writes, so that older files are measured again
_LUCK = 0x1ACC


@dataclass(frozen=True)
class Cell:
    """One (dataset, seed)."""

    dataset: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset} {self.seed}"

    def home(self, root: Path) -> Path:
        """The cell's own home below `GENRECALL_HOME`."""
        return root / "eg_grpo" / self.dataset / f"seed{self.seed}"

    def artifact(self, root: Path, name: str) -> Path:
        """Where its pipeline writes an artifact."""
        return self.home(root) / self.dataset / name

    def log(self, root: Path) -> Path:
        return self.home(root).with_suffix(".log")

    def overrides(self) -> list[str]:
        """What it changes in the recipe, whatever the row."""
        return [*(f"{part}.seed={self.seed}" for part in ("encoder", "quantizer", "sid", "generator", "align")), *DATA[self.dataset]]

    def recipe(self) -> Recipe:
        return apply_overrides(RECIPES[self.dataset](), self.overrides())

    def reuses(self) -> list[tuple[Cell, str]]:
        """The first seed's data."""
        return [(replace(self, seed=0), "dataset")] if self.seed else []


class RowPipeline(Pipeline):
    """A line whose alignment lies in a folder of its own, beside those of other rows."""

    def __init__(self, recipe: Recipe, where: Places, alignment: str) -> None:
        super().__init__(recipe, where)
        self.alignment = alignment

    def uri(self, name: str) -> str:
        return super().uri(self.alignment if name == "aligned" else name)


def run_cell(cell: Cell, plan: Plan, rows: Sequence[str], where: Places) -> None:
    """Run the stages up to the ranker, then align and measure row after row; `seconds.json` has the seconds of all that was made."""
    root, now = Path(where.home), commit()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    recipe, home = cell.recipe(), cell.home(root)
    home.mkdir(parents=True, exist_ok=True)
    take_over(cell, root)
    where = replace(where, home=str(home), tracking_uri=f"sqlite:///{home}/mlflow.db")
    use_tracking(where)
    line = Pipeline(recipe, where)
    of_variant = [(f"{MAIN_VARIANT}/{name}", getattr(line, name)) for name in ("quantizer", "sid_index", "generator")]
    stages = [("dataset", line.dataset), ("encoder", line.encoder), *of_variant, ("ranker", line.ranker)]
    seconds = run_stages(stages, line.uri, home / "seconds.json")
    changes = ROWS if plan is GRID else TUNING
    for row in rows:
        name = f"{plan.alignments}/{row}"
        row_line = RowPipeline(apply_overrides(recipe, changes[row]), where, name)
        if row not in UNALIGNED:
            seconds = run_stages([(name, row_line.aligned)], line.uri, home / "seconds.json")
        measure_once(row_line, row, plan, home / plan.measured, now)
    for name, one in seconds.items():
        print(f"{one:9.1f} s  {name}")


def measure_once(line: Pipeline, row: str, plan: Plan, folder: Path, now: str) -> None:
    """Measure a row unless its files say that they are of these very artifacts; `ROW.json` is written last, makes them count and has the commit `now`."""
    parts = {name: line.existing(name) for name in ("dataset", "encoder", f"{MAIN_VARIANT}/sid_index", f"{MAIN_VARIANT}/generator")}
    aligned = None if row in UNALIGNED else line.existing("aligned")
    made_from = {name: artifact.hash for name, artifact in parts.items()} | {"measurement": _MEASUREMENT}
    facts = {"start": dict(made_from), "aligned": None if aligned is None else aligned.hash}
    file = folder / f"{row}.json"
    if file.exists() and {name: json.loads(file.read_text()).get(name) for name in facts} == facts:
        return
    folder.mkdir(parents=True, exist_ok=True)
    check_no_leaks(parts["dataset"])
    requests = measured_requests(parts["dataset"], plan.split)
    started = time.monotonic()
    columns, ranked = measure(parts, aligned, requests, decoder_weight=0.0 if row == GUIDANCE else 1.0)
    more = {"commit": now, "requests": len(requests), "measure_seconds": round(time.monotonic() - started, 1), **alignment_facts(aligned)}
    np.savez_compressed(folder / f"{row}.npz", request_id=np.array(requests.request_ids), **columns)
    if plan is GRID and row in OUTCOME_ROWS and parts["dataset"].manifest["config"]["source"] == "marketplace":
        outcome, more["shares"] = outcome_columns(parts["dataset"], requests, ranked)
        np.savez_compressed(folder / f"{row}.outcome.npz", **outcome)
    file.write_text(json.dumps(facts | more, indent=1) + "\n")
    print(f"measured {row} on {len(requests):,} {plan.split} requests in {more['measure_seconds']:.0f} s", flush=True)


def measured_requests(dataset: Artifact, split: str) -> Requests:
    """All requests of a split that the evaluation would count, in its order."""
    catalog = load_catalog(dataset)
    requests, train = load_requests(dataset, split, catalog), load_requests(dataset, "train", catalog)
    sample = sample_requests(requests, train, catalog, query_kind=dataset.json("stats.json")["query_kind"], max_requests=None, seed=0)
    return requests.take(sample.indices[sample.primary])


def measure(parts: Mapping[str, Artifact], aligned: Artifact | None, requests: Requests, *, decoder_weight: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Search R requests with stage 3, or with the alignment's stage 4: `COLUMNS` as float32 [R], and the items served, int32 [R, DEPTH].

    `decoder_weight` is how often the decoder's logits count beside the guidance.
    """
    generator, sid_index = parts[f"{MAIN_VARIANT}/generator"], parts[f"{MAIN_VARIANT}/sid_index"]
    trained, stage = (generator, "stage3") if aligned is None else (aligned, "stage4")
    retriever = load_retriever(
        generator_folder=generator.path,
        stage=trained.file(stage).absolute(),
        sid_index=sid_index.path,
        encoder=parts["encoder"].path,
        support=trained.json("training.json")["support"],
    )
    with weighted_decoder(retriever.model, decoder_weight):
        found = retriever.generate(requests.queries, requests.genders, requests.age_bands, requests.history, beam_size=max(BEAMS), personalised=True)
        ranked = item_lists(retriever, found, DEPTH)
    columns = sid_columns(
        found.sid_rows, load_index(sid_index.path), Tiers.of(requests), ranked, beams=BEAMS, budgets=(10,), cut_items=1000, cut_beams=(max(BEAMS),)
    )
    columns["recall@10"] = columns["hit@items10"]  # of the items as they are served
    return {name: columns[name].astype(np.float32) for name in COLUMNS}, ranked


def alignment_facts(aligned: Artifact | None) -> dict[str, Any]:
    """How an alignment went, and the seconds of steps that runs made before the one that ended it; nothing of stage 3."""
    if aligned is None:
        return {}
    training, health = aligned.json("training.json"), pq.read_table(aligned.file("health.parquet"), columns=["seconds_experience", "seconds_update"])
    steps_s = sum(float(np.sum(column.to_numpy())) for column in health.columns)
    facts = {name: training[name] for name in ("steps_run", "kept_step", "stopped")}
    return facts | {"earlier_seconds": round(max(0.0, steps_s - training["seconds"]), 1)}


def outcome_columns(dataset: Artifact, requests: Requests, ranked: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What U shoppers do on the pages of each arm.

    Args:
        ranked: int32 [R, DEPTH], our channel's items.

    Returns:
        `shopper` [U] and `ARM.OUTCOME` float64 [U] for the arms with our channel (""), without it and with it alone; the channel's shares in the first.
    """
    config = dataset.manifest["config"]
    marketplace = Marketplace(config["marketplace_size"], config["seed"])
    chosen = np.sort(np.random.default_rng(_LUCK).permutation(len(requests))[:OUTCOME_REQUESTS])
    asked = marketplace.requests([requests.request_ids[row] for row in chosen.tolist()])
    # The marketplace numbers all of its items; the catalogue may lack some that preparation rejected.
    theirs = np.asarray(marketplace.catalog.rows_of(load_catalog(dataset).item_ids.tolist()))
    ours = np.where(ranked[chosen] >= 0, theirs[np.maximum(ranked[chosen], 0)], -1)
    site, nothing = marketplace.production.candidates(asked), (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    shoppers, shopper = np.unique(asked.users, return_inverse=True)
    columns: dict[str, np.ndarray] = {"shopper": shoppers}
    shares: dict[str, float] = {}
    for arm, theirs_too, channel in (("", site, ours), (WITHOUT, site, None), (ALONE, nothing, ours)):
        rank = functools.partial(marketplace.production.rank_scores, asked)
        pages = build_pages(asked, theirs_too, channel, np.asarray(marketplace.catalog.first_seen), rank, page_size=10)
        totals, found = play(marketplace, asked, shopper, pages, repeats=OUTCOME_REPEATS, rng=np.random.default_rng(_LUCK))
        columns |= {f"{arm}.{outcome}": totals[:, place] for place, outcome in enumerate(OUTCOMES)}
        shares = found if not arm else shares
    return columns, shares


def cell_command(cell: Cell, *, plan: Plan, rows: Sequence[str]) -> list[str]:
    """How a cell's process is started."""
    tune = ["--tune"] if plan is TUNE else []
    return [sys.executable, str(Path(__file__).resolve()), "--cell", cell.dataset, str(cell.seed), *tune, "--rows", *rows]


def collect(plan: Plan, datasets: Sequence[str], seeds: Sequence[int], root: Path, output: Path) -> None:
    """Write and print the tables of every dataset whose seeds are all there.

    Raises:
        CollectionError: measurements that do not belong together.
        SystemExit: there is nothing to collect.
    """
    tune, usual = (" --tune", TUNING_SEEDS) if plan is TUNE else ("", SEEDS)
    tail = tune + ("" if tuple(seeds) == usual else f" --seeds {' '.join(map(str, seeds))}")
    homes = {dataset: {str(cell): cell.home(root) for cell in (Cell(dataset, seed) for seed in seeds)} for dataset in datasets}
    commands = {dataset: f"python benchmarks/eg_grpo.py --datasets {dataset}{tail}" for dataset in datasets}
    text = eg_grpo_tables.rebuild(plan, homes, commands, output)
    if text is None:
        raise SystemExit(f"nothing to collect under {root / 'eg_grpo'}; run without --collect-only first")
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=(*DATASETS, "tiny"), help=f"default: {' '.join(DATASETS)}; with --tune: marketplace")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {' '.join(map(str, SEEDS))}; with --tune: {' '.join(map(str, TUNING_SEEDS))}")
    parser.add_argument("--rows", nargs="+", help=f"default: all; {START} always comes first")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    parser.add_argument("--tune", action="store_true", help="try hyperparameters on the validation requests instead")
    parser.add_argument("--collect-only", action="store_true", help="make the tables from the measurements that are there")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables (default: benchmarks/results)")
    parser.add_argument("--cell", nargs=2, metavar=("DATASET", "SEED"), help="run one cell in this process")
    options = parser.parse_args(argv)
    plan = TUNE if options.tune else GRID
    datasets = list(dict.fromkeys(options.datasets or (("marketplace",) if options.tune else DATASETS)))
    seeds = sorted(set((TUNING_SEEDS if options.tune else SEEDS) if options.seeds is None else options.seeds))
    rows = [row for row in plan.rows if row == START or options.rows is None or row in options.rows]
    if unknown := set(options.rows or ()) - set(plan.rows):
        parser.error(f"--rows: expected some of {', '.join(plan.rows)}, got {', '.join(sorted(unknown))}")
    if options.jobs < 1 or min(seeds) < 0:
        parser.error(f"--jobs must be at least 1 and --seeds not negative, got {options.jobs} and {seeds}")
    if options.tune and "home_depot" in datasets:
        parser.error("--tune: hyperparameters are chosen on the marketplace alone; leave --datasets out")
    try:
        where = places()
        if "://" in where.home:
            raise ConfigError([f"GENRECALL_HOME: the grid copies artifacts between its cells and needs a local folder, got {where.home!r}"])
        if options.cell:
            dataset, seed = options.cell
            if dataset not in DATA or not seed.isdigit():
                parser.error(f"--cell: expected one of {', '.join(DATA)} and a seed, got {' '.join(options.cell)}")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a grid in the background leaves it ignored, and ends its cells by it
            run_cell(Cell(dataset, int(seed)), plan, rows, where)
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed grid leaves no cell behind
        if not options.collect_only:
            cells = [Cell(dataset, seed) for seed in seeds for dataset in datasets]
            run_grid(cells, Path(where.home), jobs=options.jobs, command=functools.partial(cell_command, plan=plan, rows=rows))
        collect(plan, datasets, seeds, Path(where.home), options.output)
    except (ConfigError, CollectionError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; run the same command again to go on\n")


if __name__ == "__main__":
    main()
