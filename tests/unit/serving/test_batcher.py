"""The queue before the engine: batches gather while one is decoded, lanes do not mix, errors and departures stay with those they concern."""

from __future__ import annotations

import asyncio

import pytest

from genrecall.serving.batcher import Batcher


class Engine:
    """Notes its batches; the first ones wait for `go`."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int], int]] = []
        self.go = asyncio.Event()

    async def __call__(self, lane, items, load):
        self.batches.append((lane, list(items), load))
        await self.go.wait()
        if 13 in items:
            raise ValueError("thirteen")
        return [item * 10 for item in items]


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_gather_while_a_batch_runs_and_answers_go_to_who_asked():
    async def main():
        engine = Engine()
        batcher = Batcher(engine, 4)
        first = asyncio.create_task(batcher.submit("a", 1))
        await settled()
        assert engine.batches == [("a", [1], 1)]  # nobody waits for company
        others = [asyncio.create_task(batcher.submit("a", number)) for number in range(2, 8)]
        await settled()
        assert len(engine.batches) == 1
        engine.go.set()
        assert await asyncio.gather(first, *others) == [10, 20, 30, 40, 50, 60, 70]
        assert engine.batches[1:] == [("a", [2, 3, 4, 5], 6), ("a", [6, 7], 2)]

    asyncio.run(main())


def test_what_comes_in_one_turn_of_the_loop_is_one_batch():
    async def main():
        engine = Engine()
        engine.go.set()
        batcher = Batcher(engine, 4)
        await asyncio.gather(*(batcher.submit("a", number) for number in range(3)))
        assert engine.batches == [("a", [0, 1, 2], 3)]

    asyncio.run(main())


def test_lanes_do_not_mix_and_keep_their_order():
    async def main():
        engine = Engine()
        batcher = Batcher(engine, 2)
        asked = [("a", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5), ("b", 6)]
        tasks = []
        for lane, number in asked:
            tasks.append(asyncio.create_task(batcher.submit(lane, number)))
            await settled()
        engine.go.set()
        assert await asyncio.gather(*tasks) == [number * 10 for _, number in asked]
        assert [(lane, items) for lane, items, _ in engine.batches] == [("a", [1]), ("a", [2, 4]), ("b", [3, 5]), ("b", [6])]

    asyncio.run(main())


def test_an_error_is_that_of_its_batch_alone_and_the_queue_goes_on():
    async def main():
        engine = Engine()
        engine.go.set()
        batcher = Batcher(engine, 2)
        found = await asyncio.gather(*(batcher.submit("a", number) for number in (1, 13, 3)), return_exceptions=True)
        assert [str(one) for one in found] == ["thirteen", "thirteen", "30"]
        assert await batcher.submit("a", 4) == 40

    asyncio.run(main())


def test_who_has_gone_away_is_not_answered():
    async def main():
        engine = Engine()
        batcher = Batcher(engine, 4)
        first, gone, third = (asyncio.create_task(batcher.submit(lane, number)) for lane, number in (("a", 1), ("b", 2), ("b", 3)))
        await settled()
        gone.cancel()
        engine.go.set()
        assert (await first, await third) == (10, 30)
        assert [items for _, items, _ in engine.batches] == [[1], [3]]
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(main())
