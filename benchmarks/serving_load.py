"""The load generator of benchmarks/serving.py: a process of its own that asks a server on this machine, by a plan read from standard input.

The plan is one line of JSON; the end of standard input ends the run, so that the generator never outlives whoever started it. A closed loop has `clients` that
each ask again once answered; an open loop asks at a fixed rate, whatever the answers do, and an answer's time counts from when its request was due. Either keeps
to `MAX_CONNECTIONS`. Plain sockets, and nothing but the standard library unless the plan asks for gRPC or for the recall client's retries: on two cores the
generator takes from the server what it uses itself.

Answers go to standard output as one JSON object: `outcomes` is a list of `Outcome` as dicts, `cpu_s` the processor time that the run took here.
Times are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_CONNECTIONS = 64
MAX_RATE = 1000.0
ATTEMPT_S = 30.0

FAILED = 0
"""The status of a request whose connection failed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask.

    Attributes:
        port: on 127.0.0.1. key: the API key.
        queries: asked in turn, and from the first again after the last.
        limit: items an answer.
        clients: of the closed loop; None with a `rate`.
        rate: requests a second of the open loop.
        seconds, requests: the run ends after either, or at the end of standard input.
        keep_every: every so many answers are kept in short form; 0: none.
        batch_every: every so many requests are a batch of 8; 0: none.
        variants: further fields of single requests as the API takes them, in turn; ({},) asks for nothing more.
        grpc: `port` is that of Serve's gRPC proxy; recalls alone, in a closed loop.
        retries: asks through the recall client, with so many retries; None: through plain sockets, and once.
    """

    port: int
    key: str
    queries: Sequence[str]
    limit: int = 100
    clients: int | None = None
    rate: float | None = None
    seconds: float | None = None
    requests: int | None = None
    keep_every: int = 0
    batch_every: int = 0
    variants: Sequence[Mapping[str, Any]] = ({},)
    grpc: bool = False
    retries: int | None = None

    def __post_init__(self) -> None:
        if self.grpc and (self.rate is not None or self.batch_every or self.retries is not None):
            raise ValueError("grpc: expected a closed loop of single requests without retries")
        if (self.clients is None) == (self.rate is None):
            raise ValueError("expected either clients (closed loop) or a rate (open loop)")
        if any(self.variants) and (self.grpc or self.retries is not None):
            raise ValueError("variants: expected neither grpc nor retries beside them")
        if not self.queries or not self.variants or not 0 < (self.clients or 1) <= MAX_CONNECTIONS or not 0 < (self.rate or 1.0) <= MAX_RATE:
            raise ValueError(f"expected queries, variants, at most {MAX_CONNECTIONS} clients and a rate of at most {MAX_RATE:.0f} a second")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. due: when it was to be sent. sent, done: when it was sent and answered. status: of HTTP. kept: the answer in short form, see `short_form`.
    fields: names of the further fields that it had.
    """

    due: float
    sent: float
    done: float
    status: int
    query: str
    kept: dict[str, Any] | None = None
    fields: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class NextRequest:
    """What to send: `number` counts requests, `fields` names what it has beyond query and limit."""

    number: int
    query: str
    path: str
    body: bytes
    fields: Sequence[str] = ()


@dataclass
class Asked:
    """The outcomes so far, and what numbers the next request."""

    plan: Plan
    outcomes: list[Outcome] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def next_request(self) -> NextRequest:
        """The next request of the plan."""
        number = next(self.numbers)
        queries, limit, variants = self.plan.queries, self.plan.limit, self.plan.variants
        query = queries[number % len(queries)]
        if self.plan.batch_every and number % self.plan.batch_every == self.plan.batch_every - 1:
            several = [{"query": queries[(number + step) % len(queries)], "limit": limit} for step in range(8)]
            return NextRequest(number=number, query=query, path="/v1/recall/batch", body=json.dumps({"requests": several}).encode())
        # Another variant after each round of the queries too, so that every query meets every variant.
        more = variants[(number + number // len(queries)) % len(variants)]
        body = json.dumps({"query": query, "limit": limit, **more}).encode()
        return NextRequest(number=number, query=query, path="/v1/recall", body=body, fields=sorted(more))

    def keeps(self, number: int) -> bool:
        """Whether the answer to this request is kept."""
        return bool(self.plan.keep_every) and number % self.plan.keep_every == 0


def due_times(start: float, rate: float) -> Iterator[float]:
    """When the requests of an open loop are due: evenly, from `start` on."""
    return (start + number / rate for number in itertools.count())


def short_form(answer: dict[str, Any]) -> dict[str, Any]:
    """What is judged of an answer: its versions, SIDs, item ids with the SIDs they came from, and the size of its batch."""
    return {
        "versions": answer["versions"],
        "sids": [one["sid"] for one in answer["sids"]],
        "items": [[one["item_id"], one["sid"]] for one in answer["items"]],
        "batch_size": answer["timings"]["batch_size"],
    }


class Connection:
    """One connection that stays open, and is opened anew after a failure."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._headers = f"Host: 127.0.0.1:{port}\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer; status `FAILED` where the connection failed."""
        try:
            return await asyncio.wait_for(self._ask(path, body), ATTEMPT_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            self.close()
            return FAILED, b""

    async def _ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._streams is not None and self._streams[0].at_eof():  # the server closed it while it lay idle: no failure of this request, which is not sent yet
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._streams
        writer.write(f"POST {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        answer = await _chunks(reader) if headers.get("transfer-encoding") == "chunked" else await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split(" ")[1]), answer

    def read(self, answer: bytes) -> dict[str, Any]:
        """The answer as a dict."""
        return dict(json.loads(answer))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class GrpcConnection:
    """A channel to Serve's gRPC proxy, with the calls of `Connection`."""

    def __init__(self, port: int, key: str) -> None:
        import grpc

        from genrecall.serving import recall_pb2
        from genrecall.serving.recall_pb2_grpc import RecallServiceStub

        self._grpc, self._messages = grpc, recall_pb2
        self._metadata = [("x-api-key", key)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self._stub = RecallServiceStub(self._channel)

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        """As `Connection.ask`; any status but OK is `FAILED`."""
        assert path == "/v1/recall"
        try:
            answer = await self._stub.Recall(self._messages.RecallRequest(**json.loads(body)), metadata=self._metadata, timeout=ATTEMPT_S)
        except self._grpc.RpcError:
            return FAILED, b""
        return 200, answer.SerializeToString()

    def read(self, answer: bytes) -> dict[str, Any]:
        from genrecall.serving.grpc_messages import from_protobuf
        from genrecall.serving.messages import RecallResponse

        return from_protobuf(self._messages.RecallResponse.FromString(answer), RecallResponse).model_dump()

    def close(self) -> None:
        self._closing = asyncio.ensure_future(self._channel.close())


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


async def _ask_once(asked: Asked, connection: Connection | GrpcConnection, due: float | None) -> None:
    request = asked.next_request()
    sent = time.monotonic()
    status, answer = await connection.ask(request.path, request.body)
    done = time.monotonic()
    kept = short_form(connection.read(answer)) if status == 200 and request.path == "/v1/recall" and asked.keeps(request.number) else None
    due = sent if due is None else due
    asked.outcomes.append(Outcome(due=due, sent=sent, done=done, status=status, query=request.query, kept=kept, fields=request.fields))


async def run(plan: Plan, ended: asyncio.Event) -> list[Outcome]:
    """Ask by the plan until it or `ended` says so; what is under way then is still waited for."""
    asked, start = Asked(plan), time.monotonic()

    def over() -> bool:
        late = plan.seconds is not None and time.monotonic() - start >= plan.seconds
        return ended.is_set() or late

    if plan.rate is None:
        assert plan.clients is not None, "checked with the plan"
        left = itertools.count() if plan.requests is None else iter(range(plan.requests))

        async def client() -> None:
            connection = (GrpcConnection if plan.grpc else Connection)(plan.port, plan.key)
            while not over() and next(left, None) is not None:
                await _ask_once(asked, connection, None)
            connection.close()

        await asyncio.gather(*(client() for _ in range(plan.clients)))
        return asked.outcomes
    if plan.retries is not None:
        return await _run_retrying(plan, asked, over, start)
    idle = [Connection(plan.port, plan.key) for _ in range(MAX_CONNECTIONS)]
    free, under_way = asyncio.Semaphore(MAX_CONNECTIONS), set()

    async def request(due: float) -> None:
        async with free:
            connection = idle.pop()
            try:
                await _ask_once(asked, connection, due)
            finally:
                idle.append(connection)

    for due in itertools.islice(due_times(start, plan.rate), plan.requests):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if over():
            break
        task = asyncio.ensure_future(request(due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    for connection in idle:
        connection.close()
    return asked.outcomes


async def _run_retrying(plan: Plan, asked: Asked, over: Callable[[], bool], start: float) -> list[Outcome]:
    """An open loop through the recall client, whose status is that of the last attempt."""
    from genrecall.serving.client import RecallClient, RecallError

    assert plan.rate is not None
    assert plan.retries is not None
    client = RecallClient(f"http://127.0.0.1:{plan.port}", plan.key, timeout_s=ATTEMPT_S, retries=plan.retries)

    def request(due: float, query: str) -> None:
        sent = time.monotonic()
        try:
            kept = short_form(client.recall(query, limit=plan.limit).model_dump())
            status = 200
        except RecallError as error:
            status, kept = error.status or FAILED, None
        asked.outcomes.append(Outcome(due=due, sent=sent, done=time.monotonic(), status=status, query=query, kept=kept))

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        for due in due_times(start, plan.rate):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if over():
                break
            pool.submit(request, due, asked.next_request().query)
    return asked.outcomes


async def _main() -> None:
    plan = Plan(**json.loads(sys.stdin.readline()))
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    began = time.process_time()
    outcomes = await run(plan, ended)
    loop.remove_reader(sys.stdin.fileno())
    json.dump({"outcomes": [asdict(one) for one in outcomes], "cpu_s": time.process_time() - began}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
