"""Threads that give way: themselves alone."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from genrecall.serving.thread_priority import LOADING, SHADOWS, give_way


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
@pytest.mark.parametrize("wanted", [LOADING, SHADOWS])
def test_a_thread_gives_way_by_itself(wanted: int) -> None:
    before = niceness()
    if before > wanted:
        pytest.skip(f"the tests run at niceness {before} themselves")
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        pool.submit(give_way, wanted).result()
        assert pool.submit(niceness).result() == wanted
        assert other.submit(niceness).result() == niceness() == before
