"""The HTTP face over a fake backend, in process: what is refused, how, and what every answer carries."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

from genrecall.serving import openapi
from genrecall.serving.api import LARGER_BODIES, MAX_BODY_BYTES, OverloadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import (
    MAX_HISTORY,
    ItemExplanation,
    ModelInfo,
    Prefix,
    RecallBatchResponse,
    RecalledItem,
    RecalledSid,
    RecallResponse,
    Timings,
    Versions,
)

ROOT = Path(__file__).parents[3]
KEY, OTHER_KEY = "k" * 20, "o" * 20
VERSIONS = Versions(model="shop/3", bundle="abc")


class FakeBackend:
    """Answers every request with one item."""

    def __init__(self) -> None:
        self.requests = []
        self.error = None
        self.is_ready = True

    async def recall(self, request):
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        item = RecalledItem(item_id="i1", title="hose", brand="", category_path=["Home"], rank=0, sid="<1,2,3>", score=-0.5)
        timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
        return RecallResponse(items=[item], sids=[RecalledSid(sid="<1,2,3>", score=-0.5, size=4)], beam_size=10, versions=VERSIONS, timings=timings)

    async def recall_batch(self, requests):
        return [await self.recall(request) for request in requests]

    def ready(self):
        return self.is_ready

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
    backend.is_ready = True
    return client_of(backend)


@pytest.fixture
def guarded(backend, tmp_path):
    (tmp_path / "keys").write_text(f"# team a\n{KEY}\n\n{OTHER_KEY}\n")
    return client_of(backend, ApiKeys(str(tmp_path / "keys")))


def fields_of(response):
    return {problem["field"]: problem["message"] for problem in response.json()["problems"]}


def test_a_request_with_all_fields_is_answered(call, backend):
    filters = {"categories": [["Home", "Garden"]], "brands": ["Acme"], "in_stock": True, "excluded": ["i1"]}
    request = {"query": "hose", "shopper": {"gender": "f", "age_band": "18-24"}, "history": ["i1"], "beam_size": 10, "filters": filters, "limit": 5}
    request |= {"explain": True, "deadline_ms": 200, "version": "champion"}
    response = call("POST", "/v1/recall", json=request)
    assert response.status_code == 200
    assert RecallResponse.model_validate_json(response.content).items[0].sid == "<1,2,3>"
    assert response.json()["versions"] == {"model": "shop/3", "bundle": "abc", "catalog_seq": 0, "role": "champion"}
    assert backend.requests[0].model_dump() == request


def test_a_query_alone_is_enough_and_may_be_empty(call, backend):
    assert call("POST", "/v1/recall", json={"query": ""}).status_code == 200
    assert (backend.requests[0].limit, backend.requests[0].beam_size, backend.requests[0].history) == (100, None, [])
    assert backend.requests[0].filters is None


def test_a_clause_alone_is_enough_for_a_filter(call, backend):
    assert call("POST", "/v1/recall", json={"query": "x", "filters": {}}).status_code == 200
    assert call("POST", "/v1/recall", json={"query": "x", "filters": {"brands": ["Acme"]}}).status_code == 200
    nothing = {"categories": [], "brands": [], "in_stock": False, "excluded": []}
    assert [request.filters.model_dump() for request in backend.requests] == [nothing, nothing | {"brands": ["Acme"]}]


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
        ({"query": "x", "explain": 1}, "explain", "valid boolean"),
        ({"query": "x", "deadline_ms": 0}, "deadline_ms", "greater than or equal to 1"),
        ({"query": "x", "deadline_ms": 60_001}, "deadline_ms", "less than or equal to 60000"),
        ({"query": "x", "filters": []}, "filters", "valid dictionary"),
        ({"query": "x", "filters": {"colour": "red"}}, "filters.colour", "Extra inputs are not permitted"),
        ({"query": "x", "filters": {"categories": ["Home"]}}, "filters.categories.0", "valid list"),
        ({"query": "x", "filters": {"categories": [["Home"], []]}}, "filters.categories.1", "at least 1 item"),
        ({"query": "x", "filters": {"categories": [["Home", ""]]}}, "filters.categories.0.1", "at least 1 character"),
        ({"query": "x", "filters": {"categories": [["a"] * 17]}}, "filters.categories.0", "at most 16 items"),
        ({"query": "x", "filters": {"categories": [["a"]] * 51}}, "filters.categories", "at most 50 items"),
        ({"query": "x", "filters": {"brands": ["b"] * 101}}, "filters.brands", "at most 100 items"),
        ({"query": "x", "filters": {"brands": ["b" * 257]}}, "filters.brands.0", "at most 256 characters"),
        ({"query": "x", "filters": {"brands": [None]}}, "filters.brands.0", "valid string"),
        ({"query": "x", "filters": {"in_stock": 1}}, "filters.in_stock", "valid boolean"),
        ({"query": "x", "filters": {"excluded": ["i"] * 501}}, "filters.excluded", "at most 500 items"),
        ({"query": "x", "filters": {"excluded": [7]}}, "filters.excluded.0", "valid string"),
        ({"query": "x", "filters": {"excluded": ["i" * 257]}}, "filters.excluded.0", "at most 256 characters"),
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


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "requests", "Field required"),
        ({"requests": []}, "requests", "at least 1 item"),
        ({"requests": [{"query": "x"}] * 65}, "requests", "at most 64 items"),
        ({"requests": [{"query": "x"}, {"query": "x", "limit": 0}]}, "requests.1.limit", "greater than or equal to 1"),
        ({"requests": [{"query": "x"}], "limit": 5}, "limit", "Extra inputs are not permitted"),
        ([{"query": "x"}], "body", "valid dictionary"),
    ],
)
def test_a_wrong_field_of_a_batch_is_named(call, backend, body, field, message):
    response = call("POST", "/v1/recall/batch", json=body)
    assert response.status_code == 422
    assert message in fields_of(response)[field]
    assert not backend.requests


def test_a_batch_is_answered_in_order(call, backend):
    response = call("POST", "/v1/recall/batch", json={"requests": [{"query": "hose"}, {"query": "lamp", "limit": 3}]})
    assert response.status_code == 200
    assert len(RecallBatchResponse.model_validate_json(response.content).answers) == 2
    assert [(request.query, request.limit) for request in backend.requests] == [("hose", 100), ("lamp", 3)]


def test_a_batch_may_be_larger_than_a_request_and_has_a_limit_too(call):
    most = LARGER_BODIES["/v1/recall/batch"]
    body = json.dumps({"requests": [{"query": "x"}]})
    header = {"content-type": "application/json"}
    assert call("POST", "/v1/recall/batch", content=body.ljust(most), headers=header).status_code == 200
    response = call("POST", "/v1/recall/batch", content=body.ljust(most + 1), headers=header)
    assert (response.status_code, fields_of(response)) == (413, {"body": "expected at most 1048576 bytes"})


@pytest.mark.parametrize("path", ["/", "/page.js", "/healthz", "/readyz", "/openapi.json", "/v1/model", "/nothing"])
def test_no_route_reads_a_body_without_end(call, path):
    assert call("GET", path, content=_chunks(MAX_BODY_BYTES)).status_code == 413


@pytest.mark.parametrize("declared", ["9" * 5000, "-1", "1e9", "²"])
def test_a_strange_length_is_no_failure(call, declared):
    response = call("POST", "/v1/recall", content=b'{"query": "x"}', headers={"content-length": declared.encode(), "content-type": "application/json"})
    assert response.status_code in (200, 413)


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
@pytest.mark.parametrize("path", ["/v1/recall", "/v1/recall/batch", "/v1/model", "/v1/nothing", "/nothing", "/v1", "//v1/model", "/healthz/"])
def test_without_a_valid_key_nothing_but_the_open_paths_answers(guarded, headers, path):
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = guarded("POST" if path.startswith("/v1/recall") else "GET", path, headers=encoded)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert "X-API-Key" in fields_of(response)


@pytest.mark.parametrize("headers", [{"x-api-key": KEY}, {"x-api-key": OTHER_KEY}, {"authorization": f"Bearer {KEY}"}])
def test_each_of_several_keys_is_accepted(guarded, headers):
    assert guarded("POST", "/v1/recall", json={"query": "x"}, headers=headers).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/shop", "/v1"])
def test_a_prefix_that_the_application_is_mounted_at_opens_nothing(backend, tmp_path, prefix):
    """Ray Serve leaves a route prefix in the path and names it as the root path."""
    (tmp_path / "keys").write_text(KEY)
    app = create_app(lambda: backend, ApiKeys(str(tmp_path / "keys")))

    async def ask(path, **headers):
        transport = httpx.ASGITransport(app=app, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(prefix + path, headers=headers)).status_code

    assert asyncio.run(ask("/v1/model")) == 401
    assert asyncio.run(ask("/v1/model", **{"x-api-key": KEY})) == 200
    assert asyncio.run(ask("/healthz")) == asyncio.run(ask("/")) == 200
    assert asyncio.run(ask("/nothing")) == 401


def test_health_and_page_need_no_key(guarded):
    assert guarded("GET", "/healthz").json() == {"status": "ok", "model": "shop/3"}
    assert guarded("GET", "/readyz").json() == {"status": "ready", "model": "shop/3"}
    assert guarded("GET", "/").status_code == guarded("GET", "/page.js").status_code == 200


def test_overload_is_503_with_retry_after(call, backend):
    backend.error = OverloadedError("too many requests are waiting")
    response = call("POST", "/v1/recall", json={"query": "x"})
    assert (response.status_code, response.headers["retry-after"], response.json()["error"]) == (503, "1", "too many requests are waiting")


def test_not_ready_is_503_with_retry_after_while_it_lives(call, backend):
    backend.is_ready = False
    response = call("GET", "/readyz")
    assert (response.status_code, response.headers["retry-after"], response.json()["error"]) == (503, "1", "not ready")
    assert call("GET", "/healthz").status_code == 200


def test_what_was_not_asked_for_is_left_out_of_the_answer(call):
    answer = call("POST", "/v1/recall", json={"query": "x"}).json()
    assert set(answer["items"][0]) == {"item_id", "title", "brand", "category_path", "rank", "sid", "score"}
    assert set(answer["sids"][0]) == {"sid", "score", "size"}
    assert (answer["degraded"], answer["degraded_by"], answer["timings"]["cached"]) == (False, [], False)


def test_an_explained_answer_is_one_that_the_document_describes():
    item = RecalledItem(item_id="i", title="t", brand="", category_path=[], rank=0, sid="<1,2,3>", score=-3.0)
    explained = item.model_copy(update={"explanation": ItemExplanation(sid_score=-1.0, share=-2.0, path=["<1>", "<1,2>", "<1,2,3>"])})
    sid = RecalledSid(sid="<1,2,3>", score=-1.0, size=2, label="Hoses", path=[Prefix(prefix="<1>", label="", size=9)])
    schemas = openapi.document()["components"]
    for one, schema in ((explained, "RecalledItem"), (sid, "RecalledSid")):
        jsonschema.validate(one.model_dump(exclude_none=True), {"$ref": f"#/components/schemas/{schema}", "components": schemas})


def test_an_unexpected_error_tells_the_client_nothing(call, backend):
    backend.error = RuntimeError("secret detail")
    response = call("POST", "/v1/recall", json={"query": "x"})
    assert response.status_code == 500
    assert "secret" not in response.text


def test_neither_keys_nor_queries_nor_shoppers_are_logged(guarded, backend, caplog):
    caplog.set_level(logging.DEBUG)
    body = {"query": "a private query", "shopper": {"gender": "private-gender"}, "history": ["private-item"]}
    for key in (KEY, "w" * 20):
        guarded("POST", "/v1/recall", json=body, headers={"x-api-key": key})
        guarded("POST", "/v1/recall", json=body | {"limit": "private-limit"}, headers={"authorization": f"Bearer {key}"})
    backend.error = RuntimeError("broken")
    assert guarded("POST", "/v1/recall", json=body, headers={"x-api-key": KEY}).status_code == 500
    backend.error = None
    for secret in (KEY, "w" * 20, "private"):
        assert secret not in caplog.text


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


BODY_REFUSALS = {"400", "401", "413", "422", "503"}
ROUTES = {
    ("/v1/recall", "post"): {"200"} | BODY_REFUSALS,
    ("/v1/recall/batch", "post"): {"200"} | BODY_REFUSALS,
    ("/v1/items", "post"): {"200", "403"} | BODY_REFUSALS,
    ("/v1/model", "get"): {"200", "401"},
    ("/healthz", "get"): {"200"},
    ("/readyz", "get"): {"200", "503"},
}


def test_the_openapi_document_is_valid_and_whole(call, guarded):
    document = call("GET", "/openapi.json").json()
    validate(document)
    described = {(path, method): set(about["responses"]) for path, methods in document["paths"].items() for method, about in methods.items()}
    assert described == ROUTES
    for (path, method), about in {(path, method): document["paths"][path][method] for path, method in ROUTES}.items():
        assert about["description"], (path, method)
        for code, response in about["responses"].items():
            name = response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert (name == "ErrorResponse") == (code != "200"), (path, code)
    recall, batch = (document["paths"][path]["post"] for path in ("/v1/recall", "/v1/recall/batch"))
    assert recall["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RecallRequest")
    assert batch["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RecallBatchRequest")
    assert (str(MAX_BODY_BYTES) in recall["responses"]["413"]["description"], str(2**20) in batch["responses"]["413"]["description"]) == (True, True)
    assert "Retry-After" in recall["responses"]["503"]["headers"]
    assert "security" not in recall
    guarded_document = guarded("GET", "/openapi.json").json()
    validate(guarded_document)
    keyed = {path for path, methods in guarded_document["paths"].items() for about in methods.values() if about.get("security")}
    assert keyed == {path for path in document["paths"] if path.startswith("/v1/")}
    assert guarded_document["paths"]["/v1/recall"]["post"]["security"] == [{"APIKeyHeader": []}]


def test_the_document_states_every_limit_and_forbids_other_fields(call):
    schemas = call("GET", "/openapi.json").json()["components"]["schemas"]
    for name, schema in schemas.items():
        assert schema["additionalProperties"] is False, name
    request, filters, shopper = (schemas[name]["properties"] for name in ("RecallRequest", "Filters", "Shopper"))
    assert (request["query"]["maxLength"], request["history"]["maxItems"], request["history"]["items"]["maxLength"]) == (1000, 200, 256)
    assert (request["limit"]["minimum"], request["limit"]["maximum"], request["limit"]["default"]) == (1, 1000, 100)
    assert (request["beam_size"]["anyOf"][0]["maximum"], request["deadline_ms"]["anyOf"][0]["maximum"]) == (200, 60000)
    assert (shopper["gender"]["anyOf"][0]["maxLength"], shopper["age_band"]["anyOf"][0]["maxLength"]) == (64, 64)
    assert [filters[name]["maxItems"] for name in ("categories", "brands", "excluded")] == [50, 100, 500]
    assert (schemas["RecallBatchRequest"]["properties"]["requests"]["minItems"], schemas["RecallBatchRequest"]["properties"]["requests"]["maxItems"]) == (1, 64)


def test_every_example_of_the_document_is_accepted_as_it_stands(call, backend):
    document = call("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, name in (("/v1/recall", "RecallRequest"), ("/v1/recall/batch", "RecallBatchRequest")):
        assert schemas[name]["examples"]
        for example in schemas[name]["examples"]:
            assert call("POST", path, json=example).status_code == 200
    for example in schemas["RecallResponse"]["examples"]:
        RecallResponse.model_validate_json(json.dumps(example))


def test_the_document_in_the_repository_is_the_one_that_is_served(guarded, tmp_path):
    openapi.main([str(tmp_path / "openapi.json")])
    assert json.loads((tmp_path / "openapi.json").read_text()) == guarded("GET", "/openapi.json").json()
    stored = ROOT / "docs" / "openapi.json"
    assert stored.read_text() == (tmp_path / "openapi.json").read_text(), "write it anew: python -m genrecall.serving.openapi docs/openapi.json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
NAMES = st.sampled_from(["query", "limit", "beam_size", "history", "shopper", "filters", "explain", "deadline_ms", "requests"])


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.dictionaries(NAMES | st.text(), JSON, max_size=5).map(lambda value: json.dumps(value).encode())))
def test_no_body_makes_the_server_fail(backend, body):
    backend.error = None
    for path in ("/v1/recall", "/v1/recall/batch"):
        response = client_of(backend)("POST", path, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 422)
        assert response.status_code == 200 or response.json()["problems"]
