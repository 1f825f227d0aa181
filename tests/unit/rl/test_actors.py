"""The rollout actors on Ray: the pool's size changes nothing, a killed actor is replaced and its work done again."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
import ray

from genrecall.rl.actors import ActorPoolError, NamedActor, RolloutPool, Supervisor
from genrecall.rl.rollout import RolloutActor, weights_of


class Flaky:
    """An actor that dies as long as its file says so."""

    def __init__(self, spec) -> None:
        self.spec = spec

    def work(self) -> str:
        import os
        from pathlib import Path

        if Path(self.spec["die"]).exists():
            os._exit(1)
        return "done"


def actors_of(spec, count: int) -> list[NamedActor]:
    run = uuid.uuid4().hex[:8]
    return [NamedActor(RolloutActor, spec, name=f"test-{run}-{number}", namespace="genrecall-test", cpus=0.1) for number in range(count)]


@pytest.mark.timeout(120)
def test_pool_size_changes_nothing_and_a_killed_actor_is_replaced(ray_cluster, toy, rollout_spec):
    tasks = [toy.task(rows) for rows in ([0, 1], [2, 3], [4, 5])]
    weights = weights_of(toy.model)
    actors = actors_of(rollout_spec, 2)
    try:
        supervisor = Supervisor(timeout_s=60.0)
        alone, pair = RolloutPool(actors[:1], supervisor), RolloutPool(actors, supervisor)
        alone.publish(0, weights)
        pair.publish(0, weights)
        by_one, by_two = alone.collect(alone.submit(tasks)), pair.collect(pair.submit(tasks))
        assert np.array_equal(by_one.tokens, by_two.tokens)
        assert np.array_equal(by_one.log_probs, by_two.log_probs)
        assert by_two.request_rows.tolist() == [0, 1, 2, 3, 4, 5]
        assert supervisor.replaced == 0

        calls = pair.submit(tasks)
        pair.publish(1, {name: 0 * value for name, value in weights.items()})
        actors[1].kill()  # with its task perhaps under way
        again = pair.collect(calls)
        assert np.array_equal(again.tokens, by_two.tokens)
        assert again.version == 0  # a call that is made again keeps its weights
        pair.publish(2, weights)
        ray.kill(actors[1].handle)  # behind the pool's back: its next call finds out
        after = pair.collect(pair.submit(tasks))
        assert np.array_equal(after.tokens, by_two.tokens)
        assert after.version == 2
        assert supervisor.replaced >= 1
    finally:
        for actor in actors:
            actor.kill()


@pytest.mark.timeout(120)
def test_an_actor_that_dies_again_and_again_is_an_error(ray_cluster, tmp_path):
    (tmp_path / "die").touch()
    actor = NamedActor(Flaky, {"die": str(tmp_path / "die")}, name=f"test-{uuid.uuid4().hex[:8]}", namespace="genrecall-test", cpus=0.1)
    supervisor = Supervisor(timeout_s=30.0)
    try:
        with pytest.raises(ActorPoolError, match="gave no answer in 3 attempts"):
            supervisor.result(supervisor.call(actor, lambda handle: handle.work.remote()))
        (tmp_path / "die").unlink()
        assert supervisor.result(supervisor.call(actor, lambda handle: handle.work.remote())) == "done"
    finally:
        actor.kill()


class SlowToReturn:
    """An actor that dies in its first call, and takes seconds to start again."""

    def __init__(self, spec) -> None:
        import time
        from pathlib import Path

        self.died = Path(spec["died"])
        if self.died.exists():
            time.sleep(4.0)

    def work(self, number: int) -> int:
        import os

        if not self.died.exists():
            self.died.touch()
            os._exit(1)
        return number


@pytest.mark.timeout(120)
def test_an_actor_that_crashes_is_waited_for_and_counted_once_whatever_it_had_under_way(ray_cluster, tmp_path):
    actor = NamedActor(SlowToReturn, {"died": str(tmp_path / "died")}, name=f"test-{uuid.uuid4().hex[:8]}", namespace="genrecall-test", cpus=0.1)
    supervisor = Supervisor(timeout_s=60.0)

    def work(number):
        return lambda handle: handle.work.remote(number)

    try:
        calls = [supervisor.call(actor, work(number)) for number in range(3)]
        assert [supervisor.result(call) for call in calls] == [0, 1, 2]
        assert supervisor.replaced == 1
    finally:
        actor.kill()
