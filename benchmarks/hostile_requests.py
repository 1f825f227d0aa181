"""HTTP requests that no well-meaning client sends, for benchmarks/fuzz.py: the n-th of a seed is always the same one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

STRINGS = (
    "",
    " ",
    "angle bracket",
    "GARDEN  hose 50ft",
    "\x00",
    "a\x00b",
    "\u202eesoh",
    "日本語 ホース",
    "é" * 40,
    "e" + "\u0301" * 60,
    "\U0001f469\u200d\U0001f469\u200d\U0001f466",
    "ﬃ Ⅷ ①",
    "ß ſ İ ı",
    "<script>alert(1)</script>",
    "'; DROP TABLE items; --",
    "{{7*7}} ${7*7} %s %n",
    "../../etc/passwd",
    "[ANSWER] [GENDER=f]",
    "<12,5,7>",
    "x" * 1000,
    "word " * 200,
    "9" * 1000,
    "\ud800",
    "i00",
    "i07",
)
JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
)
NAMES = (
    "query",
    "shopper",
    "history",
    "filters",
    "beam_size",
    "limit",
    "explain",
    "deadline_ms",
    "requests",
    "upsert",
    "delist",
    "gender",
    "brands",
    "__proto__",
    "",
    "q" * 300,
)
PATHS = ("/v1/recall", "/v1/recall/batch", "/v1/items", "/v1/model", "/healthz", "/readyz", "/", "/page.js", "/openapi.json")
ODD_PATHS = (
    "/v1/recall/",
    "//v1/recall",
    "/v1//recall",
    "/V1/recall",
    "/v1/recall/../model",
    "/../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "/page.js/../messages.py",
    "/\x00",
    "/\ud7ff",
    "/" + "a" * 3000,
    "/docs",
    "",
    "*",
)
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X" * 50, "")
CONTENT_TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "",
    "\x00",
)
LENGTHS = ("0", "1", "-1", "99999999999", "9" * 400, "1e9", "abc", "", "\xb2")


@dataclass(frozen=True)
class Attempt:
    """One request: headers as they come off the wire, the body in the pieces it arrives in.

    kind: what was done to it. leaves: whether the client goes away in the middle of the body.
    """

    kind: str
    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    chunks: tuple[bytes, ...]
    leaves: bool = False


class HostileRequests:
    """Gives requests by number.

    Args:
        seed: of all of them.
        key, admin_key: the server's; most requests carry the right one.
        sizes: bytes that routes take.
    """

    def __init__(self, seed: int, key: str, admin_key: str, sizes: Sequence[int]) -> None:
        self._seed, self._key, self._admin_key, self._sizes = seed, key, admin_key, tuple(sizes)
        self._makers: Sequence[tuple[Callable[[random.Random], Attempt], int]] = (
            (self._plausible, 30),
            (self._mutated, 35),
            (self._broken_bytes, 20),
            (self._random_bytes, 5),
            (self._odd_http, 9),
            (self._large, 1),
        )

    def __call__(self, number: int) -> Attempt:
        """The request of a number."""
        rng = random.Random(f"{self._seed}/{number}")
        (maker,) = rng.choices([maker for maker, _ in self._makers], [weight for _, weight in self._makers])
        return maker(rng)

    def posted(self, kind: str, path: str, body: bytes, rng: random.Random) -> Attempt:
        """A POST of a body, in one piece or several."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if rng.random() < 0.95:
            headers.append((b"x-api-key", (self._admin_key if path == "/v1/items" else self._key).encode()))
        return Attempt(kind, "POST", path, tuple(headers), _pieces(body, rng))

    def _plausible(self, rng: random.Random) -> Attempt:
        path, message = _message(rng)
        return self.posted("plausible", path, _dumped(message, rng), rng)

    def _mutated(self, rng: random.Random) -> Attempt:
        path, message = _message(rng)
        for turn in range(rng.randint(1, 3)):
            message = _mutate(message, rng, 70 if turn == 0 and rng.random() < 0.3 else 1)
        return self.posted("mutated", path, _dumped(message, rng), rng)

    def _broken_bytes(self, rng: random.Random) -> Attempt:
        path, message = _message(rng)
        body = bytearray(_dumped(message, rng))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body) + 1)
            way = rng.randrange(4)
            if way == 0:
                del body[at:]
            elif way == 1:
                body[at:at] = rng.choice(
                    [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b'"', b"{", b"[" * 500, b"\\u", b"\\ud800", b"1e999"]
                )
            elif way == 2 and at < len(body):
                body[at] = rng.randrange(256)
            else:
                body[at:at] = body[: rng.randrange(len(body) + 1)]
        return self.posted("broken", path, bytes(body), rng)

    def _random_bytes(self, rng: random.Random) -> Attempt:
        return self.posted("bytes", rng.choice(PATHS), rng.choice([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b"]) + rng.randbytes(rng.randrange(2000)), rng)

    def _odd_http(self, rng: random.Random) -> Attempt:
        _, message = _message(rng)
        body = _dumped(message, rng)
        headers = [(b"content-type", rng.choice(CONTENT_TYPES).encode()), (b"content-length", rng.choice(LENGTHS).encode("latin-1"))]
        keys = [self._key.encode(), b"", b"\xff" * 20, b"k" * 8000, self._key.encode() + b" ", self._key.upper().encode()]
        headers.append((rng.choice([b"x-api-key", b"authorization"]), rng.choice([b"", b"Bearer ", b"Basic "]) + rng.choice(keys)))
        if rng.random() < 0.7:
            headers.append((b"x-api-key", self._key.encode()))
        headers += [
            (rng.choice([b"host", b"cookie", b"accept", b"range", b"x-forwarded-for", b"transfer-encoding"]), rng.randbytes(rng.randrange(40)))
        ] * rng.randrange(4)
        rng.shuffle(headers)
        path = rng.choice(PATHS if rng.random() < 0.6 else ODD_PATHS)
        return Attempt("http", rng.choice(METHODS), path, tuple(headers), _pieces(body, rng), leaves=rng.random() < 0.2)

    def _large(self, rng: random.Random) -> Attempt:
        path, message = _message(rng)
        most = rng.choice(self._sizes) + rng.choice([-1, 0, 1, 4096])
        if rng.random() < 0.5:
            return self.posted("large", path, _dumped(message, rng).ljust(most), rng)
        filling = rng.choice([b"[", b'{"a":', b'"a",', b"0", b"\\u0000"])
        return self.posted("large", path, (filling * (most // len(filling) + 1))[:most], rng)


def _message(rng: random.Random) -> tuple[str, Any]:
    """A route and a body that it may well accept."""
    if rng.random() < 0.1:
        return "/v1/recall/batch", {"requests": [_request(rng) for _ in range(rng.randint(1, 5))]}
    if rng.random() < 0.1:
        ids = {field: [_item_id(rng) for _ in range(rng.randint(0, 3))] for field in ("delist", "out_of_stock", "in_stock")}
        return "/v1/items", {"upsert": [_record(rng) for _ in range(rng.randint(0, 5))], **ids}
    return "/v1/recall", _request(rng)


def _request(rng: random.Random) -> dict[str, Any]:
    request: dict[str, Any] = {"query": rng.choice(STRINGS) if rng.random() < 0.7 else _text(rng)}
    fields: dict[str, Callable[[], Any]] = {
        "shopper": lambda: {rng.choice(["gender", "age_band"]): rng.choice(["f", "m", "18-24", None, _text(rng)[:64]])},
        "history": lambda: [_item_id(rng) for _ in range(rng.choice([0, 1, 5, 200]))],
        "filters": lambda: _filters(rng),
        "beam_size": lambda: rng.choice([None, 1, 2, 7, 50, 200]),
        "limit": lambda: rng.choice([1, 3, 100, 1000]),
        "explain": lambda: rng.random() < 0.5,
        "deadline_ms": lambda: rng.choice([None, 1, 50, 60_000]),
    }
    for name, make in fields.items():
        if rng.random() < 0.4:
            request[name] = make()
    return request


def _record(rng: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {"item_id": _item_id(rng), "title": rng.choice(STRINGS)}
    fields: dict[str, Callable[[], Any]] = {
        "category_path": lambda: [rng.choice(STRINGS)[:100] for _ in range(rng.randint(0, 3))],
        "brand": lambda: rng.choice(STRINGS)[:100],
        "text": lambda: _text(rng),
        "price": lambda: rng.choice([None, 0.0, 9.99, 1e308, -1.0]),
        "prior_score": lambda: rng.choice([None, 0.5, -1e308]),
    }
    for name, make in fields.items():
        if rng.random() < 0.5:
            record[name] = make()
    return record


def _filters(rng: random.Random) -> dict[str, Any]:
    filters: dict[str, Any] = {}
    if rng.random() < 0.5:
        filters["categories"] = [
            [rng.choice(["Home", "deck screw", "garden hose", *STRINGS[2:12]]) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(0, 3))
        ]
    if rng.random() < 0.5:
        filters["brands"] = [rng.choice(["Acme", *STRINGS[2:12]]) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.3:
        filters["in_stock"] = rng.random() < 0.5
    if rng.random() < 0.5:
        filters["excluded"] = [_item_id(rng) for _ in range(rng.choice([0, 1, 20]))]
    return filters


def _item_id(rng: random.Random) -> str:
    return f"i{rng.randrange(60):02d}" if rng.random() < 0.8 else rng.choice(STRINGS)[:256]


def _text(rng: random.Random) -> str:
    alphabet = rng.choice(["abc ", "aäß\u0301 ", "0123456789.-", "".join(map(chr, range(32))), "\U0001f600\U00010348 x", "日本語カナ"])
    return "".join(rng.choices(alphabet, k=rng.choice([1, 5, 30, 300])))


def _mutate(value: Any, rng: random.Random, repeats: int) -> Any:
    """The value with one place in it changed, and the outermost list around it repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        way = rng.randrange(4)
        changed = dict(value)
        if way == 0:
            changed[rng.choice(NAMES)] = _hostile(rng)
        elif way == 1:
            del changed[name]
        else:
            changed[name] = _mutate(value[name], rng, repeats)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        changed_list = list(value)
        at = rng.randrange(len(changed_list))
        changed_list[at] = _mutate(changed_list[at], rng, 1)
        return changed_list * repeats
    return _hostile(rng)


def _hostile(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        nested: Any = rng.choice(JSON_VALUES)
        for _ in range(rng.choice([2, 50, 900])):
            nested = [nested] if rng.random() < 0.5 else {rng.choice(NAMES): nested}
        return nested
    return rng.choice(JSON_VALUES if rng.random() < 0.5 else STRINGS)


def _dumped(value: Any, rng: random.Random) -> bytes:
    """JSON, with the half surrogates that Python writes as escapes or, half of the time, as the bytes that they are not."""
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 2000


def _pieces(body: bytes, rng: random.Random) -> tuple[bytes, ...]:
    if rng.random() < 0.7 or len(body) < 2:
        return (body,)
    cuts = sorted(rng.randrange(len(body)) for _ in range(rng.randint(1, 4)))
    return tuple(body[first:end] for first, end in zip([0, *cuts], [*cuts, len(body)], strict=True))
