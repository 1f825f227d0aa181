"""A clean log passes; every planted leak is caught and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genrecall.evaluation.leaks import LeakError, check_no_leaks
from genrecall.storage import Artifact

Make = Callable[..., Artifact]
Log = dict[str, list[dict[str, Any]]]


def test_clean_logs_pass(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    check_no_leaks(make_dataset(tmp_path / "time", log))
    check_no_leaks(make_dataset(tmp_path / "last", log, split="leave_last_out"))


def test_test_request_copied_into_training_is_caught(make_dataset: Make, log: Log, tmp_path: Path) -> None:
    leaky = copy.deepcopy(log)
    leaky["train"].append(leaky["test"][3])
    with pytest.raises(LeakError, match=r"request 'r83': is in both train and test"):
        check_no_leaks(make_dataset(tmp_path / "d", leaky))


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
