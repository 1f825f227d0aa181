"""Registered versions: finding the one that an address means and fetching its bundle, checked, without running any of its code.

`mlflow.pyfunc.load_model` would import the model's Python file; here the files are downloaded and read as data, and the
bundle's manifest must hash to what the version's tag says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from genrecall.registry.bundle import BundleError
from genrecall.storage import MANIFEST, cache_folder, cached, check_files, open_artifact, read_manifest, sha256_of

CHAMPION = "champion"
CHALLENGER = "challenger"
MANIFEST_TAG = "genrecall.manifest_sha256"
PROMOTED_AT_TAG = "genrecall.promoted_at"
LATEST_CHAMPION = "latest-champion"
BUNDLE_FOLDER = "artifacts/bundle"
METRICS_FILE = "metrics.json"

_ADDRESS = re.compile(r"models:/(?P<name>[\w. -]+)(?:@(?P<alias>[\w-]+)|/(?P<number>[0-9]+))")
_USERINFO = re.compile(r"://[^/\s]*@")  # to the last @: a password may hold one that nobody escaped
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_THERE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})


class RegistryError(ValueError):
    """An address that names no registered version, or a version that cannot be used."""


class NotRegisteredError(RegistryError):
    """The registry has no such model, alias or version."""


@dataclass(frozen=True)
class Version:
    """One registered version of a model."""

    name: str
    number: int
    manifest_sha256: str

    @property
    def text(self) -> str:
        """`name/number`, as answers and logs show it."""
        return f"{self.name}/{self.number}"


def redacted(error: object) -> str:
    """What an error says, without the user and password of the URLs in it: MLflow's name the whole address of the registry."""
    return _USERINFO.sub("://***@", str(error))


@contextlib.contextmanager
def redacting() -> Iterator[None]:
    """Raise MLflow's errors as a `RegistryError` that is `redacted`, without their cause: a traceback would show the password too."""
    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"the registry or its store failed: {redacted(error)}") from None


def is_address(text: str) -> bool:
    """Whether `resolve` can read `text`."""
    return text == LATEST_CHAMPION or _ADDRESS.fullmatch(text) is not None


def open_registry(tracking_uri: str) -> MlflowClient:
    """A client of the registry at `tracking_uri`.

    Raises:
        RegistryError: a sqlite file that is not there (MLflow would make an empty one).
    """
    path = tracking_uri.removeprefix("sqlite:///")
    if path != tracking_uri and not Path(path).is_file():
        raise RegistryError(
            f"{tracking_uri}: no registry there; set MLFLOW_TRACKING_URI (or GENRECALL_HOME) to where the models were registered, "
            "in the environment that Ray was started in, or give tracking_uri"
        )
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def resolve(address: str, client: MlflowClient) -> Version:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/NUMBER` or `latest-champion` means now.

    `latest-champion` is the champion that was promoted last, over all models of this registry: handy on one's own machine;
    a production configuration names its model.

    Raises:
        NotRegisteredError: no such model, alias or version; the message lists the champions there are.
        RegistryError: a version that cannot be used.
        MlflowException: the registry does not answer.
    """
    if address == LATEST_CHAMPION:
        champions = _champions(client)
        if not champions:
            raise RegistryError("the registry has no champion yet; run jobs/run_pipeline.py (or `make demo`), or check MLFLOW_TRACKING_URI")
        return resolve(f"models:/{max(champions)[1]}@{CHAMPION}", client)
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RegistryError(f"{address!r}: expected models:/NAME@ALIAS, models:/NAME/NUMBER or {LATEST_CHAMPION}")
    name, alias, number = match["name"], match["alias"], match["number"]
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in _NOT_THERE:
            raise
        known = ", ".join(f"models:/{one}@{CHAMPION}" for _, one in _champions(client)) or "none"
        raise NotRegisteredError(f"{address}: not in the registry; champions there: {known}") from error
    tag = found.tags.get(MANIFEST_TAG)
    if not tag:
        raise RegistryError(f"{address}: version {found.version} was not registered by genrecall (no {MANIFEST_TAG} tag); use jobs/register_model.py")
    if not _SHA256.fullmatch(tag):  # it names a folder of the bundle cache
        raise RegistryError(f"{address}: version {found.version}: {MANIFEST_TAG} is no sha256: {tag[:80]!r}; register it again with jobs/register_model.py")
    return Version(name=name, number=int(found.version), manifest_sha256=tag)


def fetch_bundle(version: Version, client: MlflowClient, cache: Path | None = None) -> Path:
    """The folder of a version's bundle on this machine.

    Args:
        cache: keeps copies, a folder for each manifest, checked each time and fetched once more where they are damaged. None reads a local store in place,
            whose files whoever loads the bundle checks, and copies a remote one to `storage.cache_folder`.

    Raises:
        BundleError: no bundle there, or its manifest is not the one that was registered.
        ArtifactError: a file of the store is missing or changed; or a cache folder that cannot be trusted.
        MlflowException, OSError: the store does not answer.
    """
    source = _source_of(version, client)
    if cache is None:
        if _is_local(source):
            return _checked(_download(source, client), version)
        cache = cache_folder()

    def check(folder: Path) -> None:
        manifest = read_manifest(str(_checked(folder, version)))
        assert manifest is not None, "hashes to what was registered"
        check_files(folder, manifest, version.text)

    return cached(cache / version.manifest_sha256, lambda folder: _download(source, client, folder), check)


def fetch_bundle_from(tracking_uri: str, version: Version) -> Path:
    """`fetch_bundle` for whoever cannot be given a client: another process, perhaps on another machine."""
    with redacting():
        return fetch_bundle(version, open_registry(tracking_uri))


def fetch_metrics(version: Version, client: MlflowClient) -> dict[str, Any]:
    """The evaluation that a version was registered with. Of a remote store nothing else is downloaded; a local one's bundle is checked whole.

    Raises:
        BundleError, ArtifactError, MlflowException, OSError: as for `fetch_bundle`.
    """
    source = _source_of(version, client)
    if _is_local(source):
        return dict(open_artifact(str(fetch_bundle(version, client)), kind="bundle").json(METRICS_FILE))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (MANIFEST, METRICS_FILE):
            _download(f"{source}/{file}", client, folder)
        manifest = read_manifest(str(_checked(folder, version)))
        assert manifest is not None, "hashes to what was registered"
        only = {METRICS_FILE: manifest["files"][METRICS_FILE]}
        check_files(folder, {**manifest, "files": only}, version.text)
        return dict(json.loads((folder / METRICS_FILE).read_text()))


def _source_of(version: Version, client: MlflowClient) -> str:
    return f"{client.get_model_version_download_uri(version.name, str(version.number)).rstrip('/')}/{BUNDLE_FOLDER}"


def _is_local(source: str) -> bool:
    return urlsplit(source).scheme in ("", "file")


def _download(source: str, client: MlflowClient, folder: Path | None = None) -> Path:
    uri = client.tracking_uri
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(folder) if folder else None, tracking_uri=uri, registry_uri=uri))


def _checked(bundle: Path, version: Version) -> Path:
    if not (bundle / MANIFEST).is_file():
        raise BundleError(f"{version.text}: has no {BUNDLE_FOLDER}/{MANIFEST}; register it again with jobs/register_model.py")
    found = sha256_of(bundle / MANIFEST)
    if found != version.manifest_sha256:
        raise BundleError(f"{version.text}: manifest hashes to {found[:12]}..., registered was {version.manifest_sha256[:12]}...; refused. Register it again")
    return bundle


def _champions(client: MlflowClient) -> list[tuple[str, str]]:
    """(time of promotion, model name) of every model with a champion."""
    models = client.search_registered_models(max_results=1000)
    return [(str(model.tags.get(PROMOTED_AT_TAG, "")), str(model.name)) for model in models if CHAMPION in (model.aliases or {})]
