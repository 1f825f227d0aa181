"""Settings of the deployment and where it refuses to listen; the deployment itself runs in tests/serving."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from genrecall.registry.promotion import register
from genrecall.serving import deployments, recall_pb2, recall_pb2_grpc
from genrecall.serving.api import LateError, VersionNotLoadedError
from genrecall.serving.api_keys import ApiKeyError
from genrecall.serving.deployments import RecallDeployment
from genrecall.serving.messages import RecallRequest
from genrecall.serving.open_ports import refuse_open_grpc, refuse_open_port
from genrecall.serving.recall_settings import RecallSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "latest-champion"}, "modle\n  Extra inputs are not permitted"),
        ({"model": "shop"}, "expected models:/NAME@ALIAS, models:/NAME/NUMBER or latest-champion, got 'shop'"),
        ({"beam_sizes": [20, 50, 100]}, "expected the widest beam first"),
        ({"beam_sizes": [100, 50]}, "beam_sizes.2\n  Field required"),
        ({"beam_sizes": [500, 50, 20]}, "less than or equal to 200"),
        ({"max_batch_size": 0}, "max_batch_size\n  Input should be greater than or equal to 1"),
        ({"follow_s": -1}, "follow_s"),
        ({"torch_threads": 0}, "torch_threads"),
        ({"catalogue_follow_s": 10}, "catalogue_follow_s\n  Input should be less than or equal to 4"),
        ({"drift_unknown_categories": 2}, "drift_unknown_categories"),
    ],
)
def test_settings_that_cannot_be_used_are_named(args, message):
    with pytest.raises(ValidationError) as caught:
        RecallSettings(**args)
    assert message in str(caught.value)


def test_recall_yaml_holds_settings_that_can_be_used_and_binds_loopback():
    config = yaml.safe_load((ROOT / "serve_apps" / "recall.yaml").read_text())
    assert config["http_options"]["host"] == "127.0.0.1"
    assert "grpc_options" not in config
    (application,) = config["applications"]
    settings = RecallSettings(**application["args"])
    (deployment,) = application["deployments"]
    assert settings.max_waiting < deployment["max_ongoing_requests"], "else Serve queues what the replica would refuse at once"
    assert deployment["max_ongoing_requests"] >= 4 * settings.max_batch_size
    assert settings.torch_threads <= deployment["ray_actor_options"]["num_cpus"]


def test_recall_grpc_yaml_is_recall_yaml_with_grpc_and_keys():
    plain, with_grpc = (yaml.safe_load((ROOT / "serve_apps" / name).read_text()) for name in ("recall.yaml", "recall_grpc.yaml"))
    options = with_grpc.pop("grpc_options")
    keys_file = with_grpc["applications"][0]["args"].pop("api_keys_file")
    assert with_grpc == plain
    assert keys_file, "the port is open to the network"
    (servicer,) = options.pop("grpc_servicer_functions")
    assert servicer == f"{recall_pb2_grpc.__name__}.{recall_pb2_grpc.add_RecallServiceServicer_to_server.__name__}"
    assert options == {"port": 9000, "request_timeout_s": plain["http_options"]["request_timeout_s"], "enable_reflection": False}


def test_the_deployment_has_a_method_for_each_call_that_takes_its_context():
    calls = recall_pb2.DESCRIPTOR.services_by_name["RecallService"].methods_by_name
    methods = {name: getattr(RecallDeployment.func_or_class, name) for name in calls}
    assert len(methods) == 4
    assert {list(inspect.signature(method).parameters)[2] for method in methods.values()} == {"grpc_context"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    refuse_open_port(host, behind_haproxy=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", ""])
def test_an_open_port_needs_a_key(host):
    with pytest.raises(ApiKeyError, match=f"http_options.host is {host}, open to the network, and there are no API keys"):
        refuse_open_port(host, behind_haproxy=False)


def test_grpc_needs_a_key_whatever_the_host():
    with pytest.raises(ApiKeyError, match="grpc_options opens a port on all interfaces, and there are no API keys; set api_keys_file"):
        refuse_open_grpc(True)
    refuse_open_grpc(False)


def test_haproxy_needs_a_key_whatever_the_host():
    with pytest.raises(ApiKeyError, match="opens its ports on all interfaces"):
        refuse_open_port("127.0.0.1", behind_haproxy=True)


class Stop(Exception):
    """Ends a loop that has no end."""


@pytest.mark.parametrize("follow_s", [0, 30])
def test_keys_are_rotated_whether_or_not_the_registry_is_followed_or_answers(registry, untrained_line, tmp_path, monkeypatch, follow_s):
    register(untrained_line(), "shop", metrics={})
    keys = tmp_path / "keys"
    keys.write_text("a" * 16)
    started, slept = {}, []
    thread = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(
        deployments, "threading", SimpleNamespace(Lock=threading.Lock, Thread=lambda target, name, **_: started.setdefault(name, target) and thread)
    )
    settings = RecallSettings(model="models:/shop/1", follow_s=follow_s, api_keys_file=str(keys), beam_sizes=(5, 4, 3))
    plain = RecallDeployment.func_or_class.__bases__[0]  # without Serve's part
    replica = plain(settings.model_dump(), registry.tracking_uri)
    monkeypatch.setattr(replica._follower, "newer", lambda *_: pytest.fail("the keys wait for the registry"))

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) > 1:
            raise Stop

    monkeypatch.setattr(deployments, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic, perf_counter=time.perf_counter))
    keys.write_text("b" * 16)
    with pytest.raises(Stop):
        started["key follower"]()
    assert (replica._keys.accept(b"a" * 16), replica._keys.accept(b"b" * 16)) == (False, True)
    assert slept[0] == (follow_s or 10)
    assert ("follower" in started) == bool(follow_s)


class Replica:
    """As much of a replica as counting a request needs; `answer` stands for the queue and the engine."""

    _recall = RecallDeployment.func_or_class._recall
    _admit = RecallDeployment.func_or_class._admit
    recall_batch = RecallDeployment.func_or_class.recall_batch

    def __init__(self, answer):
        async def answer_together(*_):
            return [await answer()]

        async def submit(*_):
            return await answer()

        self.counted = []
        self._served, self._challenger = None, SimpleNamespace(served=None)
        self._cache = SimpleNamespace(entries=0)
        self._metrics = SimpleNamespace(count=lambda outcome, *_: self.counted.append(outcome), answered=lambda *_: None)
        self._batcher = SimpleNamespace(submit=submit)
        self._in_torch_thread = answer_together
        self._settings = RecallSettings()
        self._waiting = 0


async def hang():
    await asyncio.sleep(60)


async def taken_out():
    raise VersionNotLoadedError("the challenger was taken out of service")


async def broken():
    raise ZeroDivisionError("anything")


async def late():
    return None


async def ask(replica, batch):
    request = RecallRequest(query="hose")
    await asyncio.wait_for(replica.recall_batch([request]) if batch else replica._recall("champion", request, time.monotonic()), 0.05)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("answer", "outcome", "error"),
    [(hang, "gone", TimeoutError), (broken, "failed", ZeroDivisionError), (late, "late", LateError)],
    ids=["hang", "broken", "late"],
)
def test_who_waits_no_longer_is_not_counted_as_a_failure_of_the_engine(batch, answer, outcome, error):
    replica = Replica(answer)
    with pytest.raises(error):
        asyncio.run(ask(replica, batch))
    assert (replica.counted, replica._waiting) == ([outcome], 0)


def test_a_challenger_taken_out_while_a_request_waited_is_not_counted_as_a_failure_of_the_engine():
    replica = Replica(taken_out)
    with pytest.raises(VersionNotLoadedError):
        asyncio.run(ask(replica, batch=False))
    assert replica.counted == ["not_loaded"]
