"""Which ports Ray Serve opens to the network, and that a server without keys refuses to answer there."""

from __future__ import annotations

import ipaddress
import os

import ray

from genrecall.serving.api_keys import KEYS_VARIABLE, ApiKeyError


def refuse_open_port(host: str, behind_haproxy: bool) -> None:
    """Check that a server without keys answers loopback only.

    Raises:
        ApiKeyError: the host is open to the network.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if behind_haproxy or not loopback:
        where = "RAY_SERVE_ENABLE_HA_PROXY opens its ports on all interfaces" if behind_haproxy else f"http_options.host is {host}, open to the network"
        raise ApiKeyError(f"{where}, and there are no API keys; set api_keys_file or {KEYS_VARIABLE}, or bind 127.0.0.1")


def refuse_open_grpc(listens: bool) -> None:
    """Check that there are keys where Serve's gRPC proxy listens: it always binds all interfaces.

    Raises:
        ApiKeyError: it listens.
    """
    if listens:
        message = "grpc_options opens a port on all interfaces, and there are no API keys"
        raise ApiKeyError(f"{message}; set api_keys_file or {KEYS_VARIABLE}, or take the servicer functions out of grpc_options")


def grpc_listens() -> bool:
    """Whether Serve has a gRPC proxy."""
    from ray.serve.context import _get_global_client  # as below

    client = _get_global_client()
    assert client is not None, "a replica always has a controller"
    options = ray.get(client._controller.get_grpc_config.remote())
    return bool(options.port > 0 and options.grpc_servicer_functions)


def http_binding() -> tuple[str, bool]:
    """The host that Serve's HTTP proxy binds, and whether HAProxy stands before it."""
    from ray.serve.context import _get_global_client  # Ray 2.60 has no public way to ask from inside a replica

    client = _get_global_client()
    assert client is not None, "a replica always has a controller"
    return str(client.http_config.host), os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
