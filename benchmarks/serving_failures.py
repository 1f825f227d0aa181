"""Table `failures` of the serving benchmark: a replica, the proxy, the controller or the registry goes away under load."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving_bench import Bench, by_status, capacity_of, p99
from serving_server import CONTROLLER, PROXY, REPLICA, RegistryServer, Server, again, load

from genrecall.registry.versions import open_registry
from genrecall.serving.hot_swap import REGISTRY_AWAY


def failures(bench: Bench, folder: Path) -> None:
    """Two replicas over a registry behind `mlflow server`; one, the proxy, the controller or the registry goes away under load, with and without the client's
    retries. Once the registry is back, the alias moves."""
    with RegistryServer(bench.tracking_uri, folder / "registry") as registry, replace(bench, tracking_uri=registry.uri).server(folder, replicas=2) as server:
        capacity = capacity_of(bench, server)
        for row, retries in (("client retries", 2), ("no retries", None)):
            killed = server.pids(REPLICA)[0]
            replaced = functools.partial(_replaced, server, killed)
            _fail(bench, server, f"replica killed, {row}", retries, capacity, functools.partial(server.kill, killed), replaced)
        if proxies := server.pids(PROXY):
            _fail(bench, server, "proxy killed, no retries", None, capacity, lambda: server.kill(proxies[0]), lambda: server.call("/v1/model")[0] == 200)
        controllers = server.pids(CONTROLLER)
        _fail(bench, server, "controller killed", None, capacity, lambda: server.kill(controllers[0]), lambda: server.pids(CONTROLLER) not in ([], controllers))
        _registry_away(bench, server, registry, capacity)


def _registry_away(bench: Bench, server: Server, registry: RegistryServer, capacity: float) -> None:
    """The registry's server is killed and started again; whole again are the replicas here once each says in its log that the registry does not answer.

    Raises:
        RuntimeError: a replica did not notice, or does not follow the alias once the registry is back.
    """
    before = server.replicas_that_logged(REGISTRY_AWAY)

    def noticed() -> int:
        return sum(count > before.get(name, 0) for name, count in server.replicas_that_logged(REGISTRY_AWAY).items())

    _fail(bench, server, "registry away", None, capacity, registry.stop, lambda: noticed() == 2)
    bench.figure("failures", "replicas_that_noticed", [noticed()], row="registry away")
    fresh = again(open_registry(bench.tracking_uri), bench.name, bench.number)  # in the file: the server takes no source on its own disk
    registry.start()
    server.champion(fresh)
    live_s = server.wait_until(lambda: server.is_live_everywhere(fresh), wait_s=120.0)
    bench.figure("failures", "swap_live_s", [live_s], row="registry back")
    server.champion(bench.number)  # as other tables expect it


def _replaced(server: Server, killed: int) -> bool:
    """Whether Serve has missed a killed replica and sends requests to another in its place."""
    pids = server.pids(REPLICA)
    return killed not in pids and len(pids) == 2 and server.healthy_replicas() == 2


def _fail(bench: Bench, server: Server, row: str, retries: int | None, capacity: float, fault: Any, whole: Any) -> None:
    """A fault under constant load: what the clients saw, and how long until everything was there again."""
    sizes = bench.sizes
    plan = replace(bench.plan(server, bench.queries), clients=None, rate=sizes.load_share * capacity, retries=retries)
    with load(plan) as running:
        time.sleep(sizes.seconds / 2)
        began = time.monotonic()
        fault()
        struck = time.monotonic()
        server.wait_until(whole)
        back = time.monotonic()
        time.sleep(sizes.seconds / 2)
        outcomes = running.finish()
    failed = [one for one in outcomes if one.status != 200]
    bench.figure("failures", "requests", [len(outcomes)], row=row)
    bench.figure("failures", "errors_seen", [len(failed)], row=row)
    bench.figure("failures", "errors_sent_later", [sum(one.sent > struck for one in failed)], row=row)  # not in flight when the fault struck
    by_status(bench, "failures", "errors_seen", failed, row)
    bench.figure("failures", "last_error_s", [max((one.done - began for one in failed), default=0.0)], row=row)
    bench.figure("failures", "whole_again_s", [back - began], row=row)
    bench.figure("failures", "p99_ms", [p99([one for one in outcomes if one.done >= began])], row=row)
