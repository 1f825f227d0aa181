"""An alignment whose driver is killed and that is run again goes on at its last step. Run as a program, this file is that driver."""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from safetensors.numpy import load_file

from genrecall import train_worker
from genrecall.rl import eg_grpo
from genrecall.rl.align_config import AlignConfig
from genrecall.storage import Artifact, open_artifact
from genrecall.train_worker import TrainSettings

CONFIG = AlignConfig(steps=3, requests_per_step=4, group_size=4, num_experts=1, learning_rate=1e-3, warmup_steps=0, rollout_actors=1)
PARTS = ("dataset", "encoder", "sid_index", "generator")


def watched_loop(loop_config: dict[str, Any]) -> None:
    """The learner's loop; the file `seen` gets a line with each update that begins, and update `hangs_at` never ends."""

    class Watched(train_worker.TrainWorker):
        def loss(self, *batch: Any) -> Any:
            with open(loop_config["seen"], "a") as file:
                file.write(f"{self._step}\n")
            if self._step == loop_config["hangs_at"]:
                time.sleep(600)
            return super().loss(*batch)

    vars(eg_grpo)["TrainWorker"] = Watched
    eg_grpo.align_loop(loop_config)


def align_watched(parts: Mapping[str, Artifact], uri: str, seen: str, *, hangs_at: int = -1) -> Artifact:
    """Align with `watched_loop`; checkpoints come as they do by default."""
    fit = eg_grpo.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eg_grpo, "fit", lambda loop, config, **options: fit(watched_loop, {**config, "seen": seen, "hangs_at": hangs_at}, **options))
        return eg_grpo.align_generator(CONFIG, **{name: parts[name] for name in PARTS}, ranker=None, uri=uri, train=TrainSettings())


def outcome(aligned: Artifact) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Final weights and the health of every step, less what depends on the machine."""
    rows = pq.read_table(aligned.file("health.parquet")).to_pylist()
    return load_file(aligned.file("stage4") / "model.safetensors"), [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def noted_a_checkpoint(uri: str) -> bool:
    """Whether there is a checkpoint that a run under way would be resumed from."""
    return any('"checkpoint_dir_name"' in file.read_text() for file in Path(f"{uri}.work").glob("*/checkpoint_manager_snapshot.json"))


@pytest.mark.timeout(900)
def test_an_alignment_whose_driver_is_killed_goes_on_at_its_last_step(ray_cluster: None, untrained_line: Callable[..., Any], tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    parts, seen = untrained_line.parts(), tmp_path / "seen"  # type: ignore[attr-defined]
    undisturbed = align_watched(parts, str(tmp_path / "undisturbed"), str(tmp_path / "all"))
    assert (tmp_path / "all").read_text().split() == ["0", "1", "2"]
    uri = str(tmp_path / "aligned")
    with subprocess.Popen([sys.executable, __file__, ray.get_runtime_context().gcs_address, uri, str(seen), *(parts[name].uri for name in PARTS)]) as driver:
        try:
            deadline = time.monotonic() + 400
            # Ray looks for reports every two seconds; what it has not noted yet when it dies is not resumed from.
            while not (seen.exists() and seen.read_text().split() == ["0", "1"] and noted_a_checkpoint(uri)):
                assert driver.poll() is None, "the driver ended before its second update"
                assert time.monotonic() < deadline, "the driver came to no second update"
                time.sleep(0.2)
        finally:
            driver.send_signal(signal.SIGKILL)
    again = align_watched(parts, uri, str(seen))
    assert seen.read_text().split() == ["0", "1", "1", "2"]
    (weights, rows), (expected, expected_rows) = outcome(again), outcome(undisturbed)
    np.testing.assert_equal(rows, expected_rows)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    restarts = [json.loads(one.file("training.json").read_text())["restarts"] for one in (undisturbed, again)]
    assert restarts == [0, 1]


if __name__ == "__main__":
    address, aligned_uri, seen_file, *uris = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    align_watched({name: open_artifact(uri) for name, uri in zip(PARTS, uris, strict=True)}, aligned_uri, seen_file, hangs_at=1)
