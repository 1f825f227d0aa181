"""What the serving benchmark's tables share: how much is measured, the bundle as the engine answers from it, and what of a load's outcomes is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measurement import Recorder
from serving_answers import KnownVersion, percentile, problem_of
from serving_load import Outcome, Plan, short_form
from serving_server import KEY, Server, load

from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.messages import RecallRequest
from genrecall.serving.recall_service import ServedBundle, answer_batch

CLIENTS, BATCH, LIMIT = 32, 16, 100


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. requests: of a round's one client, and of its engine. seconds: of a round at 32 clients, and of each window under constant load.
    queries: distinct ones of the load whose answers are known. rounds: repeats. load_share: a constant load's, of the capacity of 32 clients.
    """

    requests: int = 60
    seconds: float = 10.0
    queries: int = 100
    rounds: int = 5
    minutes: float = 30.0
    load_share: float = 0.4


QUICK = Sizes(requests=3, seconds=0.6, queries=6, rounds=1, minutes=0.05)


@dataclass(frozen=True)
class Bench:
    """What all tables share."""

    record: Recorder
    sizes: Sizes
    beam: int
    row: str
    tracking_uri: str
    number: int
    other: int | None
    served: ServedBundle
    queries: list[str]
    grpc: bool = False

    @property
    def name(self) -> str:
        return self.served.version.name

    def figure(self, table: str, metric: str, values: Sequence[float], *, row: str | None = None, batch: int = 1) -> None:
        self.record(row or self.row, metric, values, threads=1, batch=batch, beam=self.beam, table=table)

    def server(self, folder: Path, *, replicas: int = 1) -> Server:
        return Server(folder, self.tracking_uri, self.name, beam=self.beam, replicas=replicas, grpc=self.grpc)

    def engine(self, queries: Sequence[str]) -> None:
        answer_batch(self.served, [RecallRequest(query=query, limit=LIMIT) for query in queries], (self.beam,) * 3)

    def plan(self, server: Server, queries: Sequence[str]) -> Plan:
        """A closed loop of one client, to be changed."""
        return Plan(port=server.grpc_port if self.grpc else server.port, key=KEY, queries=list(queries), limit=LIMIT, clients=1, grpc=self.grpc)


def queries_of(served: ServedBundle, count: int) -> list[str]:
    """Distinct queries: some words of titles, spread over the catalogue, with a number where there are too few."""
    rows = [place * served.bundle.num_listed // count for place in range(count)]
    found: dict[str, None] = {}
    for number, item in enumerate(served.bundle.shown(rows)):
        words = str(item["title"]).split()
        query = " ".join(words[number % 2 : number % 2 + 2 + number % 3]) or "item"
        found[query if query not in found else f"{query} {number}"] = None
    return list(found)


def fetched(tracking_uri: str, name: str, number: int, catalogues: Path | None = None) -> ServedBundle:
    """A version as a replica loads it."""
    return BundleFollower(f"models:/{name}/{number}", tracking_uri, None, catalogues).load()


def known_version(served: ServedBundle, queries: Sequence[str], beam: int) -> KnownVersion:
    """What the engine says of a version."""
    table = served.bundle.retriever.table
    texts = table.space.texts_of(table.tokens)
    ids = served.bundle.ids_of(list(range(len(table.item_sid))))
    reference = {}
    for query in queries:
        (answer,) = answer_batch(served, [RecallRequest(query=query, limit=LIMIT)], (beam,) * 3)
        reference[query] = frozenset(one.sid for one in answer.sids)
    named = served.versions
    sid_of = {item_id: texts[row] for item_id, row in zip(ids, table.item_sid.tolist(), strict=True) if row >= 0}
    return KnownVersion(model=named.model, bundle=named.bundle, sids=frozenset(texts), sid_of=sid_of, reference=reference)


def require_equal(server: Server, known: KnownVersion, queries: Sequence[str]) -> None:
    """Check that the server answers as the engine does.

    Raises:
        SystemExit: it does not.
    """
    for query in queries:
        status, answer = server.call("/v1/recall", {"query": query, "limit": LIMIT})
        problem = f"status {status}" if status != 200 else problem_of(query, short_form(answer), [known], [])
        if problem:
            raise SystemExit(f"the server does not answer {query!r} as the engine does: {problem}")


def answered(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, all 200.

    Raises:
        SystemExit: one is not.
    """
    failed = [one.status for one in outcomes if one.status != 200]
    if failed or not outcomes:
        raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed, with status {sorted(set(failed))}")
    return list(outcomes)


def capacity_of(bench: Bench, server: Server) -> float:
    """Requests a second of 32 clients, short and for setting a load alone."""
    require_equal(server, known_version(bench.served, bench.queries[:2], bench.beam), bench.queries[:2])
    with load(replace(bench.plan(server, bench.queries), clients=CLIENTS, seconds=max(1.0, bench.sizes.seconds / 2))) as running:
        outcomes = answered(running.finish(at_once=False))
    return float(len(outcomes) / (outcomes[-1].done - outcomes[0].sent))


@dataclass(frozen=True)
class Window:
    """A stretch of constant load, in which something happened or nothing."""

    row: str
    began: float
    ended: float

    def of(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The requests that were under way in it."""
        return [one for one in outcomes if one.done >= self.began and one.due <= self.ended]


def p99(outcomes: Sequence[Outcome]) -> float:
    """Milliseconds from when requests were due, of those that were answered."""
    times: list[float] = [1e3 * (one.done - one.due) for one in outcomes if one.status == 200]
    return float(percentile(times or [0.0], 0.99))


def by_status(bench: Bench, table: str, metric: str, failed: Sequence[Outcome], row: str) -> None:
    """Record failures once more, a row for each status of HTTP that there was (0: no answer)."""
    for status, count in sorted(Counter(one.status for one in failed).items()):
        bench.figure(table, metric, [count], row=f"{row}, status {status}")
