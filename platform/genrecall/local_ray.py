"""The Ray that a job runs on. Free of Ray Train and MLflow: every worker imports what its task's module imports, and they take seconds."""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import logging
import os

import ray

_LOCAL_OBJECT_STORE_BYTES = 1 << 30


def ensure_ray(num_cpus: int | None = None) -> None:
    """Connect to the cluster that the environment names (inside a Ray job, or `RAY_ADDRESS`), else start a local one.

    The local one listens on loopback only and has a bounded object store; `num_cpus` sets its CPU count (default: the
    machine's). Its dashboard stays on because Ray Train asks the dashboard's state API whether a run's controller still lives.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
        return
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        log_to_driver=True,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": "genrecall.ray_environment.quiet_worker"},
    )
