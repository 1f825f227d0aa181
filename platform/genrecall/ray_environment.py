"""Environment variables of Ray and of torch's threads, set before either is first imported, because they are read then.

Token authentication is said explicitly: left unset, Ray turns it on by itself once a token exists, and driver, workers and command
line may disagree. Whoever sets a variable before keeps it. Import this module first; it sets nothing once Ray is loaded.
"""

from __future__ import annotations

import logging
import os
import sys

if "ray" not in sys.modules:
    for _name, _value in {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a proxy is replaced after three failed checks: in some 6 s in place of 30
        "RAY_raylet_start_wait_time_s": "120",  # a busy machine needs more than the usual 30
        # Threads that wait for each other must not spin: on a machine shared with other processes spinning costs several times the work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(_name, _value)


def quiet_worker() -> None:
    """Run in every worker process at its start.

    Libraries log from warnings up only: our own lines say what a person waiting wants to know. And what Ray Train starts in the
    background asks "the" Ray of this machine for news; where there are several, this names the worker's own.
    """
    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    for name in ("ray", "ray.train", "DeepSpeed", "numexpr"):
        logging.getLogger(name).setLevel(logging.WARNING)
