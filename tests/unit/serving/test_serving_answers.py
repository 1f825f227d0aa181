"""What the load benchmark judges by: percentiles, the open loop's times, plans that are bounded, and answers that mix versions."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def answers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("serving_answers")


@pytest.fixture(scope="module")
def loads() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("serving_load")


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_a_percentile_is_the_smallest_value_that_the_share_does_not_exceed(answers, count, share):
    values = [float(number * 7919 % count) for number in range(count)]
    found = answers.percentile(values, share)
    assert sum(value <= found for value in values) >= share * count
    assert all(sum(value <= smaller for value in values) < share * count for smaller in values if smaller < found)


def test_a_percentile_of_nothing_is_refused(answers):
    with pytest.raises(ValueError, match="at least one"):
        answers.percentile([], 0.99)


def test_an_open_loop_is_due_evenly_whatever_the_answers_do(loads):
    due = list(itertools.islice(loads.due_times(10.0, 4.0), 9))
    assert due[0] == 10.0
    assert all(math.isclose(after - before, 0.25) for before, after in itertools.pairwise(due))


@pytest.mark.parametrize("wrong", [{}, {"clients": 1, "rate": 1.0}, {"clients": 65}, {"rate": 1001.0}, {"rate": -1.0}, {"clients": 1, "queries": []}])
def test_a_plan_without_bounds_is_refused(loads, wrong):
    with pytest.raises(ValueError, match="expected"):
        loads.Plan(**{"port": 1, "key": "", "queries": ["x"], **wrong})


@pytest.mark.parametrize("more", [{"clients": None, "rate": 1.0}, {"batch_every": 4}, {"retries": 1}])
def test_grpc_is_asked_in_a_closed_loop_of_single_requests(loads, more):
    with pytest.raises(ValueError, match="grpc: expected a closed loop"):
        loads.Plan(**{"port": 1, "key": "", "queries": ["x"], "clients": 1, "grpc": True, **more})


def test_every_request_asks_another_query_until_all_were_asked_and_batches_come_in_between(loads):
    asked = loads.Asked(loads.Plan(port=1, key="", queries=["a", "b", "c"], clients=1, batch_every=4, keep_every=2))
    requests = [asked.next_request() for _ in range(8)]
    assert [one.query for one in requests] == ["a", "b", "c", "a", "b", "c", "a", "b"]
    assert [one.path for one in requests] == ["/v1/recall", "/v1/recall", "/v1/recall", "/v1/recall/batch"] * 2
    assert [asked.keeps(one.number) for one in requests] == [True, False] * 4


def test_variants_take_turns_until_every_query_met_each_and_a_batch_has_none(loads):
    variants = [{}, {"history": ["i"], "explain": True}]
    asked = loads.Asked(loads.Plan(port=1, key="", queries=["a", "b"], limit=7, rate=1.0, variants=variants, batch_every=5))
    requests = [asked.next_request() for _ in range(5)]
    assert [json.loads(one.body) for one in requests[:4]] == [
        {"query": "a", "limit": 7},
        {"query": "b", "limit": 7, "history": ["i"], "explain": True},
        {"query": "a", "limit": 7, "history": ["i"], "explain": True},
        {"query": "b", "limit": 7},
    ]
    assert [list(one.fields) for one in requests] == [[], ["explain", "history"], ["explain", "history"], [], []]
    with pytest.raises(ValueError, match="variants: expected neither"):
        loads.Plan(port=1, key="", queries=["a"], rate=1.0, retries=1, variants=variants)


@pytest.mark.parametrize(("closes", "statuses"), [("after the answer", [200, 200]), ("before the answer", [0, 0])])
def test_a_connection_that_the_server_closed_while_idle_is_opened_anew_and_one_that_breaks_is_a_failure(loads, closes, statuses):
    async def serve(reader, writer):
        await reader.readuntil(b"{}")
        if closes == "after the answer":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
        writer.close()

    async def asked():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            connection = loads.Connection(server.sockets[0].getsockname()[1], "key")
            found = []
            for _ in range(2):
                found.append((await connection.ask("/v1/recall", b"{}"))[0])
                await asyncio.sleep(0.2)
            connection.close()
        return found

    assert asyncio.run(asked()) == statuses


@pytest.fixture
def versions(answers) -> list[Any]:
    first = answers.KnownVersion(
        model="m/1", bundle="one", sids=frozenset({"<0>", "<1>", "<2>"}), sid_of={"a": "<0>", "b": "<1>"}, reference={"hose": frozenset({"<0>", "<1>"})}
    )
    second = answers.KnownVersion(
        model="m/2", bundle="two", sids=frozenset({"<0>", "<2>", "<3>"}), sid_of={"a": "<2>", "b": "<3>"}, reference={"hose": frozenset({"<2>", "<3>"})}
    )
    return [first, second]


def answer(model: str = "m/1", bundle: str = "one", seq: int = 0, sids: tuple[str, ...] = ("<0>", "<1>"), items: Any = (("a", "<0>"), ("b", "<1>"))) -> Any:
    return {"versions": {"model": model, "bundle": bundle, "catalog_seq": seq}, "sids": list(sids), "items": [list(one) for one in items]}


def test_a_whole_answer_of_either_version_passes(answers, versions):
    assert answers.problem_of("hose", answer(), versions, []) is None
    assert answers.problem_of("hose", answer("m/2", "two", 0, ("<2>", "<3>"), (("a", "<2>"),)), versions, []) is None
    assert answers.problem_of("another query", answer(sids=("<2>",), items=()), versions, []) is None


@pytest.mark.parametrize(
    ("mixed", "said"),
    [
        (answer(bundle="two"), "no version that was served"),
        (answer(model="m/3"), "no version that was served"),
        (answer(sids=("<0>", "<3>")), "has no SID <3>"),
        (answer(sids=("<0>", "<2>"), items=()), "has other SIDs"),
        (answer(items=(("a", "<1>"),)), "item a has SID <0>, not <1>"),
        (answer(items=(("a", "<2>"),)), "was not generated"),
        (answer(items=(("n", "<0>"),)), "no change up to 0 added it"),
        (answer("m/2", "two", sids=("<0>", "<2>"), items=(("a", "<0>"),)), "has other SIDs"),
    ],
)
def test_an_answer_that_mixes_versions_is_seen(answers, versions, mixed, said):
    assert said in answers.problem_of("hose", mixed, versions, [])


def test_items_come_and_go_by_the_changes_that_the_answer_knows(answers, versions):
    changes = [
        answers.ItemChange(sequence=sequence, item_id=item_id, listed=listed) for sequence, item_id, listed in [(1, "n", True), (2, "a", False), (3, "a", True)]
    ]
    new = (("n", "<0>"),)
    assert "no change up to 0" in answers.problem_of("hose", answer(seq=0, items=new), versions, changes)
    assert answers.problem_of("hose", answer(seq=1, items=new), versions, changes) is None
    assert answers.problem_of("hose", answer(seq=1), versions, changes) is None
    assert "item a was delisted" in answers.problem_of("hose", answer(seq=2), versions, changes)
    assert answers.problem_of("hose", answer(seq=3), versions, changes) is None
