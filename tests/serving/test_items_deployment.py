"""Catalogue changes on a real Serve of two replicas: durable, live in both within seconds, through a swap, a rollback and a restart."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from genrecall.config import Places
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.promotion import register
from genrecall.tracking import use_tracking

ADMIN = "an-admin-key-for-this-test"
LIVE_WITHIN_S = 5.0
ASKED_TO_REACH_BOTH = 12


class Server:
    """The application, with two replicas."""

    def __init__(self, home: Path, registry: MlflowClient) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.home, self.registry = home, registry

    def start(self) -> None:
        from ray import serve

        from genrecall.serving.deployments import RecallDeployment
        from genrecall.serving.recall_settings import RecallSettings

        settings = RecallSettings(model="models:/shop@champion", follow_s=0.5, beam_sizes=(20, 20, 20), admin_keys_file=str(self.home / "admins"))
        replicas = RecallDeployment.options(num_replicas=2, ray_actor_options={"num_cpus": 0.25})
        serve.run(replicas.bind(settings.model_dump(), self.registry.tracking_uri, str(self.home / "catalogue")), name="recall", route_prefix="/")

    def call(self, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers={"content-type": "application/json", "x-api-key": key})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def change(self, **changes: Any) -> int:
        status, answer = self.call("/v1/items", changes, key=ADMIN)
        assert status == 200, answer
        return int(answer["catalog_seq"])

    def answers(self, count: int = ASKED_TO_REACH_BOTH) -> list[Any]:
        """Answers to as many requests, of either replica."""
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: self.call("/v1/recall", {"query": "angle bracket", "beam_size": 200, "limit": 1000}), range(count)))
        assert {status for status, _ in found} == {200}
        return [answer for _, answer in found]

    def wait_until_live(self, sequence: int, model: str | None = None) -> float:
        """Seconds until every answer knows a change (and is of a version)."""
        started = time.monotonic()
        while True:
            versions = [answer["versions"] for answer in self.answers()]
            if all(one["catalog_seq"] >= sequence and model in (None, one["model"]) for one in versions):
                return time.monotonic() - started
            assert time.monotonic() - started < 60, versions


@pytest.fixture(scope="module")
def server(ray_cluster: None, untrained_line: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    home = tmp_path_factory.mktemp("items_served")
    uri = f"sqlite:///{home}/mlflow.db"
    before = mlflow.get_tracking_uri()
    use_tracking(Places(home=str(home), data=str(home), tracking_uri=uri))
    for seed in range(2):
        register(untrained_line(seed=seed), "shop", metrics={})
    registry = MlflowClient(uri, registry_uri=uri)
    registry.set_registered_model_alias("shop", "champion", "1")
    (home / "admins").write_text(ADMIN)
    server = Server(home, registry)
    serve.start(http_options={"host": "127.0.0.1", "port": server.port})
    server.start()
    yield server
    serve.shutdown()
    mlflow.set_tracking_uri(before)


def ids(answer: Any) -> set[str]:
    return {item["item_id"] for item in answer["items"]}


def test_changes_are_live_in_both_replicas_within_seconds_and_survive_swap_rollback_and_restart(server):
    assert server.call("/v1/items", {"delist": ["i00"]})[0] == 401
    assert server.call("/v1/items", {"delist": ["i00", "i00"]}, key=ADMIN)[0] == 422
    built = {f"i{row:02d}" for row in range(40)}
    assert all(ids(answer) == built for answer in server.answers())

    sequence = server.change(upsert=[{"item_id": "n0", "title": "soaker hose"}, {"item_id": "n1", "title": "chrome lamp"}], delist=["i00"])
    assert sequence == 3
    assert CatalogueLog(server.home / "catalogue" / "shop").read(0).sequence == 3  # on disk before the answer
    assert server.wait_until_live(sequence) < LIVE_WITHIN_S
    expected = (built | {"n0", "n1"}) - {"i00"}
    assert all(ids(answer) == expected for answer in server.answers())

    server.registry.set_registered_model_alias("shop", "champion", "2")
    server.wait_until_live(sequence, "shop/2")
    sequence = server.change(upsert=[{"item_id": "n2", "title": "deck screw"}], delist=["n0"])
    server.wait_until_live(sequence)
    expected = (expected | {"n2"}) - {"n0"}
    assert all(ids(answer) == expected for answer in server.answers())

    server.registry.set_registered_model_alias("shop", "champion", "1")
    server.wait_until_live(sequence, "shop/1")
    assert all(ids(answer) == expected for answer in server.answers())

    from ray import serve

    serve.delete("recall")
    server.start()
    answers = server.answers()
    assert {(answer["versions"]["model"], answer["versions"]["catalog_seq"]) for answer in answers} == {("shop/1", sequence)}
    assert all(ids(answer) == expected for answer in answers)
    _, model = server.call("/v1/model")
    assert (model["items"], model["catalogue"]["later_items"], model["catalogue"]["delisted_items"]) == (41, 2, 1)
    assert (model["catalogue"]["alarms"], model["catalogue"]["problem"]) == ([], None)


def test_both_replicas_append_to_one_log_and_no_number_is_given_twice(server):
    before = server.call("/v1/model")[1]["versions"]["catalog_seq"]
    with ThreadPoolExecutor(8) as pool:
        sequences = list(pool.map(lambda number: server.change(upsert=[{"item_id": f"c{number}", "title": "hose"}]), range(30)))
    assert sorted(sequences) == list(range(before + 1, before + 31))
    changes = CatalogueLog(server.home / "catalogue" / "shop").read(before).changes
    assert sorted(change.item_id for change in changes) == sorted(f"c{number}" for number in range(30))
    server.wait_until_live(before + 30)
