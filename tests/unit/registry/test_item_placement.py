"""Newcomers placed in a batch, on Ray Data."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from genrecall.data.schema import DataError
from genrecall.encoders.embed import compose_item_text
from genrecall.encoders.text_encoder import load_encoder
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.item_placement import append_items, assign_items
from genrecall.sid.assign import load_assigner
from genrecall.sid.index import load_sid_table

NEW = [{"item_id": f"n{row}", "title": title, "category_path": ["Home"]} for row, title in enumerate(["chrome angle bracket", "soaker hose", "brass faucet"])]


@pytest.fixture
def placed(untrained_line, tmp_path, ray_cluster):
    rows = [*NEW, {"item_id": "i05", "title": "known"}, {"item_id": "n0", "title": "again"}, {"item_id": None, "title": "nameless"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    bundle = untrained_line()
    return bundle, assign_items(bundle, str(tmp_path / "items.jsonl"), tmp_path / "out"), tmp_path / "out"


def test_newcomers_get_the_sids_that_a_server_would_give_them(placed):
    bundle, summary, output = placed
    rows = {row["item_id"]: row for row in pq.read_table(output / "placed.parquet").to_pylist()}
    assert set(rows) == {"n0", "n1", "n2", "i05"}
    vectors = load_encoder(bundle.path / "encoder").encode_items([compose_item_text(item["title"], "", ["Home"], "") for item in NEW])
    expected = load_assigner(quantizer=bundle.path / "quantizer", sid_index=bundle.path / "sid_index").assign(vectors, [["Home"]] * 3)
    table = load_sid_table(bundle.path / "sid_index")
    for row, sid_row in zip((rows["n0"], rows["n1"], rows["n2"]), expected.tolist(), strict=True):
        assert (row["sid_row"], row["sid"], row["known"]) == (sid_row, table.text(sid_row), False)
        assert row["quantization_error"] > 0
    # A known item keeps its published SID, whatever its row says now.
    assert rows["i05"]["known"]
    assert rows["i05"]["sid_row"] == table.item_sid[5]
    assert rows["i05"]["quantization_error"] is None

    rejected = {(row["row"], row["reason"]) for row in pq.read_table(output / "rejected.parquet").to_pylist()}
    assert {place for place, _ in rejected} == {4, 5, 6}
    assert (4, "duplicate_item_id") in rejected
    assert (summary.placed, summary.known, summary.rejected, summary.oversize_sids) == (3, 1, 3, 0)
    assert summary.mean_quantization_error == pytest.approx(np.mean([rows[f"n{row}"]["quantization_error"] for row in range(3)]), abs=1e-3)
    assert "placed: 3" in summary.lines()

    with pytest.raises(DataError, match="exists already; name a new folder"):
        assign_items(bundle, "unused", output)


def test_unreadable_input_leaves_nothing_behind(untrained_line, tmp_path, ray_cluster):
    (tmp_path / "items.csv").write_text("sku,title\n1,hose\n")
    with pytest.raises(DataError, match="items lack column item_id"):
        assign_items(untrained_line(), str(tmp_path / "items.csv"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv"]
    with pytest.raises(DataError, match="no files at"):
        assign_items(untrained_line(), str(tmp_path / "absent"), tmp_path / "out")


def test_sound_rows_go_into_the_catalogue_log_the_first_of_each_id(tmp_path, monkeypatch):
    monkeypatch.setattr("genrecall.registry.item_placement._RECORDS_AT_ONCE", 2)
    rows = [{**NEW[0], "brand": "Acme", "price": 2.5, "text": "sturdy"}, *NEW[1:], {"item_id": "n0", "title": "again"}, {"item_id": None, "title": "nameless"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    log = CatalogueLog(tmp_path / "log")
    assert append_items(str(tmp_path / "items.jsonl"), log) == 3
    assert [change.record for change in log.read(0).changes] == [
        ItemRecord(item_id="n0", title="chrome angle bracket", category_path=("Home",), brand="Acme", text="sturdy", price=2.5),
        ItemRecord(item_id="n1", title="soaker hose", category_path=("Home",)),
        ItemRecord(item_id="n2", title="brass faucet", category_path=("Home",)),
    ]
    with pytest.raises(DataError, match="no files at"):
        append_items(str(tmp_path / "absent"), log)
