"""Records of results over several seeds: means and paired gains, each with its interval over requests and seeds together.

A record is {table, dataset, row, metric, value, low, high, seeds, command, commit}: one number with its 95 % interval (null where it has
none), how many seeds stand behind it, the command that rebuilds it and the commit it was built at. `METRIC_gain_vs_ROW` is the paired
relative difference to another row, `METRIC_misses_gone_vs_ROW` the share of that row's misses that are gone.

Shapes: T seeds, R requests (or shoppers, where a table counts those).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrecall.evaluation.bootstrap import Bootstrap, Interval

Record = dict[str, Any]
Columns = Mapping[str, np.ndarray]
"""metric -> float64 [T, R]."""


class CollectionError(ValueError):
    """Measurements that do not belong together; the message says which cell to rerun."""


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def require_equal(signatures: Mapping[str, Any], what: str, fix: Callable[[str], str]) -> None:
    """Check that all cells say the same.

    Args:
        signatures: cell -> what it says.
        what: stands between the odd cells and the others in the message.
        fix: cell -> what to do about it.

    Raises:
        CollectionError: naming the cells that differ from most of the others (from the first, where no two agree).
    """
    usual = Counter(signatures.values()).most_common(1)[0][0]
    rest = ", ".join(f"`{cell}`" for cell, one in signatures.items() if one == usual)
    odd = [cell for cell, one in signatures.items() if one != usual]
    if odd:
        raise CollectionError(f"{', '.join(f'`{cell}`' for cell in odd)} {what} {rest}: {'; '.join(map(fix, odd))}")


@dataclass(frozen=True)
class PairedRecords:
    """Makes the records of one dataset.

    Attributes:
        seeds: T.
        samples: of the bootstrap; every table over the same requests shares the resamples, so any two numbers are paired.
    """

    dataset: str
    seeds: int
    command: str
    commit: str
    samples: int = 1000

    def means(self, table: str, columns: Mapping[str, Columns], wanted: Iterable[tuple[str, str]]) -> list[Record]:
        """Means of (row, metric), those that were not measured left out.

        Args:
            columns: row -> its columns, all over the same seeds and requests.
        """
        names = [(row, metric) for row, metric in wanted if metric in columns.get(row, {})]
        if not names:
            return []
        cube = np.stack([columns[row][metric] for row, metric in names], axis=2)
        intervals = self._bootstrap(cube).intervals(cube)
        return [self.record(table, row, metric, one.value, one.low, one.high) for (row, metric), one in zip(names, intervals, strict=True)]

    def gains(
        self, table: str, columns: Mapping[str, Columns], pairs: Iterable[tuple[str, str]], metrics: Sequence[str], misses: Sequence[str] = ()
    ) -> list[Record]:
        """Paired gains of (row, base), and the shares of the base's misses that are gone; nothing where either row is missing."""
        names: list[tuple[str, str]] = []
        ours: list[np.ndarray] = []
        theirs: list[np.ndarray] = []
        for row, base in pairs:
            first, second = columns.get(row, {}), columns.get(base, {})
            for metric in [one for one in metrics if one in first and one in second]:
                names.append((row, f"{metric}_gain_vs_{base}"))
                ours, theirs = [*ours, first[metric]], [*theirs, second[metric]]
            for metric in [one for one in misses if one in first and one in second]:
                names.append((row, f"{metric}_misses_gone_vs_{base}"))
                ours, theirs = [*ours, 1.0 - first[metric]], [*theirs, 1.0 - second[metric]]
        if not names:
            return []
        candidate, baseline = np.stack(ours, axis=2), np.stack(theirs, axis=2)
        intervals = self._bootstrap(candidate).gains(candidate, baseline)
        return [self.record(table, row, metric, *_bounds(metric, one)) for (row, metric), one in zip(names, intervals, strict=True)]

    def record(self, table: str, row: str, metric: str, value: float | None, low: float | None = None, high: float | None = None) -> Record:
        """One record."""
        bounds = {name: None if one is None else round(one, 6) for name, one in (("value", value), ("low", low), ("high", high))}
        names = {"table": table, "dataset": self.dataset, "row": row, "metric": metric}
        return {**names, **bounds, "seeds": self.seeds, "command": self.command, "commit": self.commit}

    def _bootstrap(self, cube: np.ndarray) -> Bootstrap:
        return Bootstrap(cube.shape[1], samples=self.samples)


def _bounds(metric: str, one: Interval) -> tuple[float | None, float | None, float | None]:
    """(value, low, high); the relative change of misses turned round, so that fewer is positive."""
    if "_misses_gone_vs_" not in metric:
        return one.value, one.low, one.high
    flipped = [None if bound is None else 0.0 - bound for bound in (one.value, one.high, one.low)]
    return flipped[0], flipped[1], flipped[2]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def merged(fresh: Sequence[Record], old: Sequence[Record], gone: Iterable[tuple[str, str]]) -> list[Record]:
    """All records in a fixed order: the fresh ones, and the old ones of every (dataset, table) that is not among `gone`; other benchmarks' may have no dataset."""
    left = set(gone)
    kept = [record for record in old if (record.get("dataset"), record["table"]) not in left]
    return sorted([*fresh, *kept], key=lambda record: tuple(record.get(name, "") for name in ("dataset", "table", "row", "metric")))


def to_json(records: Sequence[Record]) -> str:
    """A JSON list with one record a line, so that a change of one number is a change of one line."""
    return "[\n" + ",\n".join(" " + json.dumps(record, allow_nan=False) for record in records) + "\n]\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(one: Record, measured: Record | None, unit: str = "requests") -> str:
    """The line that says where a table comes from: one of its records, and the record that counts what was measured, if there is one."""
    about = "" if measured is None else f", {measured['value']:,} {unit}, 95 % intervals over both"
    return f"{one['seeds']} seed{'s' if one['seeds'] > 1 else ''}{about}: `{one['command']}` at {one['commit']}."
