"""Following an alias: what is taken, what is refused, what stays in service."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import weakref
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from genrecall.registry.bundle import BundleConfig, BundleError, build_bundle
from genrecall.registry.catalogue_log import CatalogueLog, CatalogueLogError
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.promotion import register
from genrecall.registry.versions import RegistryError, fetch_bundle
from genrecall.serving import hot_swap
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.live_catalogue import CHANGES_AT_ONCE
from genrecall.serving.messages import RecallRequest
from genrecall.serving.recall_service import answer_batch
from genrecall.storage import open_artifact, sha256_of


@pytest.fixture
def versions(registry, untrained_line):
    """Two registered versions; the first is champion."""
    both = [register(untrained_line(seed=seed), "shop", metrics={}) for seed in (0, 1)]
    registry.set_registered_model_alias("shop", "champion", "1")
    return both


@pytest.fixture
def follower(registry, versions):
    return BundleFollower("models:/shop@champion", registry.tracking_uri)


def move(registry, number):
    registry.set_registered_model_alias("shop", "champion", str(number))


def test_a_moved_alias_brings_the_other_version_and_moving_back_the_first(registry, versions, follower):
    first = follower.load()
    assert first.version == versions[0]
    assert follower.newer(first) is None
    move(registry, 2)
    second = follower.newer(first)
    assert second is not None
    assert second.version == versions[1]
    move(registry, 1)
    # The one served before stayed loaded.
    assert follower.newer(second) is first
    assert follower.refused is None


def test_the_version_before_makes_room_before_a_third_is_loaded(registry, versions, untrained_line, follower, monkeypatch):
    register(untrained_line(seed=2), "shop", metrics={})
    first = follower.load()
    move(registry, 2)
    second = follower.newer(first)
    before = weakref.ref(first.bundle)
    del first
    assert before() is not None  # kept to go back to
    held, load = [], hot_swap.load_bundle

    def seen(path):
        held.append(before() is not None)
        return load(path)

    monkeypatch.setattr(hot_swap, "load_bundle", seen)
    move(registry, 3)
    assert follower.newer(second).version.number == 3
    assert held == [False]


@pytest.mark.parametrize("logged", [False, True])
def test_a_challenger_that_becomes_champion_is_not_loaded_again(registry, versions, tmp_path, monkeypatch, logged):
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path if logged else None)
    first = follower.load()
    registry.set_registered_model_alias("shop", "challenger", "2")
    challenger = follower.of_challenger("shop").load_challenger(versions[1])
    if logged:
        CatalogueLog(tmp_path / "shop").append([ItemRecord(item_id="n0", title="hose")])
    monkeypatch.setattr(hot_swap, "load_bundle", lambda _: pytest.fail("loaded again"))
    move(registry, 2)
    second = follower.newer(first, challenger)
    assert second.versions.model == "shop/2"
    assert (second.versions.role, challenger.versions.role) == ("champion", "challenger")
    assert second.bundle.retriever.model is challenger.bundle.retriever.model
    assert second.versions.catalog_seq == int(logged)
    move(registry, 1)
    assert follower.newer(second, challenger).bundle.retriever.model is first.bundle.retriever.model


def test_loading_a_version_does_not_lose_the_place_of_the_one_in_service_in_the_log(registry, versions, tmp_path, monkeypatch):
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path)
    first = follower.load()
    site = CatalogueLog(tmp_path / "shop")
    for number in range(5):
        site.append([], [f"gone {number}"])
    first = follower.up_to_date(first)
    place = follower.log._read_to
    assert place.sequence == 5
    move(registry, 2)
    assert follower.newer(first).versions.catalog_seq == 5
    assert follower.log._read_to is place


def test_latest_champion_settles_on_its_model(registry, versions):
    follower = BundleFollower("latest-champion", registry.tracking_uri)
    assert follower.load().version == versions[0]
    assert follower.address == "models:/shop@champion"


def corrupt(registry, version):
    weights = next(Path(fetch_bundle(version, registry)).rglob("model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x01\x02\x03")
    return lambda: weights.write_bytes(content)


def test_a_corrupted_version_is_refused_named_and_tried_again_later(registry, versions, follower, monkeypatch):
    first = follower.load()
    repair = corrupt(registry, versions[1])
    move(registry, 2)
    assert follower.newer(first) is None
    assert "shop/2: " in follower.refused
    assert "model.safetensors (changed)" in follower.refused
    repair()
    assert follower.newer(first) is None  # not again so soon: hashing a large bundle each time would cost
    monkeypatch.setattr(hot_swap, "RETRY_REFUSED_S", 0.0)
    assert follower.newer(first).version == versions[1]
    assert follower.refused is None


def test_moving_the_alias_back_clears_the_refusal(registry, versions, follower):
    first = follower.load()
    corrupt(registry, versions[1])
    move(registry, 2)
    assert follower.newer(first) is None
    move(registry, 1)
    assert follower.newer(first) is None
    assert follower.refused is None


def test_a_corrupted_version_does_not_start(registry, versions):
    corrupt(registry, versions[1])
    with pytest.raises(Exception, match=r"model\.safetensors \(changed\)"):
        BundleFollower("models:/shop/2", registry.tracking_uri).load()


def test_a_registry_that_is_down_leaves_the_version_in_service(registry, versions, follower, monkeypatch):
    first = follower.load()
    for error in (MlflowException("down"), OSError("gone"), RuntimeError("anything")):

        def down(*_, error=error):
            raise error

        monkeypatch.setattr(hot_swap, "resolve", down)
        assert follower.newer(first) is None
        assert follower.refused is None


def test_a_registry_that_takes_connections_and_says_nothing_holds_up_a_look_for_seconds_only(registry, versions, follower, monkeypatch, caplog):
    first = follower.load()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        other = BundleFollower("models:/shop@champion", address)
        started = time.monotonic()
        assert other.newer(first) is None
        assert 2.0 <= time.monotonic() - started < 10.0
    assert other.refused is None
    assert "does not answer" in caplog.text


def test_passwords_in_the_registrys_address_are_neither_logged_nor_shown(registry, versions, follower, monkeypatch, caplog):
    first = follower.load()
    said = "API request to http://operator:se@cret@127.0.0.1:1/api/2.0/mlflow failed"

    def down(*_):
        raise MlflowException(said)

    challengers = follower.of_challenger("shop")
    with monkeypatch.context() as patch:
        patch.setattr(hot_swap, "resolve", down)
        follower.newer(first)
        assert challengers.wanted_challenger(None, first.version) is None
        with pytest.raises(RegistryError, match="the registry or its store failed") as caught:
            BundleFollower("models:/shop@champion", registry.tracking_uri).load()
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    monkeypatch.setattr(hot_swap, "fetch_bundle", down)
    move(registry, 2)
    assert follower.newer(first) is None
    assert challengers.load_challenger(versions[1]) is None
    shown = [caplog.text, str(caught.value), follower.refused, challengers.refused]
    assert all("http://***@127.0.0.1:1/api" in one and "cret" not in one and "operator" not in one for one in shown)


def test_a_deleted_alias_leaves_the_version_in_service_and_says_so(registry, versions, follower):
    first = follower.load()
    registry.delete_registered_model_alias("shop", "champion")
    assert follower.newer(first) is None
    assert "not in the registry" in follower.refused


def test_whatever_goes_wrong_on_loading_is_a_refusal(registry, versions, follower, monkeypatch):
    first = follower.load()
    move(registry, 2)
    for error in (BundleError("warm-up differs"), OSError("disk full"), ZeroDivisionError("anything")):

        def broken(*_, error=error):
            raise error

        follower._refused_version = None
        monkeypatch.setattr(hot_swap, "load_bundle", broken)
        assert follower.newer(first) is None
        assert str(error) in follower.refused


def test_no_registry_is_an_error_at_the_start(tmp_path):
    with pytest.raises(RegistryError, match="no registry there"):
        BundleFollower("latest-champion", f"sqlite:///{tmp_path}/absent.db")


def test_looking_costs_little(registry, versions, follower):
    first = follower.load()
    follower.newer(first)
    started = time.monotonic()
    follower.newer(first)
    assert time.monotonic() - started < 1.0


@pytest.fixture
def other_codes(registry, versions, untrained_line, tmp_path):
    """A third version whose codebooks are others, so that it places newcomers elsewhere."""
    folder = tmp_path / "other_codes"
    shutil.copytree(untrained_line(seed=1).path, folder)
    weights = folder / "quantizer" / "quantizer.safetensors"
    tensors = load_file(weights)
    save_file({name: value.flip(0).contiguous() for name, value in tensors.items()}, weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["quantizer/quantizer.safetensors"] = {"sha256": sha256_of(weights), "bytes": weights.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return register(open_artifact(str(folder), kind="bundle"), "shop", metrics={})


def answered(served):
    """What a version answers: the items by id; no answer says another version."""
    (answer,) = answer_batch(served, [RecallRequest(query="angle bracket", beam_size=200, limit=1000)], (4, 3, 2))
    assert answer.versions == served.versions
    return {item.item_id: item for item in answer.items}


def titles(served):
    return {item_id: item.title for item_id, item in answered(served).items()}


def test_items_upserted_then_a_swap_a_rollback_and_a_restart_every_version_serves_them_and_none_a_delisted_one(registry, versions, other_codes, tmp_path):
    def started():
        return BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path)

    follower = started()
    first = follower.load()
    built = titles(first)
    assert len(built) == 40
    site = CatalogueLog(tmp_path / "shop")

    # Upsert: three newcomers, one of them gone again; one known item renamed; one delisted.
    new = [ItemRecord(item_id=f"n{number}", title=title, category_path=("Home",)) for number, title in enumerate(["soaker hose", "chrome lamp", "deck screw"])]
    site.append([*new, ItemRecord(item_id="i03", title="renamed")], ["i00"])
    site.append([], ["n2"])
    upserted = follower.up_to_date(first)
    expected = {**built, "n0": "soaker hose", "n1": "chrome lamp", "i03": "renamed"}
    del expected["i00"]
    assert titles(upserted) == expected
    assert (upserted.versions.model, upserted.versions.catalog_seq) == ("shop/1", 6)
    assert titles(first) == built  # a batch under way

    # Swap: the other version places them by its own codes.
    move(registry, 3)
    second = follower.newer(upserted)
    assert (second.versions.model, second.versions.catalog_seq) == ("shop/3", 6)
    assert titles(second) == expected
    assert [answered(second)[one].sid for one in ("n0", "n1")] != [answered(upserted)[one].sid for one in ("n0", "n1")]
    assert answered(second)["i03"].sid == answered(upserted)["i03"].sid

    # While the second serves, another item comes, one goes, and one comes back.
    site.append([ItemRecord(item_id="n3", title="late"), ItemRecord(item_id="i00", title="back")], ["n0", "i39"])
    second = follower.up_to_date(second)
    expected = {**expected, "n3": "late", "i00": "back"}
    del expected["n0"], expected["i39"]
    assert titles(second) == expected

    # Rollback: the version kept loaded has missed those.
    move(registry, 1)
    back = follower.newer(second)
    assert (back.versions.model, back.versions.catalog_seq) == ("shop/1", 10)
    assert back.bundle.published is upserted.bundle.published  # not loaded again
    assert titles(back) == expected

    # Restart, of either version, also after a compaction.
    for compacted in (False, True):
        if compacted:
            site.compact()
        for number in (1, 2, 3):
            move(registry, number)
            restarted = started().load()
            assert (restarted.version.number, restarted.versions.catalog_seq) == (number, 10)
            assert titles(restarted) == expected
            assert follower.caught_up(restarted) is restarted


def test_the_log_is_taken_in_steps(registry, versions, tmp_path):
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path)
    served = follower.load()
    for part in range(3):
        follower.log.append([ItemRecord(item_id=f"n{part}-{number}", title="hose") for number in range(CHANGES_AT_ONCE - 10)])
    steps = []
    while (further := follower.caught_up(served)) is not served:
        served = further
        steps.append(served.versions.catalog_seq)
    # Requests stay whole: the step that reaches its size ends with the request.
    assert steps == [2 * (CHANGES_AT_ONCE - 10), 3 * (CHANGES_AT_ONCE - 10)]
    assert served.info("", None).items == 40 + 3 * (CHANGES_AT_ONCE - 10)


def test_a_version_that_cannot_take_the_log_is_refused_and_does_not_start(registry, versions, tmp_path):
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path)
    first = follower.load()
    site = CatalogueLog(tmp_path / "shop")
    site.append([ItemRecord(item_id="n0", title="hose")], ["i00"])
    first = follower.up_to_date(first)
    site.compact(covered=2)  # an operator's mistake: neither bundle covers that
    move(registry, 2)
    assert follower.newer(first) is None
    assert "shop/2: " in follower.refused
    assert "serve a bundle that covers 2 or more" in follower.refused
    assert follower.up_to_date(first) is first  # the one in service knows these changes
    with pytest.raises(CatalogueLogError, match="covers 2 or more"):
        BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path).load()


def test_without_a_folder_of_logs_a_bundle_is_served_as_it_was_built(registry, versions, follower):
    first = follower.load()
    assert follower.log is None
    assert follower.up_to_date(first) is first
    assert first.versions.catalog_seq == 0


def test_a_swap_replays_what_the_new_bundle_does_not_hold_itself(registry, versions, untrained_line, tmp_path):
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path)
    first = follower.load()
    site = CatalogueLog(tmp_path / "shop")
    site.append([], ["gone before the export"])
    site.append([ItemRecord(item_id="n0", title="soaker hose", category_path=("Home",))], ["i00"])
    config = BundleConfig(warm_up_beam_size=5, catalog_seq=1)
    version = register(build_bundle(config, **untrained_line.parts(seed=1), uri=str(tmp_path / "bundle"), log=site), "shop", metrics={})
    assert site.compact(covered=1).dropped == 1
    move(registry, version.number)
    second = follower.newer(first)
    assert (second.version.number, second.bundle.published.catalog_seq, second.versions.catalog_seq) == (version.number, 1, 3)
    assert {"n0"} == set(titles(second)) - set(titles(first))
    assert "i00" not in titles(second)
    # The version before holds nothing of the log itself, and the dropped tombstone is one that it would need.
    move(registry, 2)
    assert follower.newer(second) is None
    assert "serve a bundle that covers 1 or more" in follower.refused
