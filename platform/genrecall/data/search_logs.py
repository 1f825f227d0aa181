"""From search logs and a catalogue to a dataset artifact, on Ray Data: read, check, shuffle by shopper, assemble requests, split.

Three passes of tasks (`partitions.py`): every portion of the input is read and sharded; items are merged partition by partition;
events are assembled partition by partition. The driver then streams the partitions, in order, into the artifact's Parquet parts.
Peak memory is a few shards and partitions, whatever the size of the log. On a cluster the artifact's place (`uri`) must be reachable
from every node (a shared disk or an object store), because the work folder lies beside it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data

from genrecall.data.dataset_writer import DatasetWriter, nothing_left, parquet_files
from genrecall.data.partitions import SHOWN_BAD_ROWS, TaskReport, Work, assemble_partition, merge_items, read_and_partition, read_parquet
from genrecall.data.request_assembly import AssemblyRules
from genrecall.data.schema import DataError
from genrecall.data.sources import Source, open_adapter, open_erased_users, open_files, open_marketplace, stage_tables
from genrecall.data.splits import time_cuts
from genrecall.data.validation import RowRules
from genrecall.local_ray import ensure_ray
from genrecall.storage import Artifact, Draft, Stage, remove_tree

ALGORITHM_VERSION = 2
_MAX_PARTITIONS = 1_000
_ITEMS_PER_PARTITION = 50_000  # however many events fit into memory: items have long texts, of which Arrow sorts two gigabytes at most
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig:
    """What to read and how to clean, assemble and split it.

    Attributes:
        source: "canonical" for a site's own tables, else the built-in marketplace or an outside data set.
        items, events, users: canonical only: file, folder or glob under the data root (or absolute, or a URI) of Parquet, JSONL or CSV.
        folder: outside data sets only: where under the data root; default the data set's usual name.
        erased_users: a text file under the data root (or absolute, or a URI) with one user id a line: nothing of these shoppers comes into the dataset.
        split: "auto" takes what fits: time where there are timestamps, else leave-last-out where there are shoppers, else by query.
            "time" without timestamps goes by `sequence`, which must then count over the whole log.
        max_test_requests: keep a seeded sample of this many test requests; the others are left out, not moved to training.
        history_length: items of a shopper's history that a request carries.
        max_user_events_per_day, max_user_clicks_per_day: a shopper above either on one UTC day is a bot. A person who looks at 250
            pages of 20 products in a day stays below the first.
        max_clicks_per_request: a request with more rows of clicks, carts and purchases, repeated ones included, is a bot's.
        future_tolerance_hours: how far a timestamp may lie ahead of this machine's clock.
        max_rejected_fraction: of the rows of one table; above it the job fails.
        events_per_partition: bounds memory; raise it together with the machines' memory when there are more than 1,000 times as many events.
    """

    source: Literal["marketplace", "canonical", "home_depot", "amazon_scientific", "kuaisearch", "jdsearch", "ubi"] = "marketplace"
    marketplace_size: Literal["tiny", "small", "medium", "large", "busy"] = "small"
    folder: str | None = None
    items: str = "items"
    events: str = "events"
    users: str | None = None
    erased_users: str | None = None
    category_separator: str = ">"
    split: Literal["auto", "time", "leave_last_out", "by_query"] = "auto"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_test_requests: int | None = None
    history_length: int = 20
    session_gap_minutes: float = 30.0
    max_query_characters: int = 256
    max_user_events_per_day: int = 5_000
    max_user_clicks_per_day: int = 500
    max_clicks_per_request: int = 200
    future_tolerance_hours: float = 24.0
    max_rejected_fraction: float = 0.01
    events_per_partition: int = 50_000
    seed: int = 0

    def problems(self) -> list[str]:
        found = []
        if self.validation_fraction < 0 or self.test_fraction <= 0 or self.validation_fraction + self.test_fraction >= 1:
            found.append(f"validation_fraction, test_fraction: expected test > 0 and a sum below 1, got {self.validation_fraction} and {self.test_fraction}")
        if not 0 <= self.max_rejected_fraction <= 1:
            found.append(f"max_rejected_fraction: expected 0 to 1, got {self.max_rejected_fraction}")
        for name in ("max_query_characters", "max_user_events_per_day", "max_user_clicks_per_day", "max_clicks_per_request", "events_per_partition"):
            if getattr(self, name) < 1:
                found.append(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("history_length", "session_gap_minutes", "future_tolerance_hours"):
            if getattr(self, name) < 0:
                found.append(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.max_test_requests is not None and self.max_test_requests < 1:
            found.append(f"max_test_requests: expected at least 1 or none, got {self.max_test_requests}")
        if self.source != "canonical" and (self.items, self.events, self.users) != ("items", "events", None):
            found.append(f"items, events, users: only read with source=canonical, and source is {self.source!r}")
        if self.source in ("canonical", "marketplace") and self.folder is not None:
            found.append(f"folder: not used with source={self.source}; " + ("set items, events and users" if self.source == "canonical" else "remove it"))
        if not self.category_separator:
            found.append("category_separator: expected at least one character")
        return found


def prepare_data(config: PrepareDataConfig, *, uri: str, data_root: str, force: bool = False) -> Artifact:
    """Make the dataset artifact at `uri` from the source that `config` names.

    Args:
        data_root: folder or URI under which sources lie; "" where there is none (then sources are named by absolute places).
        force: redo it even if the artifact there matches config and input files.

    Returns:
        An artifact of kind "dataset"; its `stats.json` has split, counts of items, users, events and requests by split, rejected rows
        by reason, removed rows (duplicates, bots, erased shoppers'), what was changed in passing (`noted`), source and query kind.

    Raises:
        DataError: input missing, unreadable or without a needed column; too many rejected rows; nothing left. Nothing is written then.
    """
    source = _open_source(config, data_root)
    parents = {"source": source.origin}
    erased: frozenset[str] = frozenset()
    if config.erased_users is not None:
        erased, parents["erased_users"] = open_erased_users(config.erased_users, data_root)
    stage = Stage(
        kind="dataset",
        uri=uri,
        config=config,
        algorithm_version=ALGORITHM_VERSION,
        parents=parents,
        seed=config.seed,
        job="prepare_data",
    )
    if done := stage.current(force=force):
        return done
    ensure_ray()
    remove_tree(stage.work_uri)
    try:
        with stage.write() as draft:
            _Run(config, source, erased, stage.work_uri).write(draft)
    finally:
        remove_tree(f"{uri}.work")  # a killed run leaves it behind; the next one starts from the input again
    return stage.open()


def _open_source(config: PrepareDataConfig, data_root: str) -> Source:
    if config.source == "marketplace":
        return open_marketplace(config.marketplace_size, seed=config.seed)
    if config.source == "canonical":
        return open_files(config.items, config.events, config.users, data_root)
    return open_adapter(config.source, config.folder, data_root, seed=config.seed)


class _Run:
    """One run of the three passes; `report` adds up what the tasks tell."""

    def __init__(self, config: PrepareDataConfig, source: Source, erased: frozenset[str], folder: str) -> None:
        self.config, self.source = config, source
        self.portions = stage_tables(source, f"{folder}/raw")
        self.report = TaskReport()
        self.times: list[tuple[np.ndarray, float]] = []  # by partition: request times, and how many requests each stands for
        self.work = Work(
            folder=folder,
            partitions={"items": self._partitions("items"), "events": self._partitions("events")},
            labels=[portion.label for portion in self.portions],
            shard_rows=config.events_per_partition,
            rows=RowRules(
                max_query_characters=config.max_query_characters,
                latest_time=int((time.time() + config.future_tolerance_hours * 3600) * 1e6),
                category_separator=config.category_separator,
            ),
            assembly=AssemblyRules(
                session_gap_minutes=config.session_gap_minutes,
                max_user_events_per_day=config.max_user_events_per_day,
                max_user_clicks_per_day=config.max_user_clicks_per_day,
                max_clicks_per_request=config.max_clicks_per_request,
                history_length=config.history_length,
            ),
            seed=config.seed,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            erased_users=erased,
        )

    def write(self, draft: Draft) -> None:
        work = self.work
        for table in ("items", "events"):
            if not any(portion.table == table for portion in self.portions):
                raise DataError(f"{self.source.name}: {table} hold no rows; check the source's files")
        portions = self.portions  # tasks take along what they name: never `self`, which holds the source's open streams
        self._run("Reading tables", lambda place: read_and_partition(portions[place], work), len(portions))
        shards = self.report.shards
        self._fail_if_too_many_rejected()
        if work.erased_users:
            _logger.info("left out %d rows of %d erased shoppers", self.report.noted["erased"], len(work.erased_users))
        item_shards = sorted(shards.get("items", []))
        self._run("Merging items", lambda partition: merge_items(partition, item_shards, work), work.partitions["items"])
        self._fail_if_too_many_rejected()
        for table in ("items", "events"):
            if not shards.get(table):
                files = sorted({portion.label for portion in self.portions if portion.table == table})
                raise DataError(f"{', '.join(files[:3])}: {table} hold no usable rows; check that the files are complete")
        split = self._choose_split()
        known_items = ray.put(self._known_items())
        event_shards, user_shards = sorted(shards["events"]), sorted(shards.get("users", []))
        self._run(
            "Assembling requests",
            lambda partition: assemble_partition(partition, event_shards, user_shards, ray.get(known_items), split, work),
            work.partitions["events"],
        )
        self._fail_if_too_many_rejected()
        cuts = self._time_cuts() if split == "time" else None
        DatasetWriter(
            work.folder, self.source, self.report, split=split, cuts=cuts, max_test_requests=self.config.max_test_requests, seed=self.config.seed
        ).write(draft)

    def _partitions(self, table: str) -> int:
        rows = sum(portion.estimated_rows for portion in self.portions if portion.table == table)
        most = self.config.events_per_partition if table == "events" else min(self.config.events_per_partition, _ITEMS_PER_PARTITION)
        return min(max(math.ceil(rows / most), 1), _MAX_PARTITIONS)

    def _run(self, name: str, task: Callable[[int], TaskReport], count: int) -> None:
        for report in run_tasks(name, task, count):
            self.report.rows += report.rows
            self.report.rejected += report.rejected
            self.report.noted += report.noted
            self.report.bad_rows += report.bad_rows
            if report.times:
                self.times.append((np.asarray(report.times, dtype=np.int64), report.timed_requests / len(report.times)))
            for table, names in report.shards.items():
                self.report.shards.setdefault(table, []).extend(names)

    def _known_items(self) -> pa.Array:
        """Ids of all kept items."""
        ids = [read_parquet(file, columns=["item_id"])["item_id"] for file in parquet_files(f"{self.work.folder}/items")]
        return pa.chunked_array([chunk for one in ids for chunk in one.chunks], pa.string()).combine_chunks()

    def _choose_split(self) -> str:
        noted = self.report.noted
        with_time, without_time, with_shopper = (noted.pop(f"events_{name}", 0) for name in ("with_time", "without_time", "with_shopper"))
        if with_time and without_time:
            raise DataError(
                f"{self.source.name}: {without_time} of {with_time + without_time} events have no timestamp; give all events one, or none (then sequence orders them)"
            )
        split = self.config.split if self.config.split != "auto" else self.source.split
        if split is None:
            split = "time" if with_time else "leave_last_out" if with_shopper else "by_query"
        if split == "leave_last_out" and not with_shopper:
            raise DataError(f"{self.source.name}: split=leave_last_out needs user ids and the events have none; set split=time or split=by_query")
        return split

    def _time_cuts(self) -> tuple[int, int]:
        if not self.times:
            raise nothing_left(self.source, self.report)
        times = np.concatenate([times for times, _ in self.times])
        weights = np.repeat([weight for _, weight in self.times], [len(times) for times, _ in self.times])
        return time_cuts(times, weights, validation_fraction=self.config.validation_fraction, test_fraction=self.config.test_fraction)

    def _fail_if_too_many_rejected(self) -> None:
        for table in ("items", "users", "events"):
            reasons = {name.split(".", 1)[1]: count for name, count in sorted(self.report.rejected.items()) if name.startswith(f"{table}.")}
            rows, bad = self.report.rows[table], sum(reasons.values())
            if not bad or bad <= self.config.max_rejected_fraction * rows:
                continue
            shown = sorted((row for row in self.report.bad_rows if row["table"] == table), key=lambda row: (row["file"], row["row"] or 0))[:SHOWN_BAD_ROWS]
            lines = [f"  {row['file']}, row {row['row']}, column {row['column'] or '-'}: {row['reason']}: {row['value']!r}" for row in shown]
            raise DataError(
                f"{table}: {bad} of {rows} rows rejected ({bad / rows:.1%}), more than max_rejected_fraction ({self.config.max_rejected_fraction:.1%}): "
                f"{', '.join(f'{reason} {count}' for reason, count in reasons.items())}. First bad rows (counted from 0):\n"
                + "\n".join(lines)
                + "\nCorrect the source, or raise max_rejected_fraction if these rows may be dropped."
            )


def run_tasks(name: str, task: Callable[[int], TaskReport], count: int) -> Iterator[TaskReport]:
    """Run `task(0) ... task(count - 1)` on Ray Data, one after another on each CPU, and yield their reports in order.

    Raises:
        DataError: as raised by a task.
    """

    def run(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        try:
            answers = [json.dumps(vars(task(int(number)))) for number in batch["id"]]
        except DataError as error:  # travels as an answer: Ray Data would wrap it and lose its type
            answers = [json.dumps({"error": str(error)})]
        # A worker is used again for other tasks; without this it keeps the peak of each kind of task.
        pa.default_memory_pool().release_unused()
        return {"answer": answers}

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    talk = logging.getLogger("ray.data")
    level = talk.level
    with ray.data.DataContext.current(context):
        try:
            talk.setLevel(logging.WARNING)  # its plans and timings are of no interest here
            dataset = ray.data.range(count, override_num_blocks=count).map_batches(run, batch_size=1)
            dataset.set_name(name)
            answers = []
            for row in dataset.iter_rows():
                answers.append(json.loads(row["answer"]))
                if "error" in answers[-1]:
                    raise DataError(answers[-1]["error"])  # leaving the loop stops the remaining tasks
        finally:
            talk.setLevel(level)
    for fields in answers:
        yield TaskReport(**{**fields, **{field: Counter(fields[field]) for field in ("rows", "rejected", "noted")}})
