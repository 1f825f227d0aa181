"""A client of the recall API: connections that stay open, retries of what a retry can mend, answers as the API's own messages.

Needs nothing but the standard library and pydantic. Tried again: 503 (waiting as long as Retry-After says) and connections that fail or break; all
requests here are reads, so that asking twice does no harm. A timeout is not tried again: whoever waits for the answer has gone on.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from genrecall.serving.messages import (
    ErrorResponse,
    Filters,
    ModelInfo,
    Problem,
    RecallBatchRequest,
    RecallBatchResponse,
    RecallRequest,
    RecallResponse,
    Shopper,
)

MAX_WAIT_S = 5.0
"""Longest wait between two attempts, whatever Retry-After says."""

_FIRST_WAIT_S = 0.05
_Answer = TypeVar("_Answer", bound=BaseModel)


class RecallError(RuntimeError):
    """The channel gave no answer; go on with the site's others.

    Attributes:
        status: of the last answer; None where there was none.
        problems: the wrong fields, where the request was refused for them.
    """

    def __init__(self, message: str, status: int | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.problems = tuple(problems)


class RecallClient:
    """Asks one server; for any number of threads, each with a connection of its own.

    Args:
        url: of the server, e.g. `http://127.0.0.1:8000`, with the prefix that the application is mounted at.
        api_key: sent in X-API-Key; never part of a message or of `repr`.
        timeout_s: for connecting, and again for each wait for bytes, of one attempt.
        retries: attempts after the first.

    Raises:
        ValueError: a URL of another kind, credentials in the URL, a key that no header can carry, or a number out of range.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 2.0, retries: int = 2) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url: expected http://HOST:PORT or https://HOST:PORT, perhaps with a path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url: holds credentials; give the key as api_key")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: expected printable ASCII characters; is there a line's end in it?")
        if timeout_s <= 0 or retries < 0:
            raise ValueError(f"expected a timeout_s above 0 and retries of at least 0, got {timeout_s} and {retries}")
        self.url = url.rstrip("/")
        self.timeout_s, self.retries = timeout_s, retries
        self._connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({} if api_key is None else {"X-API-Key": api_key})
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"RecallClient({self.url!r})"

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
        )
        return self._ask("POST", "/v1/recall", request, RecallResponse)

    def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        """Answers to up to 64 requests, in order and all by one version; errors as for `recall`."""
        return self._ask("POST", "/v1/recall/batch", RecallBatchRequest(requests=list(requests)), RecallBatchResponse).answers

    def model(self) -> ModelInfo:
        """What is being served; raises RecallError."""
        return self._ask("GET", "/v1/model", None, ModelInfo)

    def ready(self) -> bool:
        """Whether the server is there and ready, asked once."""
        try:
            return self._attempt("GET", "/readyz", None)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """Close this thread's connection; the next request opens another."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            connection.close()

    def _ask(self, method: str, path: str, message: BaseModel | None, kind: type[_Answer]) -> _Answer:
        body = None if message is None else message.model_dump_json(exclude_none=True, exclude_defaults=True).encode()
        failure = RecallError("not asked")
        for attempt in range(self.retries + 1):
            wait_s = random.uniform(0.5, 1.0) * _FIRST_WAIT_S * 2**attempt
            try:
                status, retry_after, text = self._attempt(method, path, body)
            except TimeoutError as error:
                raise RecallError(f"{self.url}{path}: no answer within {self.timeout_s} s") from error
            except (OSError, http.client.HTTPException) as error:
                failure = RecallError(f"{self.url}{path}: {type(error).__name__}: {error}")
                failure.__cause__ = error
            else:
                if status == 200:
                    return _read(kind, text, f"{self.url}{path}")
                failure = _refusal(f"{self.url}{path}", status, text)
                if status != 503:
                    break
                if retry_after is not None:
                    wait_s = retry_after
            if attempt < self.retries:
                time.sleep(min(wait_s, MAX_WAIT_S))
        raise failure

    def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[int, float | None, bytes]:
        """Status, seconds of Retry-After and body of one answer.

        Raises:
            OSError, HTTPException: the connection failed.
        """
        connection = getattr(self._local, "connection", None)
        kept = connection is not None
        if connection is None:
            connection = self._connect(self._host, self._port, timeout=self.timeout_s)
            self._local.connection = connection
        try:
            connection.request(method, self._prefix + path, body=body, headers=self._headers)
            response = connection.getresponse()
            text = response.read()
        except TimeoutError:
            self.close()
            raise
        except (OSError, http.client.HTTPException):
            self.close()
            if kept:  # the server closed a connection that lay idle: no attempt of its own
                return self._attempt(method, path, body)
            raise
        if response.will_close:
            self.close()
        after = response.getheader("Retry-After") or ""
        return response.status, float(after) if after.isdecimal() else None, text


def _read(kind: type[_Answer], text: bytes, where: str) -> _Answer:
    try:
        # A newer server may say more.
        return kind.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        raise RecallError(f"{where}: not an answer of the recall API: {error.error_count()} fields are wrong or missing", 200) from error


def _refusal(where: str, status: int, text: bytes) -> RecallError:
    try:
        found = ErrorResponse.model_validate_json(text, extra="ignore")
    except ValidationError:
        found = ErrorResponse(error=http.client.responses.get(status, "unknown"))
    said = "; ".join([found.error, *(f"{one.field}: {one.message}" for one in found.problems)])
    return RecallError(f"{where}: {status} {said}", status, found.problems)
