"""Reading tables from, and keeping the work folder on, an object store (a mock of S3's API in this process)."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pytest

from genrecall.data.dataset_writer import parquet_files
from genrecall.data.partitions import Work, merge_items, read_and_partition, read_parquet, write_parquet
from genrecall.data.request_assembly import AssemblyRules
from genrecall.data.sources import open_files
from genrecall.data.table_readers import find_portions
from genrecall.data.validation import RowRules


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    fsspec.filesystem("s3").clear_instance_cache()
    filesystem.mkdir("shop")
    yield "s3://shop"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_items_are_read_sharded_and_merged_on_an_object_store(bucket: str) -> None:
    write_parquet(pa.table({"item_id": ["a", "b", "a"], "title": ["x", "y", "x"]}), f"{bucket}/raw/items/one.parquet")
    with fsspec.open(f"{bucket}/raw/items/two.jsonl.gz", "wt", compression="gzip") as file:
        file.write('{"item_id": "c", "title": "z"}\n')
    write_parquet(pa.table({"item_id": ["a"]}), f"{bucket}/raw/events.parquet")
    source = open_files("items", "events.parquet", None, f"{bucket}/raw")
    assert source.origin.hash == open_files("items", "events.parquet", None, f"{bucket}/raw").origin.hash
    portions = find_portions("items", f"{bucket}/raw/items/*")
    work = Work(
        folder=f"{bucket}/work",
        partitions={"items": 2, "events": 1},
        labels=[portion.label for portion in portions],
        shard_rows=2,
        rows=RowRules(max_query_characters=256, latest_time=2**62, category_separator=">"),
        assembly=AssemblyRules(session_gap_minutes=30, max_user_events_per_day=9, max_user_clicks_per_day=9, max_clicks_per_request=9, history_length=9),
        seed=0,
        validation_fraction=0.1,
        test_fraction=0.1,
    )
    shards = [name for portion in portions for name in read_and_partition(portion, work).shards["items"]]
    assert sum(merge_items(partition, shards, work).rows["items_kept"] for partition in range(2)) == 3
    assert sorted(title for file in parquet_files(f"{bucket}/work/items") for title in read_parquet(file)["title"].to_pylist()) == ["x", "y", "z"]
