"""A client of the recall API: connections that stay open, retries of what a retry can mend, answers as the API's own messages.

Needs nothing but the standard library and pydantic. Tried again: 503 (waiting as long as Retry-After says), connections that fail or break, and a 500 that is
not the API's own, which Serve's proxy gives for a replica that died; asking twice does no harm, and neither does sending the same changes of the catalogue twice.
A timeout is not tried again: whoever waits for the answer has gone on. Nor is anything once the request's deadline would have passed before the next attempt;
an attempt before that is given what is left of it.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from genrecall.serving.messages import (
    ErrorResponse,
    Filters,
    ItemsAccepted,
    ItemsRequest,
    ItemUpsert,
    Message,
    ModelInfo,
    Problem,
    RecallBatchRequest,
    RecallBatchResponse,
    RecallRequest,
    RecallResponse,
    Role,
    Shopper,
)

MAX_WAIT_S = 5.0
"""Longest wait between two attempts, whatever Retry-After says."""

_FIRST_WAIT_S = 0.05
_ROUTES = {
    "recall": ("POST", "/v1/recall"),
    "recall_batch": ("POST", "/v1/recall/batch"),
    "model": ("GET", "/v1/model"),
    "change_items": ("POST", "/v1/items"),
}
Answer = TypeVar("Answer", bound=Message)


class RecallError(RuntimeError):
    """The channel gave no answer; go on with the site's others.

    Attributes:
        status: of the last answer, as over HTTP; None where there was none.
        problems: the wrong fields, where the request was refused for them.
    """

    def __init__(self, message: str, status: int | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.problems = tuple(problems)


class AskAgain(Exception):
    """An attempt failed in a way that another may not.

    Attributes:
        failure: what to raise if there is no other attempt.
        after_s: seconds that the server asks to wait.
    """

    def __init__(self, failure: RecallError, after_s: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.after_s = failure, after_s


class RecallCalls(ABC):
    """What one asks a server, however it is reached; `RecallClient` goes over HTTP, `grpc_client.GrpcRecallClient` over gRPC.

    Args:
        timeout_s: of one attempt.
        retries: attempts after the first.
        keys: API key and admin key, either of which may be None.

    Raises:
        ValueError: a key that no header can carry, or a number out of range.
    """

    def __init__(self, *, timeout_s: float, retries: int, keys: Mapping[str, str | None]) -> None:
        for name, key in keys.items():
            if key is not None and not (key.isascii() and key.isprintable()):
                raise ValueError(f"{name}: expected printable ASCII characters; is there a line's end in it?")
        if timeout_s <= 0 or retries < 0:
            raise ValueError(f"expected a timeout_s above 0 and retries of at least 0, got {timeout_s} and {retries}")
        self.timeout_s, self.retries = timeout_s, retries
        self._may_change = keys.get("admin_key") is not None

    @abstractmethod
    def _attempt(self, call: str, message: Message | None, kind: type[Answer]) -> Answer:
        """The answer to one of `recall`, `recall_batch`, `model` and `change_items`, asked once.

        Raises:
            AskAgain: there is none now.
            RecallError: there is none.
        """

    def _ask(self, call: str, message: Message | None, kind: type[Answer]) -> Answer:
        started, deadline_ms, asked = time.monotonic(), _deadline_ms(message), message
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(call, asked, kind)
            except AskAgain as again:
                wait_s = random.uniform(0.5, 1.0) * _FIRST_WAIT_S * 2**attempt if again.after_s is None else again.after_s
                wait_s = min(wait_s, MAX_WAIT_S)
                gone_ms = 1e3 * (time.monotonic() - started + wait_s)
                if attempt == self.retries or (deadline_ms is not None and gone_ms >= deadline_ms):
                    raise again.failure from again.failure.__cause__
                time.sleep(wait_s)
                asked = _after(message, gone_ms)
        raise AssertionError("retries are at least 0")

    def recall(
        self,
        query: str,
        *,
        shopper: Shopper | Mapping[str, Any] | None = None,
        history: Sequence[str] = (),
        filters: Filters | Mapping[str, Any] | None = None,
        beam_size: int | None = None,
        limit: int = 100,
        explain: bool = False,
        deadline_ms: int | None = None,
        version: Role | None = None,
    ) -> RecallResponse:
        """The items for a query, best first; the fields are those of `RecallRequest`.

        Raises:
            RecallError: no answer, after the retries.
            pydantic.ValidationError: a field that the API would refuse; nothing was sent.
        """
        request = RecallRequest(
            query=query,
            shopper=Shopper() if shopper is None else Shopper.model_validate(shopper),
            history=list(history),
            filters=None if filters is None else Filters.model_validate(filters),
            beam_size=beam_size,
            limit=limit,
            explain=explain,
            deadline_ms=deadline_ms,
            version=version,
        )
        return self._ask("recall", request, RecallResponse)

    def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        """Answers to up to 64 requests, in order and all by one version; errors as for `recall`."""
        return self._ask("recall_batch", RecallBatchRequest(requests=list(requests)), RecallBatchResponse).answers

    def model(self) -> ModelInfo:
        """What is being served; raises RecallError."""
        return self._ask("model", None, ModelInfo)

    def change_items(
        self,
        upsert: Sequence[ItemUpsert | Mapping[str, Any]] = (),
        delist: Sequence[str] = (),
        *,
        out_of_stock: Sequence[str] = (),
        in_stock: Sequence[str] = (),
    ) -> ItemsAccepted:
        """Add or change items, take others out and say what is in stock, whole or not at all; the fields of a record are those of `ItemUpsert`.

        Answered once the changes are on disk: answers whose `versions.catalog_seq` is at least the one returned know them.

        Raises:
            ValueError: the client was made without an admin key; nothing was sent.
            RecallError: no answer, after the retries; send the same changes again.
            pydantic.ValidationError: a field that the API would refuse; nothing was sent.
        """
        if not self._may_change:
            raise ValueError("admin_key: changes of the catalogue need one, and the client was made without")
        records = [ItemUpsert.model_validate(one) for one in upsert]
        changes = ItemsRequest(upsert=records, delist=list(delist), out_of_stock=list(out_of_stock), in_stock=list(in_stock))
        return self._ask("change_items", changes, ItemsAccepted)


def _deadline_ms(message: Message | None) -> int | None:
    """The deadline of a request, of a batch the first; None where there is none."""
    requests = message.requests if isinstance(message, RecallBatchRequest) else [message] if isinstance(message, RecallRequest) else []
    return min((one.deadline_ms for one in requests if one.deadline_ms is not None), default=None)


def _after(message: Message | None, gone_ms: float) -> Message | None:
    """A message with what is left of its deadlines."""
    if isinstance(message, RecallBatchRequest):
        return message.model_copy(update={"requests": [_after(one, gone_ms) for one in message.requests]})
    if isinstance(message, RecallRequest) and message.deadline_ms is not None:
        return message.model_copy(update={"deadline_ms": max(1, int(message.deadline_ms - gone_ms))})
    return message


class RecallClient(RecallCalls):
    """Asks one server; for any number of threads, each with a connection of its own.

    Args:
        url: of the server, e.g. `http://127.0.0.1:8000`, with the prefix that the application is mounted at.
        api_key, admin_key: sent in X-API-Key, the latter with changes of the catalogue; never part of a message or of `repr`.
        timeout_s: for connecting, and again for each wait for bytes, of one attempt.
        retries: attempts after the first.

    Raises:
        ValueError: a URL of another kind, credentials in the URL, a key that no header can carry, or a number out of range.
    """

    def __init__(self, url: str, api_key: str | None = None, *, admin_key: str | None = None, timeout_s: float = 2.0, retries: int = 2) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url: expected http://HOST:PORT or https://HOST:PORT, perhaps with a path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url: holds credentials; give the key as api_key")
        super().__init__(timeout_s=timeout_s, retries=retries, keys={"api_key": api_key, "admin_key": admin_key})
        self.url = url.rstrip("/")
        self._connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._api_key, self._admin_key = api_key, admin_key
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"RecallClient({self.url!r})"

    def ready(self) -> bool:
        """Whether the server is there and ready, asked once."""
        try:
            return self._exchange("GET", "/readyz", None)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """Close this thread's connection; the next request opens another."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            connection.close()

    def _attempt(self, call: str, message: Message | None, kind: type[Answer]) -> Answer:
        method, path = _ROUTES[call]
        body = None if message is None else message.model_dump_json(exclude_none=True, exclude_defaults=True).encode()
        where = f"{self.url}{path}"
        try:
            status, retry_after, text = self._exchange(method, path, body)
        except TimeoutError as error:
            raise RecallError(f"{where}: no answer within {self.timeout_s} s") from error
        except (OSError, http.client.HTTPException) as error:
            failure = RecallError(f"{where}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            raise AskAgain(failure) from error
        if status == 200:
            return _read(kind, text, where)
        refusal, by_the_api = _refusal(where, status, text)
        if status == 503 or (status == 500 and not by_the_api):
            raise AskAgain(refusal, retry_after)
        raise refusal

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, float | None, bytes]:
        """Status, seconds of Retry-After and body of one answer.

        Raises:
            OSError, HTTPException: the connection failed.
        """
        connection = getattr(self._local, "connection", None)
        kept = connection is not None
        if connection is None:
            connection = self._connect(self._host, self._port, timeout=self.timeout_s)
            self._local.connection = connection
        key = self._admin_key if path == _ROUTES["change_items"][1] else self._api_key
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"X-API-Key": key})
        try:
            connection.request(method, self._prefix + path, body=body, headers=headers)
            response = connection.getresponse()
            text = response.read()
        except TimeoutError:
            self.close()
            raise
        except (OSError, http.client.HTTPException):
            self.close()
            if kept:  # the server closed a connection that lay idle: no attempt of its own
                return self._exchange(method, path, body)
            raise
        if response.will_close:
            self.close()
        after = response.getheader("Retry-After") or ""
        return response.status, float(after) if after.isdecimal() else None, text


def _read(kind: type[Answer], text: bytes, where: str) -> Answer:
    try:
        # A newer server may say more.
        return kind.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        raise RecallError(f"{where}: not an answer of the recall API: {error.error_count()} fields are wrong or missing", 200) from error


def _refusal(where: str, status: int, text: bytes) -> tuple[RecallError, bool]:
    """The error of an answer other than 200, and whether the API gave it, or something before it."""
    try:
        found, by_the_api = ErrorResponse.model_validate_json(text, extra="ignore"), True
    except ValidationError:
        found, by_the_api = ErrorResponse(error=http.client.responses.get(status, "unknown")), False
    return RecallError(f"{where}: {status} {said(found)}", status, found.problems), by_the_api


def said(error: ErrorResponse) -> str:
    """A refusal in one line."""
    return "; ".join([error.error, *(f"{one.field}: {one.message}" for one in error.problems)])
