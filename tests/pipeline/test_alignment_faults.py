"""The alignment of the recipe `tiny` again, with a rollout actor, the reward actor and the learner's worker killed on the way: it ends with the same model."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from safetensors.numpy import load_file

from genrecall import train_worker
from genrecall.pipeline import Pipeline
from genrecall.recipes import MAIN_VARIANT
from genrecall.rl import eg_grpo
from genrecall.storage import Artifact

OF_THE_PROCESSES = ("seconds_experience", "seconds_update", "replaced_actors")


def disturbed_loop(loop_config: dict[str, Any]) -> None:
    """The learner's loop; once, two actors die after the first checkpoint, and this very process in the step after."""
    marker, calls = Path(loop_config["marker"]), iter(range(1000))

    class Disturbed(train_worker.TrainWorker):
        def save(self, *args: Any) -> None:
            super().save(*args)
            if not marker.exists():
                for name in (loop_config["rollout_names"][0], loop_config["reward_name"]):
                    ray.kill(ray.get_actor(name, namespace=loop_config["namespace"]))

        def loss(self, *batch: Any) -> Any:
            if next(calls) == 1 and not marker.exists():
                marker.touch()
                os._exit(1)
            return super().loss(*batch)

    vars(eg_grpo)["TrainWorker"] = Disturbed
    eg_grpo.align_loop(loop_config)


def outcome(aligned: Artifact) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Final weights and the health of every step, less what depends on the processes."""
    rows = pq.read_table(aligned.file("health.parquet")).to_pylist()
    return load_file(aligned.file("stage4") / "model.safetensors"), [{k: v for k, v in row.items() if k not in OF_THE_PROCESSES} for row in rows]


def test_an_alignment_whose_processes_die_ends_with_the_same_model(tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    fit, marker = eg_grpo.fit, tmp_path / "killed"
    monkeypatch.setattr(eg_grpo, "fit", lambda loop, config, **options: fit(disturbed_loop, {**config, "marker": str(marker)}, **options))
    inputs = {name: tiny_pipeline.existing(name) for name in ("dataset", "encoder")}
    inputs |= {name: tiny_pipeline.existing(f"{MAIN_VARIANT}/{name}") for name in ("sid_index", "generator")}
    train = replace(tiny_pipeline.recipe.train, checkpoint_every_steps=1, max_failures=1)
    again = eg_grpo.align_generator(tiny_pipeline.recipe.align, **inputs, ranker=None, uri=str(tmp_path / "aligned"), train=train)
    assert marker.exists()
    (weights, rows), (expected, expected_rows) = outcome(again), outcome(tiny_pipeline.existing("aligned"))
    assert [row["step"] for row in rows] == [0.0, 1.0, 2.0]
    np.testing.assert_equal(rows, expected_rows)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
