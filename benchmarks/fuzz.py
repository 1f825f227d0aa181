"""Hostile requests against the recall API, in process: no failure but a deliberate 503, no hang, flat memory.

Two servers, each `create_app` as it is served: "routes" over a backend that costs nothing and is overloaded now and then, "bundle" over a real bundle with
its cache and a catalogue log in a temporary folder, whose changes it takes in at once, so that later requests search the changed catalogue. A fifth of the
requests goes to the bundle, and all that warm it up. First come requests that schemathesis makes from the OpenAPI document (`--schema-share`), then
plausible, mutated, broken and random ones (hostile_requests.py). Each answer must have a status that the API gives, JSON in the form of a refusal or of the
route, and the security headers. Failures are printed with the number that makes the request again.

`rss_growth` is the resident memory over the last fifth of the counted requests, relative to the median over their first fifth. Not counted are those of
schemathesis and the first tenth of the others, all of which go to the bundle and fill the caches: of answers, masks and labels, of words in the tokenizer, and
torch's kernels by shape (oneDNN keeps 1024). With `--trace` the run says at its end which lines hold more than when counting began.

Run: nice -n 10 python benchmarks/fuzz.py --requests 100000 [--bundle FOLDER] [--seed 0] [--output benchmarks/results/serving.json]
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import schemathesis
from hostile_requests import Attempt, HostileRequests
from measurement import commit, machine, write_tables
from pydantic import BaseModel

from genrecall.config import places
from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog, CatalogueLogError
from genrecall.registry.versions import Version
from genrecall.serving.answer_cache import AnswerCache, key_of
from genrecall.serving.api import LARGER_BODIES, MAX_BODY_BYTES, Backend, OverloadedError, create_app
from genrecall.serving.api_keys import ADMIN_KEYS_VARIABLE, KEYS_VARIABLE, ApiKeys
from genrecall.serving.live_catalogue import LiveBundle
from genrecall.serving.messages import (
    ErrorResponse,
    Health,
    ItemsAccepted,
    ItemsRequest,
    ModelInfo,
    Readiness,
    RecallBatchResponse,
    RecalledItem,
    RecallRequest,
    RecallResponse,
    Timings,
    Versions,
)
from genrecall.serving.recall_service import ServedBundle, Waiting, answer_waiting

TABLE = "fuzz"
KEY, ADMIN_KEY = "a-key-for-this-benchmark", "an-admin-key-for-this-benchmark"
HANG_S = 120
"""A request that takes longer ends the run with the stacks of all threads."""

ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/recall": RecallResponse,
    "/v1/recall/batch": RecallBatchResponse,
    "/v1/items": ItemsAccepted,
    "/v1/model": ModelInfo,
    "/healthz": Health,
    "/readyz": Readiness,
}
REFUSALS = frozenset({307, 400, 401, 403, 404, 405, 413, 422, 503})


class RoutesBackend:
    """Costs nothing, and has too much work at every 97th request."""

    def __init__(self) -> None:
        self._asked = 0
        self._versions = Versions(model="fuzz/1", bundle="0")

    async def recall(self, request: RecallRequest) -> RecallResponse:
        self._asked += 1
        if self._asked % 97 == 0:
            raise OverloadedError("too many requests are waiting")
        item = RecalledItem(item_id="i", title=request.query, brand="", category_path=[], rank=0, sid="<0,0,0>", score=-1.0)
        timings = Timings(generate_ms=0.0, expand_ms=0.0, batch_size=1)
        return RecallResponse(items=[item], sids=[], beam_size=1, versions=self._versions, timings=timings)

    async def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        return [await self.recall(request) for request in requests]

    async def change_items(self, changes: ItemsRequest) -> ItemsAccepted:
        return changes.accepted(1)

    def ready(self) -> bool:
        return self._asked % 89 != 0

    def info(self) -> ModelInfo:
        return ModelInfo(versions=self._versions, address="models:/fuzz/1", items=1, sids=1, levels=[1, 1, 1], stage="stage3", refused=None)


class BundleBackend(RoutesBackend):
    """What a replica does with a request, without Ray: the cache, then the engine; changes of the catalogue go into a log and are taken in at once."""

    def __init__(self, folder: Path, log: CatalogueLog) -> None:
        self._served = ServedBundle(Version("fuzz", 1, "0" * 64), LiveBundle.over(load_bundle(folder)))
        self._log = log
        self._cache = AnswerCache(500, 4 * 2**20)
        self._delisted: set[str] = set()

    async def recall(self, request: RecallRequest) -> RecallResponse:
        key = key_of(self._served, request)
        kept = self._cache.get(key)
        if kept is not None:
            return kept
        (answer,) = await self.recall_batch([request])
        self._cache.put(key, answer)
        return answer

    async def recall_batch(self, requests: Sequence[RecallRequest]) -> list[RecallResponse]:
        # A wait of a millisecond for every deadline: those of 1 ms have passed, others have not.
        now = time.monotonic()
        answers = answer_waiting(self._served, [Waiting(request, now - 0.001) for request in requests], (20, 10, 5), now)
        if None in answers:
            raise OverloadedError("the deadline passed before the request's turn came")
        found = [answer for answer in answers if answer is not None]
        if gone := [item.item_id for answer in found for item in answer.items if item.item_id in self._delisted]:
            raise AssertionError(f"delisted items in an answer: {gone[:3]}")
        return found

    async def change_items(self, changes: ItemsRequest) -> ItemsAccepted:
        try:
            sequence = self._log.append(changes.records(), changes.delist, in_stock=changes.stock_flags())
        except CatalogueLogError as error:
            raise OverloadedError("the catalogue log cannot be written now; send the same changes again") from error
        self._delisted |= set(changes.delist)
        self._delisted -= {one.item_id for one in changes.upsert}
        assert isinstance(self._served.bundle, LiveBundle), "made here"
        self._served = replace(self._served, bundle=self._served.bundle.caught_up(self._log))
        if self._served.bundle.catalog_seq != sequence:
            raise AssertionError(f"took in the log up to {self._served.bundle.catalog_seq}, not {sequence}")
        return changes.accepted(sequence)

    def ready(self) -> bool:
        return True

    def info(self) -> ModelInfo:
        return self._served.info("models:/fuzz/1", None)


class Target:
    """One server under fire, and what came of it.

    Attributes:
        statuses: answers by status; 0 where the client left before there was one.
        wrong: what should not have happened, a line each.
        slowest_s: of one request.
    """

    def __init__(self, name: str, backend: Backend, loop: asyncio.AbstractEventLoop) -> None:
        with mock.patch.dict(os.environ, {KEYS_VARIABLE: KEY, ADMIN_KEYS_VARIABLE: ADMIN_KEY}):
            self._app = create_app(lambda: backend, ApiKeys(), ApiKeys.for_admins())
        self._loop = loop
        self.name = name
        self.document = create_app(lambda: backend, ApiKeys()).openapi()
        self.statuses: Counter[int] = Counter()
        self.unexpected = 0
        self.wrong: list[str] = []
        self.slowest_s = 0.0

    def fire(self, attempt: Attempt, label: str) -> None:
        """Send a request and judge the answer."""
        started = time.perf_counter()
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
        try:
            status, headers, body = self._loop.run_until_complete(_ask(self._app, attempt))
        except Exception as error:  # the edge: whatever escapes the application is a finding
            status, headers, body = 500, {}, f"{type(error).__name__}: {error}"[:300].encode()
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        self.statuses[status] += 1
        problem = _problem(attempt, status, headers, body)
        if problem:
            self.unexpected += status >= 500
            self.wrong.append(f"{self.name} {label} ({attempt.kind}, {attempt.method!r} {attempt.path[:60]!r}): {problem}")
            if len(self.wrong) <= 20:
                print(self.wrong[-1], file=sys.stderr, flush=True)


async def _ask(app: Any, attempt: Attempt) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request through the ASGI interface: status (0: none), headers and body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": attempt.method,
        "scheme": "http",
        "path": attempt.path,
        "raw_path": attempt.path.encode("utf-8", "surrogatepass"),
        "query_string": b"",
        "root_path": "",
        "headers": list(attempt.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    chunks = list(attempt.chunks)
    status, headers, body = 0, {}, bytearray()

    async def receive() -> dict[str, Any]:
        if not chunks or (attempt.leaves and len(chunks) == 1):
            return {"type": "http.disconnect"}
        piece = chunks.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(chunks)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers, bytes(body)


def _problem(attempt: Attempt, status: int, headers: dict[bytes, bytes], body: bytes) -> str | None:
    """What is wrong with an answer, if anything."""
    if status == 0:
        return None if attempt.leaves else "no answer"
    if status != 200 and status not in REFUSALS:
        return f"status {status}: {body[:300]!r}"
    if status == 503 and b"retry-after" not in headers:
        return "503 without Retry-After"
    if headers.get(b"x-content-type-options") != b"nosniff":
        return f"status {status} without the security headers"
    if attempt.method == "HEAD" or status == 307 or (status == 200 and attempt.path not in ANSWERS):
        return None
    kind = ANSWERS[attempt.path] if status == 200 else ErrorResponse
    try:
        answer = kind.model_validate_json(body)
    except ValueError as error:
        return f"status {status}, not in the form of {kind.__name__}: {str(error)[:200]}"
    if isinstance(answer, RecallResponse) and [item.rank for item in answer.items] != list(range(len(answer.items))):
        return "items out of rank"
    return None


def fire_schema_cases(target: Target, count: int, make: HostileRequests, seed: int, tick: Callable[[], None]) -> int:
    """Send about `count` requests that schemathesis makes from the document, half of them wrong on purpose; returns how many it made."""
    if not count:
        return 0
    schema = schemathesis.openapi.from_dict(target.document)
    paths = [path for path, methods in target.document["paths"].items() if "post" in methods]
    rng, sent = random.Random(seed), 0

    def send(case: Any) -> None:
        nonlocal sent
        body = case.body if isinstance(case.body, bytes) else b"" if isinstance(case.body, schemathesis.core.NotSet) else json.dumps(case.body).encode()
        target.fire(make.posted("schema", case.path, body, rng), f"schema case {sent}: {body[:200]!r}")
        sent += 1
        tick()

    settings = hypothesis.settings(
        max_examples=max(1, count // (2 * len(paths))),
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    for path in paths:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            cases = schema[path]["POST"].as_strategy(generation_mode=mode)
            settings(hypothesis.seed(seed)(hypothesis.given(cases)(send)))()
    return sent


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(requests: int, schema_share: float, folder: Path, seed: int, catalogue: Path, counting: Callable[[], None]) -> tuple[list[Target], list[float]]:
    """Fire everything; returns the servers and the resident memory as ninety samples along the counted requests.

    Args:
        catalogue: folder for the catalogue log.
        counting: called when those begin.
    """
    loop = asyncio.new_event_loop()
    make = HostileRequests(seed, KEY, ADMIN_KEY, (MAX_BODY_BYTES, *LARGER_BODIES.values()))
    routes, bundle = Target("routes", RoutesBackend(), loop), Target("bundle", BundleBackend(folder, CatalogueLog(catalogue)), loop)
    fired = 0

    def tick() -> None:
        nonlocal fired
        fired += 1
        if fired % max(1, requests // 20) == 0:
            print(f"{fired} requests, {len(routes.wrong) + len(bundle.wrong)} wrong, {rss_bytes() / 2**20:.0f} MiB", flush=True)

    samples: list[float] = []
    in_schema = int(requests * schema_share)
    sent = fire_schema_cases(routes, in_schema // 2, make, seed, tick) + fire_schema_cases(bundle, in_schema // 2, make, seed + 1, tick)
    left = max(requests - sent, 0)
    for number in range(left):
        (bundle if number % 5 == 0 or number < left // 10 else routes).fire(make(number), f"--seed {seed} number {number}")
        tick()
        if number == left // 10:
            counting()
        if number >= left // 10 and number % max(1, left // 100) == 0:
            samples.append(rss_bytes())
    loop.close()
    return [routes, bundle], samples


def growth(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median and highest of the last fifth of samples, relative to the median of the first fifth, less one."""
    fifth = max(1, len(samples) // 5)
    base, last = statistics.median(samples[:fifth]), samples[-fifth:]
    return min(last) / base - 1, statistics.median(last) / base - 1, max(last) / base - 1


class Traced:
    """What is allocated where, from `begin` to `report`; slows a run down several times."""

    def __init__(self) -> None:
        self._before: tracemalloc.Snapshot | None = None

    def begin(self) -> None:
        tracemalloc.start(1)
        self._before = _snapshot()

    def report(self) -> None:
        assert self._before is not None, "begun"
        for line in _snapshot().compare_to(self._before, "lineno")[:20]:
            print(line)


def _snapshot() -> tracemalloc.Snapshot:
    gc.collect()
    return tracemalloc.take_snapshot()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--schema-share", type=float, default=0.02, help="of the requests, made by schemathesis (each takes it some milliseconds to think of)")
    parser.add_argument("--bundle", type=Path, help="default: that of the recipe tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="say which lines hold more memory at the end; for a short run")
    parser.add_argument("--quick", action="store_true", help="a few hundred requests, for correctness only; writes no file unless --output is given")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    requests = 400 if options.quick else options.requests
    about = {
        "machine": machine(schemathesis, hypothesis),
        "command": " ".join(["python", "benchmarks/fuzz.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
    }
    print(about["machine"])
    traced = Traced()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundle or Path(places().home) / "tiny" / "bundle"
        targets, samples = run(requests, options.schema_share, folder, options.seed, Path(temporary), traced.begin if options.trace else lambda: None)
        if options.trace:
            traced.report()
    records: list[dict[str, Any]] = []

    def record(row: str, metric: str, low: float, value: float, high: float) -> None:
        records.append({"table": TABLE, "row": row, "metric": metric, "value": value, "low": low, "high": high, **about})
        print(f"{row:8} {metric:24} {value:12.4g} ({low:.4g} to {high:.4g})")

    for target in targets:
        record(target.name, "fuzz_requests", *[sum(target.statuses.values())] * 3)
        record(target.name, "fuzz_unexpected_5xx", *[target.unexpected] * 3)
        record(target.name, "fuzz_wrong_answers", *[len(target.wrong)] * 3)
        record(target.name, "slowest_ms", *[1e3 * target.slowest_s] * 3)
        for status, count in sorted(target.statuses.items()):
            record(target.name, f"status_{status}" if status else "client_left", *[count] * 3)
    record("all", "fuzz_requests", *[sum(sum(target.statuses.values()) for target in targets)] * 3)
    record("all", "fuzz_unexpected_5xx", *[sum(target.unexpected for target in targets)] * 3)
    record("all", "rss_growth", *growth(samples))
    record("all", "rss_mib", *[one / 2**20 for one in (min(samples), samples[-1], max(samples))])
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / "serving.json")
    if output:
        write_tables(output, records)
    if any(target.wrong for target in targets):
        raise SystemExit(f"{sum(len(target.wrong) for target in targets)} answers were wrong; see above")
    return records


if __name__ == "__main__":
    main()
