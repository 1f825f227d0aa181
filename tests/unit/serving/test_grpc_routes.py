"""The gRPC calls on a real gRPC server over a backend of the test, asked by the client: keys, errors, what is tried again, and what is never said."""

from __future__ import annotations

import asyncio
import logging
from concurrent import futures

import grpc
import pytest

from genrecall.serving import client as client_module
from genrecall.serving import recall_pb2
from genrecall.serving.api import LateError, OverloadedError, VersionNotLoadedError
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.client import RecallError
from genrecall.serving.grpc_client import GrpcRecallClient
from genrecall.serving.grpc_messages import ERROR_KEY, unpacked_error
from genrecall.serving.grpc_routes import GrpcRoutes
from genrecall.serving.messages import ItemsAccepted, ModelInfo, RecalledItem, RecallRequest, RecallResponse, Timings, Versions
from genrecall.serving.recall_pb2_grpc import RecallServiceServicer, RecallServiceStub, add_RecallServiceServicer_to_server

KEY = "a-key-for-this-test-only"
ADMIN = "an-admin-key-for-this-test"


class Backend:
    """Answers a query with itself; raises what `errors` holds first."""

    def __init__(self):
        self.errors, self.asked, self.changed = [], [], []

    async def recall(self, request):
        self.asked.append(request)
        if self.errors:
            raise self.errors.pop(0)
        item = RecalledItem(item_id=request.query, title="hose", brand="", category_path=[], rank=0, sid="<1,2,3>", score=-0.5)
        timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
        return RecallResponse(items=[item], sids=[], beam_size=5, versions=Versions(model="shop/1", bundle="a"), timings=timings)

    async def recall_batch(self, requests):
        return [await self.recall(request) for request in requests]

    async def change_items(self, changes):
        self.changed.append(changes)
        return ItemsAccepted(
            catalog_seq=7, upserted=len(changes.upsert), delisted=len(changes.delist), stock_flags=len(changes.out_of_stock) + len(changes.in_stock)
        )

    def ready(self):
        return True

    def info(self):
        versions = Versions(model="shop/1", bundle="a")
        return ModelInfo(versions=versions, address="models:/shop@champion", items=4, sids=2, levels=[1, 2, 3], stage="stage3", refused=None)


class Servicer(RecallServiceServicer):
    """What Ray Serve's proxy does: calls the method of that name, then sends what it set in the context."""

    def __init__(self, routes):
        for name, method in {"Recall": routes.recall, "RecallBatch": routes.recall_batch, "Model": routes.model, "ChangeItems": routes.change_items}.items():
            setattr(self, name, lambda request, context, method=method: asyncio.run(method(request, context)))


class Server:
    def __init__(self, keys, admin_keys):
        self.backend = Backend()
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        add_RecallServiceServicer_to_server(Servicer(GrpcRoutes(lambda: self.backend, keys, admin_keys)), self.server)
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(KEY)
    (folder / "admins").write_text(ADMIN)
    server = Server(ApiKeys(str(folder / "keys")), ApiKeys.for_admins(str(folder / "admins")))
    yield server
    server.server.stop(None)


@pytest.fixture
def server(started, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_WAIT_S", 0.01)
    started.backend.__init__()
    return started


@pytest.fixture
def client(server):
    with_keys = GrpcRecallClient(server.target, KEY, admin_key=ADMIN, timeout_s=10, retries=2)
    yield with_keys
    with_keys.close()


def test_all_calls_answer_and_what_is_asked_arrives(server, client):
    answer = client.recall("garden hose", shopper={"gender": "f"}, history=["i1"], filters={"categories": [["A", "B"]]}, limit=7, version="challenger")
    assert answer.items[0].item_id == "garden hose"
    assert server.backend.asked == [
        RecallRequest.model_validate(
            {
                "query": "garden hose",
                "shopper": {"gender": "f"},
                "history": ["i1"],
                "filters": {"categories": [["A", "B"]]},
                "limit": 7,
                "version": "challenger",
            }
        )
    ]
    assert [one.items[0].item_id for one in client.recall_batch([RecallRequest(query="a"), RecallRequest(query="b")])] == ["a", "b"]
    assert client.model() == server.backend.info()
    assert client.change_items([{"item_id": "n1", "title": "lamp", "price": 2.5}], delist=["i2"], out_of_stock=["n1"], in_stock=["i3", "i4"]) == ItemsAccepted(
        catalog_seq=7, upserted=1, delisted=1, stock_flags=3
    )
    (changes,) = server.backend.changed
    assert (changes.upsert[0].price, changes.upsert[0].prior_score, changes.delist) == (2.5, None, ["i2"])


@pytest.mark.parametrize("metadata", [[("x-api-key", KEY)], [("authorization", f"Bearer {KEY}")]])
def test_a_key_is_taken_from_either_metadata(server, metadata):
    with grpc.insecure_channel(server.target) as channel:
        assert RecallServiceStub(channel).Model(recall_pb2.ModelRequest(), metadata=metadata).items == 4


@pytest.mark.parametrize("key", [None, "another-key-that-is-wrong", ADMIN])
def test_without_a_valid_key_nothing_reaches_the_backend(server, key):
    client = GrpcRecallClient(server.target, key, timeout_s=10)
    calls = [lambda: client.recall("x"), lambda: client.recall_batch([RecallRequest(query="x")]), client.model]
    for call in calls:
        with pytest.raises(RecallError, match="UNAUTHENTICATED no valid API key; X-API-Key: send a valid key") as caught:
            call()
        assert caught.value.status == 401
    assert not server.backend.asked


def test_an_api_key_does_not_change_the_catalogue_and_without_admin_keys_nobody_does(server, tmp_path):
    with pytest.raises(RecallError, match="UNAUTHENTICATED no valid admin key"):
        GrpcRecallClient(server.target, KEY, admin_key=KEY, timeout_s=10).change_items(delist=["i1"])
    with pytest.raises(ValueError, match="admin_key: changes of the catalogue need one"):
        GrpcRecallClient(server.target, KEY).change_items(delist=["i1"])
    (tmp_path / "keys").write_text(KEY)
    closed = Server(ApiKeys(str(tmp_path / "keys")), None)
    with pytest.raises(RecallError, match="PERMISSION_DENIED no admin key is configured") as caught:
        GrpcRecallClient(closed.target, KEY, admin_key=KEY, timeout_s=10).change_items(delist=["i1"])
    assert caught.value.status == 403
    closed.server.stop(None)
    assert not server.backend.changed
    assert not closed.backend.changed


def refused(server, method, request, key=KEY):
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(RecallServiceStub(channel), method)(request, metadata=[("x-api-key", key)])
    metadata = dict(caught.value.trailing_metadata())
    return caught.value.code(), caught.value.details(), unpacked_error(metadata[ERROR_KEY]), metadata.get("retry-after")


def test_wrong_fields_are_named_in_the_details_and_one_by_one(server):
    code, details, error, _ = refused(server, "Recall", recall_pb2.RecallRequest(limit=0))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "invalid request; query: Field required; limit: Input should be greater than or equal to 1"
    assert [one.field for one in error.problems] == ["query", "limit"]
    code, details, _, _ = refused(server, "RecallBatch", recall_pb2.RecallBatchRequest())
    assert details.startswith("invalid request; requests: List should have at least 1 item")
    twice = recall_pb2.ItemsRequest(delist=["i1", "i1"])
    code, details, _, _ = refused(server, "ChangeItems", twice, ADMIN)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid request; delist.1: expected each id once, this one stands at delist.0 too")
    assert not server.backend.asked
    assert not server.backend.changed


def test_what_is_larger_than_a_body_may_be_is_refused(server):
    code, details, _, _ = refused(server, "Recall", recall_pb2.RecallRequest(query="x" * 70_000))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "body too large; body: expected at most 65536 bytes")


@pytest.mark.parametrize(
    ("error", "code", "details", "retry_after"),
    [
        (OverloadedError("too many requests are waiting"), grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are waiting", "1"),
        (LateError("the deadline passed"), grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed", "1"),
        (VersionNotLoadedError("no challenger"), grpc.StatusCode.INVALID_ARGUMENT, "invalid request; version: no challenger", None),
        (RuntimeError("/secret/path"), grpc.StatusCode.INTERNAL, "internal error; the server's log says more", None),
    ],
)
def test_errors_have_their_status_and_say_no_more_than_over_http(server, error, code, details, retry_after):
    server.backend.errors = [error]
    found = refused(server, "Recall", recall_pb2.RecallRequest(query="x"))
    assert (found[0], found[1], found[3]) == (code, details, retry_after)


def test_a_model_that_fails_validation_inside_the_server_is_an_internal_error(server):
    def broken():
        return RecallRequest(query="x", limit=0)

    server.backend.info = broken
    assert refused(server, "Model", recall_pb2.ModelRequest())[:2] == (grpc.StatusCode.INTERNAL, "internal error; the server's log says more")
    del server.backend.info


def test_overload_is_tried_again_after_as_long_as_the_server_says_and_a_deadline_is_not(server, client, monkeypatch):
    waits = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    server.backend.errors = [OverloadedError("full"), OverloadedError("full")]
    assert client.recall("x").items[0].item_id == "x"
    assert (waits, len(server.backend.asked)) == ([1.0, 1.0], 3)
    server.backend.errors = [OverloadedError("full")] * 3
    with pytest.raises(RecallError, match="RESOURCE_EXHAUSTED full") as caught:
        client.recall("x")
    assert (caught.value.status, len(server.backend.asked)) == (503, 6)
    for error, status in ((LateError("late"), 503), (RuntimeError("x"), 500), (VersionNotLoadedError("none"), 422)):
        server.backend.errors = [error]
        with pytest.raises(RecallError) as caught:
            client.recall("x")
        assert caught.value.status == status
    assert len(server.backend.asked) == 9


class FromServe(RecallServiceServicer):
    """A proxy that answers for a replica that died: INTERNAL, and nothing of ours with it."""

    def __init__(self):
        self.calls = 0

    def Model(self, request, context):
        self.calls += 1
        if self.calls == 1:
            context.abort(grpc.StatusCode.INTERNAL, "The actor died unexpectedly")
        return recall_pb2.ModelInfo(versions=recall_pb2.Versions(model="shop/1", bundle="a"), address="a", items=1, sids=1, stage="stage3")

    def Recall(self, request, context):
        return recall_pb2.RecallResponse(beam_size=1)


def test_a_replica_that_died_is_asked_again_and_an_answer_of_another_kind_is_refused(server):
    proxy = FromServe()
    other = grpc.server(futures.ThreadPoolExecutor(2))
    add_RecallServiceServicer_to_server(proxy, other)
    target = f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    other.start()
    client = GrpcRecallClient(target, timeout_s=10)
    assert (client.model().address, proxy.calls) == ("a", 2)
    with pytest.raises(RecallError, match="not an answer of the recall API: 2 fields"):
        client.recall("x")
    client.close()
    other.stop(None)
    with pytest.raises(RecallError, match=r"UNAVAILABLE|no answer within") as caught:
        GrpcRecallClient(target, timeout_s=1, retries=0).model()
    assert caught.value.status in (503, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "http://x:1"}, "expected HOST:PORT"),
        ({"target": "x:1", "api_key": "secret-key\n"}, "api_key: expected printable ASCII"),
        ({"target": "x:1", "admin_key": "secret-key\u00e9"}, "admin_key: expected printable ASCII"),
        ({"target": "x:1", "timeout_s": 0}, "timeout_s above 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named_and_no_secret_is(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        GrpcRecallClient(**arguments)
    assert "secret" not in str(caught.value)


def test_the_key_is_in_no_log_no_error_and_no_repr(server, client, caplog):
    caplog.set_level(logging.DEBUG)
    said = [repr(client)]
    for error in (OverloadedError("full"), RuntimeError("broken")):
        server.backend.errors = [error] * 3
        with pytest.raises(RecallError) as caught:
            GrpcRecallClient(server.target, KEY, timeout_s=10, retries=0).recall("garden hose")
        said += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    assert "broken" in caplog.text
    for secret in (KEY, ADMIN, "garden hose"):
        assert secret not in "".join(said) + caplog.text
