"""The client against a server that answers as it is told, and against the real routes: what is tried again, what is not, and what is never said."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
import time

import pytest
import uvicorn
from pydantic import ValidationError

from genrecall.serving import client as client_module
from genrecall.serving.api import OverloadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.client import RecallClient, RecallError
from genrecall.serving.messages import Filters, ModelInfo, RecalledItem, RecallRequest, RecallResponse, Timings, Versions

KEY = "a-key-for-this-test-only"
ADMIN = "an-admin-key-for-this-test"
ANSWER = {
    "items": [],
    "sids": [],
    "beam_size": 5,
    "versions": {"model": "shop/1", "bundle": "a"},
    "timings": {"generate_ms": 1.0, "expand_ms": 0.5, "batch_size": 1},
    "degraded": False,
}


class Scripted:
    """A server that gives the answers of `script` in turn, the last one for ever: (status, headers, body), or what to do with the connection."""

    def __init__(self):
        self.script, self.seen, self.connections = [], [], set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.connections.add(self.client_address)
                outer.seen.append((time.monotonic(), self.path, dict(self.headers), json.loads(body or b"null")))
                step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if step == "break":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif step == "hang":
                    time.sleep(1.0)
                else:
                    status, headers, body = step
                    text = body if isinstance(body, bytes) else json.dumps(body).encode()
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(text))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text)
                    self.close_connection = headers.get("Connection") == "close" or outer.script[0] == "idle"
                    if outer.script[0] == "idle":
                        outer.script.pop(0)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_WAIT_S", 0.01)
    server = Scripted()
    yield server
    server.server.shutdown()
    server.server.server_close()


OK = (200, {}, ANSWER)
BUSY = (503, {"Retry-After": "0"}, {"error": "too many requests are waiting", "problems": []})


def test_only_what_differs_from_the_defaults_is_sent(scripted):
    scripted.script = [OK]
    client = RecallClient(scripted.url + "/shop/", KEY)
    client.recall("hose")
    client.recall("lamp", shopper={"gender": "f"}, history=["i1"], filters=Filters(brands=["A"]), beam_size=5, limit=7, explain=True, deadline_ms=90)
    sent = [(path, headers["X-API-Key"], body) for _, path, headers, body in scripted.seen]
    whole = {"query": "lamp", "shopper": {"gender": "f"}, "history": ["i1"], "filters": {"brands": ["A"]}}
    whole |= {"beam_size": 5, "limit": 7, "explain": True, "deadline_ms": 90}
    assert sent == [("/shop/v1/recall", KEY, {"query": "hose"}), ("/shop/v1/recall", KEY, whole)]


def test_a_connection_is_used_again_and_one_closed_meanwhile_is_no_failure(scripted):
    scripted.script = [OK]
    client = RecallClient(scripted.url, retries=0)
    for _ in range(3):
        client.recall("hose")
    assert len(scripted.connections) == 1
    scripted.script = [OK, "idle", OK]  # the server closes after this answer, without saying so
    client.recall("hose")
    time.sleep(0.1)
    assert client.recall("hose").beam_size == 5


def test_each_thread_has_a_connection(scripted):
    scripted.script = [OK]
    client = RecallClient(scripted.url)
    threads = [threading.Thread(target=lambda: [client.recall("hose") for _ in range(3)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(scripted.seen), len(scripted.connections)) == (12, 4)


@pytest.mark.parametrize("trouble", [BUSY, (503, {}, b"<html>proxy</html>"), "break"])
def test_503_and_broken_connections_are_tried_again(scripted, trouble):
    scripted.script = [trouble, trouble, OK]
    assert RecallClient(scripted.url, retries=2).recall("hose").versions.model == "shop/1"
    assert len(scripted.seen) == 3
    scripted.script = [trouble]
    with pytest.raises(RecallError) as caught:
        RecallClient(scripted.url, retries=1).recall("hose")
    assert caught.value.status == (None if trouble == "break" else 503)
    assert len(scripted.seen) == 5


def test_nothing_is_tried_again_once_the_deadline_would_have_passed(scripted):
    scripted.script = [(503, {"Retry-After": "1"}, {"error": "too many requests are waiting", "problems": []})]
    client = RecallClient(scripted.url, retries=2)
    started = time.monotonic()
    with pytest.raises(RecallError) as caught:
        client.recall("hose", deadline_ms=900)
    assert (caught.value.status, len(scripted.seen)) == (503, 1)
    with pytest.raises(RecallError):
        client.recall_batch([RecallRequest(query="hose"), RecallRequest(query="lamp", deadline_ms=900)])
    assert len(scripted.seen) == 2
    assert time.monotonic() - started < 0.9


def test_an_attempt_after_another_is_given_what_is_left_of_the_deadline(scripted):
    scripted.script = [(503, {"Retry-After": "1"}, {}), OK]
    client = RecallClient(scripted.url, retries=1)
    client.recall("hose", deadline_ms=30_000)
    first, second = (body["deadline_ms"] for _, _, _, body in scripted.seen)
    assert first == 30_000
    assert 20_000 < second <= 29_000


def test_a_500_of_the_proxy_is_tried_again(scripted):
    scripted.script = [(500, {"Content-Type": "text/plain"}, b"The actor died unexpectedly"), OK]
    assert RecallClient(scripted.url, retries=1).recall("hose").beam_size == 5
    assert len(scripted.seen) == 2


def test_changes_of_the_catalogue_go_with_the_admin_key_and_nothing_else_does(scripted):
    scripted.script = [OK, BUSY, (200, {}, {"catalog_seq": 12, "upserted": 1, "delisted": 1})]
    client = RecallClient(scripted.url, KEY, admin_key=ADMIN)
    client.recall("hose")
    assert client.change_items([{"item_id": "n1", "title": "lamp", "category_path": ["A"]}], delist=["i1"]).catalog_seq == 12
    changes = {"upsert": [{"item_id": "n1", "title": "lamp", "category_path": ["A"]}], "delist": ["i1"]}
    sent = [(path, headers["X-API-Key"], body) for _, path, headers, body in scripted.seen]
    assert sent == [("/v1/recall", KEY, {"query": "hose"}), ("/v1/items", ADMIN, changes), ("/v1/items", ADMIN, changes)]
    with pytest.raises(ValidationError, match="title"):
        client.change_items([{"item_id": "n1"}])
    with pytest.raises(ValueError, match="admin_key: changes of the catalogue need one"):
        RecallClient(scripted.url, KEY).change_items(delist=["i1"])
    assert len(scripted.seen) == 3


def test_retry_after_is_waited_for_and_bounded(scripted, monkeypatch):
    waits = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    scripted.script = [(503, {"Retry-After": "1"}, {}), (503, {"Retry-After": "9999"}, {}), (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}), OK]
    RecallClient(scripted.url, retries=3).recall("hose")
    assert waits[:2] == [1.0, client_module.MAX_WAIT_S]
    assert 0.02 <= waits[2] <= 0.04


@pytest.mark.parametrize("status", [400, 401, 413, 422, 404, 500])
def test_other_refusals_are_not_tried_again_and_say_what_is_wrong(scripted, status):
    scripted.script = [(status, {}, {"error": "invalid request", "problems": [{"field": "limit", "message": "too large"}], "hint": "from a newer server"})]
    with pytest.raises(RecallError, match=rf"/v1/recall: {status} invalid request; limit: too large") as caught:
        RecallClient(scripted.url).recall("hose")
    assert (caught.value.status, caught.value.problems[0].field) == (status, "limit")
    assert len(scripted.seen) == 1


def test_a_timeout_is_not_tried_again(scripted):
    scripted.script = ["hang"]
    started = time.monotonic()
    with pytest.raises(RecallError, match=r"no answer within 0\.2 s"):
        RecallClient(scripted.url, timeout_s=0.2).recall("hose")
    assert (len(scripted.seen), time.monotonic() - started < 0.9) == (1, True)


def test_no_server_is_an_error_of_ours_after_the_retries():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    client = RecallClient(url, retries=1)
    with pytest.raises(RecallError, match="ConnectionRefusedError"):
        client.recall("hose")
    assert not client.ready()


def test_an_answer_with_fields_of_a_newer_server_is_read_and_another_is_refused(scripted):
    scripted.script = [(200, {}, ANSWER | {"new": 1}), (200, {}, {"hello": 1})]
    client = RecallClient(scripted.url)
    assert isinstance(client.recall("hose"), RecallResponse)
    with pytest.raises(RecallError, match="not an answer of the recall API: 5 fields"):
        client.recall("hose")


def test_a_field_that_the_api_would_refuse_is_not_sent(scripted):
    with pytest.raises(ValidationError, match="limit"):
        RecallClient(scripted.url).recall("hose", limit=0)
    with pytest.raises(ValidationError, match="sex"):
        RecallClient(scripted.url).recall("hose", shopper={"sex": "f"})
    assert not scripted.seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://x"}, "expected http://HOST:PORT"),
        ({"url": "127.0.0.1:8000"}, "expected http://HOST:PORT"),
        ({"url": "http://u:secret@x"}, "holds credentials"),
        ({"url": "http://x", "api_key": "secret-key\n"}, "api_key: expected printable ASCII"),
        ({"url": "http://x", "admin_key": "secret-key\n"}, "admin_key: expected printable ASCII"),
        ({"url": "http://x", "timeout_s": 0}, "timeout_s above 0"),
        ({"url": "http://x", "retries": -1}, "retries of at least 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named_and_no_secret_is(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        RecallClient(**arguments)
    assert "secret" not in str(caught.value)


def test_the_key_is_in_no_log_no_error_and_no_repr(scripted, caplog):
    caplog.set_level(logging.DEBUG)
    client = RecallClient(scripted.url, KEY, retries=1)
    said = [repr(client), str(client)]
    for step in (BUSY, "break", (401, {}, {"error": "no valid API key", "problems": []}), (200, {}, {})):
        scripted.script = [step]
        with pytest.raises(RecallError) as caught:
            client.recall("hose")
        said += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    assert KEY not in "".join(said) + caplog.text


class Backend:
    def __init__(self):
        self.overloaded = 0

    async def recall(self, request):
        if self.overloaded:
            self.overloaded -= 1
            raise OverloadedError("too many requests are waiting")
        item = RecalledItem(item_id=request.query, title="hose", brand="", category_path=[], rank=0, sid="<1,2,3>", score=-0.5)
        timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
        return RecallResponse(items=[item], sids=[], beam_size=5, versions=Versions(model="shop/1", bundle="a"), timings=timings)

    async def recall_batch(self, requests):
        return [await self.recall(request) for request in requests]

    def ready(self):
        return True

    def info(self):
        versions = Versions(model="shop/1", bundle="a")
        return ModelInfo(versions=versions, address="models:/shop@champion", items=4, sids=2, levels=[1, 2, 3], stage="stage3", refused=None)


def test_the_client_and_the_routes_understand_each_other(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "keys").write_text(KEY)
    backend = Backend()
    server = uvicorn.Server(uvicorn.Config(create_app(lambda: backend, ApiKeys(str(tmp_path / "keys"))), host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        client = RecallClient(url, KEY, timeout_s=10)
        assert client.ready()
        assert client.recall("garden hose").items[0].item_id == "garden hose"
        assert [one.items[0].item_id for one in client.recall_batch([RecallRequest(query="a"), RecallRequest(query="b")])] == ["a", "b"]
        assert client.model().items == 4
        backend.overloaded = 1
        assert client.recall("again").items[0].item_id == "again"  # after the second that Retry-After names
        with pytest.raises(RecallError, match="401 no valid API key"):
            RecallClient(url, "another-key-for-this-test", timeout_s=10).recall("x")
    finally:
        server.should_exit = True
        thread.join(timeout=10)
    for secret in (KEY, "another-key-for-this-test", "garden hose"):
        assert secret not in caplog.text
