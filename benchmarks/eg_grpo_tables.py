"""The alignment's tables: the per-request files of several cells in, records and Markdown out.

Records are those of `paired_records`. Tables: `alignment` (rows on SID lists of ten, in parts `METRIC` and `METRIC_gain_vs_ROW`), `cost` (means over
seeds, from the least to the most), `outcome` and `outcome_alone` (per shopper: our channel beside the site's, and by itself) and `tuning` (as
`alignment`, on validation requests); `throughput` is taken over from `rl.json`. The row `all` says how many requests or shoppers were measured.

Shapes: T seeds, R requests, U shoppers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measurement import commits
from paired_records import Columns, PairedRecords, Record, markdown_table, mean, merged, origin, read_arrays, require_equal, to_json

from genrecall.evaluation.ab_simulation import OUTCOMES

COLUMNS = ("clk@1", "clk@10", "exp@1", "exp@10", "pvr@10", "recall@10")
START, GUIDANCE, CONTINUED, PLAIN, MAIN = "stage3", "guidance", "stage3_continued", "grpo_k0", "eg_grpo_k2"
UNALIGNED = (START, GUIDANCE)
OUTCOME_ROWS = (START, MAIN)
WITHOUT, ALONE = "without_channel", "alone"
BARS: Mapping[str, Mapping[str, float]] = {
    "marketplace": {"clk@1": 0.0, "clk@10": 0.0, "exp@1": -0.003, "exp@10": -0.003, "pvr@10": -0.003},
    "home_depot": dict.fromkeys(("clk@1", "clk@10", "exp@1", "exp@10", "pvr@10"), -0.01),
}
"""What the lower bound of each gain over stage 3 must lie above. On Home Depot it is a loss of a hundredth: the intervals of the marketplace's 21,000
requests, scaled to some 1,760 queries, reach 0.3 % (pvr@10) to 2 % (clk@1) to either side, so that -0.3 % could be shown of hardly any alignment that
changes nothing. Nor can -1 % at one beam, where only a gain passes: the margin is the loss that one would accept, not what passes."""
COST = ("seconds", "steps_run", "kept_step", "stopped")

TABLES_OF = {"rows": ("alignment", "cost", "outcome", "outcome_alone"), "tuning": ("tuning",)}
TITLES = {
    "alignment": "Alignment, ten beams",
    "cost": "What an alignment takes (least to most over seeds; `seconds` by the wall clock, `stopped` the share of runs that a stop rule ended)",
    "outcome": "Simulated outcome per shopper, the site's channels and ours behind the site's ranker",
    "outcome_alone": "Simulated outcome per shopper, our channel alone behind the site's ranker",
    "tuning": "EG-GRPO, K = 2, by hyperparameters, on validation requests",
}
DATASET_NAMES = {"marketplace": "Marketplace, busy", "home_depot": "Home Depot", "tiny": "Tiny"}
ROW_NAMES = {
    START: "stage 3",
    GUIDANCE: "guidance alone (no decoder)",
    CONTINUED: "stage 3 continued",
    PLAIN: "GRPO (K = 0)",
    "eg_grpo_k1": "EG-GRPO, K = 1",
    MAIN: "EG-GRPO, K = 2",
    "eg_grpo_k4": "EG-GRPO, K = 4",
    "eg_grpo_k2_ranker": "EG-GRPO, K = 2, ranker",
    "eg_grpo_k2_mixed": "EG-GRPO, K = 2, mixed",
    WITHOUT: "without our channel",
}
_GAIN = re.compile(r"(?P<metric>.+)_gain_vs_(?P<base>.+)")


@dataclass(frozen=True)
class Plan:
    """Which rows a run makes, and where in a cell's home their files lie.

    Attributes:
        name: key of `TABLES_OF`.
        rows: in order, the start first.
        split: whose requests are measured.
        alignments, measured: folders.
    """

    name: str
    rows: tuple[str, ...]
    split: str
    alignments: str
    measured: str


@dataclass(frozen=True)
class Measured:
    """Some rows of T cells over the same requests.

    Attributes:
        columns: row -> metric -> float64 [T, R].
        facts: row -> `ROW.json` of each cell.
        seconds: `seconds.json` of each cell.
        outcome: row -> `ARM.OUTCOME` -> float64 [T, U]; empty where nothing was simulated.
    """

    columns: Mapping[str, Columns]
    facts: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: Sequence[Mapping[str, float]]
    outcome: Mapping[str, Columns]

    @property
    def requests(self) -> int:
        return int(self.columns[START][COLUMNS[0]].shape[1])


def read_measured(plan: Plan, homes: Mapping[str, Path]) -> tuple[Measured | None, list[str]]:
    """Read the rows that all cells of a dataset have measured.

    Args:
        homes: a cell's name as `DATASET SEED` -> its home.

    Returns:
        them, None where stage 3 or everything else is missing somewhere; and what is missing as `CELL: ROW`.

    Raises:
        CollectionError: measurements on other requests, or from another generator than the rest of their cell.
    """
    files = {(cell, row): homes[cell] / plan.measured / f"{row}.json" for cell in homes for row in plan.rows}
    missing = [f"{cell}: {row}" for (cell, row), file in files.items() if not file.exists()]
    rows = [row for row in plan.rows if all(files[cell, row].exists() for cell in homes)]
    if START not in rows or len(rows) < 2:
        return None, missing
    facts = {(cell, row): json.loads(files[cell, row].read_text()) for cell in homes for row in rows}
    arrays = {f"{cell}: {row}": read_arrays(files[cell, row].with_suffix(".npz")) for cell in homes for row in rows}
    tune = " --tune" if plan.name == "tuning" else ""

    def fix(name: str) -> str:
        cell, row = name.split(": ")
        return f"delete {files[cell, row]} and run `python benchmarks/eg_grpo.py --cell {cell}{tune}` again"

    require_equal({name: tuple(one["request_id"].tolist()) for name, one in arrays.items()}, "measured other requests than", fix)
    for cell in homes:
        require_equal({f"{cell}: {row}": json.dumps(facts[cell, row]["start"], sort_keys=True) for row in rows}, "started from other artifacts than", fix)
    outcome: dict[str, Columns] = {}
    simulated = {(cell, row): files[cell, row].with_suffix(".outcome.npz") for cell in homes for row in OUTCOME_ROWS if row in rows}
    if simulated and all(file.exists() for file in simulated.values()):
        played = {f"{cell}: {row}": read_arrays(file) for (cell, row), file in simulated.items()}
        require_equal({name: tuple(one["shopper"].tolist()) for name, one in played.items()}, "simulated other shoppers than", fix)
        outcome = {row: _stacked([played[f"{cell}: {row}"] for cell in homes], "shopper") for row in OUTCOME_ROWS if row in rows}
    times = [homes[cell] / "seconds.json" for cell in homes]
    seen = Measured(
        columns={row: _stacked([arrays[f"{cell}: {row}"] for cell in homes], "request_id") for row in rows},
        facts={row: [facts[cell, row] for cell in homes] for row in rows},
        seconds=[json.loads(file.read_text()) if file.exists() else {} for file in times],
        outcome=outcome,
    )
    return seen, missing


def _stacked(files: Sequence[Mapping[str, np.ndarray]], key: str) -> dict[str, np.ndarray]:
    """name -> float64 [T, n] of all columns but the one that says which requests or shoppers they are of."""
    return {name: np.stack([one[name] for one in files]).astype(np.float64) for name in files[0] if name != key}


def records_of(plan: Plan, seen: Measured, maker: PairedRecords) -> list[Record]:
    """All records of a dataset."""
    table = "tuning" if plan.name == "tuning" else "alignment"
    rows = list(seen.columns)
    records = maker.means(table, seen.columns, [(row, metric) for row in rows for metric in COLUMNS])
    records.append(maker.record(table, "all", "requests", seen.requests))
    records += maker.gains(table, seen.columns, pairs(rows) if table == "alignment" else [(row, START) for row in rows if row != START], COLUMNS)
    if table == "tuning":
        return records
    return records + _cost(plan, seen, maker) + _outcome(seen, maker)


def pairs(rows: Iterable[str]) -> list[tuple[str, str]]:
    """(row, base) of the gains: stage 3 over its guidance, all alignments over stage 3, what learns from rewards over mere further training, and experts over none."""
    bases = {START: [GUIDANCE], GUIDANCE: [], CONTINUED: [START], PLAIN: [START, CONTINUED]}
    return [(row, base) for row in rows for base in bases.get(row, [START, CONTINUED, PLAIN])]


def _cost(plan: Plan, seen: Measured, maker: PairedRecords) -> list[Record]:
    records = []
    for row in seen.columns:
        if row in UNALIGNED:
            continue
        facts = seen.facts[row]
        values: dict[str, list[float | None]] = {
            "seconds": [
                None if (last := one.get(f"{plan.alignments}/{row}")) is None else last + fact["earlier_seconds"]
                for one, fact in zip(seen.seconds, facts, strict=True)
            ],
            "steps_run": [fact["steps_run"] for fact in facts],
            "kept_step": [fact["kept_step"] for fact in facts],
            "stopped": [float(fact["stopped"] is not None) for fact in facts],
        }
        for metric in COST:
            known = [value for value in values[metric] if value is not None]
            spread = (min(known), max(known)) if len(known) > 1 else (None, None)
            records.append(maker.record("cost", row, metric, mean(known), *spread))
    return records


def _outcome(seen: Measured, maker: PairedRecords) -> list[Record]:
    if not seen.outcome:
        return []
    records = []
    for table, arm in (("outcome", ""), ("outcome_alone", ALONE)):
        rows = {row: {name: columns[f"{arm}.{name}"] for name in OUTCOMES} for row, columns in seen.outcome.items()}
        over = [(MAIN, START)] if MAIN in rows else []
        if table == "outcome":
            rows[WITHOUT] = {name: seen.outcome[START][f"{WITHOUT}.{name}"] for name in OUTCOMES}
            over += [(row, WITHOUT) for row in seen.outcome]
        records += maker.means(table, rows, [(row, name) for row in rows for name in OUTCOMES])
        records += maker.gains(table, rows, over, OUTCOMES)
        records.append(maker.record(table, "all", "shoppers", rows[START][OUTCOMES[0]].shape[1]))
    for row in seen.outcome:
        shares = [fact["shares"] for fact in seen.facts[row]]
        records += [maker.record("outcome", row, name, mean([one[name] for one in shares])) for name in shares[0]]
    return records


def rebuild(plan: Plan, homes: Mapping[str, Mapping[str, Path]], commands: Mapping[str, str], output: Path) -> str | None:
    """Write `eg_grpo.json` and `eg_grpo.md` anew and return the second; None, and nothing written, where neither a dataset nor `rl.json` has anything.

    Args:
        homes: dataset -> cell's name -> its home. commands: dataset -> what rebuilds its tables.

    Raises:
        CollectionError: see `read_measured`.
    """
    fresh, gone = list[Record](), list[tuple[str, str]]()
    for dataset, cells in homes.items():
        seen, missing = read_measured(plan, cells)
        if missing:
            print(f"left out: {dataset}, not measured: {', '.join(missing)}", file=sys.stderr)
        if seen is not None:
            made_at = commits(fact.get("commit") for facts in seen.facts.values() for fact in facts)
            fresh += records_of(plan, seen, PairedRecords(dataset, len(cells), commands[dataset], made_at))
            gone += [(dataset, table) for table in TABLES_OF[plan.name]]
    if steps := whole_steps(output / "rl.json"):
        fresh += steps
        gone.append(("synthetic", "throughput"))
    if not gone:
        return None
    file = output / "eg_grpo.json"
    records = merged(fresh, json.loads(file.read_text()) if file.exists() else [], gone)
    text = markdown(records)
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(records))
    (output / "eg_grpo.md").write_text(text)
    return text


def whole_steps(file: Path) -> list[Record]:
    """What `rl.py` measured of whole alignment steps and of rollout actors, as records of these tables; none where it has not been run."""
    found = json.loads(file.read_text()) if file.exists() else []
    names = ("table", "row", "metric", "value", "low", "high", "command", "commit")
    return [{name: record[name] for name in names} | {"dataset": "synthetic", "seeds": 1} for record in found if record["table"] == "throughput"]


def markdown(records: Sequence[Record]) -> str:
    """Every dataset's tables: values with intervals, gains beneath, and where they come from. Other benchmarks' tables are left out."""
    datasets = sorted({record["dataset"] for record in records if record["table"] in TITLES}, key=lambda name: ([*DATASET_NAMES, name].index(name), name))
    parts = []
    for dataset in datasets:
        parts.append(f"## {DATASET_NAMES.get(dataset, dataset)}")
        for table, title in TITLES.items():
            found = {(record["row"], record["metric"]): record for record in records if (record.get("dataset"), record["table"]) == (dataset, table)}
            if found:
                unit = "shoppers" if table.startswith("outcome") else "requests"
                parts += [f"### {title}", origin(next(iter(found.values())), found.get(("all", unit)), unit), *_blocks(dataset, table, found)]
    return "\n\n".join(parts) + "\n"


def _blocks(dataset: str, table: str, found: Mapping[tuple[str, str], Record]) -> list[str]:
    metrics = COST if table == "cost" else OUTCOMES if table.startswith("outcome") else COLUMNS
    digits = {"cost": 0, "outcome": 3, "outcome_alone": 3}.get(table, 4)
    names = dict.fromkeys(row for row, metric in found if metric in metrics)
    rows = [row for row in (WITHOUT, *ROW_NAMES) if row in names] + [row for row in names if row not in ROW_NAMES]
    rows = list(dict.fromkeys(rows))
    blocks = [markdown_table(["", *metrics], [[_name(row), *(_value(found.get((row, metric)), digits) for metric in metrics)] for row in rows])]
    gains: dict[str, dict[str, dict[str, Record]]] = {}
    for (row, name), record in found.items():
        if match := _GAIN.fullmatch(name):
            gains.setdefault(match["base"], {}).setdefault(row, {})[match["metric"]] = record
    for base in [one for one in rows if one in gains]:
        bar = BARS.get(dataset) if (table, base) == ("alignment", START) else None
        lines = [
            [_name(row), *(_gain(gains[base][row].get(metric)) for metric in metrics), *([_verdict(gains[base][row], bar)] if bar else [])]
            for row in rows
            if row in gains[base]
        ]
        about = f" (bar: lower bounds above {_bounds(bar)})" if bar else ""
        blocks += [f"Paired gains over {_name(base)}{about}:", markdown_table(["", *metrics, *(["bar"] if bar else [])], lines)]
    return blocks


def _verdict(gains: Mapping[str, Record], bar: Mapping[str, float]) -> str:
    """Whether gains over stage 3 reach a bar; "not measured" where one of its metrics has no interval."""
    lows = {metric: gains[metric]["low"] if metric in gains else None for metric in bar}
    if any(low is None for low in lows.values()):
        return "not measured"
    return "met" if all(lows[metric] > bound for metric, bound in bar.items()) else "not met"


def _bounds(bar: Mapping[str, float]) -> str:
    """The bounds of a bar in words, metrics of one bound together."""
    metrics: dict[float, list[str]] = {}
    for metric, bound in bar.items():
        metrics.setdefault(bound, []).append(metric)
    return "; ".join(f"{100 * bound:g} % for {', '.join(names)}" for bound, names in metrics.items())


def _name(row: str) -> str:
    return ROW_NAMES.get(row, row)


def _value(record: Record | None, digits: int) -> str:
    if record is None or record["value"] is None:
        return "n/a"
    bounds = "" if record["low"] is None else f" ({record['low']:.{digits}f}-{record['high']:.{digits}f})"
    return f"{record['value']:.{digits}f}{bounds}"


def _gain(record: Record | None) -> str:
    if record is None or record["value"] is None:
        return "n/a"
    bounds = "" if record["low"] is None else f" ({100 * record['low']:+.2f} to {100 * record['high']:+.2f})"
    return f"{100 * record['value']:+.2f} %{bounds}"
