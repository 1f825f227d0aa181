"""Bundles: put together only from parts of one line, loaded only when every byte is as it was, and data only."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.config import ConfigError, apply_overrides
from genrecall.registry.bundle import BundleConfig, BundleError, build_bundle, check_coverage, load_bundle
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.storage import ArtifactError, sha256_of


@pytest.fixture
def copied(untrained_line, tmp_path):
    """A bundle folder of one's own, to be tampered with."""
    folder = tmp_path / "bundle"
    shutil.copytree(untrained_line().path, folder)
    return folder


def list_in_manifest(folder, name):
    """What somebody with write access can do: make the manifest agree with a changed file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_loaded_bundle_answers_as_its_parts_would(untrained_line):
    bundle = load_bundle(untrained_line().path)
    (result,) = bundle.retriever.recall(["angle bracket"], [None], [None], [np.zeros(0, np.int32)], beam_size=5, limit=10)
    shown = bundle.shown(result.item_rows)
    assert [item["item_id"] for item in shown] == bundle.ids_of(result.item_rows) == [f"i{row:02d}" for row in result.item_rows]
    assert shown[0]["brand"] == "Acme"
    assert (np.diff(result.scores) <= 0).all()
    assert bundle.about["support"] == "trie"
    assert bundle.about["max_items_per_sid"] == 5


def test_item_ids_become_rows_and_unknown_ones_are_left_out(untrained_line):
    bundle = load_bundle(untrained_line().path, verify=False)
    assert bundle.rows_of(["i39", "i00", "zzz", "", "i07", "i0"]).tolist() == [39, 0, 7]


def test_building_again_is_skipped(untrained_line):
    first = untrained_line()
    assert untrained_line().manifest["created"] == first.manifest["created"]


def test_labels_of_sids_come_with_the_bundle_and_older_ones_make_them_when_asked(copied):
    bundle = load_bundle(copied, verify=False)
    rows = np.arange(len(bundle.retriever.table))
    stored = bundle.labels.made_before(rows)
    assert any(stored)
    (copied / "sid_labels.parquet").unlink()
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"]["sid_labels.parquet"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    older = load_bundle(copied, verify=False)
    assert older.labels.made_before(rows) == [None] * len(rows)
    assert [older.labels.path(row)[2].label for row in rows] == stored


def test_labels_of_other_sids_are_refused(copied):
    pq.write_table(pa.table({"label": ["Hoses"]}), copied / "sid_labels.parquet")
    list_in_manifest(copied, "sid_labels.parquet")
    with pytest.raises(BundleError, match=r"sid_labels.parquet has 1 labels, the SID table \d+ SIDs; rebuild it with"):
        load_bundle(copied)


def test_parts_of_another_line_are_refused(untrained_line, tmp_path):
    parts = untrained_line.parts(seed=0) | {"generator": untrained_line.parts(seed=1)["generator"]}
    with pytest.raises(BundleError, match=r"evaluation .* was made from another generator than .*generator1; rerun jobs/make_evaluation\.py"):
        build_bundle(BundleConfig(), **parts, uri=str(tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_an_evaluation_of_another_model_than_the_served_one_is_refused(untrained_line, tmp_path):
    parts = untrained_line.parts()
    with pytest.raises(BundleError, match="did not judge aligned; rerun"):
        build_bundle(BundleConfig(), **parts | {"aligned": parts["generator"]}, uri=str(tmp_path / "bundle"))


def test_a_changed_file_is_refused(copied):
    weights = copied / "generator" / "stage" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors \(changed\); rerun jobs/register_model\.py"):
        load_bundle(copied)


def test_a_missing_and_an_added_file_are_refused(copied):
    (copied / "items.parquet").unlink()
    (copied / "extra.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"items\.parquet \(missing\), extra\.json \(not in the manifest\)"):
        load_bundle(copied)


def test_a_planted_pickle_is_refused_even_when_the_manifest_lists_it(copied):
    (copied / "encoder" / "weights.pkl").write_bytes(pickle.dumps({"a": 1}))
    list_in_manifest(copied, "encoder/weights.pkl")
    with pytest.raises(BundleError, match=r"holds encoder/weights\.pkl; a bundle holds only .*Nothing was loaded"):
        load_bundle(copied)


class Planted:
    """Unpickling it would leave a trace."""

    ran = False

    def __reduce__(self):
        return (setattr, (Planted, "ran", True))


@pytest.mark.parametrize(
    "name",
    [
        "sid_index/index/offsets.npy",
        "generator/stage/model.safetensors",
        "encoder/encoder.safetensors",
        "sid_index/trie/tokens3.npy",
        "sid_index/trie/item_vectors.npy",
    ],
)
def test_a_pickle_under_a_harmless_name_is_never_run(copied, name):
    if name.endswith(".npy"):
        np.save(copied / name, np.array([Planted()], dtype=object), allow_pickle=True)
    else:
        (copied / name).write_bytes(pickle.dumps(Planted()))
    list_in_manifest(copied, name)
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_bundle(copied)
    assert not Planted.ran


def test_a_file_name_that_leaves_the_folder_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["../outside.json"] = {"sha256": "0", "bytes": 0}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a name that leaves the folder"):
        load_bundle(copied)


@pytest.mark.parametrize("tampered", ["score", "sid"])
def test_warm_up_answers_that_differ_are_refused(copied, tampered):
    warm_up = json.loads((copied / "warm_up.json").read_text())
    first = warm_up["requests"][0]
    if tampered == "score":
        first["scores"][0] += 0.01
    else:
        first["sids"][0], first["sids"][-1] = first["sids"][-1], first["sids"][0]
    (copied / "warm_up.json").write_text(json.dumps(warm_up))
    list_in_manifest(copied, "warm_up.json")
    with pytest.raises(BundleError, match=r"warm-up request 0 gets .* rebuild it here"):
        load_bundle(copied)
    load_bundle(copied, verify=False)


def test_warm_up_answers_within_rounding_pass(copied):
    warm_up = json.loads((copied / "warm_up.json").read_text())
    for request in warm_up["requests"]:
        request["scores"] = [score + 5e-4 for score in request["scores"]]
    (copied / "warm_up.json").write_text(json.dumps(warm_up))
    list_in_manifest(copied, "warm_up.json")
    load_bundle(copied)


def test_the_config_says_what_is_wrong():
    with pytest.raises(ConfigError, match="warm_up_requests: must be at least 1, got 0"):
        apply_overrides(BundleConfig(), ["warm_up_requests=0"])


@pytest.fixture
def log(tmp_path):
    """Items a and b added (1, 2), c delisted (3), a delisted and c listed again (4: c, 5: a)."""
    log = CatalogueLog(tmp_path / "log")
    log.append([ItemRecord(item_id="a", title="hose"), ItemRecord(item_id="b", title="lamp")], ["c"])
    log.append([ItemRecord(item_id="c", title="rake")], ["a"])
    return log


def test_items_hold_the_changes_that_no_later_one_replaces(log):
    check_coverage(["b"], log, 3)  # a and c change again later: servers replay that
    check_coverage(["a", "b", "c"], log, 3)
    check_coverage(["b", "c"], log, 5)
    check_coverage(["b", "c"], log, 0)


@pytest.mark.parametrize(
    ("items", "sequence", "message"),
    [
        (["a"], 3, r"lacks items that were added by change 3: 'b'; give the number that a server named before the items were exported"),
        (["b"], 5, r"lacks items that were added by change 5: 'c'"),
        (["a", "b", "c"], 5, r"holds items that were delisted by change 5: 'a'"),
        (["b", "c"], 6, r"bundle\.catalog_seq: expected at most 5, the last change in .*log, got 6"),
    ],
)
def test_items_that_claim_more_changes_than_they_hold_are_refused(log, items, sequence, message):
    with pytest.raises(BundleError, match=message):
        check_coverage(items, log, sequence)


def test_coverage_outlives_a_compaction(log):
    log.compact(covered=3)
    check_coverage(["b", "c"], log, 5)
    check_coverage(["b"], log, 3)
    with pytest.raises(BundleError, match="holds items that were delisted by change 5: 'a'"):
        check_coverage(["a", "c"], log, 5)


def test_a_bundle_records_the_changes_that_its_items_hold(untrained_line, tmp_path):
    log = CatalogueLog(tmp_path / "log")
    log.append([], ["gone before the export"])
    log.append([ItemRecord(item_id="later", title="hose")])
    parts = untrained_line.parts()
    built = build_bundle(BundleConfig(warm_up_beam_size=5, catalog_seq=1), **parts, uri=str(tmp_path / "bundle"), log=log)
    assert load_bundle(built.path).catalog_seq == built.json("bundle.json")["catalog_seq"] == 1
    with pytest.raises(BundleError, match="lacks items that were added by change 2: 'later'"):
        build_bundle(BundleConfig(warm_up_beam_size=5, catalog_seq=2), **parts, uri=str(tmp_path / "other"), log=log)
    assert not (tmp_path / "other").exists()
    assert load_bundle(untrained_line().path, verify=False).catalog_seq == 0
