"""POST /v1/items in process: who may, what is refused and how, and that a request counts whole or not at all."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.serving.api import LARGER_BODIES, OverloadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import ItemsAccepted, ItemsRequest

KEY, ADMIN, OTHER_ADMIN = "k" * 20, "a" * 20, "b" * 20
HEADERS = {"x-api-key": ADMIN}


class FakeBackend:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.taken = []
        self.error = None

    async def change_items(self, changes):
        if self.error:
            raise self.error
        self.taken.append(changes)
        return ItemsAccepted(
            catalog_seq=7, upserted=len(changes.upsert), delisted=len(changes.delist), stock_flags=len(changes.out_of_stock) + len(changes.in_stock)
        )


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


@pytest.fixture(scope="module")
def post(backend, tmp_path_factory):
    """`post(body)`, with an admin key unless told otherwise."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(KEY)
    (folder / "admins").write_text(f"{ADMIN}\n{OTHER_ADMIN}\n")
    app = create_app(lambda: backend, ApiKeys(str(folder / "keys")), ApiKeys.for_admins(str(folder / "admins")))
    return client_of(app)


def client_of(app):
    def post(body, headers=HEADERS, path="/v1/items"):
        async def run():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://test") as client:
                given = {"content": body} if isinstance(body, bytes) else {"json": body}
                return await client.post(path, headers={"content-type": "application/json", **headers}, **given)

        return asyncio.run(run())

    return post


@pytest.fixture(autouse=True)
def clean(backend):
    backend.taken.clear()
    backend.error = None


def fields_of(response):
    return {problem["field"]: problem["message"] for problem in response.json()["problems"]}


def test_records_and_ids_are_taken_and_numbered(post, backend):
    record = {"item_id": "300001", "title": "hose", "category_path": ["Home", "灯"], "brand": "Acme", "text": "long", "price": 3, "prior_score": -1.5}
    response = post({"upsert": [record, {"item_id": "b", "title": "x"}], "delist": ["c"], "out_of_stock": ["b", "z"], "in_stock": ["c"]})
    assert (response.status_code, response.json()) == (200, {"catalog_seq": 7, "upserted": 2, "delisted": 1, "stock_flags": 3})
    assert backend.taken[0].upsert[0].model_dump() == record
    assert post({"delist": ["c"]}, headers={"authorization": f"Bearer {OTHER_ADMIN}"}).status_code == 200


def test_a_thousand_records_fit_and_no_more(post, backend):
    records = [{"item_id": str(number), "title": "t" * 200, "text": "d" * 4000} for number in range(1001)]
    assert post({"upsert": records[:1000], "delist": [f"d{number}" for number in range(1000)]}).json()["upserted"] == 1000
    assert fields_of(post({"upsert": records})) == {"upsert": "List should have at most 1000 items after validation, not 1001"}
    assert "delist" in fields_of(post({"delist": [str(number) for number in range(1001)]}))
    assert post(b" " * (LARGER_BODIES["/v1/items"] + 1)).status_code == 413
    assert len(backend.taken) == 1


@pytest.mark.parametrize("headers", [{}, {"x-api-key": KEY}, {"x-api-key": "wrong" * 5}, {"authorization": f"Basic {ADMIN}"}])
def test_no_other_key_changes_the_catalogue(post, backend, headers):
    response = post({"delist": ["c"]}, headers=headers)
    assert (response.status_code, response.json()["error"]) == (401, "no valid admin key")
    assert fields_of(response) == {"X-API-Key": "send a valid admin key in X-API-Key or as a Bearer token"}
    assert not backend.taken


def test_an_admin_key_asks_nothing_else(post):
    assert post({"query": "x"}, path="/v1/recall").status_code == 401


@pytest.mark.parametrize("with_keys", [True, False])
def test_without_an_admin_key_configured_the_route_says_how_to_open_it(backend, monkeypatch, tmp_path, with_keys):
    for name in ("GENRECALL_API_KEYS", "GENRECALL_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "keys").write_text(KEY)
    keys = ApiKeys(str(tmp_path / "keys")) if with_keys else ApiKeys()
    for admins in (None, ApiKeys.for_admins()):
        response = client_of(create_app(lambda: backend, keys, admins))({"delist": ["c"]}, headers={"x-api-key": KEY})
        assert (response.status_code, response.json()["error"]) == (403, "no admin key is configured")
        assert fields_of(response)["X-API-Key"] == "put an admin key into admin_keys_file or GENRECALL_ADMIN_KEYS where the server runs"
    assert not backend.taken


GOOD = {"item_id": "a", "title": "hose"}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "upsert", "expected at least one record here, or an id in delist"),
        ({"upsert": [], "delist": []}, "upsert", "expected at least one record"),
        ({"upsert": [GOOD, {"item_id": "b"}]}, "upsert.1.title", "Field required"),
        ({"upsert": [GOOD, {"item_id": "b", "title": ""}]}, "upsert.1.title", "at least 1 character"),
        ({"upsert": [GOOD, {"item_id": "", "title": "x"}]}, "upsert.1.item_id", "at least 1 character"),
        ({"upsert": [{"item_id": "灯" * 22, "title": "x"}]}, "upsert.0.item_id", "expected at most 64 bytes in UTF-8, got 66"),
        ({"upsert": [{"item_id": "a\0", "title": "x"}]}, "upsert.0.item_id", "does not end in a zero byte"),
        ({"upsert": [GOOD | {"price": "3"}]}, "upsert.0.price", "valid number"),
        ({"upsert": [GOOD | {"category_path": "Home"}]}, "upsert.0.category_path", "valid list"),
        ({"upsert": [GOOD | {"category_path": ["Home", ""]}]}, "upsert.0.category_path.1", "at least 1 character"),
        ({"upsert": [GOOD | {"colour": "red"}]}, "upsert.0.colour", "Extra inputs are not permitted"),
        ({"upsert": [GOOD, {"item_id": "b", "title": "x"}, GOOD]}, "upsert.2.item_id", "expected each id once, this one stands at upsert.0.item_id too"),
        ({"upsert": [GOOD], "delist": ["b", "a"]}, "delist.1", "this one stands at upsert.0.item_id too"),
        ({"delist": ["b", "b"]}, "delist.1", "this one stands at delist.0 too"),
        ({"delist": ["b"], "out_of_stock": ["b", "a"], "in_stock": ["a"]}, "in_stock.0", "this one stands at out_of_stock.1 too"),
        ({"in_stock": ["a\0"]}, "in_stock.0", "does not end in a zero byte"),
        ({"delist": ["x" * 65]}, "delist.0", "at most 64 characters"),
        ({"delist": [5]}, "delist.0", "valid string"),
        ({"delete": ["b"]}, "delete", "Extra inputs are not permitted"),
        ([GOOD], "body", "valid dictionary"),
    ],
)
def test_what_is_wrong_is_named_by_record_and_field_and_nothing_is_taken(post, backend, body, field, message):
    response = post(body)
    assert response.status_code == 422
    assert message in fields_of(response)[field]
    assert not backend.taken


def test_numbers_that_are_none_are_refused(post, backend):
    for number in (b"NaN", b"Infinity", b"1e999"):
        response = post(b'{"upsert": [{"item_id": "a", "title": "x", "price": ' + number + b"}]}")
        assert response.status_code == 422
        assert "finite number" in fields_of(response)["upsert.0.price"]
    assert not backend.taken


def test_all_that_is_wrong_is_named_at_once(post):
    response = post({"upsert": [{"item_id": "", "title": "x"}, {"item_id": "b"}], "delist": [5]})
    assert set(fields_of(response)) == {"upsert.0.item_id", "upsert.1.title", "delist.0"}


def test_a_log_that_cannot_be_written_is_503_with_retry_after(post, backend):
    backend.error = OverloadedError("the catalogue log cannot be written now; send the same changes again")
    response = post({"delist": ["c"], "out_of_stock": ["b", "z"], "in_stock": ["c"]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_the_openapi_document_says_who_may_and_what_comes(backend, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    keys = ApiKeys(str(tmp_path / "keys"))
    document = create_app(lambda: backend, keys, keys).openapi()
    route = document["paths"]["/v1/items"]["post"]
    assert set(route["responses"]) == {"200", "400", "401", "403", "413", "422", "503"}
    assert route["security"] == [{"AdminKey": []}]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ItemsRequest")
    for example in document["components"]["schemas"]["ItemsRequest"]["examples"]:
        ItemsRequest.model_validate(example)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["item_id", "title", "price"]), inner, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=100), st.dictionaries(st.sampled_from(["upsert", "delist", "x"]), JSON, max_size=3).map(lambda value: json.dumps(value).encode())
    )
)
def test_no_body_makes_the_server_fail(post, body):
    assert post(body).status_code in (200, 400, 422)
