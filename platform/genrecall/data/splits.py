"""Which requests train, which tune and which test: by time, leave-last-out, or by query.

Splits are int8 arrays: 0 train, 1 validation, 2 test (the order of `schema.SPLITS`). By time is the default wherever there is
time: nothing of the future is seen. Leave-last-out serves sources with an order but no time, by-query those without shoppers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

TRAIN, VALIDATION, TEST = 0, 1, 2
_BUCKETS = 10_000


def time_cuts(times: np.ndarray, weights: np.ndarray, *, validation_fraction: float, test_fraction: float) -> tuple[int, int]:
    """Where validation and test begin, so that they hold about these fractions of the requests.

    Args:
        times: int64 [n], request times, in any order (or a sample of them).
        weights: float64 [n], how many requests each stands for.

    Returns:
        (validation_start, test_start): a request belongs to test from `test_start` on, to validation from `validation_start` on.
        Requests of one instant stay together, so that training is strictly earlier than validation, and validation than test.
    """
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    before = np.concatenate([[0.0], np.cumsum(weights[order])])
    total = before[-1]

    def start(fraction: float) -> int:
        # The small slack keeps 0.1 of 1,000 at 100 in spite of rounding.
        place = int(np.searchsorted(before[:-1], math.floor(total * (1.0 - fraction) + 1e-6), side="left"))
        return int(ordered[place]) if place < len(ordered) else int(ordered[-1]) + 1

    return start(validation_fraction + test_fraction), start(test_fraction)


def by_time(times: np.ndarray, validation_start: int, test_start: int) -> np.ndarray:
    """int8 [R] splits of requests at `times` (int64 [R])."""
    return ((times >= validation_start).astype(np.int8) + (times >= test_start)).astype(np.int8)


def leave_last_out(users: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int8 [R]: each shopper's last request is test, the one before it validation.

    Requests of a shopper at one place in time cannot be told apart, so they go together: where several are last, all of them test. Shoppers
    with requests at fewer than three places stay in training, as do requests without a shopper.

    Args:
        users: int [R], a number per shopper, -1 where there is none.
        order: int [R], place of each request in time.
    """
    splits = np.zeros(len(users), dtype=np.int8)
    known = np.flatnonzero(users >= 0)
    if not known.size:
        return splits
    ranked = known[np.lexsort((order[known], users[known]))]
    opens = np.append(True, (np.diff(users[ranked]) != 0) | (np.diff(order[ranked]) != 0))  # a shopper's next place
    owners = users[ranked[opens]]
    last = np.flatnonzero(np.append(owners[1:] != owners[:-1], True))
    sizes = np.diff(np.concatenate([[-1], last]))
    last = last[sizes >= 3]
    of_place = np.zeros(len(owners), dtype=np.int8)
    of_place[last] = TEST
    of_place[last - 1] = VALIDATION
    splits[ranked] = of_place[np.cumsum(opens) - 1]
    return splits


def by_query(queries: Sequence[str], *, seed: int, validation_fraction: float, test_fraction: float) -> np.ndarray:
    """int8 [R]: all requests of one query (case and spaces apart) fall into one split, by a seeded hash of the query."""
    bucket = text_hash([normal_query(query) for query in queries], seed=seed) % np.uint64(_BUCKETS)
    test_below, validation_below = round(test_fraction * _BUCKETS), round((test_fraction + validation_fraction) * _BUCKETS)
    return np.where(bucket < test_below, TEST, np.where(bucket < validation_below, VALIDATION, TRAIN)).astype(np.int8)


def normal_query(query: str) -> str:
    """A query without regard to case and spacing, as the split by query compares it."""
    return " ".join(query.casefold().split())


def text_hash(texts: Sequence[str], *, seed: int) -> np.ndarray:
    """uint64 [n] hash of each text, the same on every machine and in every process."""
    if not len(texts):
        return np.zeros(0, dtype=np.uint64)
    key = f"{seed:016d}"[-16:]
    return np.asarray(pd.util.hash_array(np.asarray(texts, dtype=object), hash_key=key, categorize=False))
