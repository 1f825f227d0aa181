"""Which categories own a level-1 code.

Source: CQ-SID (arXiv:2605.14434): an item with a known category takes that category's code at level 1. The paper has 1,711
categories in a book of 2,048; here the depth at which a category path is cut follows from the catalogue: an item's category is
its deepest ancestor with at least `min_items` items, and the smallest subtrees of the category tree are rolled up, each whole, until
the categories fill at most a share of the book. The other codes are spare: they serve items without a category.

Whole subtrees, because rolling up the smallest categories one at a time takes each small leaf to its parent, which is then itself small, and so
on to the root: a third of a catalogue ends in codes that stand for whole departments.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
        max_categories: at most this many; where there are more, the subtree with the fewest items becomes one category, and so on until they fit.
            When even the roots are too many, the smallest roots stay without a code and their items take the nearest one.
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

    smallest_subtree_first = sorted((path for path, count in below.items() if count >= min_items), key=lambda path: (below[path], -len(path), path))
    held_below: defaultdict[Path, set[Path]] = defaultdict(set)  # the members at or below each path
    for path in members:
        for depth in range(1, len(path) + 1):
            held_below[path[:depth]].add(path)
    for root in smallest_subtree_first:  # so that none comes before a subtree of its own
        if len(members) <= max_categories:
            break
        held = set(held_below[root])
        if len(held) > 1:
            members[root] = sum(members.pop(path) for path in held)
            for depth in range(1, len(root) + 1):
                held_below[root[:depth]] -= held
                held_below[root[:depth]].add(root)
    largest_first = sorted(members, key=lambda path: (-members[path], path))
    return Level1Categories(tuple(sorted(largest_first[: max(max_categories, 0)])))
