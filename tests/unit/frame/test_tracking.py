"""The experiment that all runs share."""

from __future__ import annotations

import mlflow
from mlflow.tracking import MlflowClient

from genrecall.config import Places
from genrecall.tracking import EXPERIMENT, use_tracking


def test_two_jobs_that_start_at_once_on_a_new_store_share_one_experiment(registry, tmp_path, monkeypatch):
    looked = MlflowClient.get_experiment_by_name

    def another_was_faster(client, name):
        found = looked(client, name)
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", looked)
        client.create_experiment(name, artifact_location=(tmp_path / "theirs").as_uri())
        return found

    registry.rename_experiment(registry.get_experiment_by_name(EXPERIMENT).experiment_id, "before")
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", another_was_faster)
    use_tracking(Places(home=str(tmp_path), data="", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    with mlflow.start_run() as run:
        assert run.info.artifact_uri.startswith((tmp_path / "theirs").as_uri())
