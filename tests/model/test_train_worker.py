"""The worker group itself: two workers on ZeRO 2, one of which dies; the run resumes and exports."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor, nn

from genrecall.storage import Stage
from genrecall.train_worker import CheckpointPace, TrainingError, TrainSettings, TrainWorker, cosine_schedule, fit

STEPS = 30


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    seed: int = 0


def squared_error(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows) + rows).square().mean()


def loop(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    worker = TrainWorker(model, squared_error, learning_rate=lambda step: 0.05, total_steps=STEPS, loop_config=config)
    start = int(worker.resume().get("step", 0))
    died = Path(config["marker"])
    for step in range(start, STEPS):
        if step == 15 and worker.rank == 1 and not died.exists():
            died.write_text("once")
            raise RuntimeError("a worker dies")
        rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(step * worker.world_size + worker.rank))
        loss = worker.loss(rows)
        worker.step(loss)
        worker.log(step, {"loss": loss})
        if worker.checkpoint_due(step):
            worker.save({"step": step + 1})
    summary = {"start": start, "loss": float(loss.detach()), "world_size": worker.world_size}
    worker.finish(lambda folder: (folder / "summary.json").write_text(json.dumps(summary)) and None)


def stage(tmp_path: Path) -> Stage:
    return Stage(kind="toy", uri=str(tmp_path / "toy"), config=ToyConfig(), algorithm_version=1, parents={}, seed=0, job="toy")


def test_a_run_whose_worker_dies_goes_on_from_its_checkpoint(ray_cluster: None, tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    train = TrainSettings(num_workers=2, cpus_per_worker=1, zero_stage=2, checkpoint_every_steps=10, max_failures=1)
    exported = fit(loop, {"marker": str(tmp_path / "died")}, name="toy", stage=stage(tmp_path), train=train)
    summary = json.loads((exported / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["start"] == 10  # not 0, and not 15: the last checkpoint
    assert summary["loss"] < 1.0  # 2.3 at the start
    assert exported.is_relative_to(tmp_path)
    # The driver dies before the artifact is written, and the job is run again with another number of workers.
    with pytest.raises(
        TrainingError, match=r"was written with train\.num_workers=2 train\.zero_stage=2, this run has train\.num_workers=1 train\.zero_stage=2"
    ):
        fit(loop, {}, name="toy", stage=stage(tmp_path), train=dataclasses.replace(train, num_workers=1))


def test_more_cpus_than_the_cluster_has_is_an_error_before_anything_starts(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="asks for 3 workers x 7 CPUs, the cluster has 2"):
        fit(loop, {}, name="toy", stage=stage(tmp_path), train=TrainSettings(num_workers=3, cpus_per_worker=7))


def test_cosine_schedule_warms_up_peaks_and_ends_at_a_tenth() -> None:
    rate = cosine_schedule(1.0, warmup_steps=10, total_steps=110)
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)


def test_a_checkpoint_waits_until_it_is_a_small_share_of_the_time() -> None:
    pace = CheckpointPace()
    assert pace.due(1000.0, 0.05)  # what it costs is not known yet, and there is nothing to go back to
    pace.took(1000.0, 1001.0)
    assert [pace.due(now, 0.05) for now in (1001.0, 1019.9, 1020.1)] == [False, False, True]  # 1 of 20 seconds
    pace.took(1030.0, 1030.1)  # 0.1 of 2 seconds
    assert [pace.due(now, 0.05) for now in (1031.9, 1032.1)] == [False, True]


def test_bad_settings_are_named() -> None:
    assert dataclasses.replace(TrainSettings(), num_workers=0).problems() == ["num_workers: must be at least 1, got 0"]
