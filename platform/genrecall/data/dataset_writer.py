"""Writing the dataset artifact: the assembled partitions, streamed in order into Parquet parts of bounded size, split by split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.partitions import TaskReport, read_parquet, request_times
from genrecall.data.schema import EVENTS, ITEMS, REJECTED, REQUESTS, SPLITS, USERS, DataError
from genrecall.data.sources import Source
from genrecall.data.splits import TEST, by_time, text_hash
from genrecall.storage import Draft

_ROWS_PER_FILE = 250_000
_logger = logging.getLogger(__name__)


def nothing_left(source: Source, report: TaskReport) -> DataError:
    """The error for a source of which cleaning left no request."""
    return DataError(f"{source.name}: no requests are left after cleaning (rejected: {dict(report.rejected)}, removed as bots: {report.noted['bot']})")


class DatasetWriter:
    """Streams the partitions into the artifact's folders, each table in Parquet parts of bounded size."""

    def __init__(
        self, folder: str, source: Source, report: TaskReport, *, split: str, cuts: tuple[int, int] | None, max_test_requests: int | None, seed: int
    ) -> None:
        self.folder, self.source, self.report, self.split, self.cuts = folder, source, report, split, cuts
        self.max_test_requests, self.seed = max_test_requests, seed

    def write(self, draft: Draft) -> None:
        """Fill the draft: tables, `stats.json`, row counts."""
        counts = {
            name: _copy_parts(f"{self.folder}/{name}", draft.path / name, schema)
            for name, schema in (("items", ITEMS), ("users", USERS), ("rejected", REJECTED))
        }
        requests, events, left_out = self._write_requests(draft.path)
        if not sum(requests.values()):
            raise nothing_left(self.source, self.report)
        stats = self._stats(counts, requests, events, left_out)
        (draft.path / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True))
        draft.row_counts.update(counts)
        draft.row_counts.update({f"requests/{name}": count for name, count in requests.items()})
        draft.row_counts.update({f"events/{name}": count for name, count in events.items()})
        for reason, count in stats["rejected"].items():
            _logger.warning("rejected %d rows: %s", count, reason)
        for name in SPLITS:
            if not requests[name]:
                _logger.warning("the %s split is empty (%d requests in all, split %s)", name, sum(requests.values()), self.split)
        _logger.info("dataset of %s: %d items, %s requests, split %s", self.source.name, counts["items"], requests, self.split)

    def _write_requests(self, target: Path) -> tuple[dict[str, int], dict[str, int], int]:
        threshold, left_out = self._test_sample()
        requests = [_PartWriter(target / "requests" / name, REQUESTS) for name in SPLITS]
        events = [_PartWriter(target / "events" / name, EVENTS) for name in SPLITS]
        for file in parquet_files(f"{self.folder}/requests"):
            table = read_parquet(file)
            splits = self._splits_of(table)
            rows = read_parquet(f"{self.folder}/events/{file.rsplit('/', 1)[1]}")
            owner = rows["_request"].to_numpy()
            for number in range(len(SPLITS)):
                keep = splits == number
                if number == TEST and threshold is not None:
                    keep &= _sample_keys(table, self.seed) <= threshold
                requests[number].write(table.select(REQUESTS.names).filter(pa.array(keep)))
                events[number].write(rows.select(EVENTS.names).filter(pa.array(keep[owner])))
        return (
            {name: writer.close() for name, writer in zip(SPLITS, requests, strict=True)},
            {name: writer.close() for name, writer in zip(SPLITS, events, strict=True)},
            left_out,
        )

    def _splits_of(self, table: pa.Table) -> np.ndarray:
        if self.cuts is None:
            return np.asarray(table["_split"].to_numpy())
        return by_time(request_times(table), *self.cuts)

    def _test_sample(self) -> tuple[np.uint64 | None, int]:
        """The largest hash that a sampled test request may have, and how many requests that leaves out."""
        if self.max_test_requests is None:
            return None, 0
        keys = [np.zeros(0, dtype=np.uint64)]
        for file in parquet_files(f"{self.folder}/requests"):
            table = read_parquet(file, columns=["request_id", "user_id", "timestamp", "sequence", "_split"])
            keys.append(_sample_keys(table, self.seed)[self._splits_of(table) == TEST])
        pool = np.sort(np.concatenate(keys))
        if len(pool) <= self.max_test_requests:
            return None, 0
        return pool[self.max_test_requests - 1], len(pool) - self.max_test_requests

    def _stats(self, counts: dict[str, int], requests: dict[str, int], events: dict[str, int], left_out: int) -> dict[str, Any]:
        noted = dict(self.report.noted)
        rejected: Counter[str] = Counter()
        for name, count in self.report.rejected.items():
            rejected[name.split(".", 1)[1]] += count
        return {
            "source": self.source.name,
            "query_kind": self.source.query_kind,
            "split": self.split,
            "split_starts": None if self.cuts is None else {"validation": self.cuts[0], "test": self.cuts[1]},
            "items": counts["items"],
            "users": counts["users"],
            "events": sum(events.values()),
            "events_by_split": events,
            "requests": requests,
            "test_requests_left_out": left_out,
            "rows_read": {table: self.report.rows[table] for table in ("items", "users", "events")},
            "rejected": dict(sorted(rejected.items())),
            "rejected_by_table": dict(sorted(self.report.rejected.items())),
            "removed": {name: noted.pop(name, 0) for name in ("duplicate", "bot", "erased")},
            "noted": dict(sorted(noted.items())),
        }


class _PartWriter:
    """Parquet parts `part-00000.parquet`, ... of one folder; there is always at least one, if only with a schema."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._folder, self._schema = folder, schema
        self._parts, self._rows, self._total = 0, 0, 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if not len(table):
            return
        if self._writer is None:
            self._open()
        assert self._writer is not None
        self._writer.write_table(table.cast(self._schema))
        self._rows += len(table)
        self._total += len(table)
        if self._rows >= _ROWS_PER_FILE:
            self._writer.close()
            self._writer = None

    def close(self) -> int:
        """Finish; returns the rows written in all."""
        if self._writer is None and not self._parts:
            self._open()
        if self._writer is not None:
            self._writer.close()
        return self._total

    def _open(self) -> None:
        self._writer = pq.ParquetWriter(self._folder / f"part-{self._parts:05d}.parquet", self._schema, compression="zstd")
        self._parts, self._rows = self._parts + 1, 0


def _copy_parts(source: str, target: Path, schema: pa.Schema) -> int:
    writer = _PartWriter(target, schema)
    for file in parquet_files(source):
        writer.write(read_parquet(file))
    return writer.close()


def parquet_files(folder: str) -> list[str]:
    """The Parquet files of a work folder, by name."""
    filesystem, root = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()  # other processes wrote here
    names = sorted(filesystem.glob(f"{root}/*.parquet")) if filesystem.exists(root) else []
    return [filesystem.unstrip_protocol(name) if "://" in folder else name for name in names]


def _sample_keys(table: pa.Table, seed: int) -> np.ndarray:
    """uint64 [R]: a seeded hash of each request, by shopper and id."""
    return text_hash(pc.binary_join_element_wise(pc.fill_null(table["user_id"], ""), table["request_id"], "/").to_numpy(), seed=seed)
