"""Threads of a replica that give way to its answers: what they do may take longer, what a shopper waits for may not."""

from __future__ import annotations

import os
import sys
import threading

LOADING = 10
"""Niceness of what loads and verifies versions: a tenth of a busy core's time."""

SHADOWS = 19
"""Niceness of answers that nobody waits for: the lowest priority."""


def give_way(niceness: int) -> None:
    """Lower this thread's priority; on Linux alone, where threads have their own. It cannot be raised again."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
