"""The command that rebuilds the quality tables: a grid of pipeline runs over data sets, seeds and experiments, then tables over the seeds.

    python benchmarks/quality.py [--datasets marketplace amazon_scientific home_depot] [--experiments channels sids large] [--seeds 0 1 2] [--jobs 2]
        [--collect-only]

Experiments:
- channels: the recipe as recommended, with CQ-SID alone and without reinforcement learning.
- sids: the SIDs compared in the paper's setting: item features are content alone (an encoder that has seen no query), and the generator reads
  the query as text alone. With features that clicks have aligned already, RQ-VAE has much of what CQ-SID's constraints bring.
- large: the same setting among the large marketplace's 100,000 items: how many SIDs must be written so that, of what they hold, the 1,000 items
  of highest prior have the most targets; CQ-SID against RQ-VAE, also with clusters as large on average.
- large_paper: `large` with the paper's codebooks, 2048 x 1024 x 1024, trained on a GPU; only where --experiments names it.

A cell is one (dataset, seed, experiment), a process of its own with its own home `GENRECALL_HOME/quality/DATASET/seedK/EXPERIMENT/` and
its own MLflow store there; its log lies beside that folder. Run the command again after an interrupt or an error: finished cells, stages
and checkpoints are not redone. All seeds share the data and the evaluated requests; encoder, quantiser, SIDs and generator are trained anew.
Results go to `benchmarks/results/quality.json` and `quality.md`, where tables that were not rebuilt stay as they were. `--collect-only`
reads the evaluations that are there without checking that they are current. A record's commit is the one that its cell was evaluated at, the
one checked out when that process began (`evaluated.json` in the cell's home); where seeds were evaluated at different ones it names them all.
The data set `tiny` is for trying the command only.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import quality_tables
from grid import ROOT, copy_artifact, run_grid, run_stages, take_over
from measurement import commit, commits
from paired_records import CollectionError, Record, to_json

from genrecall.config import ConfigError, Places, apply_overrides, places
from genrecall.pipeline import Pipeline, quiet_libraries
from genrecall.recipes import RECIPES, RESIZED
from genrecall.storage import read_manifest
from genrecall.tracking import use_tracking

DATASETS = ("marketplace", "amazon_scientific", "home_depot")
SEEDS = (0, 1, 2)
SID_VARIANTS = ("cqsid", "rqvae", "rqvae_resized", "cqsid_without_category", "cqsid_without_query", "rqkmeans")
_LARGE_VARIANTS = ("cqsid", "rqvae", "rqvae_resized")
VARIANTS = {"channels": ("cqsid",), "sids": SID_VARIANTS, "large": _LARGE_VARIANTS, "large_paper": _LARGE_VARIANTS}
EXPERIMENTS = ("channels", "sids", "large")
"""Those that are run by default: two cores are enough for them."""
PAPER_SETTING = ("encoder.steps=0", "generator.guided=false", "generator.soft_prompt=false")
_LARGE = (
    "data.marketplace_size=large",
    "quantizer.latent_dim=128",
    "quantizer.gamma=0.2",
    "generator.stage1.steps=400",
    "generator.stage2.steps=800",
    "generator.stage3.steps=200",
    "evaluation.beams=[1,10,100,320]",
    "evaluation.cut_beams=[20,40,60,80,100,120,140,160,180,200,240,280,320]",
)
TASKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sids": {
        "marketplace": (
            "data.marketplace_size=medium",
            "quantizer.level_sizes=[256,4,4]",
            "quantizer.latent_dim=128",
            "quantizer.gamma=0.2",
            "generator.stage1.steps=200",
            "generator.stage2.steps=600",
            "generator.stage3.steps=200",
        ),
        "amazon_scientific": (
            "quantizer.level_sizes=[256,8,8]",
            "quantizer.latent_dim=128",
            "quantizer.gamma=0.2",
            "generator.stage1.steps=200",
            "generator.stage2.steps=500",
            "generator.stage3.steps=150",
        ),
        "tiny": ("generator.guide_weight_steps=0", "generator.stage1.steps=20", "generator.stage2.steps=20", "generator.stage3.steps=20"),
    },
    "large": {"marketplace": ("quantizer.level_sizes=[256,8,8]", *_LARGE)},
    "large_paper": {"marketplace": ("quantizer.level_sizes=[2048,1024,1024]", "train.use_gpu=true", *_LARGE)},
}
"""Where SIDs are compared: among the medium marketplace's 20,000 items (the small one's 2,000 leave RQ-VAE nothing to miss), after shorter training, since
these generators are only compared with each other. Not on Home Depot: without categories CQ-SID has the query constraint alone, so one ablation would be
CQ-SID again and the other RQ-VAE."""
SIZE_TOLERANCE = 0.05
RESIZE_TRIES = 6


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    dataset: str
    seed: int
    experiment: str

    def __str__(self) -> str:
        return f"{self.dataset} {self.seed} {self.experiment}"

    def home(self, root: Path) -> Path:
        """The cell's own home below `GENRECALL_HOME`."""
        return root / "quality" / self.dataset / f"seed{self.seed}" / self.experiment

    def artifact(self, root: Path, name: str) -> Path:
        """Where its pipeline writes an artifact."""
        return self.home(root) / self.dataset / name

    def log(self, root: Path) -> Path:
        return self.home(root).with_suffix(".log")

    def evaluated(self, root: Path) -> Path:
        """Says at which commit its evaluation was made."""
        return self.home(root) / "evaluated.json"

    def evaluated_at(self, root: Path) -> str | None:
        """The commit of the evaluation that is there; None where nothing says so."""
        file, manifest = self.evaluated(root), read_manifest(str(self.artifact(root, "evaluation"))) or {}
        found = json.loads(file.read_text()) if file.exists() else {}
        return found.get("commit") if found.get("created") == manifest.get("created") else None

    def variants(self) -> tuple[str, ...]:
        """The SIDs it compares: CQ-SID and RQ-VAE first, because `rqvae_resized` is sized after them."""
        return VARIANTS[self.experiment]

    def overrides(self) -> list[str]:
        """What it changes in the recipe."""
        found = [f"{part}.seed={self.seed}" for part in ("encoder", "quantizer", "sid", "generator")]
        found += [f"variants={json.dumps(self.variants())}", "align=none", "evaluation.max_requests=1500"]
        return found + (
            [] if self.experiment == "channels" else ["resized_levels=[2,2,2]", *PAPER_SETTING, *TASKS[self.experiment][self.dataset]]
        )  # resized later, see `resize`

    def reuses(self) -> list[tuple[Cell, str]]:
        """(cell, artifact) that it takes over from cells before it: all cells of a data set share it."""
        changes = TASKS.get(self.experiment, {}).get(self.dataset, ())
        own_data = any(change.startswith("data.") for change in changes)
        first = replace(self, seed=0, experiment=self.experiment if own_data else "channels")
        return [] if self == first else [(first, "dataset")]


def grid(datasets: Sequence[str], seeds: Sequence[int], experiments: Sequence[str] = EXPERIMENTS) -> list[Cell]:
    """All cells, one seed of every data set before the next seed."""
    cells = [Cell(dataset, seed, experiment) for seed in seeds for dataset in datasets for experiment in VARIANTS if experiment in experiments]
    return [cell for cell in cells if cell.experiment == "channels" or cell.dataset in TASKS[cell.experiment]]


def run_cell(cell: Cell, where: Places) -> None:
    """Run a cell's stages one after the other and write the seconds of those that were made into `seconds.json`."""
    root, now = Path(where.home), commit()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    recipe = apply_overrides(RECIPES[cell.dataset](), cell.overrides())
    home = cell.home(root)
    home.mkdir(parents=True, exist_ok=True)
    take_over(cell, root)
    where = replace(where, home=str(home), tracking_uri=f"sqlite:///{home}/mlflow.db")
    use_tracking(where)
    pipeline = Pipeline(recipe, where)
    stages: list[tuple[str, Callable[[], object]]] = [("dataset", pipeline.dataset), ("encoder", pipeline.encoder)]
    for variant in recipe.variants:
        if variant == RESIZED:
            stages.append((f"{variant}/sid_index", functools.partial(resize, pipeline)))
            stages.append((f"{variant}/generator", functools.partial(pipeline.generator, variant)))
            continue
        for name in ("quantizer", "sid_index", "generator"):
            stages.append((f"{variant}/{name}", functools.partial(getattr(pipeline, name), variant)))
    stages += [("ranker", pipeline.ranker), ("evaluation", functools.partial(evaluate, pipeline, cell.evaluated(root), now))]
    for name, one in run_stages(stages, pipeline.uri, home / "seconds.json").items():
        print(f"{one:9.1f} s  {name}")


def evaluate(pipeline: Pipeline, file: Path, now: str) -> None:
    """The evaluation; where it is made and not there already, `file` says of which commit it is."""
    before = read_manifest(pipeline.uri("evaluation"))
    pipeline.evaluation()
    made = read_manifest(pipeline.uri("evaluation"))
    if made is not None and made != before:
        file.write_text(json.dumps({"commit": now, "created": made.get("created")}) + "\n")


def resize(pipeline: Pipeline) -> None:
    """Fit `rqvae_resized`: RQ-VAE with its later books resized until its clusters are on average as large as CQ-SID's, within 5 % or as near as it gets.

    A try that comes no nearer is the last but for the books between it and the one before. `rqvae_resized/tried.json` remembers them all, so that running the cell again fits none again.
    """

    def mean_size(variant: str) -> float:
        counts = pipeline.existing(f"{variant}/sid_index").manifest["row_counts"]
        return float(counts["items"] / counts["sids"])

    def error(levels: tuple[int, int, int]) -> float:
        return max(tried[levels] / wanted, wanted / tried[levels]) - 1

    file, made_from = Path(pipeline.uri(f"{RESIZED}/tried.json")), [pipeline.existing(f"{variant}/sid_index").hash for variant in ("cqsid", "rqvae")]
    saved = json.loads(file.read_text()) if file.exists() else {}
    known: dict[str, float] = saved["sizes"] if saved.get("made_from") == made_from else {}
    wanted, levels = mean_size("cqsid"), pipeline.recipe.quantizer.level_sizes
    tried = {levels: mean_size("rqvae")}

    def fit(levels: tuple[int, int, int]) -> None:
        if str(levels) not in known:
            _fit_resized(pipeline, levels)
            known[str(levels)] = mean_size(RESIZED)
            file.write_text(json.dumps({"made_from": made_from, "sizes": known}) + "\n")
        tried[levels] = known[str(levels)]

    while error(levels) > SIZE_TOLERANCE and len(tried) < RESIZE_TRIES:
        ratio, before = tried[levels] / wanted, levels
        second, third = (max(2, round(size * ratio**0.75)) for size in levels[1:])
        if (second, third) == levels[1:]:
            third += 1 if ratio > 1 else -1
        levels = (levels[0], second, max(2, third))
        if levels in tried:
            break
        fit(levels)
        if error(levels) >= error(before):  # no nearer: on the other side something lies between, else more codes change nothing any more
            between = (levels[0], before[1], levels[2])
            if (tried[levels] > wanted) != (tried[before] > wanted) and between not in tried:
                fit(between)
            break
    best = min(tried, key=error)
    _fit_resized(pipeline, best)
    print(f"{RESIZED}: books {best}, {mean_size(RESIZED):.2f} items a SID, CQ-SID {wanted:.2f}; tried {tried}", flush=True)


def _fit_resized(pipeline: Pipeline, levels: tuple[int, int, int]) -> None:
    pipeline.recipe = replace(pipeline.recipe, resized_levels=levels)
    if levels == pipeline.recipe.quantizer.level_sizes:  # RQ-VAE's own books, so what was made for it is what would be made
        for name in ("quantizer", "sid_index", "generator"):
            copy_artifact(Path(pipeline.uri(f"rqvae/{name}")), Path(pipeline.uri(f"{RESIZED}/{name}")))
    pipeline.quantizer(RESIZED)
    pipeline.sid_index(RESIZED)


def cell_command(cell: Cell) -> list[str]:
    """How a cell's process is started."""
    return [sys.executable, str(Path(__file__).resolve()), "--cell", cell.dataset, str(cell.seed), cell.experiment]


def collect(datasets: Sequence[str], seeds: Sequence[int], experiments: Sequence[str], root: Path, output: Path) -> None:
    """Write and print the tables of every (dataset, experiment) whose seeds are all there.

    Raises:
        CollectionError: seeds that do not belong together.
        SystemExit: there is nothing to collect.
    """
    fresh, rebuilt = list[Record](), list[tuple[str, str]]()
    for dataset in datasets:
        command = f"python benchmarks/quality.py --datasets {dataset}"
        command += "" if tuple(experiments) == EXPERIMENTS else f" --experiments {' '.join(experiments)}"
        command += "" if tuple(seeds) == SEEDS else f" --seeds {' '.join(map(str, seeds))}"
        for experiment in dict.fromkeys(cell.experiment for cell in grid([dataset], seeds, experiments)):
            cells = [Cell(dataset, seed, experiment) for seed in seeds]
            folders = {str(cell): cell.artifact(root, "evaluation") for cell in cells}
            missing = [name for name, folder in folders.items() if not (folder / "metrics.json").exists()]
            if missing:
                print(f"left out: {dataset} {experiment}, not finished: {', '.join(missing)}", file=sys.stderr)
                continue
            seen = quality_tables.read_evaluations(folders)
            made_at = commits(cell.evaluated_at(root) for cell in cells)
            fresh += quality_tables.Collector(dataset, seen, command, made_at).records(experiment)
            rebuilt.append((dataset, experiment))
    if not rebuilt:
        raise SystemExit(f"nothing to collect under {root / 'quality'}; run without --collect-only first")
    file = output / "quality.json"
    old = json.loads(file.read_text()) if file.exists() else []
    records = quality_tables.merged(fresh, old, rebuilt)
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(records))
    text = quality_tables.markdown(records)
    (output / "quality.md").write_text(text)
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=(*DATASETS, "tiny"))
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=tuple(VARIANTS), help=f"default: {' '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--collect-only", action="store_true", help="make the tables from the evaluations that are there")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables (default: benchmarks/results)")
    parser.add_argument("--cell", nargs=3, metavar=("DATASET", "SEED", "EXPERIMENT"), help="run one cell in this process")
    options = parser.parse_args(argv)
    if options.jobs < 1 or min(options.seeds) < 0:
        parser.error(f"--jobs must be at least 1 and --seeds not negative, got {options.jobs} and {options.seeds}")
    try:
        where = places()
        if "://" in where.home:
            raise ConfigError([f"GENRECALL_HOME: the grid copies artifacts between its cells and needs a local folder, got {where.home!r}"])
        if options.cell:
            dataset, seed, experiment = options.cell
            if dataset not in (*DATASETS, "tiny") or not seed.isdigit() or experiment not in VARIANTS:
                parser.error(f"--cell: expected a data set, a seed and one of {', '.join(VARIANTS)}, got {' '.join(options.cell)}")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a grid in the background leaves it ignored, and ends its cells by it
            run_cell(Cell(dataset, int(seed), experiment), where)
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed grid leaves no cell behind
        datasets, seeds = list(dict.fromkeys(options.datasets)), sorted(set(options.seeds))
        experiments = [experiment for experiment in VARIANTS if experiment in options.experiments]
        if not options.collect_only:
            run_grid(grid(datasets, seeds, experiments), Path(where.home), jobs=options.jobs, command=cell_command)
        collect(datasets, seeds, experiments, Path(where.home), options.output)
    except (ConfigError, CollectionError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; run the same command again to go on\n")


if __name__ == "__main__":
    main()
