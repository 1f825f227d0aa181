"""The gRPC face of the recall service: the calls of `recall.proto` over the same backend, keys, limits and errors as the HTTP routes.

A refusal is a status, its words as details, an `ErrorResponse` as trailing metadata `genrecall-error-bin`, and `retry-after` (seconds) where the same request
may be answered later:

    401 UNAUTHENTICATED, 403 PERMISSION_DENIED, 413 and 422 INVALID_ARGUMENT, 503 RESOURCE_EXHAUSTED, or DEADLINE_EXCEEDED where it is the deadline, 500 INTERNAL
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from pydantic import ValidationError

from genrecall.serving import recall_pb2
from genrecall.serving.api import (
    LARGER_BODIES,
    MAX_BODY_BYTES,
    RETRY_AFTER_S,
    Backend,
    LateError,
    OverloadedError,
    VersionNotLoadedError,
    key_refusal,
    problem_of,
)
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.grpc_messages import ERROR_KEY, MAX_PROBLEMS, RETRY_AFTER_KEY, UnknownFieldError, from_protobuf, packed_error, to_protobuf
from genrecall.serving.messages import ErrorResponse, ItemsRequest, Message, Problem, RecallBatchRequest, RecallBatchResponse, RecallRequest

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

MAX_DETAILS_CHARACTERS = 500

_STATUS_OF = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}
_Asked = TypeVar("_Asked", bound=Message)
_Twin = TypeVar("_Twin")


class CallContext(Protocol):
    """What of Ray Serve's `RayServegRPCContext` a call needs."""

    def invocation_metadata(self) -> Sequence[tuple[str, Any]]:
        """What the client sent beside the message."""
        ...

    def set_code(self, code: Any) -> None:
        """The status of the answer."""
        ...

    def set_details(self, details: str) -> None:
        """The words of the status."""
        ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, Any]]) -> None:
        """What goes with the status."""
        ...


class GrpcRoutes:
    """The calls, none of which raises: Ray Serve would send an exception's traceback to the client, and would not send metadata with it.

    Args:
        backend_of: called without arguments for each request, gives the `Backend`.
        keys: asked for on all calls, if there are any.
        admin_keys: asked for on `change_items`, which without any is closed.
    """

    def __init__(self, backend_of: Callable[[], Backend], keys: ApiKeys, admin_keys: ApiKeys | None = None) -> None:
        self._backend_of = backend_of
        self._keys = keys
        self._admin_keys = admin_keys

    async def recall(self, request: recall_pb2.RecallRequest, context: CallContext) -> recall_pb2.RecallResponse:
        """Generate SIDs for a request and return the items of their clusters, best first."""

        async def answer() -> Message:
            return await self._backend_of().recall(_read(request, RecallRequest, MAX_BODY_BYTES))

        return await self._answered(answer, context, recall_pb2.RecallResponse)

    async def recall_batch(self, request: recall_pb2.RecallBatchRequest, context: CallContext) -> recall_pb2.RecallBatchResponse:
        """Answer several requests, in order and by one version."""

        async def answer() -> Message:
            batch = _read(request, RecallBatchRequest, LARGER_BODIES["/v1/recall/batch"])
            return RecallBatchResponse(answers=await self._backend_of().recall_batch(batch.requests))

        return await self._answered(answer, context, recall_pb2.RecallBatchResponse)

    async def model(self, request: recall_pb2.ModelRequest, context: CallContext) -> recall_pb2.ModelInfo:
        """What is being served."""

        async def answer() -> Message:
            return self._backend_of().info()

        return await self._answered(answer, context, recall_pb2.ModelInfo)

    async def change_items(self, request: recall_pb2.ItemsRequest, context: CallContext) -> recall_pb2.ItemsAccepted:
        """Add, change and delist items, and say what is in stock; answered once the changes are on disk, whole or not at all."""

        async def answer() -> Message:
            changes = _read(request, ItemsRequest, LARGER_BODIES["/v1/items"])
            if repeats := changes.repeats():
                raise _InvalidError("invalid request", [Problem(field=".".join(map(str, where)), message=message) for where, message in repeats])
            return await self._backend_of().change_items(changes)

        return await self._answered(answer, context, recall_pb2.ItemsAccepted, admin=True)

    async def _answered(self, answer: Callable[[], Awaitable[Message]], context: CallContext, kind: Callable[[], _Twin], *, admin: bool = False) -> _Twin:
        """The answer's protobuf twin, or an empty one of `kind` and the refusal in `context`."""
        if barred := key_refusal(_given_key(context), self._admin_keys if admin else self._keys, admin=admin):
            status, error = barred
            return _refused(context, kind, _STATUS_OF[status], error)
        try:
            twin: _Twin = to_protobuf(await answer())
            return twin
        except _InvalidError as error:
            return _refused(context, kind, grpc.StatusCode.INVALID_ARGUMENT, ErrorResponse(error=str(error), problems=error.problems))
        except VersionNotLoadedError as error:
            found = ErrorResponse(error="invalid request", problems=[Problem(field="version", message=str(error))])
            return _refused(context, kind, grpc.StatusCode.INVALID_ARGUMENT, found)
        except OverloadedError as error:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if isinstance(error, LateError) else grpc.StatusCode.RESOURCE_EXHAUSTED
            return _refused(context, kind, code, ErrorResponse(error=str(error)), (RETRY_AFTER_KEY, str(RETRY_AFTER_S)))
        except Exception:  # the edge: what went wrong stays in the log
            logger.exception("a gRPC call failed")
            return _refused(context, kind, grpc.StatusCode.INTERNAL, ErrorResponse(error="internal error; the server's log says more"))


class _InvalidError(ValueError):
    """A request that is wrong in `problems`."""

    def __init__(self, error: str, problems: list[Problem]) -> None:
        super().__init__(error)
        self.problems = problems


def _read(request: Any, kind: type[_Asked], most: int) -> _Asked:
    """The validated request, of at most so many bytes.

    Raises:
        _InvalidError: it is larger, or a field is wrong.
    """
    if request.ByteSize() > most:
        raise _InvalidError("body too large", [Problem(field="body", message=f"expected at most {most} bytes")])
    try:
        return from_protobuf(request, kind)
    except ValidationError as error:
        raise _InvalidError("invalid request", [problem_of(one) for one in error.errors(include_url=False)[:MAX_PROBLEMS]]) from error
    except UnknownFieldError as error:
        raise _InvalidError("invalid request", error.problems) from error


def _given_key(context: CallContext) -> bytes:
    """The key in the call's metadata `x-api-key` or `authorization`; empty where there is none."""
    metadata = dict(context.invocation_metadata())
    given = metadata.get("x-api-key") or str(metadata.get("authorization", "")).removeprefix("Bearer ")
    return given if isinstance(given, bytes) else str(given).encode()


def _refused(context: CallContext, kind: Callable[[], _Twin], code: grpc.StatusCode, error: ErrorResponse, *metadata: tuple[str, str]) -> _Twin:
    """The refusal in the context, and an empty message, which gRPC does not send with it."""
    context.set_code(code)
    said = "; ".join([error.error, *(f"{one.field}: {one.message}" for one in error.problems)])
    context.set_details(said[:MAX_DETAILS_CHARACTERS])
    context.set_trailing_metadata([(ERROR_KEY, packed_error(error)), *metadata])
    return kind()
