"""A registry of one's own for each test, and an object store."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket on a mock server of the real API."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="artifacts")
    yield "s3://artifacts"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
