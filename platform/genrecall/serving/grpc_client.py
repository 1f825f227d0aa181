"""A small client of the recall API over gRPC, with the calls, messages and errors of `client.RecallClient`.

Tried again: what is 503 over HTTP (after as long as `retry-after` says), connections that fail, and an INTERNAL that is not the API's own, which Serve's proxy
gives for a replica that died. A timeout, and a deadline that passed, are not tried again.
"""

from __future__ import annotations

from typing import Any

import grpc
from pydantic import ValidationError

from genrecall.serving import recall_pb2
from genrecall.serving.client import Answer, AskAgain, RecallCalls, RecallError, said
from genrecall.serving.grpc_messages import ERROR_KEY, RETRY_AFTER_KEY, from_protobuf, to_protobuf, unpacked_error
from genrecall.serving.messages import ErrorResponse, Message
from genrecall.serving.recall_pb2_grpc import RecallServiceStub

_CALLS = {"recall": "Recall", "recall_batch": "RecallBatch", "model": "Model", "change_items": "ChangeItems"}
_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 422,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.INTERNAL: 500,
}


class GrpcRecallClient(RecallCalls):
    """Asks one server over one channel; for any number of threads.

    Args:
        target: of the server, e.g. `127.0.0.1:9000`.
        api_key, admin_key: sent in the metadata `x-api-key`, the latter with changes of the catalogue; never part of a message or of `repr`. Without
            `credentials` they travel in clear.
        credentials: of the channel, see `grpc.ssl_channel_credentials`; None: no TLS.
        application: the name of the application in Serve's configuration, which has to be said where there are several.
        timeout_s: of one attempt.
        retries: attempts after the first.

    Raises:
        ValueError: a target that is a URL, a key that no metadata can carry, or a number out of range.
    """

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        *,
        admin_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        application: str | None = None,
        timeout_s: float = 2.0,
        retries: int = 2,
    ) -> None:
        if not target or "://" in target:
            raise ValueError("target: expected HOST:PORT, without http://")
        super().__init__(timeout_s=timeout_s, retries=retries, keys={"api_key": api_key, "admin_key": admin_key})
        self.target = target
        self._api_key, self._admin_key = api_key, admin_key
        self._application = [] if application is None else [("application", application)]
        options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(target, options) if credentials is None else grpc.secure_channel(target, credentials, options)
        self._stub = RecallServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"GrpcRecallClient({self.target!r})"

    def close(self) -> None:
        """Close the channel; the client cannot be used any more."""
        self._channel.close()

    def _attempt(self, call: str, message: Message | None, kind: type[Answer]) -> Answer:
        where = f"{self.target} {_CALLS[call]}"
        key = self._admin_key if call == "change_items" else self._api_key
        metadata = self._application + ([] if key is None else [("x-api-key", key)])
        request = recall_pb2.ModelRequest() if message is None else to_protobuf(message)
        try:
            answer = getattr(self._stub, _CALLS[call])(request, timeout=self.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._failure(where, error) from error
        try:
            return from_protobuf(answer, kind, newer_fields=True)
        except ValidationError as error:
            raise RecallError(f"{where}: not an answer of the recall API: {error.error_count()} fields are wrong or missing", 200) from error

    def _failure(self, where: str, error: Any) -> AskAgain | RecallError:
        """What to raise for a call that failed."""
        code: grpc.StatusCode = error.code()
        metadata = dict(error.trailing_metadata() or ())
        found = unpacked_error(metadata[ERROR_KEY]) if ERROR_KEY in metadata else None
        if found is None and code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RecallError(f"{where}: no answer within {self.timeout_s} s")
        status = 503 if code is grpc.StatusCode.DEADLINE_EXCEEDED else _STATUSES.get(code)
        words = found if found is not None else ErrorResponse(error=error.details() or "no words")
        failure = RecallError(f"{where}: {code.name} {said(words)}", status, words.problems)
        failure.__cause__ = error
        if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE) or (code is grpc.StatusCode.INTERNAL and found is None):
            after = metadata.get(RETRY_AFTER_KEY, "")
            return AskAgain(failure, float(after) if after.isdecimal() else None)
        return failure
