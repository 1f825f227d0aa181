"""Whose checkpoints a training goes on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs
import pytest
from ray.train import Checkpoint

from genrecall import train_worker
from genrecall.storage import Stage
from genrecall.train_worker import TrainingError, TrainSettings, _exported, fit


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


@pytest.mark.parametrize(
    ("written_by", "message"),
    [
        ({"num_workers": 8, "zero_stage": 1}, r"go on from it with train\.num_workers=8 train\.zero_stage=1, or begin again with --force"),
        (
            {"num_workers": 1, "zero_stage": 2},
            r"was written with train\.num_workers=1 train\.zero_stage=2, this run has train\.num_workers=1 train\.zero_stage=1",
        ),
    ],
)
def test_a_checkpoint_of_other_workers_is_refused_before_anything_starts(tmp_path: Path, written_by: dict[str, int], message: str) -> None:
    stage = Stage(kind="toy", uri=str(tmp_path / "toy"), config=Config(), algorithm_version=1, parents={}, seed=0, job="toy")
    checkpoint = Path(stage.work_uri) / "checkpoint_2026-01-01_00-00-00.000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 10, "written_by": written_by}))
    with pytest.raises(TrainingError, match=message):
        fit(lambda config: None, {}, name="toy", stage=stage, train=TrainSettings())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    for name in ("export/stage1/model.safetensors", "export/training.json", "deepspeed/optimizer.pt"):
        (tmp_path / "checkpoint" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint" / name).write_text(name)
    return Checkpoint(str(tmp_path / "checkpoint"), filesystem=pyarrow.fs.LocalFileSystem())


def test_of_a_remote_checkpoint_the_export_alone_is_copied_and_goes_with_the_process(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(train_worker.atexit, "register", lambda *call, **_: at_exit.append(call))
    copy = _exported(checkpoint, remote=True)
    assert {file.relative_to(copy).as_posix(): file.read_text() for file in copy.rglob("*") if file.is_file()} == {
        "stage1/model.safetensors": "export/stage1/model.safetensors",
        "training.json": "export/training.json",
    }
    assert at_exit == [(shutil.rmtree, copy)]
    shutil.rmtree(copy)
    assert _exported(checkpoint, remote=False) == Path(checkpoint.path) / "export"
