"""The HTTP face of the recall service: routes, limits, keys and errors, as a FastAPI application over any backend.

Every refusal is `{"error": ..., "problems": [{"field": ..., "message": ...}]}`: 401 no valid key, 403 no admin key is configured, 413 body too large, 422 a
field is wrong (400 where the body cannot be read at all), 503 overloaded, too late or not ready, with Retry-After.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genrecall.serving.api_keys import ADMIN_KEYS_VARIABLE, ApiKeys
from genrecall.serving.messages import (
    ErrorResponse,
    Health,
    ItemsAccepted,
    ItemsRequest,
    ModelInfo,
    Problem,
    Readiness,
    RecallBatchRequest,
    RecallBatchResponse,
    RecallRequest,
    RecallResponse,
)

MAX_BODY_BYTES = 64 * 1024
LARGER_BODIES = {"/v1/recall/batch": 1024 * 1024, "/v1/items": 8 * 1024 * 1024}
"""Bytes taken by routes that take more than `MAX_BODY_BYTES`."""

RETRY_AFTER_S = 1
OPEN_PATHS = frozenset({"/", "/page.js", "/healthz", "/readyz", "/openapi.json"})
"""Paths that need no key; all others do, known or not."""

ADMIN_PATHS = frozenset({"/v1/items"})
"""Paths that take an admin key and no other; without an admin key configured they are closed."""

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MAX_FIELD_CHARACTERS = 100
_REFUSALS = {
    400: "the body cannot be read",
    401: "no valid key",
    403: "no admin key is configured, so nobody may change the catalogue",
    413: "the body is larger than {most} bytes",
    422: "a field is wrong; the answer names it",
    503: "too many requests are waiting, the deadline has passed, or the server is not ready",
}
_USUAL_REFUSALS = (400, 401, 413, 422, 503)


class OverloadedError(RuntimeError):
    """The backend has as much work as it takes, or the answer would come too late."""


class LateError(OverloadedError):
    """The request's deadline passed before its turn came."""


class VersionNotLoadedError(ValueError):
    """A request asks for a version that is not loaded, or for one where it cannot be chosen."""


class Backend(Protocol):
    """What the routes need."""

    async def recall(self, request: RecallRequest) -> RecallResponse:
        """Answer a request, or raise OverloadedError or VersionNotLoadedError."""
        ...

    async def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        """Answer requests in order, all by one version, or raise OverloadedError or VersionNotLoadedError."""
        ...

    async def change_items(self, changes: ItemsRequest) -> ItemsAccepted:
        """Write changes of the catalogue to its log, or raise OverloadedError where that cannot be done now."""
        ...

    def ready(self) -> bool:
        """Whether a bundle is verified and warmed up and requests get answered."""
        ...

    def info(self) -> ModelInfo:
        """What is being served."""
        ...


class Gate:
    """Before any route: the key, the size of the body, and headers that every answer carries.

    A path counts below the prefix that the application is mounted at; a body counts as it arrives, whatever length it declares.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, admin_keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path not in OPEN_PATHS:
            headers = Headers(scope=scope)
            given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
            if barred := key_refusal(given.encode("latin-1"), self._admin_keys if path in ADMIN_PATHS else self._keys, admin=path in ADMIN_PATHS):
                status, error = barred
                marked = {"WWW-Authenticate": "Bearer"} if status == 401 else None
                await _refusal(status, error.error, error.problems, marked)(scope, receive, send_marked)
                return
        most = LARGER_BODIES.get(path, MAX_BODY_BYTES)
        body = await _read_body(Headers(scope=scope), receive, most)
        if body is None:
            return
        if len(body) > most:
            problem = Problem(field="body", message=f"expected at most {most} bytes")
            await _refusal(413, "body too large", [problem], {"Connection": "close"})(scope, receive, send_marked)
            return
        delivered = False

        async def replay() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send_marked)


def key_refusal(given: bytes, keys: ApiKeys | None, *, admin: bool) -> tuple[int, ErrorResponse] | None:
    """Why a request is refused for the key that it gives: the status and the words; None where it is not.

    Args:
        given: the key, empty where there is none.
        keys: those that are accepted; without any, everybody may ask and nobody may change the catalogue.
        admin: whether an admin key is asked for.
    """
    if admin and (keys is None or not keys.required):
        message = f"put an admin key into admin_keys_file or {ADMIN_KEYS_VARIABLE} where the server runs"
        return 403, ErrorResponse(error="no admin key is configured", problems=[Problem(field="X-API-Key", message=message)])
    if keys is None or not keys.required or keys.accept(given):
        return None
    kind = "admin key" if admin else "key"
    problem = Problem(field="X-API-Key", message=f"send a valid {kind} in X-API-Key or as a Bearer token")
    return 401, ErrorResponse(error=f"no valid {'admin' if admin else 'API'} key", problems=[problem])


async def _read_body(headers: Headers, receive: Receive, most: int) -> bytearray | None:
    """The body, up to a little over `most` bytes; None if the client went away."""
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > most):  # Python refuses to read a number of thousands of digits
        return bytearray(most + 1)
    body = bytearray()
    while len(body) <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


def create_app(backend_of: Callable[[], Backend], keys: ApiKeys, admin_keys: ApiKeys | None = None) -> FastAPI:
    """The application.

    Args:
        backend_of: called without arguments for each request, gives the `Backend`.
        keys: asked for on all paths but `OPEN_PATHS`, if there are any.
        admin_keys: asked for on `ADMIN_PATHS`, which without any are closed.
    """
    app = FastAPI(title="genrecall", version="1", description="Generative recall for e-commerce search", redoc_url=None, docs_url=None)
    app.add_middleware(Gate, keys=keys, admin_keys=admin_keys)
    key_in_document = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if keys.required else []

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(422, "invalid request", [problem_of(one) for one in error.errors()])

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        problems = [Problem(field="body", message="expected a JSON object in UTF-8")] if error.status_code == 400 else []
        return _refusal(error.status_code, str(error.detail), problems, dict(error.headers or {}))

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> JSONResponse:
        return _refusal(503, str(error), [], {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(VersionNotLoadedError)
    async def not_loaded(_: Request, error: VersionNotLoadedError) -> JSONResponse:
        return _refusal(422, "invalid request", [Problem(field="version", message=str(error))])

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _refusal(500, "internal error; the server's log says more", [])

    @app.post("/v1/recall", response_model=RecallResponse, responses=_refusals("/v1/recall"), dependencies=key_in_document)
    async def recall(request: RecallRequest) -> Response:
        """Generate SIDs for a request and return the items of their clusters, best first."""
        answer = await backend_of().recall(request)
        # A response of our own: FastAPI would validate and convert the whole answer once more.
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @app.post("/v1/recall/batch", response_model=RecallBatchResponse, responses=_refusals("/v1/recall/batch"), dependencies=key_in_document)
    async def recall_batch(batch: RecallBatchRequest) -> Response:
        """Answer several requests, in order and by one version; where a deadline among them has passed, the whole batch is refused."""
        answers = await backend_of().recall_batch(batch.requests)
        return Response(RecallBatchResponse(answers=answers).model_dump_json(exclude_none=True), media_type="application/json")

    @app.post(
        "/v1/items",
        responses=_refusals("/v1/items", *_USUAL_REFUSALS, 403),
        dependencies=[Security(APIKeyHeader(name="X-API-Key", scheme_name="AdminKey", auto_error=False))],
    )
    async def items(changes: ItemsRequest) -> ItemsAccepted:
        """Add, change and delist items, and say what is in stock; answered once the changes are on disk, whole or not at all."""
        if repeats := changes.repeats():
            raise RequestValidationError([{"type": "value_error", "loc": ("body", *where), "msg": message} for where, message in repeats])
        return await backend_of().change_items(changes)

    @app.get("/v1/model", responses=_refusals("/v1/model", 401), dependencies=key_in_document)
    async def model() -> ModelInfo:
        """What is being served."""
        return backend_of().info()

    @app.get("/healthz")
    async def healthz() -> Health:
        """Alive and holding a model."""
        return Health(status="ok", model=backend_of().info().versions.model)

    @app.get("/readyz", response_model=Readiness, responses=_refusals("/readyz", 503))
    async def readyz() -> Readiness:
        """Ready for requests: a bundle is verified and warmed up, and no batch hangs."""
        if not backend_of().ready():
            raise OverloadedError("not ready")
        return Readiness(status="ready", model=backend_of().info().versions.model)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(_page("page.html"), media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_page("page.js"), media_type="text/javascript")

    return app


def _refusals(path: str, *codes: int) -> dict[int | str, dict[str, Any]]:
    """The document's entries for the refusals of a route; all kinds where no codes are given."""
    most = LARGER_BODIES.get(path, MAX_BODY_BYTES)
    entries: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse, "description": _REFUSALS[code].format(most=most)} for code in codes or _USUAL_REFUSALS
    }
    if 503 in entries:
        entries[503]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return entries


def _page(name: str) -> str:
    return resources.files("genrecall.serving").joinpath(name).read_text()


def problem_of(error: Any) -> Problem:
    """One validation error as we report it: the field by its dotted path, never the value that came."""
    if error["type"] == "json_invalid":
        return Problem(field="body", message=f"not JSON: {error.get('ctx', {}).get('error', 'cannot be parsed')} at character {error['loc'][-1]}")
    field = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
    # A field's name may be the client's own text: no half surrogates in the answer, and no flood.
    return Problem(field=field.encode("utf-8", "replace").decode()[:_MAX_FIELD_CHARACTERS], message=str(error["msg"]))


def _refusal(status: int, error: str, problems: list[Problem], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=error, problems=problems).model_dump(), status_code=status, headers=headers)
