"""MLflow: one run a stage, nested under the pipeline's run, with the stage's config, metrics and the hash of what it made."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from genrecall.config import Places, to_dict

EXPERIMENT = "genrecall"


def use_tracking(places: Places) -> None:
    """Point MLflow at the run's tracking store (sqlite in the home by default), keeping its files in the home too."""
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if places.tracking_uri.startswith("sqlite:///"):
        Path(places.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(places.tracking_uri)
    client = MlflowClient()
    if client.get_experiment_by_name(EXPERIMENT) is None:
        location = places.home if "://" in places.home else Path(places.home).as_uri()
        try:
            client.create_experiment(EXPERIMENT, artifact_location=f"{location}/mlflow")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
    mlflow.set_experiment(EXPERIMENT)


@contextlib.contextmanager
def stage_run(name: str, config: Any, *, tags: Mapping[str, str] | None = None, parent_run_id: str | None = None) -> Iterator[str]:
    """Run the block inside an MLflow run called `name` and yield its run id.

    The config's leaves become parameters. A block that raises leaves the run marked FAILED.

    Args:
        parent_run_id: the run it belongs to; default: the one active in this thread, if any.
    """
    parent = mlflow.active_run()
    parent_run_id = parent_run_id or (parent.info.run_id if parent else None)
    with mlflow.start_run(run_name=name, nested=parent_run_id is not None, parent_run_id=parent_run_id, tags=dict(tags or {})) as run:
        mlflow.log_params({key: str(value)[:500] for key, value in flatten(to_dict(config)).items()})
        yield run.info.run_id


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: `clk@10` becomes `clk_at_10`, other signs underscores."""
    return re.sub(r"[^\w .:/-]", "_", name.replace("@", "_at_"))


class MetricLog:
    """Writes metrics and tags of one run from any process, in batches; does nothing without a run id."""

    def __init__(self, tracking_uri: str | None, run_id: str | None) -> None:
        self._client = MlflowClient(tracking_uri) if tracking_uri and run_id else None
        self._run_id = run_id or ""

    def write(self, records: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Write `(step, time in ms, {name: value})` records."""
        if self._client is None or not records:
            return
        metrics = [Metric(metric_name(name), value, time_ms, step) for step, time_ms, values in records for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        if self._client is not None:
            self._client.log_batch(self._run_id, tags=[RunTag(name, value) for name, value in tags.items()])
