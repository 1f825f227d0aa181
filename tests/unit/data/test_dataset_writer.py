"""From assembled partitions to the artifact's folders."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from genrecall.data.dataset_writer import DatasetWriter
from genrecall.data.partitions import TaskReport, write_parquet
from genrecall.data.request_assembly import AssemblyRules, assemble_requests
from genrecall.data.schema import EVENTS
from genrecall.data.sources import Source
from genrecall.data.splits import TEST
from genrecall.storage import Artifact, Draft

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
RULES = AssemblyRules(session_gap_minutes=30, max_user_events_per_day=100, max_user_clicks_per_day=100, max_clicks_per_request=100, history_length=20)


def test_the_events_of_test_requests_that_are_left_out_are_left_out_too(tmp_path: Path) -> None:
    events = [
        {"request_id": f"r{n}", "user_id": "u", "timestamp": START + datetime.timedelta(minutes=n), "query": "q", "item_id": item, "action": "click"}
        for n in range(20)
        for item in "ab"
    ]
    outcome = assemble_requests(pa.Table.from_pylist(events, pa.schema([one.with_nullable(True) for one in EVENTS])), RULES)
    requests = outcome.requests.append_column("_split", pa.array([TEST] * 20, pa.int8()))
    write_parquet(requests, f"{tmp_path}/work/requests/00000.parquet")
    write_parquet(outcome.events.append_column("_request", pa.array(outcome.event_request)), f"{tmp_path}/work/events/00000.parquet")
    source = Source("shop", Artifact("shop", tmp_path, {}), "real", None)
    draft = Draft(tmp_path / "draft")
    DatasetWriter(f"{tmp_path}/work", source, TaskReport(), split="leave_last_out", cuts=None, max_test_requests=5, seed=0).write(draft)
    kept = pq.read_table(draft.path / "requests/test")["request_id"].to_pylist()
    assert len(kept) == 5
    assert pq.read_table(draft.path / "events/test")["request_id"].to_pylist() == [name for name in kept for _ in "ab"]
    assert draft.row_counts["events/test"] == 10
