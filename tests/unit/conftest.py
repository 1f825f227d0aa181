"""A registry of one's own for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from genrecall.config import Places
from genrecall.tracking import use_tracking


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite registry without models: making its tables takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("registry")
    use_tracking(Places(home=str(home), data=str(home), tracking_uri=f"sqlite:///{home}/mlflow.db"))
    return home / "mlflow.db"


@pytest.fixture
def registry(empty_registry: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    """MLflow pointed at a fresh registry under `tmp_path`."""
    shutil.copy2(empty_registry, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.set_experiment(experiment_id=mlflow.create_experiment("test", artifact_location=(tmp_path / "mlflow").as_uri()))
    assert experiment is not None
    yield MlflowClient(uri, registry_uri=uri)
    mlflow.set_tracking_uri(before)
