"""The quality tables: the evaluations of several seeds in, records and Markdown out.

Records are those of `paired_records`. `METRIC[SLICE]` is the metric over a slice of the requests; the row `all` says how many requests were
measured: the headline ones or, in the tables `NAME_all_queries` of data sets whose queries are derived from the items bought, a uniform
sample of the test requests.

Shapes: T seeds, R requests, M metrics.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paired_records
from paired_records import Columns, PairedRecords, Record, markdown_table, mean, origin, require_equal

from genrecall.evaluation.bootstrap import Bootstrap
from genrecall.evaluation.results_table import CHANNEL_NAMES, row_name, show, show_gain

ALL_QUERIES = "_all_queries"
TABLES_OF = {
    "channels": ("channels", "channels_all_queries", "channels_by_slice", "semantic_guided", "personalised_guided"),
    "sids": ("semantic", "semantic_all_queries", "personalised", "personalised_all_queries"),
    "large": ("semantic_large", "personalised_large"),
    "large_paper": ("semantic_large_paper", "personalised_large_paper"),
}
"""The tables that each experiment fills."""
TITLES = {
    "channels": "Recall channels, the generative one as recommended",
    "channels_all_queries": "Recall channels, the generative one as recommended, all queries",
    "channels_by_slice": "What the generative channel adds, by slice (mean over seeds)",
    "semantic_guided": "CQ-SID with the recommended generator, query alone",
    "personalised_guided": "CQ-SID with the recommended generator, query and shopper",
    "semantic": "SIDs compared under the paper's generator, query alone",
    "semantic_all_queries": "SIDs compared under the paper's generator, query alone, all queries",
    "personalised": "SIDs compared under the paper's generator, query and shopper",
    "personalised_all_queries": "SIDs compared under the paper's generator, query and shopper, all queries",
    "semantic_large": "Items against SIDs written, 100,000 items, query alone",
    "personalised_large": "Items against SIDs written, 100,000 items, query and shopper",
    "semantic_large_paper": "Items against SIDs written, 100,000 items, the paper's codebooks, query alone",
    "personalised_large_paper": "Items against SIDs written, 100,000 items, the paper's codebooks, query and shopper",
}
REQUESTS_NOTE = (
    "Headline tables hold the test requests whose query is unseen in training and free of its targets' category words; "
    'tables named "all queries" a uniform sample of the test requests.'
)
DATASET_NAMES = {"marketplace": "Marketplace", "amazon_scientific": "Amazon Scientific", "home_depot": "Home Depot"}

SID_ROWS = ("rqvae", "rqvae_resized", "rqkmeans", "cqsid_without_category", "cqsid_without_query", "cqsid")
SID_METRICS = ("clk@1", "clk@10", "clk@100", "hit@items10", "hit@items100")
SID_MISSES = ("clk@100", "hit@items100")
SIZE = "items_per_sid"
CUT_ROWS = ("rqvae", "rqvae_resized", "cqsid")
CUT = "cut1000@beam"
BEST, NEEDED, SAVED = "best_cut1000_beam", "beam_for_best_cut1000_of_", "beam_saved_vs_"
CHANNEL_ROWS = tuple(CHANNEL_NAMES)
RECALLS = ("recall@10", "recall@100")
ADDED = ("marginal@100", "missed_found@100")
SLICE_COUNTS = {"marginal@100": "requests", "missed_found@100": "requests_with_misses"}
CHANNEL_PAIRS = (
    ("rrf_all", "rrf_bm25_dense"),
    ("generative", "dense"),
    ("generative", "bm25"),
    ("generative", "guidance"),
    ("rrf_bm25_corrected_dense", "rrf_bm25_dense"),
    ("rrf_all_corrected", "rrf_bm25_corrected_dense"),
)
OURS = "generative"
MAIN = "cqsid"
_VERSUS = re.compile(r"(?P<metric>.+)_(?P<kind>gain|misses_gone)_vs_(?P<base>.+)")
_SLICE = re.compile(r"(?P<metric>[^\[]+)\[(?P<slice>.+)\]")


@dataclass(frozen=True)
class Evaluations:
    """One experiment's evaluations, one a seed, all over the same requests.

    Attributes:
        columns: (table, row) -> metric -> float64 [T, R].
        metrics: `metrics.json` of each seed.
        requests: R.
        all_queries: over a uniform sample of the test requests, where queries are derived and the headline is no such sample.
    """

    columns: Mapping[tuple[str, str], Columns]
    metrics: Sequence[Mapping[str, Any]]
    requests: int
    all_queries: Evaluations | None = None


def read_evaluations(folders: Mapping[str, Path]) -> Evaluations:
    """Read the evaluations of one experiment, over the headline requests.

    Args:
        folders: a cell's name as `DATASET SEED EXPERIMENT` -> its `evaluation` folder.

    Raises:
        CollectionError: a cell that measured other requests, or other rows or metrics, than the rest.
    """
    asked = {}
    for cell, folder in folders.items():
        with np.load(folder / "per_request" / "requests.npz", allow_pickle=False) as file:
            asked[cell] = tuple(tuple(file[name].tolist()) for name in ("request_id", "primary", "uniform"))
    fix = functools.partial(_rerun, folders)
    require_equal(asked, "measured other requests than", fix)
    _, primary, uniform = next(iter(asked.values()))
    by_cell = {cell: _columns_of(folder / "per_request") for cell, folder in folders.items()}
    require_equal({cell: tuple(sorted((key, *sorted(one)) for key, one in found.items())) for cell, found in by_cell.items()}, "has other rows than", fix)
    found = list(by_cell.values())
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders.values()]

    def over(chosen: Sequence[bool], all_queries: Evaluations | None = None) -> Evaluations:
        mask = np.array(chosen, dtype=bool)
        columns = {key: {metric: np.stack([one[key][metric][mask] for one in found]) for metric in first} for key, first in found[0].items()}
        return Evaluations(columns, metrics, int(mask.sum()), all_queries)

    return over(primary, over(uniform) if metrics[0]["query_kind"] == "derived" else None)


def _columns_of(folder: Path) -> dict[tuple[str, str], Columns]:
    """(table, row) -> metric -> float64 [evaluated requests] of one evaluation; files without a row in their name hold something else."""
    found: dict[tuple[str, str], Columns] = {}
    for path in sorted(folder.glob("*.*.npz")):
        table, _, row = path.stem.partition(".")
        with np.load(path, allow_pickle=False) as file:
            found[table, row] = {metric: file[metric].astype(np.float64) for metric in file.files}
    return found


def _rerun(folders: Mapping[str, Path], cell: str) -> str:
    return f"delete {folders[cell]} and run `python benchmarks/quality.py --cell {cell}` again"


@dataclass(frozen=True)
class Collector:
    """Makes the records of one dataset from one experiment's evaluations.

    Attributes:
        samples: of the bootstrap; every table shares the resamples, so any two numbers are paired.
    """

    dataset: str
    seen: Evaluations
    command: str
    commit: str
    samples: int = 1000

    def records(self, experiment: str) -> list[Record]:
        """All records of the experiment's tables."""
        everything = None if self.seen.all_queries is None else replace(self, seen=self.seen.all_queries)
        if experiment == "channels":
            found = self._channels() + self._slices() + self._sid_tables((MAIN,), "_guided")
            return found + ([] if everything is None else everything._channels(ALL_QUERIES))
        if experiment.startswith("large"):
            beams = [record for source in ("semantic", "personalised") for record in self._beams(source, f"{source}_{experiment}")]
            return self._sid_tables(SID_ROWS, f"_{experiment}") + beams
        return self._sid_tables(SID_ROWS) + ([] if everything is None else everything._sid_tables(SID_ROWS, ALL_QUERIES))

    def _channels(self, suffix: str = "") -> list[Record]:
        wanted = [(row, metric) for row in CHANNEL_ROWS for metric in (*RECALLS, *(ADDED if row == OURS else ()))]
        return self._means("channels", f"channels{suffix}", wanted) + self._gains("channels", f"channels{suffix}", CHANNEL_PAIRS, RECALLS)

    def _slices(self) -> list[Record]:
        """Means over seeds of what the evaluations say of each slice, and of how many requests: a share of misses has only those with a miss behind it."""
        by_name: dict[str, list[float | None]] = {}
        for metrics in self.seen.metrics:
            for one in metrics["records"]:
                if one["table"] == "channels" and one["row"] == OURS and one["slice"] and one["metric"] in ADDED:
                    by_name.setdefault(f"{one['metric']}[{one['slice']}]", []).append(one["value"])
                    by_name.setdefault(f"{SLICE_COUNTS[one['metric']]}[{one['slice']}]", []).append(one["n"])
        return [self._maker.record("channels_by_slice", OURS, name, mean(values)) for name, values in by_name.items()]

    def _sid_tables(self, rows: Sequence[str], suffix: str = "") -> list[Record]:
        """Both stages' tables, the second only where it says something new."""
        sources = ["semantic"] if self._personalised_is_a_copy() else ["semantic", "personalised"]
        return [record for source in sources for record in self._sids(source, f"{source}{suffix}", rows)]

    def _sids(self, source: str, table: str, rows: Sequence[str]) -> list[Record]:
        present = [row for row in rows if (source, row) in self.seen.columns]
        wanted = [(row, metric) for row in present for metric in SID_METRICS]
        wanted += [(row, metric) for row in present if row in CUT_ROWS for metric in self.seen.columns[source, row] if metric.startswith(CUT)]
        sizes = {
            row: [
                one["value"] for metrics in self.seen.metrics for one in metrics["records"] if (one["table"], one["row"], one["metric"]) == (source, row, SIZE)
            ]
            for row in present
        }
        pairs = [(row, "rqvae") for row in present if row != "rqvae"] + [(MAIN, row) for row in present if row not in (MAIN, "rqvae")]
        records = self._means(source, table, wanted) + self._gains(source, table, pairs, SID_METRICS, SID_MISSES)
        return records + [self._maker.record(table, row, SIZE, mean(values)) for row, values in sizes.items() if values]

    def _beams(self, source: str, table: str) -> list[Record]:
        """The beam at which each RQ-VAE is best after the cut, the beam at which CQ-SID is as good, and the share of SIDs saved (None: it never is)."""
        rows, records = self._rows(source), list[Record]()
        cuts = [metric for _, metric in sorted((int(metric.removeprefix(CUT)), metric) for metric in rows.get(MAIN, {}) if metric.startswith(CUT))]
        beams = np.array([int(metric.removeprefix(CUT)) for metric in cuts], dtype=np.float64)
        for base in [row for row in CUT_ROWS if row != MAIN and row in rows]:
            cube = np.stack([rows[row][metric] for row in (base, MAIN) for metric in cuts], axis=2)
            bootstrap = Bootstrap(cube.shape[1], samples=self.samples)
            point = np.array([[one.value for one in bootstrap.intervals(cube)]], dtype=np.float64)
            values = np.concatenate([point, bootstrap.means(cube)])  # [1 + samples, 2 x beams]
            theirs, ours = values[:, : len(beams)], values[:, len(beams) :]
            best = beams[theirs.argmax(axis=1)]
            needed = beam_needed(beams, ours, theirs.max(axis=1))
            for row, metric, numbers in ((base, BEST, best), (MAIN, f"{NEEDED}{base}", needed), (MAIN, f"{SAVED}{base}", 1 - needed / best)):
                bounds = (numbers[0], *np.quantile(numbers[1:], (0.025, 0.975), method="nearest"))
                records.append(self._maker.record(table, row, metric, *(float(one) if np.isfinite(one) else None for one in bounds)))
        return records

    def _personalised_is_a_copy(self) -> bool:
        """Whether stage 3 is stage 2 (no shopper is known), so that its table would say everything twice."""
        columns = self.seen.columns
        rows = [row for table, row in columns if table == "personalised" and ("semantic", row) in columns]
        return all(
            np.array_equal(column, columns["semantic", row][metric], equal_nan=True) for row in rows for metric, column in columns["personalised", row].items()
        )

    def _means(self, source: str, table: str, wanted: Iterable[tuple[str, str]]) -> list[Record]:
        """Means of (row, metric), and how many requests were measured; nothing where none of them was."""
        records = self._maker.means(table, self._rows(source), wanted)
        return [*records, self._maker.record(table, "all", "requests", self.seen.requests)] if records else []

    def _gains(self, source: str, table: str, pairs: Iterable[tuple[str, str]], metrics: Sequence[str], misses: Sequence[str] = ()) -> list[Record]:
        return self._maker.gains(table, self._rows(source), pairs, metrics, misses)

    def _rows(self, source: str) -> dict[str, Columns]:
        """row -> columns of one of the evaluations' tables."""
        return {row: columns for (table, row), columns in self.seen.columns.items() if table == source}

    @property
    def _maker(self) -> PairedRecords:
        return PairedRecords(self.dataset, len(self.seen.metrics), self.command, self.commit, self.samples)


def beam_needed(beams: np.ndarray, curves: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The narrowest beam at which each curve reaches what is wanted of it, linear between the beams measured.

    Args:
        beams: float64 [B], ascending.
        curves: float64 [C, B].
        wanted: float64 [C].

    Returns:
        float64 [C]; the first beam where a curve begins above, `inf` where it ends below.
    """
    reached = curves >= wanted[:, None]
    at = reached.argmax(axis=1)
    rows, before = np.arange(len(curves)), np.maximum(at - 1, 0)
    low, high = curves[rows, before], curves[rows, at]
    share = np.divide(wanted - low, high - low, out=np.ones(len(curves)), where=(at > 0) & (high > low))
    return np.where(reached.any(axis=1), beams[before] + share * (beams[at] - beams[before]), np.inf)


def merged(fresh: Sequence[Record], old: Sequence[Record], rebuilt: Iterable[tuple[str, str]]) -> list[Record]:
    """All records in a fixed order: the fresh ones, and the old ones of every (dataset, experiment) that was not rebuilt."""
    return paired_records.merged(fresh, old, [(dataset, table) for dataset, experiment in rebuilt for table in TABLES_OF[experiment]])


def markdown(records: Sequence[Record]) -> str:
    """Every dataset's tables: values with intervals, gains beneath, and where they come from."""
    datasets = sorted({record["dataset"] for record in records}, key=lambda name: ([*DATASET_NAMES, name].index(name), name))
    parts = []
    for dataset in datasets:
        parts.append(f"## {DATASET_NAMES.get(dataset, dataset)}")
        if any(record["dataset"] == dataset and record["table"].endswith(ALL_QUERIES) for record in records):
            parts.append(REQUESTS_NOTE)
        for table, title in TITLES.items():
            found = {(record["row"], record["metric"]): record for record in records if (record["dataset"], record["table"]) == (dataset, table)}
            if found:
                parts += [f"### {title}", origin(next(iter(found.values())), found.get(("all", "requests"))), *_blocks(table, found)]
    return "\n\n".join(parts) + "\n"


def _blocks(table: str, found: Mapping[tuple[str, str], Record]) -> list[str]:
    if table == "channels_by_slice":
        split = {metric: match.groupdict() for _, metric in found if (match := _SLICE.fullmatch(metric))}
        slices = list(dict.fromkeys(one["slice"] for one in split.values()))
        columns = [column for metric, count in SLICE_COUNTS.items() for column in (count, metric)]
        cells = {(column, name): found.get((OURS, f"{column}[{name}]")) for column in columns for name in slices}
        rows = [[name, *(show(cells[column, name]) if column in ADDED else _count(cells[column, name]) for column in columns)] for name in slices]
        return [markdown_table(["slice", *columns], rows)]
    is_sid = not table.startswith("channels")
    order, metrics = (SID_ROWS, list(SID_METRICS)) if is_sid else (CHANNEL_ROWS, [*RECALLS, *ADDED])
    rows_there = [row for row in order if any((row, metric) in found for metric in metrics)]
    blocks = [
        markdown_table(
            ["", *(["items/SID"] if is_sid else []), *metrics],
            [[row_name(row), *([_size(found.get((row, SIZE)))] if is_sid else []), *_cells(found, row, metrics)] for row in rows_there],
        )
    ]
    cuts = sorted({metric for _, metric in found if metric.startswith(CUT)}, key=lambda metric: int(metric.removeprefix(CUT)))
    if cuts:
        cut_rows = [[row_name(row), *_cells(found, row, cuts)] for row in rows_there if row in CUT_ROWS]
        blocks += ["Cut to the 1,000 items of highest prior:", markdown_table(["", *(f"beam {metric.removeprefix(CUT)}" for metric in cuts)], cut_rows)]
        blocks += [_beam_line(found, base) for base in CUT_ROWS if (MAIN, f"{SAVED}{base}") in found]
    gains = _gain_rows(found, rows_there)
    if gains:
        names = list(dict.fromkeys(name for _, by_name in gains for name in by_name))
        blocks += ["Paired gains:", markdown_table(["", *names], [[pair, *(show_gain(by_name.get(name)) for name in names)] for pair, by_name in gains])]
    return blocks


def _gain_rows(found: Mapping[tuple[str, str], Record], rows: Sequence[str]) -> list[tuple[str, dict[str, Record]]]:
    """(`A over B`, column -> record), in the order of the rows."""
    by_pair: dict[tuple[str, str], dict[str, Record]] = {}
    for (row, name), record in found.items():
        if match := _VERSUS.fullmatch(name):
            column = match["metric"] if match["kind"] == "gain" else f"{match['metric']}, misses gone"
            by_pair.setdefault((row, match["base"]), {})[column] = record
    wanted = [(row, base) for base in rows for row in rows if (row, base) in by_pair]
    columns = [*RECALLS, *SID_METRICS, *(f"{metric}, misses gone" for metric in SID_MISSES)]
    return [
        (f"{row_name(row)} over {row_name(base)}", {name: by_pair[row, base][name] for name in columns if name in by_pair[row, base]}) for row, base in wanted
    ]


def _beam_line(found: Mapping[tuple[str, str], Record], base: str) -> str:
    best, needed, saved = found[base, BEST], found[MAIN, f"{NEEDED}{base}"], found[MAIN, f"{SAVED}{base}"]
    if saved["value"] is None:
        return f"{row_name(base)} is best at beam {best['value']:.0f}; {row_name(MAIN)} is as good at no beam measured."
    low, high = ("less than measured" if saved[bound] is None else f"{100 * saved[bound]:+.0f}" for bound in ("low", "high"))
    return (
        f"{row_name(base)} is best at beam {best['value']:.0f} ({best['low']:.0f} to {best['high']:.0f}); {row_name(MAIN)} is as good at beam {needed['value']:.0f}: "
        f"{100 * saved['value']:+.0f} % ({low} to {high}) SIDs saved."
    )


def _cells(found: Mapping[tuple[str, str], Record], row: str, metrics: Sequence[str]) -> list[str]:
    return [show(found[row, metric], interval=True) if (row, metric) in found else "" for metric in metrics]


def _count(record: Record | None) -> str:
    """A mean number of requests, to one place where it is not whole."""
    return "" if record is None else f"{record['value']:,.1f}".removesuffix(".0")


def _size(record: Record | None) -> str:
    return "" if record is None or record["value"] is None else f"{record['value']:.2f}"
