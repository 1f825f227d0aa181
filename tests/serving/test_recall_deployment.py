"""The deployment on a real Serve: answers over HTTP, follows the alias, refuses a corrupted version. One start for the whole module."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import grpc
import mlflow
import pytest
from mlflow.tracking import MlflowClient

from genrecall.config import Places
from genrecall.registry.promotion import register
from genrecall.registry.versions import fetch_bundle
from genrecall.serving import recall_pb2
from genrecall.serving.api import RETRY_AFTER_S
from genrecall.serving.client import RecallError
from genrecall.serving.grpc_client import GrpcRecallClient
from genrecall.serving.messages import ModelInfo, RecallRequest, RecallResponse
from genrecall.serving.recall_pb2_grpc import RecallServiceStub
from genrecall.tracking import use_tracking

FOLLOW_S = 0.5
KEY = "a-key-for-this-test-only"
ADMIN = "an-admin-key-for-this-test"
ROOT = Path(__file__).parents[2]
SERVICER = "genrecall.serving.recall_pb2_grpc.add_RecallServiceServicer_to_server"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The running application and the registry it follows."""

    def __init__(self, port: int, grpc_port: int, registry: MlflowClient, keys_file: Path, arguments: dict[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.registry = registry
        self.keys_file = keys_file
        self._arguments = arguments

    def deploy(self, **user_config: Any) -> None:
        """What `serve deploy` does with a configuration file."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": "recall",
            "route_prefix": "/",
            "import_path": "serve_apps.recall:app",
            "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "platform")))}},
            "args": self._arguments,
            "deployments": [{"name": "recall", "num_replicas": 1, "ray_actor_options": {"num_cpus": 1}, "user_config": user_config}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]), _blocking=True)

    def call(self, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
        status, _, answer = self.exchange(path, body, key)
        return status, answer

    def exchange(self, path: str, body: Any = None, key: str = KEY) -> tuple[int, Message, Any]:
        """Status, headers and answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": "application/json", "x-api-key": key})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    def champion(self, number: int) -> None:
        self.registry.set_registered_model_alias("shop", "champion", str(number))

    def replica(self) -> str:
        """The replica's name, which another process would not have."""
        from ray.util import list_named_actors

        (name,) = [actor["name"] for actor in list_named_actors(all_namespaces=True) if "recall#recall" in actor["name"]]
        return str(name)

    def wait_for(self, condition, seconds: float = 15.0) -> float:
        """Seconds until `condition(what GET /v1/model says)` holds."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if condition(self.call("/v1/model")[1]):
                return time.monotonic() - started
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {self.call('/v1/model')}")


@pytest.fixture(scope="module")
def server(ray_cluster: None, untrained_line: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    home = tmp_path_factory.mktemp("served")
    uri = f"sqlite:///{home}/mlflow.db"
    before = mlflow.get_tracking_uri()
    use_tracking(Places(home=str(home), data=str(home), tracking_uri=uri))
    for seed in range(3):
        register(untrained_line(seed=seed), "shop", metrics={})
    registry = MlflowClient(uri, registry_uri=uri)
    registry.set_registered_model_alias("shop", "champion", "1")
    keys_file = home / "keys"
    keys_file.write_text(KEY)
    (home / "admins").write_text(ADMIN)
    port, grpc_port = free_port(), free_port()
    arguments = {
        "model": "models:/shop@champion",
        "tracking_uri": uri,
        "follow_s": FOLLOW_S,
        "beam_sizes": [5, 4, 3],
        "api_keys_file": str(keys_file),
        "admin_keys_file": str(home / "admins"),
        "max_waiting": 8,
        "cache_entries": 100,
        "catalogue_folder": str(home / "catalogue"),
    }
    grpc_options = {"port": grpc_port, "grpc_servicer_functions": [SERVICER], "enable_reflection": False}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, grpc_options=grpc_options)
    server = Server(port, grpc_port, registry, keys_file, arguments)
    server.deploy(canary_share=0.0)
    yield server
    serve.shutdown()
    mlflow.set_tracking_uri(before)


def test_a_query_is_answered_with_items_sids_scores_and_versions(server):
    status, answer = server.call("/v1/recall", {"query": "angle bracket", "limit": 7})
    assert status == 200
    assert len(answer["items"]) == 7
    assert answer["items"][0]["sid"].startswith("<")
    assert answer["items"][0]["score"] < 0
    assert answer["beam_size"] == 5
    assert answer["versions"]["model"] == "shop/1"


def test_a_request_that_comes_again_is_answered_from_the_cache_and_alike(server):
    first, again = (server.call("/v1/recall", {"query": query, "limit": 7})[1] for query in ("deck screw", " Deck  SCREW"))
    assert (first["timings"]["cached"], again["timings"]["cached"]) == (False, True)
    assert again["items"] == first["items"]


def test_a_batch_larger_than_the_queue_is_answered_in_order_by_one_version(server):
    queries = [f"{thing} {number}" for thing in ("hose", "lamp") for number in range(20)]
    status, answer = server.call("/v1/recall/batch", {"requests": [{"query": query, "limit": 3, "beam_size": 5} for query in queries]})
    assert (status, len(answer["answers"])) == (200, 40)
    assert {one["versions"]["bundle"] for one in answer["answers"]} == {server.call("/v1/model")[1]["versions"]["bundle"]}
    for number in (0, 17, 39):
        alone = server.call("/v1/recall", {"query": queries[number], "limit": 3, "beam_size": 5})[1]
        assert [item["item_id"] for item in answer["answers"][number]["items"]] == [item["item_id"] for item in alone["items"]]


def test_a_loaded_replica_is_ready(server):
    assert server.call("/readyz", key="") == (200, {"status": "ready", "model": "shop/1"})


def test_an_explained_answer_has_labels(server):
    answer = server.call("/v1/recall", {"query": "garden hose", "explain": True})[1]
    assert all(sid["label"] and len(sid["path"]) == 3 for sid in answer["sids"])
    assert all(len(item["explanation"]["path"]) == 3 for item in answer["items"])


def test_bad_input_is_refused_and_the_field_named(server):
    status, answer = server.call("/v1/recall", {"query": "x", "limit": -1})
    assert (status, answer["problems"][0]["field"]) == (422, "limit")
    assert server.call("/v1/recall", {"query": "x" * 70_000})[0] == 413


def test_a_key_is_asked_for_and_rotates_without_a_restart(server):
    assert server.call("/v1/recall", {"query": "x"}, key="")[0] == 401
    new = "another-key-for-this-test"
    assert server.call("/v1/model", key=new)[0] == 401
    server.keys_file.write_text(f"{KEY}\n{new}\n")
    deadline = time.monotonic() + 10
    while server.call("/v1/model", key=new)[0] == 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.call("/v1/model")[0] == 200


def test_the_alias_is_followed_there_and_back_without_a_restart(server):
    def best() -> list[str]:
        return [sid["sid"] for sid in server.call("/v1/recall", {"query": "garden hose"})[1]["sids"]]

    first = best()
    server.champion(2)
    # Nobody asks /v1/recall meanwhile: the alias is followed on an idle replica too.
    assert server.wait_for(lambda model: model["versions"]["model"] == "shop/2") < FOLLOW_S + 10
    assert best() != first
    assert server.call("/healthz", key="")[1] == {"status": "ok", "model": "shop/2"}
    server.champion(1)
    server.wait_for(lambda model: model["versions"]["model"] == "shop/1")
    assert best() == first


def test_a_corrupted_newer_version_is_refused_and_the_old_one_keeps_serving(server):
    bundle = fetch_bundle(_version(server, 3), server.registry)
    weights = bundle / "generator" / "stage" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    server.champion(3)
    server.wait_for(lambda model: model["refused"] is not None)
    status, model = server.call("/v1/model")
    assert (status, model["versions"]["model"]) == (200, "shop/1")
    assert model["refused"].startswith("shop/3: ")
    assert "model.safetensors (changed)" in model["refused"]
    assert server.call("/v1/recall", {"query": "garden hose"})[1]["versions"]["model"] == "shop/1"
    server.champion(1)
    server.wait_for(lambda model: model["refused"] is None)


def test_a_canary_comes_and_goes_by_a_deployed_config_without_a_restart(server):
    def answer(query: str, **more: Any) -> Any:
        return server.call("/v1/recall", {"query": query, **more})[1]

    replica = server.replica()
    server.registry.set_registered_model_alias("shop", "challenger", "2")
    assert server.call("/v1/model")[1]["challenger"] is None  # nobody needs it
    server.deploy(canary_share=0.5)
    server.wait_for(lambda model: (model["challenger"] or {}).get("versions") is not None)
    queries = [f"hose {number}" for number in range(40)]
    by_role: dict[str, list[str]] = {"champion": [], "challenger": []}
    for query in queries:
        versions = answer(query)["versions"]
        assert versions["model"] == {"champion": "shop/1", "challenger": "shop/2"}[versions["role"]]
        by_role[versions["role"]].append(query)
    assert len(by_role["champion"]) > 5
    assert len(by_role["challenger"]) > 5
    assert [answer(query)["versions"]["role"] for query in by_role["challenger"]] == ["challenger"] * len(by_role["challenger"])
    assert answer(by_role["challenger"][0], version="champion")["versions"]["model"] == "shop/1"

    server.deploy(canary_share="much")  # changes nothing but what is reported
    server.wait_for(lambda model: "canary_share" in (model["challenger"]["refused"] or ""))
    assert answer(by_role["challenger"][0])["versions"]["role"] == "challenger"

    server.deploy(canary_share=0.0)
    server.wait_for(lambda model: model["challenger"] is None)
    assert {answer(query)["versions"]["model"] for query in queries} == {"shop/1"}
    status, refusal = server.call("/v1/recall", {"query": "hose", "version": "challenger"})
    assert (status, refusal["problems"][0]["field"]) == (422, "version")
    assert server.replica() == replica


def test_more_requests_than_it_takes_are_answered_503_at_once_with_retry_after_and_the_others_served(server):
    """A batch larger than the queue (max_waiting) fills it for as long as it is worked on."""
    from concurrent.futures import ThreadPoolExecutor

    singles: list[tuple[int, Message, Any]] = []
    with ThreadPoolExecutor(2) as pool:
        for turn in range(20):
            batch = {"requests": [{"query": f"hose {turn} {number}", "beam_size": 200, "limit": 1000} for number in range(64)]}
            whole = pool.submit(server.call, "/v1/recall/batch", batch)
            while not whole.done():
                singles.append(server.exchange("/v1/recall", {"query": f"lamp {len(singles)}"}))
            status, answer = whole.result()
            assert status in (200, 503)
            if status == 200:
                assert {one["versions"]["model"] for one in answer["answers"]} == {"shop/1"}
            if status == 200 and any(one[0] == 503 for one in singles):
                break
    assert {status for status, _, _ in singles} <= {200, 503}
    refused = [(headers["Retry-After"], answer["error"]) for status, headers, answer in singles if status == 503]
    assert refused
    assert set(refused) == {(str(RETRY_AFTER_S), "too many requests are waiting")}
    assert server.call("/v1/recall", {"query": "hose"})[0] == 200


def test_grpc_gives_the_answers_of_http_and_its_refusals(server):
    asked = {"query": "angle bracket", "limit": 7, "beam_size": 5, "explain": True}
    over_http = server.call("/v1/recall", asked)[1]
    client = GrpcRecallClient(server.grpc_target, KEY, admin_key=ADMIN, timeout_s=30, retries=0)
    answer = client.recall(**asked)
    unlike = {"timings", "versions"}
    expected = RecallResponse.model_validate(over_http)
    assert answer.model_dump(exclude=unlike) == expected.model_dump(exclude=unlike)
    assert (len(answer.items), answer.versions) == (7, expected.versions)
    batch = client.recall_batch([RecallRequest(query="hose", limit=3), RecallRequest(query="lamp", limit=2)])
    assert [len(one.items) for one in batch] == [3, 2]
    assert client.model().model_dump() == ModelInfo.model_validate(server.call("/v1/model")[1]).model_dump()
    assert client.change_items(delist=["no-such-item"]).delisted == 1

    with pytest.raises(RecallError, match="UNAUTHENTICATED no valid API key") as refused:
        GrpcRecallClient(server.grpc_target, "another-key-that-is-wrong", timeout_s=30).recall("hose")
    assert refused.value.status == 401
    with grpc.insecure_channel(server.grpc_target) as channel:
        stub = RecallServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Recall(recall_pb2.RecallRequest(query="x", limit=-1), metadata=[("authorization", f"Bearer {KEY}")], timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "invalid request; limit: Input should be greater than or equal to 1"
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChangeItems(recall_pb2.ItemsRequest(delist=["i00"]), metadata=[("x-api-key", KEY)], timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    client.close()


def test_the_replica_knows_that_grpc_listens(server):
    """Ray has no public way to ask; if a new Ray moves it, this says so before a server without keys listens openly."""
    import ray

    from genrecall.serving.open_ports import grpc_listens

    assert ray.get(ray.remote(num_cpus=0)(grpc_listens).remote()) is True


def test_the_page_is_served(server):
    with urllib.request.urlopen(server.url + "/", timeout=10) as response:
        assert "script-src 'self'" in response.headers["content-security-policy"]
        assert b"genrecall" in response.read()


def test_the_replica_knows_what_host_the_proxy_binds(server):
    """Ray has no public way to ask; if a new Ray moves it, this says so before a server listens openly."""
    import ray

    from genrecall.serving.open_ports import http_binding

    host, behind_haproxy = ray.get(ray.remote(num_cpus=0)(http_binding).remote())
    assert (host, behind_haproxy) == ("127.0.0.1", False)


def _version(server: Server, number: int) -> Any:
    from genrecall.registry.versions import resolve

    return resolve(f"models:/shop/{number}", server.registry)
