"""Newcomers placed in a batch, on Ray Data."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.data.schema import DataError
from genrecall.encoders.embed import compose_item_text
from genrecall.encoders.text_encoder import load_encoder
from genrecall.generator.spelling import SpellingCorrector
from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.drift import DriftLimits
from genrecall.registry.item_placement import PLACED, _Tally, append_items, assign_items
from genrecall.registry.item_placer import ItemPlacer
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
    assert [rows[one]["unknown_category"] for one in ("n0", "i05")] == [False, None]
    live = ItemPlacer(load_bundle(bundle.path))  # what a server measures by
    assert summary.reference_quantization_error == pytest.approx(live.catalogue_error, abs=1e-3)
    assert summary.unknown_categories == 0

    with pytest.raises(DataError, match="exists already; name a new folder"):
        assign_items(bundle, "unused", output)


def test_newcomers_words_are_the_tokens_that_the_lexicon_counts(untrained_line):
    bundle = load_bundle(untrained_line().path)
    guidance, tokenizer = bundle.retriever.model.guidance, bundle.retriever.prompt_builder.tokenizer
    record = ItemRecord(item_id="n0", title="chrome angle bracket")
    ids, _ = tokenizer.encode_batch([compose_item_text(record.title, "", (), "")], 128)
    placer = ItemPlacer(bundle)
    assert placer.place([record]).tokens[0].tolist() == ids.tolist()
    guidance.token_stems[int(ids[0])] = int(ids[1])
    assert placer.place([record]).tokens[0].tolist() == [ids[1], *ids[1:]]


def test_newcomers_bring_the_words_that_the_spelling_corrector_does_not_know(untrained_line):
    bundle = load_bundle(untrained_line().path)
    records = [ItemRecord(item_id="n0", title="Brackex bracket 9"), ItemRecord(item_id="n1", title="bracket")]
    assert ItemPlacer(bundle).place(records).new_words == [frozenset()] * 2
    bundle.retriever.prompt_builder.spelling = SpellingCorrector({"bracket": 3})
    assert ItemPlacer(bundle).place(records).new_words == [{"brackex"}, frozenset()]


def test_alarms_are_those_of_live_drift_and_sids_that_were_oversize_before_are_not_counted():
    tally = _Tally(np.array([11, 10, 3]), max_items_per_sid=5)
    rows = [("a", 0, 2.0, False, True), ("b", 1, 4.0, False, False), ("c", 2, None, True, None)]
    columns = [
        {"item_id": one, "sid": "", "sid_row": sid, "quantization_error": error, "known": known, "unknown_category": u} for one, sid, error, known, u in rows
    ]
    tally.add(pa.Table.from_pylist(columns, schema=PLACED), 2, 1.0)
    tally.add(PLACED.empty_table(), 1, None)
    found = tally.summary(1.0, DriftLimits(min_items=2, oversize_share=0.3))
    assert (found.placed, found.known, found.rejected) == (2, 1, 3)
    assert found.oversize_sids == 1  # the second; the first was beyond twice the cap without them
    assert (found.mean_quantization_error, found.reference_quantization_error, found.unknown_categories) == (3.0, 1.0, 0.5)
    assert found.alarms == (
        "the quantisation error of 2 later items is 3.00 times the catalogue's, above 1.5",
        "1 of 3 SIDs grew beyond twice the cap, above a share of 0.3",
        "50% of 2 later items have categories that the bundle does not know, above 20%",
    )
    assert found.lines()[-3:] == [f"ALARM: {one}" for one in found.alarms]
    nothing = _Tally(np.array([11]), 5).summary(1.0, DriftLimits())
    assert (nothing.mean_quantization_error, nothing.unknown_categories, nothing.alarms) == (None, None, ())


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
