"""Registered versions: finding the one that an address means and fetching its bundle, checked, without running any of its code.

`mlflow.pyfunc.load_model` would import the model's Python file; here the files are downloaded and read as data, and the
bundle's manifest must hash to what the version's tag says.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from genrecall.registry.bundle import BundleError
from genrecall.storage import MANIFEST, sha256_of

CHAMPION = "champion"
CHALLENGER = "challenger"
MANIFEST_TAG = "genrecall.manifest_sha256"
PROMOTED_AT_TAG = "genrecall.promoted_at"
LATEST_CHAMPION = "latest-champion"
BUNDLE_FOLDER = "artifacts/bundle"

_ADDRESS = re.compile(r"models:/(?P<name>[\w. -]+)(?:@(?P<alias>[\w-]+)|/(?P<number>[0-9]+))")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_THERE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})


class RegistryError(ValueError):
    """An address that names no registered version, or a version that cannot be used."""


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
        RegistryError: no such model, alias or version; the message lists the champions there are.
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
        raise RegistryError(f"{address}: not in the registry; champions there: {known}") from error
    tag = found.tags.get(MANIFEST_TAG)
    if not tag:
        raise RegistryError(f"{address}: version {found.version} was not registered by genrecall (no {MANIFEST_TAG} tag); use jobs/register_model.py")
    if not _SHA256.fullmatch(tag):  # it names a folder of the bundle cache
        raise RegistryError(f"{address}: version {found.version}: {MANIFEST_TAG} is no sha256: {tag[:80]!r}; register it again with jobs/register_model.py")
    return Version(name=name, number=int(found.version), manifest_sha256=tag)


def fetch_bundle(version: Version, client: MlflowClient, cache: Path | None = None) -> Path:
    """The folder of a version's bundle on this machine.

    Args:
        cache: keeps downloads, a folder for each manifest; None reads a local store in place and downloads a remote one to a
            temporary folder.

    Raises:
        BundleError: no bundle there, or its manifest is not the one that was registered.
        MlflowException, OSError: the store does not answer.
    """
    if cache is None:
        return _checked(_download(version, client, None), version)
    kept = cache / version.manifest_sha256
    if not kept.is_dir():
        partial = cache / f".{uuid.uuid4().hex}.tmp"
        partial.mkdir(parents=True)
        try:
            bundle = _checked(_download(version, client, partial), version)
            if not kept.is_dir():  # else another replica was faster
                bundle.rename(kept)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _checked(kept, version)


def _download(version: Version, client: MlflowClient, folder: Path | None) -> Path:
    source = f"{client.get_model_version_download_uri(version.name, str(version.number)).rstrip('/')}/{BUNDLE_FOLDER}"
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
