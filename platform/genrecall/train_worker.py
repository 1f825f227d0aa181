"""The one place where Ray Train and DeepSpeed meet: start a worker group, step, checkpoint, resume, export.

A training stage gives `fit` a module-level loop that takes only JSON. Inside the loop a `TrainWorker` wraps the model and its
loss function in a DeepSpeed engine. Checkpoints lie in the stage's work folder; a rerun of the same stage (same config, same
parents) goes on from the last one, because batches are drawn from (seed, step, rank) and hold no iterator state.

ZeRO stages 0 to 2 are offered. Stage 3 is not: the decoder reads its output head level by level, outside the `forward` calls
whose hooks gather stage 3's shards, and the models here are far below the size that would need it.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import atexit
import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow.fs
import ray
import torch
from ray import train as ray_train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import Tensor, nn

from genrecall.device import default_device, default_dtype
from genrecall.local_ray import ensure_ray
from genrecall.storage import Stage
from genrecall.tracking import MetricLog

logger = logging.getLogger(__name__)

_STATE = "state.json"
_WRITTEN_BY = ("num_workers", "zero_stage")  # settings that a checkpoint's shards hang on
_SHOWN_METRICS = 8  # in a progress line; MLflow gets all of them


class TrainingError(RuntimeError):
    """A training run that did not finish; the message says where its checkpoint lies."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How training is spread over the cluster. Not part of any artifact's identity; `num_workers` is noted in its manifest.

    A checkpoint is resumed with the `num_workers` and `zero_stage` that wrote it, since each worker holds its share of the optimizer.
    """

    num_workers: int = 1
    cpus_per_worker: int = 1
    use_gpu: bool = False
    zero_stage: Literal[0, 1, 2] = 1
    checkpoint_every_steps: int = 500  # at the latest; alignment, whose steps are dear, takes them by what they cost
    max_failures: int = 1
    tracking_uri: str | None = None
    tracking_run_id: str | None = None

    def problems(self) -> list[str]:
        return [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("num_workers", "cpus_per_worker", "checkpoint_every_steps")
            if getattr(self, name) < 1
        ]


def fits_at_once(train: TrainSettings) -> int:
    """How many training runs of these settings the cluster can hold side by side, at least 1."""
    ensure_ray()
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    by_cpu = int(cluster.get("CPU", 0)) // (train.num_workers * train.cpus_per_worker)
    return max(1, min(by_cpu, int(cluster.get("GPU", 0)) // train.num_workers) if train.use_gpu else by_cpu)


def fit(loop: Callable[[dict[str, Any]], None], loop_config: Mapping[str, Any], *, name: str, stage: Stage, train: TrainSettings) -> Path:
    """Run `loop` on a Ray Train worker group and return the local folder of the files its `finish` exported.

    Args:
        loop: a module-level function; gets `loop_config` plus what `TrainWorker` needs, all JSON.
        name: shown in progress lines.
        stage: the artifact being made; checkpoints go to its `work_uri`, and a rerun resumes from there.
        train: worker count and resources.

    Raises:
        TrainingError: a checkpoint of other `num_workers` or `zero_stage`; more workers than the cluster holds; the workers failed more than
            `max_failures` times (the last checkpoint is kept).
    """
    _check_resumable(name, stage.work_uri, train)
    ensure_ray()
    needed = train.num_workers * train.cpus_per_worker
    available = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    if needed > available:
        raise TrainingError(
            f"{name}: asks for {train.num_workers} workers x {train.cpus_per_worker} CPUs, the cluster has {available}; "
            "lower train.num_workers or train.cpus_per_worker"
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if train.use_gpu and gpus < train.num_workers:
        raise TrainingError(f"{name}: asks for {train.num_workers} GPUs, the cluster has {gpus}; set train.use_gpu=false or lower train.num_workers")
    work_parent, _, work_name = stage.work_uri.rpartition("/")
    if "://" not in work_parent:
        Path(work_parent).mkdir(parents=True, exist_ok=True)
    config = {**loop_config, "_worker": {"name": name, "train": json.loads(json.dumps(train.__dict__))}}
    trainer = TorchTrainer(
        functools.partial(_run_loop, loop),
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker, **({"GPU": 1} if train.use_gpu else {})},
        ),
        run_config=ray_train.RunConfig(
            name=work_name,
            storage_path=work_parent,
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=2),
            failure_config=ray_train.FailureConfig(max_failures=train.max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{name}: training failed; rerun the same job to go on from the last checkpoint in {stage.work_uri}: {error}") from error
    if result.checkpoint is None:
        raise TrainingError(f"{name}: the loop ended without TrainWorker.finish()")
    return _exported(result.checkpoint, remote="://" in work_parent)


def _exported(checkpoint: ray_train.Checkpoint, *, remote: bool) -> Path:
    """The folder that `finish` exported, of a remote checkpoint a copy that goes when this process ends. What the optimizer needs, several times larger, stays where it is."""
    if not remote:
        return Path(checkpoint.path) / "export"
    copy = Path(tempfile.mkdtemp(prefix="genrecall-export-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    pyarrow.fs.copy_files(f"{checkpoint.path}/export", str(copy), source_filesystem=checkpoint.filesystem)
    return copy


def _check_resumable(name: str, work_uri: str, train: TrainSettings) -> None:
    """Refuse a checkpoint that other settings wrote, before workers start and DeepSpeed fails to load it."""
    filesystem, root = fsspec.core.url_to_fs(work_uri)
    filesystem.invalidate_cache()
    ours = {setting: getattr(train, setting) for setting in _WRITTEN_BY}
    for file in sorted(filesystem.glob(f"{root}/checkpoint_*/{_STATE}")):
        theirs = json.loads(filesystem.cat_file(file)).get("written_by", ours)
        if theirs != ours:
            wanted, now = (" ".join(f"train.{setting}={value}" for setting, value in one.items()) for one in (theirs, ours))
            raise TrainingError(
                f"{name}: the checkpoint in {work_uri} was written with {wanted}, this run has {now}; go on from it with {wanted}, or begin again with --force"
            )


def _run_loop(loop: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    ours = logging.getLogger("genrecall")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not config["_worker"]["train"]["use_gpu"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(max(1, int(config["_worker"]["train"]["cpus_per_worker"])))
    loop(config)


def cosine_schedule(peak: float, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step: linear from 0 to `peak` over `warmup_steps`, then a cosine to a tenth of it at `total_steps`."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))

    return rate


class CheckpointPace:
    """When the next checkpoint is cheap: times in seconds of one clock."""

    def __init__(self) -> None:
        self._cost, self._last = 0.0, 0.0

    def took(self, started: float, ended: float) -> None:
        """A checkpoint was made."""
        self._cost, self._last = ended - started, ended

    def due(self, now: float, max_share: float) -> bool:
        """Whether another like the last one would leave the share of the time since then at or below `max_share`; the first is always due."""
        return self._cost <= max_share * (now - self._last + self._cost)


class TrainWorker:
    """One Ray Train worker's model, optimizer and checkpoints, on DeepSpeed.

    Args:
        model: trained in place; `worker.model` is the same object.
        loss_fn: `loss_fn(model, *batch)` returns the scalar loss, or (loss, {metric: scalar tensor}). Must not keep state.
        learning_rate: step -> learning rate.
        weight_decay: AdamW's, on matrices only (vectors and scalars are not decayed).
        gradient_clipping: largest gradient norm.
        betas: AdamW's.
        total_steps: for progress lines.
        loop_config: what the loop received.
        dtype: of the weights while training; default: `device.default_dtype`. Models with statistics of their own need float32.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        *,
        learning_rate: Callable[[int], float],
        total_steps: int,
        loop_config: Mapping[str, Any],
        weight_decay: float = 0.0,
        gradient_clipping: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        dtype: torch.dtype | None = None,
    ) -> None:
        import deepspeed  # slow to import, and only workers need it

        # On CPUs DeepSpeed would compile a shared-memory all-reduce with g++ at the first fit of every environment (half a minute,
        # and no compiler is asked for otherwise); gloo does that work.
        # (By its full name: the attribute `deepspeed.comm.torch` is PyTorch itself.)
        vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None

        settings = loop_config["_worker"]["train"]
        context = ray_train.get_context()
        self.name = str(loop_config["_worker"]["name"])
        self.rank = int(context.get_world_rank())
        self.world_size = int(context.get_world_size())
        self.device = default_device()
        self.model = model.to(self.device)
        self.total_steps = total_steps
        self._learning_rate = learning_rate
        self._written_by = {setting: int(settings[setting]) for setting in _WRITTEN_BY}
        self._checkpoint_every = int(settings["checkpoint_every_steps"])
        self._step = 0
        self._metric_log = MetricLog(settings["tracking_uri"], settings["tracking_run_id"]) if self.rank == 0 else None
        self._pending: list[tuple[int, int, Mapping[str, Any]]] = []
        self._started = self._last_line = time.monotonic()
        self._first_step = 0
        self._pace = CheckpointPace()

        dtype = dtype or default_dtype(self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate(0), betas=betas, fused=True)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it builds
            self._engine, *_ = deepspeed.initialize(
                model=_LossProgram(self.model, loss_fn),
                optimizer=optimizer,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": 1,
                    "gradient_clipping": gradient_clipping,
                    "steps_per_print": 2**31,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": int(settings["zero_stage"])},
                    "bf16": {"enabled": dtype is torch.bfloat16},
                },
            )

    def resume(self, read: Callable[[Path], None] | None = None) -> dict[str, Any]:
        """The state given to the last `save` (with "step"), its weights, optimizer and RNG loaded; {} at a fresh start.

        Args:
            read: called with the checkpoint's folder, to read what `save` wrote there; not at a fresh start.
        """
        checkpoint = ray_train.get_checkpoint()
        if checkpoint is None:
            return {}
        with checkpoint.as_directory() as folder:
            state: dict[str, Any] = json.loads((Path(folder) / _STATE).read_text())
            # DeepSpeed checkpoints are torch files; this one was written by this very stage, under a name made of its config and parents.
            self._engine.load_checkpoint(folder, tag="deepspeed")
            if read is not None:
                read(Path(folder))
        self._step = self._first_step = int(state["step"])
        if self.rank == 0:
            logger.info("%s: resuming at step %d of %d", self.name, self._step, self.total_steps)
        return state

    def loss(self, *batch: Any) -> Any:
        """`loss_fn(model, *batch)` through the engine."""
        return self._engine(*batch)

    def step(self, loss: Tensor) -> None:
        """Backward pass, gradient reduction over the workers, clipping, one optimizer step at the schedule's rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(self._step)
        self._engine.backward(loss)
        self._engine.step()
        self._step += 1

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep metrics of a step (rank 0); about every five seconds they go to MLflow and a progress line is printed."""
        if self._metric_log is None:
            return
        now = time.monotonic()
        self._pending.append((step, int(time.time() * 1000), {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}))
        if now - self._last_line > 5.0 or step + 1 >= self.total_steps:
            self._last_line = now
            self._flush()
            done = step + 1 - self._first_step
            left_s = (now - self._started) / max(1, done) * (self.total_steps - step - 1)
            values = "  ".join(f"{k} {float(v.detach() if isinstance(v, Tensor) else v):.4g}" for k, v in itertools.islice(metrics.items(), _SHOWN_METRICS))
            logger.info("%s: step %d/%d  %s  (about %d s left)", self.name, step + 1, self.total_steps, values, left_s)

    def checkpoint_due(self, step: int, *, max_share: float = 0.0) -> bool:
        """Whether a checkpoint should follow this step; every rank calls this and gets the same answer.

        Args:
            max_share: of the time that checkpoints may take; 0 leaves only `checkpoint_every_steps` to decide.
        """
        if step + 1 >= self.total_steps:
            return False
        if (step + 1) % self._checkpoint_every == 0:
            return True
        if not max_share:
            return False
        due = torch.tensor(int(self._pace.due(time.monotonic(), max_share)), device=self.device)
        if self.world_size > 1:  # clocks differ
            torch.distributed.broadcast(due, src=0)
        return bool(due)

    def save(self, state: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Store a checkpoint; every rank calls this. `state` is JSON and holds "step", the next step to run.

        Args:
            write: called on rank 0 with the checkpoint's folder, to keep more there than the model and the state.
        """
        started = time.monotonic()
        self._report(state, export=None, write=write)
        self._pace.took(started, time.monotonic())

    def finish(
        self,
        export: Callable[[Path], None],
        metrics: Mapping[str, float] | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        write: Callable[[Path], None] | None = None,
    ) -> None:
        """Store the last checkpoint with the files that `export(folder)` writes on rank 0; every rank calls this.

        Args:
            metrics: final ones, for MLflow.
            state, write: as in `save`, for a run whose driver dies now and that is started again; "step" is filled in.
        """
        if self._metric_log is not None:
            self._flush()
            if metrics:
                self._metric_log.write([(self._step, int(time.time() * 1000), metrics)])
        self._report({**(state or {}), "step": self._step}, export=export, write=write)

    def _flush(self) -> None:
        assert self._metric_log is not None
        kept = self._pending[:: max(1, len(self._pending) // 20)]  # at most about 20 points each flush
        self._metric_log.write([(step, at, {k: float(v) for k, v in values.items()}) for step, at, values in kept])
        self._pending = []

    def _report(self, state: Mapping[str, Any], export: Callable[[Path], None] | None, write: Callable[[Path], None] | None = None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="genrecall-checkpoint-"))
        try:
            self._engine.save_checkpoint(str(folder), tag="deepspeed")
            if self.rank == 0:
                (folder / _STATE).write_text(json.dumps({**state, "written_by": self._written_by}))
                if write is not None:
                    write(folder)
                if export is not None:
                    (folder / "export").mkdir()
                    export(folder / "export")
            ray_train.report({"step": float(state["step"])}, checkpoint=ray_train.Checkpoint.from_directory(str(folder)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _LossProgram(nn.Module):
    """Gives DeepSpeed a module whose forward is the whole loss, so that losses may call any method of the model."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, *batch: Any) -> Any:
        return self._loss_fn(self.model, *batch)
