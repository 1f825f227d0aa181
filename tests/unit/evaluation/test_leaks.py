"""A clean log passes; every planted leak is caught and named."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from genrecall.data.request_assembly import AssemblyRules, assemble_requests
from genrecall.data.schema import EVENTS, SPLITS
from genrecall.data.splits import leave_last_out
from genrecall.evaluation.leaks import LeakError, check_no_leaks
from genrecall.storage import Artifact

Make = Callable[..., Artifact]
Log = dict[str, list[dict[str, Any]]]
START = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
RULES = AssemblyRules(session_gap_minutes=30, max_user_events_per_day=1_000, max_user_clicks_per_day=100, max_clicks_per_request=50, history_length=20)


def click(request: str, item: int, *, user: str = "u", minute: float | None = None, sequence: int | None = None) -> dict[str, Any]:
    """An event that clicks an item of the dataset of `make_dataset`."""
    time = None if minute is None else START + datetime.timedelta(minutes=minute)
    return {"request_id": request, "user_id": user, "timestamp": time, "sequence": sequence, "query": "q", "item_id": f"i{item:03d}", "action": "click"}


def split_by_last(*events: dict[str, Any]) -> Log:
    """The requests of a log by split, as `prepare_data` assembles and splits them leave-last-out."""
    assembled = assemble_requests(pa.Table.from_pylist(list(events), schema=pa.schema([one.with_nullable(True) for one in EVENTS])), RULES)
    splits = leave_last_out(assembled.users, assembled.order).tolist()
    rows = assembled.requests.to_pylist()
    return {name: [row for row, split in zip(rows, splits, strict=True) if split == number] for number, name in enumerate(SPLITS)}


def test_clean_logs_pass(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    check_no_leaks(make_dataset(tmp_path / "time", log))
    check_no_leaks(make_dataset(tmp_path / "last", log, split="leave_last_out"))


def test_test_request_copied_into_training_is_caught(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    leaky = copy.deepcopy(log)
    leaky["train"].append(leaky["test"][3])
    with pytest.raises(LeakError, match=r"request 'r83': is in both train and test"):
        check_no_leaks(make_dataset(tmp_path / "d", leaky))


def test_ids_numbered_per_shopper_are_no_leak(make_dataset: Make, tmp_path: Path) -> None:
    # The id 1 validates for u1 (requests 0 to 2) and trains for u2 (requests 0 to 3).
    log = split_by_last(*(click(str(number), number, user=f"u{user}", minute=number) for user in (1, 2) for number in range(2 + user)))
    assert [(row["user_id"], row["request_id"]) for row in log["test"]] == [("u1", "2"), ("u2", "3")]
    assert ("u1", "1") in [(row["user_id"], row["request_id"]) for row in log["validation"]]
    assert ("u2", "1") in [(row["user_id"], row["request_id"]) for row in log["train"]]
    check_no_leaks(make_dataset(tmp_path / "d", log, split="leave_last_out"))


def test_test_pairs_under_another_request_id_are_caught_by_their_time(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    leaky = copy.deepcopy(log)
    leaky["train"].append(leaky["test"][3] | {"request_id": "disguised"})
    with pytest.raises(LeakError, match=r"'disguised': is in train but not before"):
        check_no_leaks(make_dataset(tmp_path / "d", leaky))


def test_later_purchase_of_a_test_shopper_is_caught(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    leaky = copy.deepcopy(log)
    leaky["train"].append(leaky["test"][0] | {"request_id": "later", "sequence": 200})
    with pytest.raises(LeakError, match=r"'later': is in train but not before the test request of its shopper"):
        check_no_leaks(make_dataset(tmp_path / "d", leaky, split="leave_last_out"))


def test_requests_of_one_second_are_split_as_they_are_checked(make_dataset: Make, tmp_path: Path) -> None:
    log = split_by_last(*(click(f"r{number}", number, minute=min(number, 3)) for number in range(5)))  # r3 and r4 at once
    assert [row["request_id"] for row in log["test"]] == ["r3", "r4"]
    check_no_leaks(make_dataset(tmp_path / "seconds", log, split="leave_last_out"))
    log = split_by_last(*(click(f"r{number}", number, sequence=number // 2) for number in range(6)))
    assert {name: [row["request_id"] for row in rows] for name, rows in log.items()} == {
        "train": ["r0", "r1"],
        "validation": ["r2", "r3"],
        "test": ["r4", "r5"],
    }
    check_no_leaks(make_dataset(tmp_path / "sequences", log, split="leave_last_out"))


def test_a_sequence_orders_the_requests_of_one_second(make_dataset: Make, tmp_path: Path) -> None:
    events = [click(f"r{number}", number, minute=0, sequence=number) for number in range(4)]
    log = split_by_last(*events)
    assert [row["request_id"] for row in log["test"]] == ["r3"]
    assert log["test"][0]["history"] == ["i000", "i001", "i002"]
    check_no_leaks(make_dataset(tmp_path / "clean", log, split="leave_last_out"))
    log["train"].append(log["test"][0] | {"request_id": "later", "sequence": 9, "history": []})
    with pytest.raises(LeakError, match=r"'later': is in train but not before the test request of its shopper"):
        check_no_leaks(make_dataset(tmp_path / "leaky", log, split="leave_last_out"))


def test_query_on_both_sides_is_caught_whatever_its_case(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    split: Log = {name: [row | {"query": f"{name} {number}"} for number, row in enumerate(rows)] for name, rows in log.items()}
    check_no_leaks(make_dataset(tmp_path / "clean", split, split="by_query"))
    split["train"][5]["query"] = "  TEST   7 "
    with pytest.raises(LeakError, match=r"request 'r5': its query .* is in both train and test"):
        check_no_leaks(make_dataset(tmp_path / "d", split, split="by_query"))


def test_history_with_the_requests_own_click_is_caught(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    leaky = copy.deepcopy(log)
    row = leaky["test"][0]
    fresh = next(
        f"i{item:03d}"
        for item in range(30)
        if not any(f"i{item:03d}" in one["clicked"] for rows in leaky.values() for one in rows if one["user_id"] == row["user_id"])
    )
    row["clicked"], row["history"] = [fresh], [fresh]
    with pytest.raises(LeakError, match=rf"'r80': its history holds item '{fresh}'"):
        check_no_leaks(make_dataset(tmp_path / "d", leaky))


def test_history_of_earlier_clicks_is_no_leak(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    honest = copy.deepcopy(log)
    row = honest["test"][0]
    row["history"] = [item for one in honest["train"] if one["user_id"] == row["user_id"] for item in one["clicked"]]
    check_no_leaks(make_dataset(tmp_path / "d", honest))
