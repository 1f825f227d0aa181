"""What is kept of items that came after the bundle: what answers show of them, and one row each beside the index.

Shapes: m rows of later items, of which some are no longer in use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genrecall.registry.catalogue_records import ItemRecord

_ARRAYS = ("used", "errors", "unknown", "categories", "brands")


class ShownItem(NamedTuple):
    """What answers show of an item: the columns of a bundle's `items`."""

    item_id: str
    title: str
    category_path: tuple[str, ...]
    brand: str
    price: float | None

    @classmethod
    def of(cls, record: ItemRecord) -> ShownItem:
        return cls(record.item_id, record.title, record.category_path, record.brand, record.price)

    def columns(self) -> dict[str, Any]:
        return {**self._asdict(), "category_path": list(self.category_path)}


@dataclass(frozen=True)
class LaterRows:
    """The rows of later items, as the index has them.

    used: bool [m], not replaced by a newer row and not delisted. errors: float32 [m]. unknown: bool [m]. categories, brands: int32 [m], numbers
    into `Names`. shown: m. new_words: m sets of words that the bundle's spelling corrector does not know; empty where it has none.
    """

    used: NDArray[np.bool_]
    errors: NDArray[np.float32]
    unknown: NDArray[np.bool_]
    categories: NDArray[np.int32]
    brands: NDArray[np.int32]
    shown: tuple[ShownItem, ...]
    new_words: tuple[frozenset[str], ...]

    @classmethod
    def none(cls) -> LaterRows:
        return cls(np.zeros(0, bool), np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.int32), np.zeros(0, np.int32), (), ())

    def with_rows(self, other: LaterRows) -> LaterRows:
        joined: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return LaterRows(**joined, shown=self.shown + other.shown, new_words=self.new_words + other.new_words)

    def without(self, rows: Sequence[int]) -> LaterRows:
        used = self.used.copy()
        used[list(rows)] = False
        return dataclasses.replace(self, used=used)

    def kept(self) -> LaterRows:
        """The rows in use alone."""
        arrays: dict[str, Any] = {name: getattr(self, name)[self.used] for name in _ARRAYS}
        rows = np.flatnonzero(self.used).tolist()
        return LaterRows(**arrays, shown=tuple(self.shown[row] for row in rows), new_words=tuple(self.new_words[row] for row in rows))

    def words_in_use(self) -> frozenset[str]:
        """The new words of the rows in use."""
        return frozenset().union(*(words for words, used in zip(self.new_words, self.used.tolist(), strict=True) if used and words))


@dataclass(frozen=True)
class Names:
    """Numbers of the category paths and brands that items judged by their own record have."""

    categories: Mapping[tuple[str, ...], int]
    brands: Mapping[str, int]

    def with_names(self, shown: Iterable[ShownItem]) -> Names:
        categories, brands = dict(self.categories), dict(self.brands)
        for one in shown:
            categories.setdefault(one.category_path, len(categories))
            brands.setdefault(one.brand, len(brands))
        return Names(categories, brands)

    def numbers_of(self, shown: Sequence[ShownItem]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return np.array([self.categories[one.category_path] for one in shown], np.int32), np.array([self.brands[one.brand] for one in shown], np.int32)
