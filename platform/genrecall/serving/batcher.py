"""The queue before the engine: while one batch is decoded, requests gather for the next.

A batch starts as soon as the engine is free, with whatever waits by then: a lone request waits for nobody, and under load batches fill themselves. A
timer that closes batches while the engine is busy, as `serve.batch` does, would start small ones one after the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Lane = TypeVar("Lane")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Lane, Item, Answer]):
    """One batch at a time, of items of one lane, in the order of arrival. It belongs to one event loop.

    Args:
        answer: (lane, items, load) -> their answers, in order; `load` is how many items of all lanes waited when the batch began, itself included.
        max_batch_size: items decoded together.
    """

    def __init__(self, answer: Callable[[Lane, Sequence[Item], int], Awaitable[Sequence[Answer]]], max_batch_size: int) -> None:
        self._answer = answer
        self._max_batch_size = max_batch_size
        self._queue: deque[tuple[Lane, Item, asyncio.Future[Answer]]] = deque()
        self._drain: asyncio.Task[None] | None = None

    async def submit(self, lane: Lane, item: Item) -> Answer:
        """The answer to an item, once its batch is done. An error of the batch is raised for each of its items."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((lane, item, future))
        if self._drain is None:
            self._drain = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        await asyncio.sleep(0)  # what is ready to be submitted in this turn of the loop comes along
        try:
            while batch := self._next():
                lane, load = batch[0][0], len(batch) + len(self._queue)
                try:
                    answers = await self._answer(lane, [item for _, item, _ in batch], load)
                except Exception as error:  # the edge: it belongs to who asked
                    for _, _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, _, future), answer in zip(batch, answers, strict=True):
                        if not future.done():
                            future.set_result(answer)
        finally:
            self._drain = None

    def _next(self) -> list[tuple[Lane, Item, asyncio.Future[Answer]]]:
        """The first item that somebody still waits for, and those of its lane behind it; the others keep their places."""
        waiting = [one for one in self._queue if not one[2].done()]  # who has gone away has cancelled theirs
        batch = [one for one in waiting if one[0] == waiting[0][0]][: self._max_batch_size]
        taken = {id(one) for one in batch}
        self._queue = deque(one for one in waiting if id(one) not in taken)
        return batch
