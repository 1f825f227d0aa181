"""`prepare_data` from files to artifact on a real Ray."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.config import ConfigError, from_dict
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests, popularity, query_item_pairs
from genrecall.data.schema import SPLITS, DataError
from genrecall.data.search_logs import PrepareDataConfig, prepare_data
from genrecall.storage import Artifact

pytestmark = pytest.mark.usefixtures("ray_cluster")
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
Row = dict[str, Any]


def shop(num_items: int = 20, num_requests: int = 60, num_users: int = 6) -> tuple[list[Row], list[Row], list[Row]]:
    """Items, users and events of a small shop: each request shows three items; the middle one is clicked, in every third request bought."""
    items = [{"item_id": f"i{n:03d}", "title": f"thing {n}", "category_path": ["all", f"c{n % 3}"], "price": float(n)} for n in range(num_items)]
    users = [{"user_id": f"u{n}", "gender": "f" if n % 2 else None, "age_band": "25-34"} for n in range(num_users)]
    events = []
    for n in range(num_requests):
        shared = {"request_id": f"r{n:04d}", "user_id": f"u{n % num_users}", "query": f"thing {n % 7}"}
        for place in range(3):
            at = {"timestamp": START + datetime.timedelta(hours=n, seconds=place), "item_id": f"i{(n + place) % num_items:03d}", "position": place}
            events.append({**shared, **at, "action": "exposure"})
            if place == 1:
                events.append({**shared, **at, "action": "click"})
            if place == 1 and n % 3 == 0:
                events.append({**shared, **at, "action": "purchase"})
    return items, users, events


def save(folder: Path, items: list[Row], users: list[Row], events: list[Row], style: str = "parquet") -> None:
    for name, rows in (("items", items), ("users", users), ("events", events)):
        path = folder / f"{name}.{style}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if style == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            continue
        plain = [{key: value.isoformat() if isinstance(value, datetime.datetime) else value for key, value in row.items()} for row in rows]
        with gzip.open(path, "wt", newline="", encoding="utf-8") if style.endswith(".gz") else path.open("w", newline="") as file:
            if "jsonl" in style:
                file.writelines(json.dumps(row) + "\n" for row in plain)
            else:
                writer = csv.DictWriter(file, list(plain[0]))
                writer.writeheader()
                writer.writerows({key: ">".join(value) if isinstance(value, list) else value for key, value in row.items()} for row in plain)


def prepare(folder: Path, style: str = "parquet", **changes: Any) -> Artifact:
    names: Row = {name: f"{name}.{style}" for name in ("items", "users", "events")}
    return prepare_data(from_dict(PrepareDataConfig, {"source": "canonical", **names, **changes}), uri=str(folder / "dataset"), data_root=str(folder))


def test_the_same_shop_in_any_format_gives_the_same_dataset(tmp_path: Path) -> None:
    hashes = {}
    for style in ("parquet", "jsonl", "csv", "jsonl.gz", "csv.gz"):
        save(tmp_path / style, *shop(), style=style)
        dataset = prepare(tmp_path / style, style)
        hashes[style] = {name: entry["sha256"] for name, entry in dataset.manifest["files"].items() if name != "stats.json"}
        stats = dataset.json("stats.json")
        assert (stats["items"], stats["users"], stats["events"], stats["rejected"]) == (20, 6, 60 * 4 + 20, {})
    assert all(one == hashes["parquet"] for one in hashes.values())


def test_requests_are_loaded_with_catalogue_rows(tmp_path: Path) -> None:
    save(tmp_path, *shop())
    dataset = prepare(tmp_path)
    catalog = load_catalog(dataset)
    assert catalog.item_ids.tolist() == [f"i{n:03d}" for n in range(20)]
    assert catalog.rows_of(["i003", "nothing"]).tolist() == [3, -1]
    assert catalog.category_paths[4] == ("all", "c1")
    assert catalog.brands[0] == catalog.texts[0] == ""
    assert catalog.prices[7] == 7.0
    train = load_requests(dataset, "train", catalog)
    # 60 requests: the last tenth is test, the tenth before it validation.
    assert {name: len(load_requests(dataset, name, catalog)) for name in SPLITS} == {"train": 48, "validation": 6, "test": 6}
    assert train.request_ids == [f"r{n:04d}" for n in range(48)]
    assert train.times[1] == int((START + datetime.timedelta(hours=1)).timestamp() * 1e6)
    assert train.exposed[19].tolist() == [19, 0, 1]
    assert train.exposed[19].dtype == np.int32
    assert np.isnan(train.grades[19]).all()
    assert (train.genders[0], train.genders[1], train.age_bands[0]) == (None, "f", "25-34")
    assert train.history[12].tolist() == [1, 7]  # clicks of u0 in requests 0 and 6
    request, item, weight = query_item_pairs(train)
    assert (request[:4].tolist(), item[:4].tolist(), weight[:4].tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4], [2.0, 1.0, 1.0, 2.0])
    # Item 1 is the middle one of requests 0, 20 and 40; 0 is also a purchase (0 % 3 == 0).
    assert popularity(train, len(catalog))[1] == 3 + 1
    part = train.take([3, 1])
    assert (part.request_ids, part.times.tolist()) == (["r0003", "r0001"], train.times[[3, 1]].tolist())
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'tests'"):
        load_requests(dataset, "tests", catalog)


def test_nothing_of_the_test_side_leaks(tmp_path: Path) -> None:
    items, users, events = shop(num_requests=300)
    rng = np.random.default_rng(3)
    rng.shuffle(events)  # type: ignore[arg-type]  # out of order in the log
    save(tmp_path, items, users, events)
    dataset = prepare(tmp_path, events_per_partition=100)
    catalog = load_catalog(dataset)
    splits = {name: load_requests(dataset, name, catalog) for name in SPLITS}
    assert splits["train"].times.max() < splits["validation"].times.min()
    assert splits["validation"].times.max() < splits["test"].times.min()
    ids = [set(one.request_ids) for one in splits.values()]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 300
    # Event files follow the split of their request.
    for name in SPLITS:
        assert set(pq.read_table(dataset.file(f"events/{name}"))["request_id"].to_pylist()) == set(splits[name].request_ids)
    # Training pairs and popularity come from training events alone.
    trained = [row for row in events if row["request_id"] in set(splits["train"].request_ids)]
    positive = sum(row["action"] == "click" for row in trained)
    assert len(query_item_pairs(splits["train"])[0]) == positive
    assert popularity(splits["train"], len(catalog)).sum() == positive + sum(row["action"] == "purchase" for row in trained)
    # Every history is exactly the shopper's last clicks strictly before the request, whatever split they lie in.
    clicks = sorted((row["timestamp"], row["user_id"], row["item_id"]) for row in events if row["action"] == "click")
    for requests in splits.values():
        for user, time, history in zip(requests.user_ids, requests.times, requests.history, strict=True):
            earlier = [item for moment, owner, item in clicks if owner == user and moment.timestamp() * 1e6 < time]
            assert catalog.item_ids[history].tolist() == earlier[-20:]


def test_partitions_change_nothing_but_file_layout(tmp_path: Path) -> None:
    save(tmp_path, *shop(num_requests=200))
    loaded = []
    for size in (50_000, 60):
        dataset = prepare(tmp_path, events_per_partition=size)
        catalog = load_catalog(dataset)
        loaded.append({name: load_requests(dataset, name, catalog) for name in SPLITS})
    for name in SPLITS:
        one, other = loaded[0][name], loaded[1][name]
        assert one.request_ids == other.request_ids
        assert [rows.tolist() for rows in one.history] == [rows.tolist() for rows in other.history]


def test_leave_last_out_without_time_and_by_query_without_shoppers(tmp_path: Path) -> None:
    items, users, events = shop()
    for number, row in enumerate(events):
        row["sequence"] = number
        del row["timestamp"]
    save(tmp_path / "a", items, users, events)
    dataset = prepare(tmp_path / "a")
    assert dataset.json("stats.json")["split"] == "leave_last_out"
    assert dataset.json("stats.json")["requests"] == {"train": 48, "validation": 6, "test": 6}
    assert load_requests(dataset, "test", load_catalog(dataset)).request_ids == [f"r{n:04d}" for n in range(54, 60)]
    save(tmp_path / "b", items, users, [{**row, "user_id": None} for row in events])
    dataset = prepare(tmp_path / "b")
    stats = dataset.json("stats.json")
    assert stats["split"] == "by_query"
    queries = [set(load_requests(dataset, name, load_catalog(dataset)).queries) for name in SPLITS]
    assert not queries[0] & queries[2]
    assert sum(stats["requests"].values()) == 60


def test_max_test_requests_is_a_seeded_sample(tmp_path: Path) -> None:
    save(tmp_path, *shop(num_requests=200))
    dataset = prepare(tmp_path, max_test_requests=5)
    assert dataset.json("stats.json")["requests"] == {"train": 160, "validation": 20, "test": 5}
    assert dataset.json("stats.json")["test_requests_left_out"] == 15


def test_rejects_are_counted_by_reason_and_stored(tmp_path: Path) -> None:
    items, users, events = shop(num_requests=200)
    events[10]["item_id"] = "ghost"
    events[11]["action"] = "glance"
    events[12]["timestamp"] = datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC)
    items += [dict(items[0]), {**items[1], "title": "another thing"}]
    save(tmp_path, items, users, [*events, events[0]])
    dataset = prepare(tmp_path, max_rejected_fraction=0.1)
    stats = dataset.json("stats.json")
    assert stats["rejected"] == {"conflicting_duplicate": 1, "future_timestamp": 1, "unknown_action": 1, "unknown_item": 1}
    assert stats["removed"] == {"duplicate": 1, "bot": 0, "erased": 0}
    assert stats["noted"]["repeated_items"] == 1
    rows = {row["reason"]: row for row in pq.read_table(dataset.file("rejected")).to_pylist()}
    assert (rows["unknown_item"]["row"], rows["unknown_item"]["value"], Path(rows["unknown_item"]["file"]).name) == (10, "ghost", "events.parquet")
    assert (rows["conflicting_duplicate"]["table"], rows["conflicting_duplicate"]["row"]) == ("items", 21)
    assert load_catalog(dataset).titles[1] == "thing 1"  # the first row stays


def test_too_many_rejects_fail_with_file_and_first_rows_and_leave_nothing(tmp_path: Path) -> None:
    items, users, events = shop()
    for row in events[20:30]:
        row["item_id"] = "ghost"
    save(tmp_path, items, users, events)
    with pytest.raises(
        DataError, match=r"events: 10 of 260 rows rejected \(3\.8%\).*unknown_item 10.*\n.*events\.parquet, row 20, column item_id: unknown_item: 'ghost'"
    ):
        prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet", "items.parquet", "users.parquet"]


def test_errors_of_tasks_reach_the_caller_as_they_are(tmp_path: Path) -> None:
    save(tmp_path, *shop())
    table = pq.read_table(tmp_path / "events.parquet")
    pq.write_table(table.drop_columns(["action"]), tmp_path / "events.parquet")
    with pytest.raises(DataError, match=r"^/.*events\.parquet: events lack column action; of the known columns") as caught:
        prepare(tmp_path)
    assert "Traceback" not in str(caught.value)
    pq.write_table(table.slice(0, 0), tmp_path / "events.parquet")
    with pytest.raises(DataError, match="events hold no usable rows"):
        prepare(tmp_path)
    with pytest.raises(DataError, match="items: no files at"):
        prepare(tmp_path, items="nowhere")


def test_events_with_and_without_time_cannot_be_mixed(tmp_path: Path) -> None:
    items, users, events = shop()
    events[5]["timestamp"] = None
    save(tmp_path, items, users, [{**row, "sequence": number} for number, row in enumerate(events)])
    with pytest.raises(DataError, match="1 of 260 events have no timestamp; give all events one, or none"):
        prepare(tmp_path)


def test_one_item_one_request_no_history(tmp_path: Path) -> None:
    save(
        tmp_path,
        [{"item_id": "a", "title": ""}],
        [{"user_id": "u"}],
        [{"request_id": "r", "user_id": "u", "timestamp": START, "query": "", "item_id": "a", "action": "click"}],
    )
    dataset = prepare(tmp_path)
    catalog = load_catalog(dataset)
    assert len(catalog) == 1
    loaded = [load_requests(dataset, name, catalog) for name in SPLITS]
    assert sum(map(len, loaded)) == 1
    (only,) = [requests for requests in loaded if len(requests)]
    assert only.history[0].tolist() == []
    assert only.clicked[0].tolist() == [0]


def test_unchanged_input_is_not_done_again_and_changed_input_is(tmp_path: Path) -> None:
    items, users, events = shop()
    save(tmp_path, items, users, events)
    first = prepare(tmp_path)
    assert prepare(tmp_path).manifest["created"] == first.manifest["created"]
    assert prepare(tmp_path).hash == first.hash
    save(tmp_path, items, users, events[:-2])
    assert prepare(tmp_path).hash != first.hash


def test_nothing_of_erased_shoppers_is_built_however_often(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items, users, events = shop()
    glance = {**events[5], "action": "glance"}  # of u1; it would be rejected and keep its row number
    save(tmp_path, items, users, [*events, glance], style="jsonl")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"query": "' + "my own words " * 20 + '", "user_id": "u1", "action"\n')  # cut off, and its id lies beyond what a rejected row shows
        file.write('{"query": "another\'s words", "user_id": "u2", "action"\n')
    (tmp_path / "erased.txt").write_text("u3\n\n u1 \n")
    settings: Row = {"style": "jsonl", "erased_users": "erased.txt", "max_rejected_fraction": 0.1}
    with caplog.at_level("INFO"):
        dataset = prepare(tmp_path, **settings)
    stats = dataset.json("stats.json")
    # Ten of the sixty requests belong to each of the six shoppers.
    assert stats["requests"] == {"train": 32, "validation": 4, "test": 4}
    assert stats["users"] == 4
    assert stats["removed"]["erased"] == 2 + 1 + sum(row["user_id"] in ("u1", "u3") for row in events)
    rejected = pq.read_table(dataset.file("rejected")).to_pylist()
    assert [(row["reason"], row["row"] - len(events)) for row in rejected] == [("malformed_row", 1), ("malformed_row", 2)]
    assert [row["value"] == "" for row in rejected] == [True, False]
    everything = [json.dumps(pq.read_table(file).to_pylist(), default=str) for file in dataset.path.rglob("*.parquet")]
    everything += [file.read_text() for file in dataset.path.rglob("*.json")] + [caplog.text]
    assert not any(re.search(r"\bu[13]\b|my own words", text) for text in everything)
    assert sum(bool(re.search(r"\bu2\b", text)) for text in everything) >= 3
    # The next run of the line finds it done, whatever the order of the file's lines; another shopper's id makes it anew.
    (tmp_path / "erased.txt").write_text("u1\nu3")
    assert prepare(tmp_path, **settings).manifest["created"] == dataset.manifest["created"]
    (tmp_path / "erased.txt").write_text("u1\nu3\nu5\n")
    assert prepare(tmp_path, **settings).json("stats.json")["users"] == 3
    with pytest.raises(DataError, match=r"erased_users: no file .*gone\.txt; give a text file with one user id a line"):
        prepare(tmp_path, **{**settings, "erased_users": "gone.txt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 0.0}, "expected test > 0"),
        ({"source": "home_depot", "items": "x"}, "only read with source=canonical"),
        ({"source": "marketplace", "folder": "x"}, "folder: not used with source=marketplace"),
        ({"events_per_partition": 0}, "events_per_partition: expected at least 1"),
    ],
)
def test_impossible_configs_are_refused(changes: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PrepareDataConfig, {"source": "canonical", **changes})


@pytest.mark.parametrize(
    ("source", "items", "requests", "split"),
    [("home_depot", 54_667, 9_399, "by_query"), ("amazon_scientific", 4_344, 58_492, "leave_last_out")],
)
def test_real_sources_come_out_whole(tmp_path: Path, real_data: Callable[[str], Path], source: str, items: int, requests: int, split: str) -> None:
    config = from_dict(PrepareDataConfig, {"source": source})
    stats = prepare_data(config, uri=str(tmp_path / "dataset"), data_root=str(real_data(source).parent)).json("stats.json")
    assert (stats["items"], sum(stats["requests"].values()), stats["split"], stats["rejected"]) == (items, requests, split, {})


def test_marketplace_gives_a_dataset_split_by_time(tmp_path: Path) -> None:
    stats = prepare_data(PrepareDataConfig(marketplace_size="tiny"), uri=str(tmp_path / "dataset"), data_root=str(tmp_path)).json("stats.json")
    assert (stats["split"], stats["query_kind"], stats["rejected"]) == ("time", "simulated", {})
    assert all(count > 0 for count in stats["requests"].values())
