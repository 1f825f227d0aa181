from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.data import partitions
from genrecall.data.partitions import UNDECIDED, Work, assemble_partition, merge_items, read_and_partition, read_parquet, request_times
from genrecall.data.request_assembly import AssemblyRules
from genrecall.data.search_logs import PrepareDataConfig, _Run
from genrecall.data.sources import Source
from genrecall.data.table_readers import Portion, find_portions
from genrecall.data.validation import RowRules
from genrecall.storage import Artifact

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def work_in(folder: Path, labels: list[str], *, partitions: int = 3, shard_rows: int = 10) -> Work:
    return Work(
        folder=str(folder / "work"),
        partitions={"items": partitions, "events": partitions},
        labels=labels,
        shard_rows=shard_rows,
        rows=RowRules(max_query_characters=256, latest_time=2**62, category_separator=">"),
        assembly=AssemblyRules(session_gap_minutes=30, max_user_events_per_day=100, max_user_clicks_per_day=100, max_clicks_per_request=100, history_length=20),
        seed=0,
        validation_fraction=0.1,
        test_fraction=0.1,
    )


def save(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return str(folder / name)


def test_items_come_out_once_with_the_first_of_contradicting_rows(tmp_path: Path) -> None:
    items = [{"item_id": f"i{n}", "title": f"t{n}"} for n in range(40)]
    first = save(tmp_path, "a.parquet", [*items, items[3]])
    second = save(tmp_path, "b.parquet", [{"item_id": "i5", "title": "other"}])
    portions = [*find_portions("items", first), *find_portions("items", second, first_number=1)]
    work = work_in(tmp_path, [portion.label for portion in portions])
    reports = [read_and_partition(portion, work) for portion in portions]
    shards = [name for report in reports for name in report.shards["items"]]
    merged = [merge_items(partition, shards, work) for partition in range(3)]
    assert sum(report.rows["items_kept"] for report in merged) == 40
    assert sum(report.noted["repeated_items"] for report in merged) == 1
    rejected = [row for report in merged for row in report.bad_rows]
    assert [(row["file"], row["row"], row["reason"], row["value"]) for row in rejected] == [(second, 0, "conflicting_duplicate", "i5")]
    kept = [row for file in sorted((tmp_path / "work/items").iterdir()) for row in read_parquet(str(file)).to_pylist()]
    assert {row["item_id"]: row["title"] for row in kept} == {row["item_id"]: row["title"] for row in items}


def test_rows_of_erased_shoppers_go_as_they_are_read_whatever_the_type_of_the_ids(tmp_path: Path) -> None:
    shared = {"request_id": "r", "timestamp": START, "query": "q", "item_id": "i", "action": "click"}
    for number, ids in enumerate(([7, 8, None], [b"7", b" 7 ", b"78"], ["7", "8", "7"])):
        (portion,) = find_portions("events", save(tmp_path, f"e{number}.parquet", [{**shared, "user_id": one} for one in ids]))
        work = dataclasses.replace(work_in(tmp_path / str(number), [portion.label], partitions=1), erased_users=frozenset({"7", "9"}))
        report = read_and_partition(portion, work)
        assert report.noted["erased"] == [1, 2, 2][number]
        outcome = assemble_partition(0, report.shards["events"], [], pa.array(["i"]), "time", work)
        assert not outcome.rejected
        kept = read_parquet(f"{work.folder}/events/00000.parquet")["user_id"].to_pylist()
        assert kept == [["8", None], ["78"], ["8"]][number]


def test_all_events_of_a_shopper_meet_in_one_partition_whatever_the_shards(tmp_path: Path) -> None:
    events = [
        {
            "request_id": f"r{n}",
            "user_id": f"u{n % 7}",
            "timestamp": START + datetime.timedelta(minutes=n),
            "query": "q",
            "item_id": f"i{n % 5}",
            "action": "click",
        }
        for n in range(100)
    ]
    (portion,) = find_portions("events", save(tmp_path, "e.parquet", events))
    (people,) = find_portions("users", save(tmp_path, "u.parquet", [{"user_id": "u1", "gender": "f"}, {"user_id": "quiet", "gender": "m"}]), first_number=1)
    work = work_in(tmp_path, [portion.label, people.label])
    shards = read_and_partition(portion, work).shards["events"]
    users = read_and_partition(people, work).shards["users"]
    known = pa.array([f"i{n}" for n in range(4)])  # i4 is unknown: every fifth event
    reports = [assemble_partition(partition, shards, users, known, "time", work) for partition in range(3)]
    assert sum(report.rejected["events.unknown_item"] for report in reports) == 20
    assert sorted(time for report in reports for time in report.times) == [int(row["timestamp"].timestamp() * 1e6) for row in events if row["item_id"] != "i4"]
    seen: dict[str, int] = {}
    for file in sorted((tmp_path / "work/requests").iterdir()):
        table = read_parquet(str(file))
        assert set(table["_split"].to_pylist()) == {UNDECIDED}
        assert np.array_equal(request_times(table), table["timestamp"].cast(pa.int64()).to_numpy())
        for row in table.to_pylist():
            assert len(row["history"]) == min(seen.get(row["user_id"], 0), 20)  # in time order within a shopper
            seen[row["user_id"]] = seen.get(row["user_id"], 0) + 1
            assert row["gender"] == ("f" if row["user_id"] == "u1" else None)
    assert sum(seen.values()) == 80
    assert sum(report.rows["users_kept"] for report in reports) == 2


def test_a_task_done_twice_writes_the_same_files(tmp_path: Path) -> None:
    (portion,) = find_portions("items", save(tmp_path, "a.parquet", [{"item_id": f"i{n}", "title": "t"} for n in range(30)]))
    work = work_in(tmp_path, [portion.label])
    contents = []
    for _ in range(2):
        read_and_partition(portion, work)
        contents.append({path: path.read_bytes() for path in (tmp_path / "work").rglob("*.arrow")})
    assert contents[0] == contents[1]


def test_shards_are_bounded_in_bytes_as_well_as_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_SHARD_BYTES", 100_000)
    rows = [{"item_id": f"i{n:05d}", "title": "t" * 100} for n in range(100_000)]  # 11 MB, read in chunks of 32,768 rows
    (portion,) = find_portions("items", save(tmp_path, "a.parquet", rows))
    work = work_in(tmp_path, [portion.label], partitions=1, shard_rows=1_000_000)
    report = read_and_partition(portion, work)
    assert len(report.shards["items"]) == 4
    assert merge_items(0, report.shards["items"], work).rows["items_kept"] == 100_000


def test_items_are_spread_over_partitions_that_their_texts_fit_into(tmp_path: Path) -> None:
    portions = (Portion("items", "i", "i", "parquet", 0, estimated_rows=1_000_000), Portion("events", "e", "e", "parquet", 1, estimated_rows=10_000_000))
    source = Source("shop", Artifact("shop", tmp_path, {}), "real", None, portions=portions)
    many, few = (PrepareDataConfig(source="canonical", events_per_partition=number) for number in (2_000_000, 20_000))
    assert _Run(many, source, frozenset(), str(tmp_path)).work.partitions == {"items": 20, "events": 5}
    assert _Run(few, source, frozenset(), str(tmp_path)).work.partitions == {"items": 50, "events": 500}
