"""The tasks of `prepare_data`: read and check a portion into shards; merge one partition of items; assemble one partition of events.

A shuffle through files: each reading task writes shards (Arrow IPC, one record batch per partition, partition = hash of the key),
and the task of a partition reads its batch of every shard. Items are keyed by item id, users and events by shopper (by request
where there is none), so a partition holds all there is about its shoppers. No task holds more than a shard or a partition, beside the ids of
all items, which the tasks of one machine share; what a task writes depends on its input alone, so a repeated task writes the same files again.

The functions are plain; `search_logs` runs them on Ray Data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.request_assembly import AssemblyRules, assemble_requests
from genrecall.data.schema import EVENTS, ITEMS, REJECTED, REQUESTS, USERS
from genrecall.data.splits import by_query, leave_last_out, text_hash
from genrecall.data.table_readers import Portion, read_portion
from genrecall.data.validation import ORIGIN, SCHEMAS, RowRules, check_chunk, rejections, text_columns, without_shoppers

SHOWN_BAD_ROWS = 5
_TIME_SAMPLE = 5_000
_REJECTED_AT_ONCE = 50_000
_SHARD_BYTES = 512 << 20  # Arrow addresses two gigabytes of text in one piece
UNDECIDED = -1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all tasks of one run share.

    Attributes:
        folder: URI of the run's work folder, reachable from every task.
        partitions: how many, by table ("items"; "events" serves users too).
        labels: what messages call each portion's file, by portion number.
        shard_rows: rows a reading task collects before it writes a shard.
        erased_users: shoppers whose rows are left out as they are read.
    """

    folder: str
    partitions: Mapping[str, int]
    labels: Sequence[str]
    shard_rows: int
    rows: RowRules
    assembly: AssemblyRules
    seed: int
    validation_fraction: float
    test_fraction: float
    erased_users: frozenset[str] = frozenset()


@dataclass
class TaskReport:
    """What a task tells about its work; reports add up with `+`."""

    rows: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # "<table>.<reason>"
    noted: Counter[str] = field(default_factory=Counter)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, list[str]] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)  # of requests: all, or an even sample of `timed_requests` of them
    timed_requests: int = 0

    def add_rejected(self, rejected: pa.Table) -> None:
        if not len(rejected):
            return
        for one in pc.value_counts(pc.binary_join_element_wise(rejected["table"], rejected["reason"], ".")).to_pylist():
            self.rejected[one["values"]] += one["counts"]
        self.bad_rows = (self.bad_rows + rejected.slice(0, SHOWN_BAD_ROWS).to_pylist())[:SHOWN_BAD_ROWS]


def write_parquet(table: pa.Table, uri: str) -> None:
    """Write one Parquet file, local or remote, making its folder."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, local or remote."""
    with fsspec.open(uri, "rb") as file:
        return pq.ParquetFile(file).read(columns=None if columns is None else list(columns), use_threads=False)


def request_times(requests: pa.Table) -> np.ndarray:
    """int64 [R]: microseconds since 1970 UTC, or sequence numbers where the source has no time."""
    return np.asarray(pc.coalesce(requests["timestamp"].cast(pa.int64()), requests["sequence"]).to_numpy(), dtype=np.int64)


def read_and_partition(portion: Portion, work: Work) -> TaskReport:
    """Read one portion, check its rows, and write them to shards by partition; rejected rows go to `<folder>/rejected/`."""
    report = TaskReport(shards={portion.table: []})
    schema = SCHEMAS[portion.table]
    kept: list[pa.Table] = []
    rejected: list[pa.Table] = []
    rejected_files = 0

    def flush(*, last: bool) -> None:
        nonlocal rejected_files
        if sum(map(len, kept)) >= (1 if last else work.shard_rows) or sum(one.nbytes for one in kept) >= _SHARD_BYTES:
            name = f"{work.folder}/shards/{portion.table}/{portion.number:07d}-{len(report.shards[portion.table]):05d}.arrow"
            _write_shard(
                pa.concat_tables(kept),
                np.concatenate([_keys(portion.table, one) for one in kept]),
                work.partitions["items" if portion.table == "items" else "events"],
                name,
            )
            report.shards[portion.table].append(name)
            kept.clear()
        if sum(map(len, rejected)) >= (1 if last else _REJECTED_AT_ONCE):
            write_parquet(pa.concat_tables(rejected), f"{work.folder}/rejected/read-{portion.number:07d}-{rejected_files:05d}.parquet")
            rejected_files += 1
            rejected.clear()

    for chunk in read_portion(portion, schema.names, text_columns(portion.table)):
        if work.erased_users:  # before anything is checked, so that no rejected row keeps what such a row held
            chunk, erased = without_shoppers(portion, chunk, work.erased_users)
            report.noted["erased"] += erased
        checked = check_chunk(portion, chunk, work.rows)
        report.rows[portion.table] += len(chunk.table) + len(chunk.bad_rows)
        report.noted.update(checked.noted)
        report.add_rejected(checked.rejected)
        if portion.table == "events":
            report.noted["events_with_time"] += len(checked.table) - checked.table["timestamp"].null_count
            report.noted["events_without_time"] += checked.table["timestamp"].null_count
            report.noted["events_with_shopper"] += len(checked.table) - checked.table["user_id"].null_count
        kept.append(checked.table)
        rejected.append(checked.rejected)
        flush(last=False)
    flush(last=True)
    return report


def merge_items(partition: int, shards: Sequence[str], work: Work) -> TaskReport:
    """One partition of the catalogue without duplicates, to `<folder>/items/`; of contradicting rows the first stays."""
    report = TaskReport()
    table = _read_partition(shards, partition, ITEMS)
    table, rejected = _first_by_id(table, "items", "item_id", work.labels, report)
    _write_rejected(rejected, f"items-{partition:05d}", work, report)
    report.rows["items_kept"] = len(table)
    if len(table):
        write_parquet(table.select(ITEMS.names).sort_by("item_id").cast(ITEMS), f"{work.folder}/items/{partition:05d}.parquet")
    return report


def assemble_partition(partition: int, event_shards: Sequence[str], user_shards: Sequence[str], known_items: pa.Array, split: str, work: Work) -> TaskReport:
    """One partition of shoppers: users without duplicates, events of known items, and the requests assembled from them.

    Writes `<folder>/{users,requests,events}/<partition>.parquet`; requests carry `_split` (`UNDECIDED` when splitting by time,
    which needs all partitions), events carry `_request`, the place of their request in the partition.
    """
    report = TaskReport()
    users, rejected_users = _first_by_id(_read_partition(user_shards, partition, USERS), "users", "user_id", work.labels, report)
    events = _read_partition(event_shards, partition, EVENTS).sort_by([("_portion", "ascending"), ("_row", "ascending")])
    # Of a catalogue of millions only the ids asked for go into a table: one of all of them would cost every task a gigabyte.
    asked = pc.is_in(known_items, value_set=pc.unique(events["item_id"]))
    known = pc.is_in(events["item_id"], value_set=known_items.filter(asked))
    unknown = events.filter(pc.invert(known))
    events = events.filter(known)
    _write_rejected(
        pa.concat_tables([rejected_users, _rejected_rows(unknown, "events", "item_id", "unknown_item", work.labels)]), f"events-{partition:05d}", work, report
    )
    outcome = assemble_requests(events, work.assembly)
    report.noted.update(outcome.counts)
    requests = _with_user_attributes(outcome.requests, users)
    if split == "leave_last_out":
        splits = leave_last_out(outcome.users, outcome.order)
    elif split == "by_query":
        splits = by_query(requests["query"].to_pylist(), seed=work.seed, validation_fraction=work.validation_fraction, test_fraction=work.test_fraction)
    else:
        splits = np.full(len(requests), UNDECIDED, dtype=np.int8)
        times = np.sort(request_times(requests))
        report.timed_requests = len(times)
        if len(times) > _TIME_SAMPLE:
            times = times[np.linspace(0, len(times) - 1, _TIME_SAMPLE).round().astype(np.int64)]
        report.times = times.tolist()
    report.rows["users_kept"] = len(users)
    if len(users):
        write_parquet(users.select(USERS.names).sort_by("user_id").cast(USERS), f"{work.folder}/users/{partition:05d}.parquet")
    if len(requests):
        write_parquet(requests.append_column("_split", pa.array(splits, pa.int8())), f"{work.folder}/requests/{partition:05d}.parquet")
        write_parquet(outcome.events.append_column("_request", pa.array(outcome.event_request, pa.int32())), f"{work.folder}/events/{partition:05d}.parquet")
    return report


def _keys(name: str, table: pa.Table) -> np.ndarray:
    if name == "events":
        return text_hash(pc.coalesce(table["user_id"], table["request_id"]).to_numpy(), seed=0)
    return text_hash(table["item_id" if name == "items" else "user_id"].to_numpy(), seed=0)


def _write_shard(table: pa.Table, keys: np.ndarray, partitions: int, uri: str) -> None:
    owner = (keys % np.uint64(partitions)).astype(np.int64)
    table = table.take(pa.array(np.argsort(owner, kind="stable"))).combine_chunks()
    ends = np.cumsum(np.bincount(owner, minlength=partitions))
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    empty = pa.RecordBatch.from_pylist([], schema=table.schema)
    with filesystem.open(path, "wb") as file, pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            piece = table.slice(start, end - start).combine_chunks().to_batches()
            writer.write_batch(piece[0] if piece else empty)


def _read_partition(shards: Sequence[str], partition: int, schema: pa.Schema) -> pa.Table:
    batches = []
    for uri in shards:
        with fsspec.open(uri, "rb") as file:
            batches.append(pa.ipc.open_file(file).get_batch(partition))
    loose = pa.schema([*(one.with_nullable(True) for one in schema), *ORIGIN])
    return pa.Table.from_batches(batches, loose).combine_chunks()


def _first_by_id(table: pa.Table, name: str, key: str, labels: Sequence[str], report: TaskReport) -> tuple[pa.Table, pa.Table]:
    """The first row of each id, and the later rows that contradict it as rejections; later rows that repeat it are only counted."""
    if not len(table):
        return table, REJECTED.empty_table()
    table = table.sort_by([(key, "ascending"), ("_portion", "ascending"), ("_row", "ascending")]).combine_chunks()
    ids = table[key].to_numpy()
    opens = np.append(True, ids[1:] != ids[:-1])
    later = np.flatnonzero(~opens)
    if not later.size:
        return table, REJECTED.empty_table()
    # A row is judged against the kept one of its id, not against its neighbour.
    first = np.flatnonzero(opens)[np.cumsum(opens) - 1][later]
    columns = SCHEMAS[name].names
    ours, kept = table.select(columns).take(pa.array(later)).to_pylist(), table.select(columns).take(pa.array(first)).to_pylist()
    differs = np.array([one != other for one, other in zip(ours, kept, strict=True)])
    report.noted[f"repeated_{name}"] += int((~differs).sum())
    return table.filter(pa.array(opens)), _rejected_rows(table.take(pa.array(later[differs])), name, key, "conflicting_duplicate", labels)


def _rejected_rows(table: pa.Table, name: str, column: str, reason: str, labels: Sequence[str]) -> pa.Table:
    portions = table["_portion"].to_numpy()
    pieces = []
    for portion in np.unique(portions):
        part = table.filter(pa.array(portions == portion))
        pieces.append(rejections(name, labels[portion], part["_row"].to_numpy(), column, reason, part[column].combine_chunks()))
    return pa.concat_tables([REJECTED.empty_table(), *pieces])


def _write_rejected(rejected: pa.Table, name: str, work: Work, report: TaskReport) -> None:
    report.add_rejected(rejected)
    if len(rejected):
        write_parquet(rejected, f"{work.folder}/rejected/{name}.parquet")


def _with_user_attributes(requests: pa.Table, users: pa.Table) -> pa.Table:
    place = pc.index_in(requests["user_id"], value_set=users["user_id"], skip_nulls=True)
    for name in ("gender", "age_band"):
        requests = requests.set_column(REQUESTS.get_field_index(name), REQUESTS.field(name), users[name].take(place))
    return requests
