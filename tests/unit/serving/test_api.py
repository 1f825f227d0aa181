"""The HTTP face over a fake backend, in process: what is refused, how, and what every answer carries."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

from genrecall.serving.api import MAX_BODY_BYTES, OverloadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import MAX_HISTORY, ModelInfo, RecalledItem, RecalledSid, RecallResponse, Timings, Versions

KEY, OTHER_KEY = "k" * 20, "o" * 20
VERSIONS = Versions(model="shop/3", bundle="abc")


class FakeBackend:
    """Answers every request with one item."""

    def __init__(self) -> None:
        self.requests = []
        self.error = None

    async def recall(self, request):
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        item = RecalledItem(item_id="i1", title="hose", brand="", category_path=["Home"], rank=0, sid="<1,2,3>", score=-0.5)
        timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
        return RecallResponse(items=[item], sids=[RecalledSid(sid="<1,2,3>", score=-0.5, size=4)], beam_size=10, versions=VERSIONS, timings=timings)

    def info(self):
        return ModelInfo(versions=VERSIONS, address="models:/shop@champion", items=4, sids=2, levels=[1, 2, 3], stage="stage3", refused=None)


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


def client_of(backend, keys=None):
    app = create_app(lambda: backend, keys or ApiKeys())

    def call(method, path, **arguments):
        async def run():
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(run())

    return call


@pytest.fixture
def call(backend, monkeypatch):
    monkeypatch.delenv("GENRECALL_API_KEYS", raising=False)
    backend.requests.clear()
    backend.error = None
    return client_of(backend)


@pytest.fixture
def guarded(backend, tmp_path):
    (tmp_path / "keys").write_text(f"# team a\n{KEY}\n\n{OTHER_KEY}\n")
    return client_of(backend, ApiKeys(str(tmp_path / "keys")))


def fields_of(response):
    return {problem["field"]: problem["message"] for problem in response.json()["problems"]}


def test_a_request_with_all_fields_is_answered(call, backend):
    request = {"query": "hose", "shopper": {"gender": "f", "age_band": "18-24"}, "history": ["i1"], "beam_size": 10, "limit": 5}
    response = call("POST", "/v1/recall", json=request)
    assert response.status_code == 200
    assert RecallResponse.model_validate_json(response.content).items[0].sid == "<1,2,3>"
    assert response.json()["versions"] == {"model": "shop/3", "bundle": "abc"}
    assert backend.requests[0].model_dump() == request


def test_a_query_alone_is_enough_and_may_be_empty(call, backend):
    assert call("POST", "/v1/recall", json={"query": ""}).status_code == 200
    assert (backend.requests[0].limit, backend.requests[0].beam_size, backend.requests[0].history) == (100, None, [])


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "query", "Field required"),
        ({"query": 5}, "query", "valid string"),
        ({"query": None}, "query", "valid string"),
        ({"query": "x" * 1001}, "query", "at most 1000 characters"),
        ({"query": "x", "limit": -1}, "limit", "greater than or equal to 1"),
        ({"query": "x", "limit": 1001}, "limit", "less than or equal to 1000"),
        ({"query": "x", "limit": "5"}, "limit", "valid integer"),
        ({"query": "x", "limit": True}, "limit", "valid integer"),
        ({"query": "x", "limit": 1.5}, "limit", "valid integer"),
        ({"query": "x", "beam_size": 0}, "beam_size", "greater than or equal to 1"),
        ({"query": "x", "beam_size": 201}, "beam_size", "less than or equal to 200"),
        ({"query": "x", "history": ["i"] * (MAX_HISTORY + 1)}, "history", "at most 200 items"),
        ({"query": "x", "history": ["i", 5]}, "history.1", "valid string"),
        ({"query": "x", "history": ["i" * 300]}, "history.0", "at most 256 characters"),
        ({"query": "x", "history": "i1"}, "history", "valid list"),
        ({"query": "x", "shopper": {"sex": "f"}}, "shopper.sex", "Extra inputs are not permitted"),
        ({"query": "x", "shopper": {"gender": "f" * 65}}, "shopper.gender", "at most 64 characters"),
        ({"query": "x", "shopper": []}, "shopper", "valid dictionary"),
        ({"query": "x", "bean_size": 10}, "bean_size", "Extra inputs are not permitted"),
        (["query"], "body", "valid dictionary"),
        ("query", "body", "valid dictionary"),
        (None, "body", "valid dictionary"),
    ],
)
def test_a_wrong_field_is_named(call, body, field, message):
    response = call("POST", "/v1/recall", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert message in fields_of(response)[field]


def test_all_wrong_fields_are_named_at_once(call):
    response = call("POST", "/v1/recall", json={"query": 1, "limit": 0, "colour": "red"})
    assert set(fields_of(response)) == {"query", "limit", "colour"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"query": "x"', 422, "not JSON: Expecting ',' delimiter at character 13"),
        (b"hello", 422, "not JSON: Expecting value at character 0"),
        (b"", 422, "Field required"),
        (b"\xff\xfe{}", 422, "not JSON"),
        (b'{"query": "\xff"}', 400, "expected a JSON object in UTF-8"),
        (b"[" * 60_000, 400, "expected a JSON object in UTF-8"),
        (b'{"query": "x", "limit": ' + b"9" * 5000 + b"}", 400, "expected a JSON object in UTF-8"),
    ],
)
def test_a_body_that_is_not_json_is_refused(call, body, status, message):
    response = call("POST", "/v1/recall", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert message in fields_of(response)["body"]


def test_half_a_surrogate_is_refused_in_values_and_in_names(call):
    header = {"content-type": "application/json"}
    response = call("POST", "/v1/recall", content=b'{"query": "\\ud800"}', headers=header)
    assert (response.status_code, set(fields_of(response))) == (422, {"query"})
    response = call("POST", "/v1/recall", content=b'{"query": "x", "\\ud800": 1}', headers=header)
    assert (response.status_code, set(fields_of(response))) == (422, {"body"})


def test_what_was_sent_is_not_echoed(call):
    assert "secret" not in call("POST", "/v1/recall", json={"query": "x", "limit": "secret"}).text


async def _chunks(size):
    for _ in range(size // 8192 + 1):
        yield b" " * 8192


@pytest.mark.parametrize("way", ["declared", "chunked", "lying"])
def test_a_body_too_large_is_refused_however_it_comes(call, backend, way):
    if way == "declared":
        response = call("POST", "/v1/recall", content=b" " * (MAX_BODY_BYTES + 1))
    elif way == "chunked":
        response = call("POST", "/v1/recall", content=_chunks(MAX_BODY_BYTES))
    else:
        response = call("POST", "/v1/recall", content=_chunks(MAX_BODY_BYTES), headers={"content-length": "10"})
    assert response.status_code == 413
    assert fields_of(response) == {"body": "expected at most 65536 bytes"}
    assert not backend.requests


def test_a_body_of_the_largest_size_is_read(call):
    body = json.dumps({"query": "x"}).ljust(MAX_BODY_BYTES)
    assert call("POST", "/v1/recall", content=body, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "wrong" * 5}, {"authorization": "Bearer "}, {"authorization": f"Basic {KEY}"}, {"x-api-key": "k\xe9" * 10}]
)
@pytest.mark.parametrize("path", ["/v1/recall", "/v1/model", "/v1/nothing"])
def test_without_a_valid_key_nothing_under_v1_answers(guarded, headers, path):
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = guarded("POST" if path == "/v1/recall" else "GET", path, headers=encoded)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert "X-API-Key" in fields_of(response)


@pytest.mark.parametrize("headers", [{"x-api-key": KEY}, {"x-api-key": OTHER_KEY}, {"authorization": f"Bearer {KEY}"}])
def test_each_of_several_keys_is_accepted(guarded, headers):
    assert guarded("POST", "/v1/recall", json={"query": "x"}, headers=headers).status_code == 200


def test_health_and_page_need_no_key(guarded):
    assert guarded("GET", "/healthz").json() == {"status": "ok", "model": "shop/3"}
    assert guarded("GET", "/").status_code == guarded("GET", "/page.js").status_code == 200


def test_overload_is_503_with_retry_after(call, backend):
    backend.error = OverloadedError("too many requests are waiting")
    response = call("POST", "/v1/recall", json={"query": "x"})
    assert (response.status_code, response.headers["retry-after"], response.json()["error"]) == (503, "1", "too many requests are waiting")


def test_an_unexpected_error_tells_the_client_nothing(call, backend):
    backend.error = RuntimeError("secret detail")
    response = call("POST", "/v1/recall", json={"query": "x"})
    assert response.status_code == 500
    assert "secret" not in response.text


def test_unknown_paths_and_methods_are_answered_in_the_same_form(call):
    assert (call("GET", "/nothing").status_code, call("GET", "/nothing").json()) == (404, {"error": "Not Found", "problems": []})
    assert call("GET", "/v1/recall").status_code == 405
    assert call("GET", "/../messages.py").status_code == 404


def test_every_answer_carries_the_security_headers(call):
    for response in (call("GET", "/"), call("GET", "/v1/model"), call("GET", "/nothing"), call("POST", "/v1/recall", json={})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
    policy = call("GET", "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy


def test_the_openapi_document_is_valid_and_whole(call, guarded):
    document = call("GET", "/openapi.json").json()
    validate(document)
    assert set(document["paths"]) == {"/v1/recall", "/v1/model", "/healthz"}
    recall = document["paths"]["/v1/recall"]["post"]
    assert set(recall["responses"]) == {"200", "400", "401", "413", "422", "503"}
    assert recall["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert recall["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RecallRequest")
    assert document["components"]["schemas"]["RecallRequest"]["additionalProperties"] is False
    assert "security" not in recall
    guarded_document = guarded("GET", "/openapi.json").json()
    validate(guarded_document)
    assert guarded_document["paths"]["/v1/recall"]["post"]["security"] == [{"APIKeyHeader": []}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
NAMES = st.sampled_from(["query", "limit", "beam_size", "history", "shopper"])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.dictionaries(NAMES | st.text(), JSON, max_size=5).map(lambda value: json.dumps(value).encode())))
def test_no_body_makes_the_server_fail(backend, body):
    backend.error = None
    response = client_of(backend)("POST", "/v1/recall", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 422)
    assert response.status_code == 200 or response.json()["problems"]
