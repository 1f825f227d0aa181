"""Refuses a dataset whose test side shows through in its training side, before any number is computed from it.

Checks by kind of split: by time, training lies before validation and validation before test; leave-last-out, a shopper's test request lies
after all of that shopper's training requests, in the order of (timestamp, sequence) by which it was split; by query, no query is on two sides. For every kind: a request is in one split only, and a
request's history holds nothing that the shopper first clicked later or in that very request.
"""

from __future__ import annotations

import itertools

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.schema import REQUESTS, SPLITS
from genrecall.data.splits import normal_query
from genrecall.storage import Artifact


class LeakError(ValueError):
    """Something of the test side is visible in training; the message names the first request."""


def check_no_leaks(dataset: Artifact) -> None:
    """Check a dataset artifact.

    Raises:
        LeakError: naming the first leaking request, what leaks and what to do.
    """
    frames = _read(dataset)
    stats = dataset.json("stats.json")
    _check_request_ids(dataset, frames)
    if stats["split"] == "time":
        _check_time(dataset, frames)
    elif stats["split"] == "leave_last_out":
        _check_last_of_shopper(dataset, frames)
    else:
        _check_queries(dataset, frames)
    if not stats.get("test_requests_left_out"):  # with requests left out an earlier click may be missing, which is no leak
        _check_history(dataset, frames)


def _read(dataset: Artifact) -> dict[str, pd.DataFrame]:
    """The requests by split; `when` is the time, or the sequence number where there is none, `order` the rank of (timestamp, sequence)."""
    names = ["request_id", "user_id", "timestamp", "sequence", "query", "clicked", "history"]
    frames = []
    for split in SPLITS:
        table = pq.read_table(dataset.file(f"requests/{split}"), schema=REQUESTS).select(names)
        time = table["timestamp"].cast(pa.int64())
        table = table.append_column("when", pc.coalesce(time, table["sequence"])).append_column("time", pc.fill_null(time, 0))
        frames.append(table.set_column(3, "sequence", pc.fill_null(table["sequence"], 0)).drop_columns(["timestamp"]).to_pandas())
    together = pd.concat(frames, keys=SPLITS)
    together["order"] = together.groupby(["time", "sequence"]).ngroup()
    return {split: together[together.index.get_level_values(0) == split].reset_index(drop=True) for split in SPLITS}


def _fail(dataset: Artifact, request_id: str, what: str) -> None:
    raise LeakError(f"{dataset.uri}: request {request_id!r}: {what}; split the log again with jobs/prepare_data.py --force, nothing was evaluated")


def _check_request_ids(dataset: Artifact, frames: dict[str, pd.DataFrame]) -> None:
    for number, later in enumerate(SPLITS):
        for earlier in SPLITS[:number]:
            shared = _keys(frames[later]).isin(_keys(frames[earlier]))
            if shared.any():
                _fail(dataset, frames[later]["request_id"][shared].iloc[0], f"is in both {earlier} and {later}")


def _keys(frame: pd.DataFrame) -> pd.MultiIndex:
    """What tells requests apart: shopper and id, since request assembly takes ids per shopper."""
    return pd.MultiIndex.from_arrays([frame["user_id"].fillna(""), frame["request_id"]])


def _check_time(dataset: Artifact, frames: dict[str, pd.DataFrame]) -> None:
    filled = [split for split in SPLITS if len(frames[split])]
    for earlier, later in itertools.pairwise(filled):
        start = frames[later]["when"].min()
        late = frames[earlier]["when"] >= start
        if late.any():
            _fail(dataset, frames[earlier]["request_id"][late].iloc[0], f"is in {earlier} but not before the first {later} request")


def _check_last_of_shopper(dataset: Artifact, frames: dict[str, pd.DataFrame]) -> None:
    for earlier, later in (("train", "test"), ("validation", "test"), ("train", "validation")):
        start = frames[later].dropna(subset=["user_id"]).groupby("user_id")["order"].min()
        late = frames[earlier]["order"] >= frames[earlier]["user_id"].map(start)
        if late.any():
            row = frames[earlier][late].iloc[0]
            _fail(dataset, row["request_id"], f"is in {earlier} but not before the {later} request of its shopper")


def _check_queries(dataset: Artifact, frames: dict[str, pd.DataFrame]) -> None:
    queries = {split: frame["query"].map(normal_query) for split, frame in frames.items()}
    for earlier, later in (("train", "test"), ("validation", "test"), ("train", "validation")):
        shared = queries[earlier].isin(queries[later])
        if shared.any():
            row = frames[earlier][shared].iloc[0]
            _fail(dataset, row["request_id"], f"its query {row['query'][:80]!r} is in both {earlier} and {later}")


def _check_history(dataset: Artifact, frames: dict[str, pd.DataFrame]) -> None:
    everything = pd.concat(frames.values(), ignore_index=True)
    everything = everything[everything["user_id"].notna()]
    clicks = everything[["request_id", "user_id", "order", "clicked"]].explode("clicked").dropna(subset=["clicked"])
    first = clicks.sort_values("order", kind="stable").drop_duplicates(["user_id", "clicked"])
    first = first.rename(columns={"clicked": "item", "order": "first_click", "request_id": "first_request"})
    test = frames["test"]
    held = test[["request_id", "user_id", "order", "history"]].explode("history").dropna(subset=["history"]).rename(columns={"history": "item"})
    joined = held.merge(first, on=["user_id", "item"], how="inner")
    bad = joined[(joined["first_click"] > joined["order"]) | (joined["first_request"] == joined["request_id"])]
    if len(bad):
        row = bad.iloc[0]
        _fail(
            dataset,
            row["request_id"],
            f"its history holds item {row['item']!r}, which the shopper first clicked in request {row['first_request']!r}, not earlier",
        )
