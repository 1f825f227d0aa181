"""Rollouts per second against the number of rollout actors: the real actors on Ray, as an alignment's learner uses them.

Each call publishes a new version of the weights, as every step does, and collects the groups of all requests, experts included. Wall-clock time, since
the work is other processes'; every actor computes on one thread. All pools work within each repeat, one after the other.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from measurement import ratios, seconds

from genrecall.config import to_dict
from genrecall.generator.model import Decoder
from genrecall.local_ray import ensure_ray
from genrecall.rl.actors import NamedActor, RolloutPool, Supervisor
from genrecall.rl.align_config import AlignConfig
from genrecall.rl.rollout import START_STAGE, RolloutActor, RolloutConfig, RolloutTask, weights_of
from genrecall.sid.trie import Trie
from genrecall.storage import Stage


def pool_sizes() -> list[int]:
    """1, 2, 4 and so on, as far as the machine has cores, and 2 at least."""
    return [1 << power for power in range(max(2, os.cpu_count() or 1).bit_length())]


def compare_pools(
    model: Decoder, trie: Trie, tasks: Sequence[RolloutTask], config: RolloutConfig, sizes: Sequence[int], repeats: int, record: Callable[..., None]
) -> None:
    """Collect the groups of all tasks with pools of each size; the first is what the others are compared with."""
    requests = sum(len(task.request_rows) for task in tasks)
    with tempfile.TemporaryDirectory() as folder, _actors(model, trie, config, max(sizes), Path(folder)) as actors:
        pools = {size: RolloutPool(actors[:size], Supervisor(timeout_s=300.0)) for size in sizes}
        weights, versions = weights_of(model), itertools.count()

        def collect(pool: RolloutPool) -> None:
            pool.publish(next(versions), weights)
            pool.collect(pool.submit(tasks))

        for pool in pools.values():
            collect(pool)
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(repeats):
            for size, pool in pools.items():
                times[size].append(seconds(lambda pool=pool: collect(pool)))
    for size, values in times.items():
        options = {"batch": requests, "threads": 1, "table": "throughput"}
        record(f"actors_{size}", "rollouts_per_s", [requests * config.group_size / value for value in values], **options)
        if size != sizes[0]:
            record(f"actors_{size}", f"speedup_vs_actors_{sizes[0]}", ratios(times[sizes[0]], values), **options)


@contextmanager
def _actors(model: Decoder, trie: Trie, config: RolloutConfig, count: int, folder: Path) -> Iterator[list[NamedActor]]:
    """Rollout actors that read a decoder and a trie from artifacts in `folder`; gone afterwards, with the Ray that was started for them."""

    def written(kind: str, fill: Callable[[Path], None]) -> str:
        stage = Stage(kind=kind, uri=str(folder / kind), config=config, algorithm_version=1, parents={}, seed=0, job="benchmark")
        with stage.write() as draft:
            fill(draft.path)
        return stage.uri

    spec = {
        "generator": written("generator", lambda path: model.save_pretrained(path / START_STAGE)),
        "sid_index": written("sid_index", lambda path: trie.save(path / "trie")),
        "rollout": to_dict(config),
        "use_gpu": False,
    }
    started = not ray.is_initialized()
    ensure_ray()
    run, cpus = uuid.uuid4().hex[:8], AlignConfig().cpus_per_rollout
    actors = [NamedActor(RolloutActor, spec, name=f"benchmark-{run}-{number}", namespace="genrecall-benchmark", cpus=cpus) for number in range(count)]
    try:
        for actor in actors:  # they start up side by side
            _ = actor.handle
        yield actors
    finally:
        for actor in actors:
            actor.kill()
        if started:
            ray.shutdown()
