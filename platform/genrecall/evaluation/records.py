"""Results as data: per-request columns in, one record per number out, each with its 95 % interval.

A record is {table, dataset, row, metric, slice, value, low, high, n}: `slice` is "" for the headline requests, `n` the requests behind the
number, and all of value, low, high are null where no request has a target of the tier. A gain is a record of its own, metric
`METRIC_gain_vs_ROW`, the paired relative difference; `METRIC_misses_gone_vs_ROW` is the share of the other row's misses that are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genrecall.evaluation.bootstrap import Bootstrap, Interval

Record = dict[str, Any]


@dataclass
class Results:
    """Per-request columns of one evaluation, all over the same R requests."""

    columns: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)

    def add(self, table: str, row: str, columns: Mapping[str, np.ndarray]) -> None:
        """Put columns (float64 [R] each) into a row of a table."""
        self.columns.setdefault((table, row), {}).update(columns)

    def tables(self) -> list[str]:
        return list(dict.fromkeys(table for table, _ in self.columns))

    def rows(self, table: str) -> list[str]:
        return [row for one, row in self.columns if one == table]


@dataclass(frozen=True)
class RecordMaker:
    """Turns columns into records.

    Attributes:
        dataset: name put into every record.
        samples, seed: of the bootstrap.
    """

    dataset: str
    samples: int
    seed: int

    def record(self, table: str, row: str, metric: str, interval: Interval, slice_name: str = "") -> Record:
        """One record."""
        bounds = {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}
        return {"table": table, "dataset": self.dataset, "row": row, "metric": metric, "slice": slice_name, **bounds}

    def constant(self, table: str, row: str, metric: str, value: float, n: int) -> Record:
        """A number that has no spread over requests."""
        return self.record(table, row, metric, Interval(value, None, None, n))

    def means(
        self, results: Results, requests: np.ndarray, *, slice_name: str = "", weights: np.ndarray | None = None, metrics: Sequence[str] | None = None
    ) -> list[Record]:
        """Means of all columns (or only of `metrics`) over the requests marked in `requests` [R]."""
        names, cube = [], []
        for (table, row), columns in results.columns.items():
            for metric, column in columns.items():
                if metrics is None or metric in metrics:
                    names.append((table, row, metric))
                    cube.append(column[requests])
        if not names:
            return []
        intervals = self._bootstrap(requests).intervals(np.stack(cube, axis=1), None if weights is None else weights[requests])
        return [self.record(*name, interval, slice_name) for name, interval in zip(names, intervals, strict=True)]

    def gains(
        self,
        results: Results,
        requests: np.ndarray,
        table: str,
        row: str,
        base: str,
        *,
        metrics: Sequence[str],
        misses: Sequence[str] = (),
        slice_name: str = "",
        weights: np.ndarray | None = None,
    ) -> list[Record]:
        """Paired gains of `row` over `base` in one table; nothing where either row is missing.

        Args:
            metrics: of which to report the relative gain; those that a row lacks are left out.
            misses: of which to report the share of the base's misses that are gone.
        """
        if (table, row) not in results.columns or (table, base) not in results.columns:
            return []
        ours, theirs = results.columns[table, row], results.columns[table, base]
        names = [metric for metric in metrics if metric in ours and metric in theirs]
        lost = [metric for metric in misses if metric in ours and metric in theirs]
        if not names and not lost:
            return []
        chosen = None if weights is None else weights[requests]
        first = np.stack([ours[metric][requests] for metric in names] + [1.0 - ours[metric][requests] for metric in lost], axis=1)
        second = np.stack([theirs[metric][requests] for metric in names] + [1.0 - theirs[metric][requests] for metric in lost], axis=1)
        intervals = self._bootstrap(requests).gains(first, second, chosen)
        records = [self.record(table, row, f"{metric}_gain_vs_{base}", one, slice_name) for metric, one in zip(names, intervals, strict=False)]
        for metric, one in zip(lost, intervals[len(names) :], strict=True):
            records.append(self.record(table, row, f"{metric}_misses_gone_vs_{base}", _negated(one), slice_name))
        return records

    def _bootstrap(self, requests: np.ndarray) -> Bootstrap:
        return Bootstrap(int(np.count_nonzero(requests)), samples=self.samples, seed=self.seed)


def find(metrics: Mapping[str, Any], table: str, row: str, metric: str, slice_name: str = "") -> Record | None:
    """The record with these names in an evaluation's metrics, or None."""
    for record in metrics["records"]:
        if (record["table"], record["row"], record["metric"], record.get("slice", "")) == (table, row, metric, slice_name):
            return dict(record)
    return None


def select(metrics: Mapping[str, Any], table: str, slice_name: str = "") -> Iterator[Record]:
    """The records of one table and slice, in order."""
    for record in metrics["records"]:
        if record["table"] == table and record.get("slice", "") == slice_name:
            yield dict(record)


def headline_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The headline values as flat names for an experiment tracker, e.g. `channels/generative/recall_at_100` (trackers bar the sign "@")."""
    return {
        f"{record['table']}/{record['row']}/{record['metric']}".replace("@", "_at_"): float(record["value"])
        for record in metrics["records"]
        if not record.get("slice") and record["value"] is not None
    }


def _negated(interval: Interval) -> Interval:
    flipped = [None if bound is None else -bound for bound in (interval.value, interval.high, interval.low)]
    return Interval(flipped[0], flipped[1], flipped[2], interval.n)
