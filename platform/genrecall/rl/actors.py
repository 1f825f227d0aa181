"""Ray actors round rollouts and rewards: named that are replaced when they die, their work done again.

The driver owns the actors and the learner finds them by name. A call carries everything it needs (the weights travel by reference and are
fetched once per version), so an actor holds no state that a fresh one would lack, and a call that is made again gives the
same answer: nothing is lost or counted twice when an actor dies.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from genrecall.rl.rollout import Rollout, RolloutTask

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ATTEMPTS = 3


class ActorPoolError(RuntimeError):
    """An actor that fails again and again; the message says which and how."""


class NamedActor:
    """An actor known by name, made when it is not there and replaced when it is lost.

    Args:
        actor_class: its class; `spec` is its only argument.
        name, namespace: under which every process of the job finds it.
        cpus, gpus: reserved for it.
    """

    def __init__(self, actor_class: type, spec: Mapping[str, Any], *, name: str, namespace: str, cpus: float, gpus: float = 0.0) -> None:
        self.name = name
        self._namespace = namespace
        self._spec = dict(spec)
        self._remote: Any = ray.remote(actor_class).options(name=name, namespace=namespace, get_if_exists=True, num_cpus=cpus, num_gpus=gpus, max_restarts=-1)
        self._handle: Any = None
        self.generation = 0  # goes up whenever the actor may be another one

    @property
    def handle(self) -> Any:
        """The actor, made now if need be."""
        if self._handle is None:
            self._handle = self._remote.remote(self._spec)
        return self._handle

    def forget(self) -> None:
        """Look the actor up, or make it, again at the next use."""
        self._handle = None
        self.generation += 1

    def kill(self) -> None:
        """End the actor for good, if it lives."""
        self.forget()
        try:
            ray.kill(ray.get_actor(self.name, namespace=self._namespace), no_restart=True)
        except ValueError:
            logger.debug("%s: not there any more", self.name)


@dataclass
class _Call:
    actor: NamedActor
    make: Callable[[Any], Any]  # handle -> object reference
    reference: Any
    generation: int  # of the actor that was called


class Supervisor:
    """Makes calls on named actors and makes them again when an actor dies or does not answer.

    Args:
        timeout_s: an actor that takes longer is killed and replaced.

    `replaced` counts lost actors, however many calls one of them had under way.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.replaced = 0

    def call(self, actor: NamedActor, make: Callable[[Any], Any]) -> _Call:
        """Start a call; `make(handle)` returns its object reference and may be used again."""
        return _Call(actor, make, make(actor.handle), actor.generation)

    def result(self, call: _Call) -> Any:
        """The call's result.

        Raises:
            ActorPoolError: it failed several times over.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return ray.get(call.reference, timeout=self._timeout_s)
            except (RayActorError, GetTimeoutError) as error:
                if attempt == _ATTEMPTS:
                    raise ActorPoolError(f"{call.actor.name}: gave no answer in {_ATTEMPTS} attempts of at most {self._timeout_s:g} s: {error}") from error
                if call.generation == call.actor.generation:  # else another call has found out before
                    self.replaced += 1
                    logger.warning("%s: lost (%s), replacing it", call.actor.name, type(error).__name__)
                    if isinstance(error, GetTimeoutError):
                        call.actor.kill()
                    else:
                        call.actor.forget()
                time.sleep(0.5 * attempt)  # a killed actor's name is free a moment later
                self._wait_for(call.actor)
                call.reference, call.generation = call.make(call.actor.handle), call.actor.generation
        raise AssertionError("unreachable")

    def _wait_for(self, actor: NamedActor) -> None:
        """Wait while Ray starts a crashed actor again: until then it refuses calls, which are no attempts. What else is wrong shows in the call."""
        deadline = time.monotonic() + self._timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                ray.get(actor.handle.__ray_ready__.remote(), timeout=left)
                return
            except ActorUnavailableError:
                time.sleep(0.2)
            except (RayActorError, GetTimeoutError):
                return


class RolloutPool:
    """Rollout actors that share the tasks of a step.

    Args:
        actors: one or more; the number changes the speed, never the samples.
        supervisor: replaces lost actors.
    """

    def __init__(self, actors: Sequence[NamedActor], supervisor: Supervisor) -> None:
        self._actors = list(actors)
        self._supervisor = supervisor
        self._version = -1
        self._weights: Any = None

    def publish(self, version: int, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Put the weights of a version where every actor can fetch them; tasks submitted from now on use them."""
        self._version = version
        self._weights = ray.put(dict(weights))

    def submit(self, tasks: Sequence[RolloutTask]) -> list[_Call]:
        """Start sampling; give the result to `collect`."""
        version, weights = self._version, self._weights

        def make(task: RolloutTask) -> Callable[[Any], Any]:
            return lambda handle: handle.sample.remote(version, weights, task)

        return [self._supervisor.call(self._actors[number % len(self._actors)], make(task)) for number, task in enumerate(tasks)]

    def collect(self, calls: Sequence[_Call]) -> Rollout:
        """The groups of all tasks, in the order of the tasks."""
        return Rollout.joined([self._supervisor.result(call) for call in calls])
