"""Addresses to versions to folders, with nothing run on the way."""

from __future__ import annotations

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from genrecall.registry.bundle import BundleError
from genrecall.registry.promotion import promote, register
from genrecall.registry.versions import BUNDLE_FOLDER, MANIFEST_TAG, RegistryError, Version, fetch_bundle, is_address, open_registry, resolve

from genrecall.evaluation.gates import GateConfig  # isort: skip

GATES = GateConfig(guarded=(), required_lower_bounds=())


@pytest.fixture
def registered(registry, untrained_line):
    return register(untrained_line(), "shop", metrics={"channels/generative/recall_100": 0.5})


def test_a_number_and_an_alias_name_the_same_version(registry, registered):
    assert resolve("models:/shop/1", registry) == resolve("models:/shop@challenger", registry) == registered


def test_latest_champion_is_the_one_promoted_last(registry, untrained_line):
    first = register(untrained_line(), "first", metrics={})
    second = register(untrained_line(seed=1), "second", metrics={})
    with pytest.raises(RegistryError, match="the registry has no champion yet; run jobs/run_pipeline"):
        resolve("latest-champion", registry)
    promote(second, GATES)
    promote(first, GATES)
    assert resolve("latest-champion", registry) == first


@pytest.mark.parametrize("address", ["models:/shop@champion", "models:/shop/7", "models:/nothing@champion", "models:/nothing/1"])
def test_an_unknown_address_lists_the_champions_there_are(registry, registered, untrained_line, address):
    promote(register(untrained_line(seed=1), "other", metrics={}), GATES)
    with pytest.raises(RegistryError, match=rf"{address}: not in the registry; champions there: models:/other@champion"):
        resolve(address, registry)


@pytest.mark.parametrize(
    "address", ["shop", "models:/shop", "models:/shop@", "models:/../x@champion", "models:/a/b/1", "runs:/1/x", "models:/shop@champion/../..", ""]
)
def test_other_addresses_are_refused(registry, address):
    assert not is_address(address)
    with pytest.raises(RegistryError, match="expected models:/NAME@ALIAS"):
        resolve(address, registry)


def test_a_registry_that_does_not_answer_is_not_an_unknown_name(registry, monkeypatch):
    def down(*_):
        raise MlflowException("connection refused")

    monkeypatch.setattr(registry, "get_model_version_by_alias", down)
    with pytest.raises(MlflowException, match="connection refused"):
        resolve("models:/shop@champion", registry)


def test_a_version_that_others_registered_is_refused(registry):
    registry.create_registered_model("foreign")
    registry.create_model_version("foreign", "/nowhere")
    with pytest.raises(RegistryError, match=r"models:/foreign/1: version 1 was not registered by genrecall"):
        resolve("models:/foreign/1", registry)


def test_a_missing_registry_file_is_an_error_and_none_is_made(tmp_path):
    with pytest.raises(RegistryError, match=r"no registry there; set MLFLOW_TRACKING_URI \(or GENRECALL_HOME\)"):
        open_registry(f"sqlite:///{tmp_path}/absent.db")
    assert not list(tmp_path.iterdir())


def test_a_local_store_is_read_in_place_and_a_cache_keeps_a_copy(registry, registered, tmp_path):
    in_place = fetch_bundle(registered, registry)
    assert in_place.as_posix().endswith(BUNDLE_FOLDER)
    cache = tmp_path / "cache"
    kept = fetch_bundle(registered, registry, cache)
    assert kept == cache / registered.manifest_sha256
    assert (kept / "manifest.json").read_bytes() == (in_place / "manifest.json").read_bytes()
    before = kept.stat().st_mtime_ns
    assert fetch_bundle(registered, registry, cache).stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir()] == [registered.manifest_sha256]


def test_fetching_does_not_depend_on_the_process_wide_tracking_store(registry, registered, tmp_path):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/another.db")
    assert fetch_bundle(registered, registry).is_dir()


def test_a_manifest_other_than_the_registered_one_is_refused(registry, registered, tmp_path):
    with pytest.raises(BundleError, match=r"shop/1: manifest hashes to .*, registered was 000000000000\.\.\.; refused"):
        fetch_bundle(Version("shop", 1, "0" * 64), registry)
    registry.set_model_version_tag("shop", "1", MANIFEST_TAG, "1" * 64)
    with pytest.raises(BundleError, match=r"registered was 111111111111"):
        fetch_bundle(resolve("models:/shop/1", registry), registry, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("tag", ["../../elsewhere", "0" * 63, "0" * 64 + "/..", "A" * 64, "0" * 64 + "\n"])
def test_a_tag_that_could_leave_the_bundle_cache_is_refused(registry, registered, tag):
    registry.set_model_version_tag("shop", "1", MANIFEST_TAG, tag)
    with pytest.raises(RegistryError, match=r"genrecall\.manifest_sha256 is no sha256"):
        resolve("models:/shop/1", registry)
