"""A training driver that dies and is run again, in one process: the loop is the real one, its worker keeps checkpoints in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from genrecall.config import to_dict
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.generator import sft
from genrecall.generator.generator_config import GeneratorConfig, StageConfig
from genrecall.generator.sft import train_tokenizer

STAGE = StageConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1)
CONFIG = GeneratorConfig(
    vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48, stage1=STAGE, stage2=STAGE, stage3=STAGE
)


class Killed(BaseException):
    """What the death of a process looks like from within one."""


class Plain:
    """`TrainWorker` without Ray and DeepSpeed; a checkpoint after every step."""

    checkpoint: dict | None = None
    dies_before_step: int | None = None
    exported: Path

    def __init__(self, model, loss_fn, *, learning_rate, weight_decay, gradient_clipping, total_steps, loop_config) -> None:
        self.model, self.rank, self.world_size, self.device, self.total_steps = model, 0, 1, torch.device("cpu"), total_steps
        self._loss_fn, self._rate, self._step, self._folder = loss_fn, learning_rate, 0, Path(loop_config["folder"])
        self._optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)

    def resume(self):
        if (found := Plain.checkpoint) is None:
            return {}
        self.model.load_state_dict(found["model"])
        self._optimizer.load_state_dict(copy.deepcopy(found["optimizer"]))
        self._step = json.loads(found["state"])["step"]
        return json.loads(found["state"])

    def loss(self, *batch):
        if self._step == Plain.dies_before_step:
            Plain.dies_before_step = None
            raise Killed
        return self._loss_fn(self.model, *batch)

    def step(self, loss):
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.param_groups[0]["lr"] = self._rate(self._step)
        self._optimizer.step()
        self._step += 1

    def log(self, step, metrics):
        pass

    def checkpoint_due(self, step):
        return True

    def save(self, state):
        parts = {"model": copy.deepcopy(self.model.state_dict()), "optimizer": copy.deepcopy(self._optimizer.state_dict())}
        Plain.checkpoint = {**parts, "state": json.dumps(state)}

    def finish(self, export, metrics=None, *, state=None):
        self.save({**(state or {}), "step": self._step})
        Plain.exported = self._folder / "export"
        Plain.exported.mkdir()
        export(Plain.exported)


@pytest.fixture
def run(untrained_line, tmp_path, monkeypatch):
    """`run()` trains and returns the folder exported."""
    torch.set_num_threads(1)
    parts = untrained_line.parts()
    catalog = load_catalog(parts["dataset"])
    tokenizer = train_tokenizer(CONFIG, catalog, load_requests(parts["dataset"], "train", catalog))
    names = iter(range(100))
    monkeypatch.setattr(sft, "TrainWorker", Plain)
    Plain.checkpoint = Plain.dies_before_step = None
    stages_uri = str(tmp_path / "stages")

    def trained() -> Path:
        folder = tmp_path / str(next(names))
        folder.mkdir()
        uris = {name: parts[name].uri for name in ("dataset", "encoder", "sid_index")}
        sft._loop({"config": to_dict(CONFIG), **uris, "tokenizer": tokenizer.to_json(), "stages_uri": stages_uri, "folder": str(folder)})
        return Plain.exported

    return trained


def assert_same(one: Path, other: Path) -> None:
    for stage in ("stage1", "stage2"):  # no shopper in these requests: there is no stage 3
        weights, others = (load_file(folder / stage / "model.safetensors") for folder in (one, other))
        assert all(np.array_equal(weights[name], others[name]) for name in weights | others)
    records = [json.loads((folder / "training.json").read_text())["stages"] for folder in (one, other)]
    assert [[{**entry, "seconds": 0} for entry in record] for record in records] == [[{**entry, "seconds": 0} for entry in records[0]]] * 2
    assert [entry["stage"] for entry in records[0]] == ["stage1", "stage2"]


@pytest.mark.parametrize("dies_before_step", [1, 5])
def test_a_driver_that_dies_and_is_run_again_ends_where_an_undisturbed_one_does(run, dies_before_step):
    undisturbed = run()
    Plain.checkpoint, Plain.dies_before_step = None, dies_before_step
    with pytest.raises(Killed):
        run()
    assert_same(run(), undisturbed)


def test_a_driver_that_dies_after_the_last_step_exports_what_was_there(run):
    before = run()
    assert_same(run(), before)  # from the last checkpoint: nothing is left to do
