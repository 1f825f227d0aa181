"""The HTTP face of the recall service: routes, limits, keys and errors, as a FastAPI application over any backend.

Every refusal is `{"error": ..., "problems": [{"field": ..., "message": ...}]}`: 401 no valid key, 413 body too large, 422 a
field is wrong (400 where the body cannot be read at all), 503 overloaded, with Retry-After.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import ErrorResponse, Health, ModelInfo, Problem, RecallRequest, RecallResponse

MAX_BODY_BYTES = 64 * 1024
RETRY_AFTER_S = 1
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MAX_FIELD_CHARACTERS = 100


class OverloadedError(RuntimeError):
    """The backend has as much work as it takes."""


class Backend(Protocol):
    """What the routes need."""

    async def recall(self, request: RecallRequest) -> RecallResponse:
        """Answer a request, or raise OverloadedError."""
        ...

    def info(self) -> ModelInfo:
        """What is being served."""
        ...


class Gate:
    """Before any route: the key of `/v1/` paths, the size of the body, and headers that every answer carries.

    A body counts as it arrives, whatever length it declares.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

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

        if self._keys.required and scope["path"].startswith("/v1/") and not self._has_key(Headers(scope=scope)):
            problem = Problem(field="X-API-Key", message="send a valid key in X-API-Key or as a Bearer token")
            await _refusal(401, "no valid API key", [problem], {"WWW-Authenticate": "Bearer"})(scope, receive, send_marked)
            return
        body = await _read_body(Headers(scope=scope), receive)
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            problem = Problem(field="body", message=f"expected at most {MAX_BODY_BYTES} bytes")
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

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        return self._keys.accept(given.encode("latin-1"))


async def _read_body(headers: Headers, receive: Receive) -> bytearray | None:
    """The body, up to a little over `MAX_BODY_BYTES`; None if the client went away."""
    declared = headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        return bytearray(MAX_BODY_BYTES + 1)
    body = bytearray()
    while len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


def create_app(backend_of: Callable[[], Backend], keys: ApiKeys) -> FastAPI:
    """The application.

    Args:
        backend_of: called without arguments for each request, gives the `Backend`.
        keys: asked for on `/v1/` paths, if there are any.
    """
    app = FastAPI(title="genrecall", version="1", description="Generative recall for e-commerce search", redoc_url=None, docs_url=None)
    app.add_middleware(Gate, keys=keys)
    key_in_document = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if keys.required else []

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(422, "invalid request", [_problem(one) for one in error.errors()])

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        problems = [Problem(field="body", message="expected a JSON object in UTF-8")] if error.status_code == 400 else []
        return _refusal(error.status_code, str(error.detail), problems, dict(error.headers or {}))

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> JSONResponse:
        return _refusal(503, str(error), [], {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _refusal(500, "internal error; the server's log says more", [])

    errors: dict[int | str, dict[str, Any]] = {code: {"model": ErrorResponse} for code in (400, 401, 413, 422, 503)}

    @app.post("/v1/recall", response_model=RecallResponse, responses=errors, dependencies=key_in_document)
    async def recall(request: RecallRequest) -> Response:
        """Generate SIDs for a request and return the items of their clusters, best first."""
        answer = await backend_of().recall(request)
        # A response of our own: FastAPI would validate and convert the whole answer once more.
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/v1/model", responses={401: {"model": ErrorResponse}}, dependencies=key_in_document)
    async def model() -> ModelInfo:
        """What is being served."""
        return backend_of().info()

    @app.get("/healthz")
    async def healthz() -> Health:
        """Alive and holding a model."""
        return Health(status="ok", model=backend_of().info().versions.model)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(_page("page.html"), media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_page("page.js"), media_type="text/javascript")

    return app


def _page(name: str) -> str:
    return resources.files("genrecall.serving").joinpath(name).read_text()


def _problem(error: Any) -> Problem:
    """One validation error as we report it: the field by its dotted path, never the value that came."""
    if error["type"] == "json_invalid":
        return Problem(field="body", message=f"not JSON: {error.get('ctx', {}).get('error', 'cannot be parsed')} at character {error['loc'][-1]}")
    field = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
    # A field's name may be the client's own text: no half surrogates in the answer, and no flood.
    return Problem(field=field.encode("utf-8", "replace").decode()[:_MAX_FIELD_CHARACTERS], message=str(error["msg"]))


def _refusal(status: int, error: str, problems: list[Problem], headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=error, problems=problems).model_dump(), status_code=status, headers=headers)
