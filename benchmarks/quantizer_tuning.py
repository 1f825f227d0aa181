"""Tuning of the SIDs on validation requests: RQ-VAE under other settings than the recipe's, beside CQ-SID under the recipe's, and CQ-SID's gamma.

    python benchmarks/quantizer_tuning.py [--datasets marketplace amazon_scientific] [--seeds 0] [--settings ...] [--collect-only]

RQ-VAE gets more tries than CQ-SID's gamma, with what it has itself: learning rate, steps, commitment, width of the
latents. What helps it is tried with CQ-SID too, and was taken over by both in the experiment `sids` of quality.py: latents of 128, where the settings
below start from 64. Gammas are tried with those. Everything else is that experiment: its data, books, encoder and generator, of which stages 1 and 2 are trained, since the query
alone is searched with. Settings are compared by clk@N and hit@items of validation requests, paired; the test requests are not read.

All runs of a data set and seed share the home `GENRECALL_HOME/quality/DATASET/seedK/tuning/`, and dataset and encoder of the experiment `sids` where
they are there. Run the command again after an interrupt: finished stages and measurements are not redone. Results go to
`benchmarks/results/quantizer_tuning.json`, and as tables to `quantizer_tuning.md` beside it.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from grid import ROOT, copy_artifact, run_stages
from measurement import commit, commits
from paired_records import CollectionError, PairedRecords, Record, markdown_table, merged, origin, read_arrays, require_equal, to_json
from quality import TASKS, Cell

from genrecall.config import ConfigError, Places, apply_overrides, places
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.evaluation.request_metrics import Tiers, item_lists, sid_columns
from genrecall.evaluation.slices import sample_requests
from genrecall.generator.retriever import load_retriever
from genrecall.pipeline import Pipeline, quiet_libraries
from genrecall.recipes import RECIPES
from genrecall.sid.index import load_index
from genrecall.tracking import use_tracking


class Setting(NamedTuple):
    """A variant of the SIDs and its quantiser's settings."""

    variant: str
    changes: tuple[str, ...]


BASE, OURS = "rqvae", "cqsid"
WIDE, WITHOUT_QUERY = "rqvae_latent128", "cqsid_without_query"
GAMMAS = (0.05, 0.2, 1.0)
_START, _WIDE = ("quantizer.latent_dim=64",), ("quantizer.latent_dim=128",)
SETTINGS: Mapping[str, Setting] = {
    BASE: Setting("rqvae", _START),
    "rqvae_rate0.0003": Setting("rqvae", (*_START, "quantizer.learning_rate=3e-4")),
    "rqvae_rate0.003": Setting("rqvae", (*_START, "quantizer.learning_rate=3e-3")),
    "rqvae_steps1800": Setting("rqvae", (*_START, "quantizer.steps=1800")),
    "rqvae_beta0.25": Setting("rqvae", (*_START, "quantizer.beta=0.25")),
    "rqvae_latent32": Setting("rqvae", ("quantizer.latent_dim=32",)),
    WIDE: Setting("rqvae", _WIDE),
    OURS: Setting("cqsid", _START),
    "cqsid_latent128": Setting("cqsid", _WIDE),
    WITHOUT_QUERY: Setting("cqsid_without_query", _WIDE),
    **{f"cqsid_gamma{gamma}": Setting("cqsid", (*_WIDE, f"quantizer.gamma={gamma}")) for gamma in GAMMAS},
}
SHORTER = ("generator.stage3.steps=1", "generator.validation_requests=0")
"""Stage 3 reads the shopper, which is not compared here."""
REQUESTS = 3_000
BEAMS, BUDGETS = (1, 10, 100), (10, 100)
COLUMNS = (*(f"clk@{beam}" for beam in BEAMS), *(f"hit@items{budget}" for budget in BUDGETS))
_OF_GAMMA = (WIDE, WITHOUT_QUERY, *(name for name in SETTINGS if "gamma" in name))
TABLES: Mapping[str, tuple[str, ...]] = {
    "quantizer_tuning": tuple(name for name in SETTINGS if name == WIDE or name not in _OF_GAMMA),
    "gamma": _OF_GAMMA,
}
"""The settings of each table; there is none without the first of them."""
TITLES = {"quantizer_tuning": "RQ-VAE's own tuning", "gamma": "CQ-SID's gamma"}


class SettingPipeline(Pipeline):
    """A line whose quantiser, SIDs and generator lie in a folder of the setting's own."""

    setting = ""

    def uri(self, name: str) -> str:
        variant, slash, part = name.partition("/")
        return super().uri(f"{self.setting}/{part}" if slash else variant)


def home_of(root: Path, dataset: str, seed: int) -> Path:
    """Where the runs of a data set and seed lie."""
    return root / "quality" / dataset / f"seed{seed}" / "tuning"


def pipeline_of(dataset: str, seed: int, name: str, where: Places) -> SettingPipeline:
    """The line of a setting."""
    setting = SETTINGS[name]
    overrides = [*Cell(dataset, seed, "sids").overrides(), f"variants={json.dumps(sorted({'cqsid', setting.variant}))}", *SHORTER, *setting.changes]
    line = SettingPipeline(apply_overrides(RECIPES[dataset](), overrides), where)
    line.setting = name
    return line


def run(dataset: str, seed: int, names: Sequence[str], where: Places) -> None:
    """Train and measure settings one after the other."""
    root, now, home = Path(where.home), commit(), home_of(Path(where.home), dataset, seed)
    home.mkdir(parents=True, exist_ok=True)
    for part in ("dataset", "encoder"):
        copy_artifact(Cell(dataset, seed, "sids").artifact(root, part), home / dataset / part)
    where = replace(where, home=str(home), tracking_uri=f"sqlite:///{home}/mlflow.db")
    use_tracking(where)
    for name in names:
        line, variant = pipeline_of(dataset, seed, name, where), SETTINGS[name].variant
        stages = [("dataset", line.dataset), ("encoder", line.encoder)]
        stages += [(f"{name}/{part}", functools.partial(getattr(line, part), variant)) for part in ("quantizer", "sid_index", "generator")]
        run_stages(stages, line.uri, home / "seconds.json")
        measure_once(line, variant, home / "measured" / f"{name}.npz", now)


def measure_once(line: Pipeline, variant: str, file: Path, now: str) -> None:
    """Measure a setting unless its file says that it is of these very artifacts; the `.json` beside it is written last."""
    dataset, encoder = line.existing("dataset"), line.existing("encoder")
    sid_index, generator = line.existing(f"{variant}/sid_index"), line.existing(f"{variant}/generator")
    facts, said = {"dataset": dataset.hash, "generator": generator.hash}, file.with_suffix(".json")
    if said.exists() and {name: json.loads(said.read_text()).get(name) for name in facts} == facts:
        return
    catalog = load_catalog(dataset)
    train, validation = (load_requests(dataset, split, catalog) for split in ("train", "validation"))
    sample = sample_requests(validation, train, catalog, query_kind=dataset.json("stats.json")["query_kind"], max_requests=REQUESTS, seed=0)
    requests = validation.take(sample.indices[sample.primary])
    support = generator.json("training.json")["support"]
    retriever = load_retriever(generator_folder=generator.path, stage="stage2", sid_index=sid_index.path, encoder=encoder.path, support=support)
    found = retriever.generate(requests.queries, requests.genders, requests.age_bands, requests.history, beam_size=max(BEAMS), personalised=False)
    index, ranked = load_index(sid_index.path), item_lists(retriever, found, max(BUDGETS))
    columns = sid_columns(found.sid_rows, index, Tiers.of(requests), ranked, beams=BEAMS, budgets=BUDGETS, cut_items=1000, cut_beams=(max(BEAMS),))
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = {name: columns[name].astype(np.float32) for name in COLUMNS}
    np.savez_compressed(file, allow_pickle=False, request_id=np.array(requests.request_ids), **chosen)
    said.write_text(json.dumps(facts | {"commit": now, "items_per_sid": len(catalog) / len(index)}) + "\n")
    print(f"measured {file.stem} on {len(requests):,} validation requests", flush=True)


def collect(dataset: str, table: str, seeds: Sequence[int], root: Path) -> list[Record]:
    """The records of a table's settings that every seed has measured; none where its first is missing or alone.

    Raises:
        CollectionError: seeds or settings that were measured on different requests.
    """
    homes = [home_of(root, dataset, seed) / "measured" for seed in seeds]
    names = [name for name in TABLES[table] if all((home / f"{name}.json").exists() for home in homes)]
    if TABLES[table][0] not in names or len(names) < 2:
        return []
    arrays = {name: [read_arrays(home / f"{name}.npz") for home in homes] for name in names}
    facts = {name: [json.loads((home / f"{name}.json").read_text()) for home in homes] for name in names}
    ids = {f"{home / name}": tuple(one["request_id"].tolist()) for name in names for home, one in zip(homes, arrays[name], strict=True)}
    require_equal(ids, "measured other requests than", lambda name: f"delete {name}.json and run the command again")
    columns = {name: {metric: np.stack([one[metric] for one in arrays[name]]).astype(np.float64) for metric in COLUMNS} for name in names}
    tail = "" if tuple(seeds) == (0,) else f" --seeds {' '.join(map(str, seeds))}"
    made_at = commits(fact["commit"] for name in names for fact in facts[name])
    maker = PairedRecords(dataset, len(homes), f"python benchmarks/quantizer_tuning.py --datasets {dataset}{tail}", made_at)
    records = maker.means(table, columns, [(name, metric) for name in names for metric in COLUMNS])
    records += maker.gains(table, columns, pairs(table, names), COLUMNS)
    records += [maker.record(table, name, "items_per_sid", float(np.mean([fact["items_per_sid"] for fact in facts[name]]))) for name in names]
    return [*records, maker.record(table, "all", "requests", len(next(iter(ids.values()))))]


def pairs(table: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """(row, base) of the gains.

    Of RQ-VAE's tuning: every setting over RQ-VAE's own, CQ-SID over every RQ-VAE, its other settings over its own and over RQ-VAE under the same change.
    Of gamma: all over RQ-VAE and over none.
    """
    first = TABLES[table][0]
    found = [(name, first) for name in names if name != first]
    if table == "gamma":
        found += [(name, WITHOUT_QUERY) for name in names if name not in (WIDE, WITHOUT_QUERY)]
    else:
        ours = [name for name in names if SETTINGS[name].variant == OURS and name != OURS]
        found += [(OURS, name) for name in names if SETTINGS[name].variant == BASE and name != BASE]
        found += [(name, base) for name in ours for base in (OURS, name.replace(OURS, BASE))]
    return [(name, base) for name, base in found if {name, base} <= set(names)]


def markdown(records: Sequence[Record]) -> str:
    """Values and gains of a data set's tables."""
    blocks = []
    for table in TABLES:
        found = {(record["row"], record["metric"]): record for record in records if record["table"] == table}
        rows = [name for name in TABLES[table] if (name, COLUMNS[0]) in found]
        if not rows:
            continue
        counted = found["all", "requests"]
        values = [[name, f"{found[name, 'items_per_sid']['value']:.2f}", *(_shown(found[name, metric], "{:.3f}") for metric in COLUMNS)] for name in rows]
        gains = [
            [f"{name} over {base}", *(_shown(found[name, f"{metric}_gain_vs_{base}"], "{:+.1%}") for metric in COLUMNS)] for name, base in pairs(table, rows)
        ]
        blocks += [f"### {TITLES[table]}", origin(counted, counted), markdown_table(["", "items/SID", *COLUMNS], values), markdown_table(["", *COLUMNS], gains)]
    return "\n\n".join(blocks) + "\n"


def _shown(record: Record, form: str) -> str:
    value, low, high = (record[name] for name in ("value", "low", "high"))
    if value is None:
        return "n/a"
    return form.format(value) + ("" if low is None else f" ({form.format(low)} to {form.format(high)})")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["marketplace"], choices=tuple(TASKS["sids"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--collect-only", action="store_true", help="make the tables from the measurements that are there")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantizer_tuning.json")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    try:
        where = places()
        if "://" in where.home:
            raise ConfigError([f"GENRECALL_HOME: artifacts are copied and need a local folder, got {where.home!r}"])
        for dataset in options.datasets if not options.collect_only else ():
            for seed in options.seeds:
                run(dataset, seed, options.settings, where)
        found = {(dataset, table): collect(dataset, table, options.seeds, Path(where.home)) for dataset in options.datasets for table in TABLES}
    except (ConfigError, CollectionError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; run the same command again to go on\n")
    fresh = {place: made for place, made in found.items() if made}
    if not fresh:
        raise SystemExit(f"nothing to collect under {where.home}/quality; run without --collect-only first")
    old = json.loads(options.output.read_text()) if options.output.exists() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    records = merged([record for made in fresh.values() for record in made], old, fresh)
    options.output.write_text(to_json(records))
    datasets = dict.fromkeys(record["dataset"] for record in records)
    text = "\n".join(f"## {dataset}\n\n{markdown([record for record in records if record['dataset'] == dataset])}" for dataset in datasets)
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
