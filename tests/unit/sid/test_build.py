"""The stage that publishes SIDs, on a small catalogue written by hand."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from genrecall.data.schema import ITEMS, REQUESTS
from genrecall.quantization.residual_quantizer import FrozenQuantizer
from genrecall.sid.assign import load_assigner
from genrecall.sid.build import SidIndexConfig, build_sid_index, churn_between, publish_sids
from genrecall.sid.filters import Filter, load_filters
from genrecall.sid.index import load_index, load_sid_table, load_trie
from genrecall.storage import Stage

NUM_ITEMS = 60
EARLY, SPLIT, LATE = (datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (1, 10, 20))


def make_dataset(uri, *, with_prior=True, dated=True):
    stage = Stage(kind="dataset", uri=str(uri), config=SidIndexConfig(), algorithm_version=1, parents={}, seed=0, job="prepare_data")
    items = [
        {
            "item_id": f"i{row:03d}",
            "title": "t",
            "category_path": ["Home", "Lamps"][: row % 3],
            "brand": "Acme" if row % 4 == 0 else None,
            "text": None,
            "price": None,
            "prior_score": float(row % 7) if with_prior else None,
            "first_seen": (LATE if row >= 50 else EARLY) if dated else None,
        }
        for row in range(NUM_ITEMS)
    ]
    request = {
        "request_id": "r",
        "user_id": None,
        "timestamp": SPLIT,
        "sequence": None,
        "query": "q",
        "gender": None,
        "age_band": None,
        "exposed": ["i003"],
        "grades": [None],
        "clicked": ["i003"],
        "purchased": [],
        "history": [],
    }
    with stage.write() as draft:
        for folder, rows, schema in (("items", items, ITEMS), ("requests/train", [request], REQUESTS)):
            (draft.path / folder).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), draft.path / folder / "part-0.parquet")
    return stage.open()


def make_encoder(uri, dataset, *, count=NUM_ITEMS):
    stage = Stage(kind="encoder", uri=str(uri), config=SidIndexConfig(), algorithm_version=1, parents={"dataset": dataset}, seed=0, job="train_encoder")
    with stage.write() as draft:
        np.save(draft.path / "item_embeddings.npy", np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32))
    return stage.open()


def make_quantizer(uri, dataset, *, count=NUM_ITEMS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    quantizer = FrozenQuantizer(None, [torch.randn(size, 4, generator=generator) for size in (3, 2, 2)], None, input_dim=4)
    stage = Stage(
        kind="quantizer", uri=str(uri), config=SidIndexConfig(seed=seed), algorithm_version=1, parents={"dataset": dataset}, seed=0, job="train_quantizer"
    )
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    codes, residuals = quantizer.place(x, [()] * count)
    with stage.write() as draft:
        quantizer.save(draft.path)
        np.save(draft.path / "codes.npy", codes)
        np.save(draft.path / "residuals.npy", residuals.astype(np.float16))
    return stage.open(), codes, residuals.astype(np.float16)


def make_inputs(folder, **columns):
    dataset = make_dataset(folder / "dataset", **columns)
    return dataset, make_encoder(folder / "encoder", dataset)


CONFIG = SidIndexConfig(max_items_per_sid=4)


def test_the_artifact_holds_a_consistent_whole(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    quantizer, codes, residuals = make_quantizer(tmp_path / "quantizer", dataset)
    artifact = build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))
    table, trie, index = load_sid_table(artifact.path), load_trie(artifact.path), load_index(artifact.path)
    assert trie.find(torch.from_numpy(table.tokens)).tolist() == list(range(len(table)))
    np.testing.assert_array_equal(index.item_sid, table.item_sid)
    assert sorted(np.asarray(index.item_rows).tolist()) == list(range(NUM_ITEMS))
    # Items known at the split keep their own codes; no SID of theirs is over the cap.
    own, _ = table.space.codes_of(table.tokens_of_items(np.arange(50)))
    np.testing.assert_array_equal(own, codes[:50])
    assert np.bincount(table.item_sid[:50]).max() <= 4
    # Later items are where the assigner of a server would put them.
    later = load_assigner(quantizer=quantizer.path, sid_index=artifact.path).assign_placed(codes[50:], residuals[50:])
    assert table.item_sid[50:].tolist() == later.tolist()
    # Items of a SID come by prior score.
    first = index.items(int(table.item_sid[0]))
    assert index.prior[first].tolist() == sorted(index.prior[first].tolist(), reverse=True)
    stats = json.loads((artifact.path / "stats.json").read_text())
    assert stats["items"] == NUM_ITEMS
    assert stats["items_placed_later"] == 10
    assert stats["sids"] == len(table)


def test_the_trie_holds_the_encoders_vectors_in_the_order_of_the_index(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset)
    artifact = build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))
    trie, index = load_trie(artifact.path), load_index(artifact.path)
    embeddings = np.load(encoder.file("item_embeddings.npy"))
    np.testing.assert_array_equal(trie.item_vectors.numpy(), embeddings[index.item_rows].astype(np.float16))
    np.testing.assert_array_equal(trie.item_offsets.numpy(), index.offsets)
    assert trie.sid_of_item.tolist() == index.item_sid[index.item_rows].tolist()
    assert artifact.manifest["parents"]["encoder"]["hash"] == encoder.hash


def test_the_filters_know_the_catalogues_categories_and_brands(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset)
    artifact = build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))
    postings, index = load_filters(artifact.path), load_index(artifact.path)
    for wanted, expected in (
        (Filter(categories=(("Home",),)), [row for row in range(NUM_ITEMS) if row % 3]),
        (Filter(categories=(("Home", "Lamps"),), brands=("Acme",)), [row for row in range(NUM_ITEMS) if row % 3 == 2 and row % 4 == 0]),
    ):
        allowed = postings.resolve(wanted)
        places = np.arange(NUM_ITEMS)
        assert sorted(index.item_rows[places[allowed.passes(places)]].tolist()) == expected
        assert np.flatnonzero(allowed.leaves).tolist() == sorted(set(index.item_sid[expected].tolist()))


def test_the_table_for_people_names_every_item(tmp_path):
    dataset, encoder = make_inputs(tmp_path, dated=False)
    quantizer, codes, _ = make_quantizer(tmp_path / "quantizer", dataset)
    artifact = build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))
    rows = pq.read_table(artifact.file("sid_table.parquet")).to_pylist()
    table = load_sid_table(artifact.path)
    for number, row in enumerate(rows):
        assert row["item_id"] == f"i{number:03d}"
        assert [row["code_1"], row["code_2"], row["code_3"]] == codes[number].tolist()
        assert row["sid"] == table.text(int(table.item_sid[number]))
        assert row["sid"].endswith(f".{row['group']}>") or row["group"] == 0


def test_without_prior_scores_training_clicks_order_a_cluster(tmp_path):
    dataset, encoder = make_inputs(tmp_path, with_prior=False, dated=False)
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset)
    index = load_index(build_sid_index(SidIndexConfig(), dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index")).path)
    assert index.prior.tolist() == [1.0 if row == 3 else 0.0 for row in range(NUM_ITEMS)]
    assert index.items(int(index.item_sid[3]))[0] == 3


def test_a_second_build_is_skipped_and_a_new_cap_is_not(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset)
    arguments = {"dataset": dataset, "encoder": encoder, "quantizer": quantizer, "uri": str(tmp_path / "sid_index")}
    first = build_sid_index(CONFIG, **arguments)
    assert build_sid_index(CONFIG, **arguments).manifest["created"] == first.manifest["created"]
    assert build_sid_index(SidIndexConfig(max_items_per_sid=3), **arguments).hash != first.hash


def test_a_quantizer_of_another_catalogue_is_refused(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset, count=10)
    with pytest.raises(ValueError, match=r"codes for 10 items, the catalogue of .* 60; rerun jobs/train_quantizer"):
        build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))


def test_an_encoder_of_another_catalogue_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "dataset")
    quantizer, _, _ = make_quantizer(tmp_path / "quantizer", dataset)
    encoder = make_encoder(tmp_path / "encoder", dataset, count=NUM_ITEMS + 1)
    with pytest.raises(ValueError, match=r"vectors of 61 items, the catalogue of .* 60; rerun jobs/train_encoder"):
        build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / "sid_index"))


def test_churn_between_versions(tmp_path):
    dataset, encoder = make_inputs(tmp_path)
    folders = []
    for seed in (0, 1):
        quantizer, _, _ = make_quantizer(tmp_path / f"quantizer{seed}", dataset, seed=seed)
        folders.append(build_sid_index(CONFIG, dataset=dataset, encoder=encoder, quantizer=quantizer, uri=str(tmp_path / f"sid_index{seed}")).path)
    assert churn_between(folders[0], folders[0]) == 0.0
    assert 0.0 < churn_between(*folders) <= 1.0


def test_a_catalogue_of_one_item():
    quantizer = FrozenQuantizer(None, [torch.zeros(2, 3)] * 3, None, input_dim=3)
    codes, residuals = quantizer.place(np.ones((1, 3), np.float32), [()])
    sids = publish_sids(CONFIG, quantizer, codes, residuals, np.ones(1, bool))
    assert sids.table.tokens.tolist() == [[0, 0, 0]]
    assert sids.table.item_sid.tolist() == [0]
