"""Which categories own a level-1 code.

Source: CQ-SID (arXiv:2605.14434): an item with a known category takes that category's code at level 1. The paper has 1,711
categories in a book of 2,048; here the depth at which a category path is cut follows from the catalogue: an item's category is
its deepest ancestor with at least `min_items` items, and the smallest categories are rolled up into their parents until they
fill at most a share of the book. The other codes are spare: they serve items without a category.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Path = tuple[str, ...]


@dataclass(frozen=True)
class Level1Categories:
    """The category that owns each of the first level-1 codes: `paths[code]`, root first."""

    paths: tuple[Path, ...]
    _codes: dict[Path, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_codes", {path: code for code, path in enumerate(self.paths)})

    def __len__(self) -> int:
        """How many codes are owned; they are 0 to len - 1."""
        return len(self.paths)

    def codes_of(self, category_paths: Sequence[Sequence[str]]) -> NDArray[np.int32]:
        """The level-1 code int32 [n] of each category path: that of its longest ancestor (or itself) with a code, -1 where none has one."""
        known: dict[Path, int] = {}
        codes = np.empty(len(category_paths), dtype=np.int32)
        for row, raw in enumerate(category_paths):
            path = tuple(raw)
            code = known.get(path)
            if code is None:
                code = known[path] = next((self._codes[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in self._codes), -1)
            codes[row] = code
        return codes


def choose_categories(category_paths: Sequence[Sequence[str]], *, min_items: int, max_categories: int) -> Level1Categories:
    """Choose the categories that own level-1 codes.

    Args:
        category_paths: one path per item, root first; empty when unknown.
        min_items: a category needs this many items, those of its descendants included.
        max_categories: at most this many; the smallest are rolled up into their parents until they fit. When even the
            roots are too many, the smallest roots stay without a code and their items take the nearest one.
    """
    of_path = Counter(tuple(path) for path in category_paths)
    below: Counter[Path] = Counter()
    for path, count in of_path.items():
        for depth in range(1, len(path) + 1):
            below[path[:depth]] += count
    members: Counter[Path] = Counter()
    for path, count in of_path.items():
        for depth in range(len(path), 0, -1):
            if below[path[:depth]] >= min_items:
                members[path[:depth]] += count
                break

    # Smallest first; roots only once nothing else is left, because rolling a root up takes its items' category away.
    queue = [(len(path) == 1, count, path) for path, count in members.items()]
    heapq.heapify(queue)
    while len(members) > max(max_categories, 0):
        is_root, count, path = heapq.heappop(queue)
        if members.get(path) != count:
            continue  # an older entry of a category that has grown since
        del members[path]
        if not is_root:
            parent = path[:-1]
            members[parent] += count
            heapq.heappush(queue, (len(parent) == 1, members[parent], parent))
    return Level1Categories(tuple(sorted(members)))
