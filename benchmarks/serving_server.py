"""The server under load of benchmarks/serving.py: the application as it is deployed, on a local Ray, over a copy of the registry.

The copy is of the registry's sqlite file alone, so that moving aliases and adding versions changes nothing real; bundles are read where they lie.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from mlflow.tracking import MlflowClient
from serving_load import Outcome, Plan

from genrecall.registry.versions import CHALLENGER, CHAMPION, MANIFEST_TAG, open_registry, resolve

ROOT = Path(__file__).resolve().parents[1]
KEY, ADMIN_KEY = "a-key-for-this-benchmark", "an-admin-key-for-this-benchmark"
# Ray's own niceness of 15 would give the cores to the engine in this process and to the load before the replica. Access logs go to files alone: this
# process, whose processor time is the benchmark's, would print a line for each request.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

REPLICA, PROXY, CONTROLLER, HAPROXY = "ray::ServeReplica:recall:", "ray::ProxyActor", "ray::ServeController", "haproxy"
APPLICATION = "recall"
SERVICER = "genrecall.serving.recall_pb2_grpc.add_RecallServiceServicer_to_server"
FOLLOW_S = 1.0
WAIT_S = 600.0


def copy_registry(tracking_uri: str, folder: Path) -> str:
    """The URI of a copy of a sqlite registry in `folder`.

    Raises:
        SystemExit: the registry is of another kind.
    """
    path = tracking_uri.removeprefix("sqlite:///")
    if path == tracking_uri:
        raise SystemExit(f"{tracking_uri}: expected a sqlite registry, of which aliases can be moved in a copy")
    open_registry(tracking_uri)
    target = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    return f"sqlite:///{target}"


def again(client: MlflowClient, name: str, number: int) -> int:
    """Register a version's bundle as one more version, which servers load afresh; its number."""
    known = client.get_model_version(name, str(number))
    files = client.get_model_version_download_uri(name, str(number))
    added = client.create_model_version(name, files, tags={MANIFEST_TAG: known.tags[MANIFEST_TAG]})
    return int(added.version)


class RegistryServer:
    """`mlflow server` over a sqlite registry, in a process group of its own; a context that ends it.

    Attributes:
        uri: as clients name it; the same after a restart.
    """

    def __init__(self, backend_uri: str, folder: Path) -> None:
        (port,) = _free_ports(1)
        self._backend_uri, self._folder, self._port = backend_uri, folder, port
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it ended, or does not answer within `WAIT_S`; its output says why.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        where = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        stores = ["--backend-store-uri", self._backend_uri, "--default-artifact-root", str(self._folder / "artifacts"), "--no-serve-artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "mlflow.log").open("ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *where, *stores]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, env=environment, start_new_session=True)
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow server does not answer:\n{(self._folder / 'mlflow.log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, ValueError):
            return False

    def stop(self) -> None:
        """End it with its workers, without notice."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> RegistryServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Load:
    """A load generator at work; `finish` ends it and gives its outcomes."""

    def __init__(self, plan: Plan) -> None:
        command = [sys.executable, str(Path(__file__).with_name("serving_load.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(plan)) + "\n")
        self._process.stdin.flush()
        self.cpu_s = 0.0

    def finish(self, *, at_once: bool = True) -> list[Outcome]:
        """End the run, or wait for the plan's own end; all outcomes in the order they were answered.

        Raises:
            RuntimeError: the generator failed; standard error says why.
        """
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        if at_once:
            self._process.stdin.close()
        said = self._process.stdout.read()
        if self._process.wait():
            raise RuntimeError(f"the load generator ended with {self._process.returncode}")
        if not at_once:
            self._process.stdin.close()
        found = json.loads(said)
        self.cpu_s = float(found["cpu_s"])
        return [Outcome(**one) for one in found["outcomes"]]

    def stop(self) -> None:
        """End a run that nobody waits for."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Server:
    """The application on this machine's Ray; a context that ends it.

    Args:
        home: folder for keys and the catalogue log.
        tracking_uri, model: the registry and the model's name in it.
        beam: the one beam, whatever the load.
        replicas: with one torch thread each.
        grpc: whether Serve's gRPC proxy answers too.

    Attributes:
        port, grpc_port: of the proxies.
    """

    def __init__(self, home: Path, tracking_uri: str, model: str, *, beam: int, replicas: int = 1, grpc: bool = False) -> None:
        self._home, self._tracking_uri, self._beam, self._replicas, self._grpc = home, tracking_uri, beam, replicas, grpc
        self.model = model
        self.registry = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self.port, self.grpc_port = _free_ports(2)
        self.log_folder = home / "catalogue"

    def __enter__(self) -> Server:
        from ray import serve

        from genrecall.local_ray import ensure_ray

        self._home.mkdir(parents=True, exist_ok=True)
        (self._home / "keys").write_text(KEY)
        (self._home / "admins").write_text(ADMIN_KEY)
        ensure_ray(num_cpus=2)
        grpc_options = {"port": self.grpc_port, "grpc_servicer_functions": [SERVICER], "enable_reflection": False} if self._grpc else None
        serve.start(http_options={"host": "127.0.0.1", "port": self.port}, grpc_options=grpc_options)
        self._deploy()
        self.wait_until(self._runs)
        self.wait_until(lambda: len(self.pids(REPLICA)) == self._replicas)
        self.wait_until(lambda: self.call("/v1/model")[0] == 200)  # the proxy too
        return self

    def _deploy(self, canary_share: float = 0.0) -> None:
        """What `serve deploy` does with a configuration file; of what is deployed already, another `user_config` alone restarts nothing."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        arguments = {
            "model": f"models:/{self.model}@{CHAMPION}",
            "tracking_uri": self._tracking_uri,
            "beam_sizes": [self._beam] * 3,
            "follow_s": FOLLOW_S,
            "api_keys_file": str(self._home / "keys"),
            "admin_keys_file": str(self._home / "admins"),
            "catalogue_folder": str(self.log_folder),
        }
        deployment = {
            "name": APPLICATION,
            "num_replicas": self._replicas,
            "ray_actor_options": {"num_cpus": 1 / self._replicas},
            "user_config": {"canary_share": canary_share},
        }
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "serve_apps.recall:app",
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}},
            "args": arguments,
            "deployments": [deployment],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]), _blocking=False)  # blocking, it waits for a minute at most

    def _runs(self) -> bool:
        """Whether Serve says that the application runs.

        Raises:
            RuntimeError: it cannot be deployed.
        """
        from ray import serve

        found = serve.status().applications.get(APPLICATION)
        if found is not None and found.status == "DEPLOY_FAILED":
            raise RuntimeError(f"the application cannot be deployed: {found.message}")
        return found is not None and found.status == "RUNNING"

    def canary(self, share: float) -> None:
        """Give the challenger a share of the requests; returns once it is taken."""
        self._deploy(share)
        self.wait_until(lambda: self._canary_is(share))

    def _canary_is(self, share: float) -> bool:
        """Whether the replica that answers now has this share, and the challenger that it needs."""
        status, answer = self.call("/v1/model")
        if status != 200:
            return False
        found = answer["challenger"]
        return found is None if share == 0 else found is not None and found["canary_share"] == share and found["versions"] is not None

    def __exit__(self, *_: object) -> None:
        from ray import serve

        serve.shutdown()  # type: ignore[no-untyped-call]

    def pids(self, title: str) -> list[int]:
        """The processes of this benchmark's own Ray whose title begins so."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (process.cmdline() or [""])[0].rpartition("/")[2].startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return sorted(found)

    def replicas_that_logged(self, words: str) -> dict[str, int]:
        """How many lines of each replica's log have these words, by the log's name; replicas that logged none are left out."""
        import ray._private.worker

        folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
        found = {one.name: one.read_text(errors="replace").count(words) for one in folder.glob(f"replica_{APPLICATION}_*.log")}
        return {name: count for name, count in found.items() if count}

    def kill(self, pid: int) -> None:
        """End one process, without notice."""
        assert pid in [one.pid for one in psutil.Process().children(recursive=True)], "only what this benchmark started"
        os.kill(pid, signal.SIGKILL)

    def call(self, path: str, body: Any = None, *, key: str = KEY) -> tuple[int, Any]:
        """Status and answer of a request; status 0 where the connection failed."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json", "X-API-Key": key})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None

    def champion(self, number: int) -> None:
        """Move the alias."""
        self.registry.set_registered_model_alias(self.model, CHAMPION, str(number))

    def challenger(self, number: int) -> None:
        """Move the other alias."""
        self.registry.set_registered_model_alias(self.model, CHALLENGER, str(number))

    def is_live_everywhere(self, number: int) -> bool:
        """Whether ten answers in a row, which replicas share, name a version."""
        return all(self.is_live(number) for _ in range(10))

    def champion_number(self) -> int:
        return resolve(f"models:/{self.model}@{CHAMPION}", self.registry).number

    def change(self, **changes: Any) -> int:
        """POST /v1/items; the number of the last change."""
        status, answer = self.call("/v1/items", changes, key=ADMIN_KEY)
        if status != 200:
            raise RuntimeError(f"POST /v1/items was answered {status}")
        return int(answer["catalog_seq"])

    def is_live(self, number: int) -> bool:
        """Whether the replica that answers now serves a version."""
        status, answer = self.call("/v1/model")
        return status == 200 and answer["versions"]["model"] == f"{self.model}/{number}"

    def healthy_replicas(self) -> int:
        """Replicas that Serve sends requests to."""
        from ray import serve

        application = serve.status().applications.get(APPLICATION)
        return (
            0
            if application is None
            else sum(count for one in application.deployments.values() for state, count in one.replica_states.items() if state == "RUNNING")
        )

    def wait_until(self, condition: Callable[[], bool], *, wait_s: float = WAIT_S, every_s: float = 0.1) -> float:
        """Seconds until a condition holds.

        Raises:
            RuntimeError: it did not.
        """
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > wait_s:
                raise RuntimeError(f"not within {wait_s:.0f} s")
            time.sleep(every_s)
        return time.monotonic() - started


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def cpu_by_process(pids: Sequence[int]) -> float:
    """Seconds of processor time of processes so far."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(one.user + one.system for one in times))


def cpu_by_thread(pid: int) -> dict[int, float]:
    """Seconds of processor time of each thread so far."""
    return {one.id: one.user_time + one.system_time for one in psutil.Process(pid).threads()}


@contextlib.contextmanager
def load(plan: Plan) -> Iterator[Load]:
    """A load for as long as the context lasts, at most."""
    running = Load(plan)
    try:
        yield running
    finally:
        running.stop()
