"""Registering bundles as MLflow model versions, and moving `champion` and `challenger` only through the gates.

A new version becomes `challenger`. `promote` reads the gates and moves `champion`; `rollback` moves it back to the version
before: one alias each, nothing is copied. A version that was rolled back from is promoted again only where it is named.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import Array, ColSpec, ParamSchema, ParamSpec, Schema

from genrecall.evaluation.gates import GateConfig, GateReport, check_gates
from genrecall.registry.versions import (
    BUNDLE_FOLDER,
    CHALLENGER,
    CHAMPION,
    MANIFEST_TAG,
    PROMOTED_AT_TAG,
    RegistryError,
    Version,
    fetch_metrics,
    is_address,
    resolve,
)
from genrecall.storage import MANIFEST, Artifact, sha256_of

PREVIOUS_TAG = "genrecall.previous_champion"
ROLLED_BACK_AT_TAG = "genrecall.rolled_back_at"
"""When the version was rolled back from: no schedule promotes it again."""

CATALOG_SEQ_TAG = "genrecall.catalog_seq"
"""What the version's items hold of the catalogue log: whoever compacts it looks here."""

UNFINISHED_TAG = "genrecall.unfinished"
"""On a version that is whole but for its alias: whoever registers the bundle again sets that."""

_PYFUNC_MODEL = Path(__file__).with_name("pyfunc_model.py")
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "query")]),
    outputs=Schema([ColSpec(Array("string"))]),
    params=ParamSchema([ParamSpec("beam_size", "long", 20), ParamSpec("limit", "long", 100)]),
)


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """Under which name versions are registered, and what a champion must pass."""

    model_name: str | None = None
    gates: GateConfig = GateConfig()  # noqa: RUF009 - frozen

    def problems(self) -> list[str]:
        """What cannot be used."""
        if self.model_name is None or is_address(f"models:/{self.model_name}@{CHAMPION}"):
            return []
        return [f"model_name: expected letters, digits, '.', '_', '-' and spaces, got {self.model_name!r}"]


def register(bundle: Artifact, model_name: str, *, metrics: Mapping[str, float]) -> Version:
    """Register a bundle as the next version of `model_name` and give it the alias `challenger`.

    A bundle that is registered already (same manifest) keeps its version and aliases; where that was cut short, it is made whole or registered anew. Runs inside the active
    MLflow run, else in one of its own.

    Args:
        metrics: the evaluation's headline numbers; linked to the logged model.
    """
    client = MlflowClient()
    manifest_sha256 = sha256_of(bundle.path / MANIFEST)
    for known in client.search_model_versions(f"name='{model_name}'"):
        if known.tags.get(MANIFEST_TAG) == manifest_sha256:
            if UNFINISHED_TAG in known.tags:
                _make_challenger(client, model_name, str(known.version))
            return resolve(f"models:/{model_name}/{known.version}", client)
    if mlflow.active_run() is None:
        with mlflow.start_run(run_name="register_model"):
            return register(bundle, model_name, metrics=metrics)
    with _under_its_name(bundle) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on type hints and input examples; the signature says it all
        info = mlflow.pyfunc.log_model(
            name="bundle",
            python_model=str(_PYFUNC_MODEL),
            artifacts={"bundle": str(folder)},
            signature=_SIGNATURE,
            pip_requirements=[],
            registered_model_name=model_name,
        )
    mlflow.log_metrics(dict(metrics), model_id=info.model_id)
    number = str(info.registered_model_version)
    client.set_model_version_tag(model_name, number, CATALOG_SEQ_TAG, str(bundle.json("bundle.json").get("catalog_seq", 0)))
    client.set_model_version_tag(model_name, number, UNFINISHED_TAG, "alias")
    client.set_model_version_tag(model_name, number, MANIFEST_TAG, manifest_sha256)  # before the alias: servers refuse a challenger without it
    _make_challenger(client, model_name, number)
    return resolve(f"models:/{model_name}/{number}", client)


def _make_challenger(client: MlflowClient, model_name: str, number: str) -> None:
    client.set_registered_model_alias(model_name, CHALLENGER, number)
    client.delete_model_version_tag(model_name, number, UNFINISHED_TAG)


def aliases_of(version: Version) -> list[str]:
    """The aliases that a version has now, sorted."""
    return sorted(MlflowClient().get_model_version(version.name, str(version.number)).aliases)


@contextlib.contextmanager
def _under_its_name(bundle: Artifact) -> Iterator[Path]:
    """The bundle's folder under the name it has inside a logged model: MLflow keeps the name of the folder it is given, and follows no links."""
    name = Path(BUNDLE_FOLDER).name
    if bundle.path.name == name:
        yield bundle.path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(bundle.path, Path(folder, name)))


def promote(version: Version, gates: GateConfig, *, named: bool = False) -> GateReport:
    """Make `version` the champion if it passes the gates against the present one.

    Args:
        named: somebody asks for this very version; else one that was rolled back from is refused, as a schedule would bring back what somebody took out.

    Returns:
        What the gates found; the alias has moved exactly when `passed`.

    Raises:
        RegistryError, BundleError, ArtifactError: either version's bundle cannot be read.
    """
    client = MlflowClient()
    champion = current_champion(version.name)
    if champion is not None and champion.number == version.number:
        return GateReport(passed=True, reasons=[f"{version.text} is the champion already"])
    rolled_back_at = client.get_model_version(version.name, str(version.number)).tags.get(ROLLED_BACK_AT_TAG)
    if rolled_back_at and not named:
        reason = f"{version.text} was rolled back from at {rolled_back_at}; train another, or name it: jobs/promote.py --version {version.number}"
        return GateReport(passed=False, reasons=[reason])
    report = check_gates(fetch_metrics(version, client), fetch_metrics(champion, client) if champion else None, gates)
    if report.passed and (now := current_champion(version.name)) != champion:  # fetching takes a while
        reason = f"{now.text if now else 'no version'} became the champion meanwhile, the gates judged against {champion.text if champion else 'none'}; promote again"
        return GateReport(passed=False, reasons=[reason])
    if report.passed:
        if champion is not None:
            client.set_model_version_tag(version.name, str(version.number), PREVIOUS_TAG, str(champion.number))
        if rolled_back_at:
            client.delete_model_version_tag(version.name, str(version.number), ROLLED_BACK_AT_TAG)
        _set_champion(client, version)
    return report


def rollback(model_name: str) -> Version:
    """Give `champion` back to the version that had it before; the one that is left is not promoted again unless it is named.

    Raises:
        RegistryError: there is no champion, or none before it.
    """
    client = MlflowClient()
    champion = current_champion(model_name)
    if champion is None:
        raise RegistryError(f"{model_name}: has no champion to roll back from")
    previous = client.get_model_version(model_name, str(champion.number)).tags.get(PREVIOUS_TAG)
    if not previous:
        raise RegistryError(f"{model_name}: version {champion.number} was the first champion; there is nothing to roll back to")
    target = resolve(f"models:/{model_name}/{previous}", client)
    client.set_model_version_tag(model_name, str(champion.number), ROLLED_BACK_AT_TAG, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    _set_champion(client, target)
    return target


def least_covered(model_name: str) -> tuple[int, int] | None:
    """The least that a version which may go live by one alias move holds of the catalogue log, and that version's number; None where there is no such version.

    Those are the champion, the one that `rollback` gives back where it was not deleted, and the challenger. A log that is compacted further is one that they are refused for.
    """
    client = MlflowClient()
    try:
        aliases = client.get_registered_model(model_name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    numbers = {str(number) for alias, number in aliases.items() if alias in (CHAMPION, CHALLENGER)}
    if CHAMPION in aliases:
        numbers |= {one for one in [client.get_model_version(model_name, str(aliases[CHAMPION])).tags.get(PREVIOUS_TAG)] if one}
    held = [
        (int(version.tags.get(CATALOG_SEQ_TAG, 0)), int(version.version))
        for version in client.search_model_versions(f"name='{model_name}'")
        if str(version.version) in numbers
    ]
    return min(held, default=None)


def current_champion(model_name: str) -> Version | None:
    """The version with the alias `champion`; None where no version has it.

    Raises:
        RegistryError: the champion was not registered by genrecall, so nothing can be compared with it.
    """
    client = MlflowClient()
    try:
        aliases = client.get_registered_model(model_name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return resolve(f"models:/{model_name}@{CHAMPION}", client) if CHAMPION in aliases else None


def _set_champion(client: MlflowClient, version: Version) -> None:
    client.set_registered_model_tag(version.name, PROMOTED_AT_TAG, datetime.datetime.now(datetime.UTC).isoformat())
    client.set_registered_model_alias(version.name, CHAMPION, str(version.number))
    aliases = client.get_registered_model(version.name).aliases
    if str(aliases.get(CHALLENGER)) == str(version.number):
        client.delete_registered_model_alias(version.name, CHALLENGER)
