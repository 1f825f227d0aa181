"""Addresses to versions to folders, with nothing run on the way."""

from __future__ import annotations

import functools
import pickle
import tempfile

import mlflow
import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException

from genrecall.registry import versions
from genrecall.registry.bundle import BundleError
from genrecall.registry.item_placement import _Placer
from genrecall.registry.promotion import promote, register
from genrecall.registry.versions import BUNDLE_FOLDER, MANIFEST_TAG, RegistryError, Version, fetch_bundle, is_address, open_registry, redacted, resolve
from genrecall.storage import ArtifactError

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


@pytest.fixture
def remote(registry, untrained_line, bucket, tmp_path, monkeypatch):
    """A version whose bundle lies on S3."""
    monkeypatch.setenv("GENRECALL_CACHE", str(tmp_path / "cache"))
    with mlflow.start_run(experiment_id=mlflow.create_experiment("remote", artifact_location=f"{bucket}/{tmp_path.name}")):
        return register(untrained_line(), "far", metrics={})


@pytest.fixture
def downloads(monkeypatch):
    """What was downloaded, by the last name of its address."""
    names, download = [], versions._download

    def seen(source, *rest):
        names.append(source.rpartition("/")[2])
        return download(source, *rest)

    monkeypatch.setattr(versions, "_download", seen)
    return names


def test_a_remote_bundle_is_downloaded_once_and_leaves_nothing_else(registry, remote, downloads, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    kept = fetch_bundle(remote, registry)
    assert kept == tmp_path / "cache" / remote.manifest_sha256
    assert fetch_bundle(remote, registry) == kept
    assert downloads == ["bundle"]
    assert not list((tmp_path / "temporary").iterdir())
    assert [path.name for path in kept.parent.iterdir()] == [remote.manifest_sha256]


def test_another_machine_fetches_a_bundle_for_itself(registry, remote, downloads, tmp_path, monkeypatch):
    fetch = pickle.loads(pickle.dumps(functools.partial(versions.fetch_bundle_from, registry.tracking_uri, remote)))  # noqa: S301 - as Ray does
    here = fetch_bundle(remote, registry)
    monkeypatch.setenv("GENRECALL_CACHE", str(tmp_path / "there"))
    there = fetch()
    assert (here.parent.name, there.parent.name, downloads) == ("cache", "there", ["bundle", "bundle"])
    columns = {
        "item_id": "new",
        "title": "steel lamp",
        "brand": "",
        "category_path": ["Home"],
        "text": "",
        "file": "f",
        "row": 0,
        "column": None,
        "reason": None,
    }
    rows = pa.Table.from_pylist([columns | {"value": None}])
    assert _Placer(fetch)(rows)["sid"] == _Placer(lambda: here)(rows)["sid"]


def test_promotion_downloads_what_the_gates_read_alone(registry, remote, downloads, tmp_path):
    assert promote(remote, GATES).passed
    assert downloads == ["manifest.json", "metrics.json"]
    assert not (tmp_path / "cache").exists()
    registry.set_model_version_tag("far", "1", MANIFEST_TAG, "1" * 64)
    with pytest.raises(BundleError, match="registered was 111111111111"):
        versions.fetch_metrics(resolve("models:/far/1", registry), registry)


@pytest.mark.parametrize("name", ["manifest.json", "generator/stage/model.safetensors"])
def test_a_damaged_copy_is_fetched_once_more(registry, registered, downloads, tmp_path, name):
    kept = fetch_bundle(registered, registry, tmp_path)
    content = (kept / name).read_bytes()
    (kept / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (fetch_bundle(registered, registry, tmp_path) / name).read_bytes() == content
    assert fetch_bundle(registered, registry, tmp_path) == kept
    assert downloads == ["bundle", "bundle"]


def test_a_bundle_that_is_damaged_in_the_store_is_not_kept(registry, registered, tmp_path):
    (fetch_bundle(registered, registry) / "metrics.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"shop/1: does not match its manifest: metrics\.json \(changed\); rerun jobs/register_model\.py"):
        fetch_bundle(registered, registry, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


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


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("get https://user:pa55@host:5000/api: no", "get https://***@host:5000/api: no"),
        ("https://user:p@ss@host/x and s3://token@bucket/y", "https://***@host/x and s3://***@bucket/y"),
        ("https://host/models@champion, mail@host", "https://host/models@champion, mail@host"),
        ("models:/shop@champion: not there", "models:/shop@champion: not there"),
    ],
)
def test_who_asks_and_by_what_password_is_taken_out_of_urls(said, shown):
    assert redacted(ValueError(said)) == shown
