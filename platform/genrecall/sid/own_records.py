"""Items that filters judge by their own record instead of by the index's posting lists: later ones, and published ones whose category or brand changed.

There are few of them beside the catalogue, so they are looked at one by one, in arrays; the lists stay as they were built. What is delisted is
taken off the lists' answer too, so that no SID is searched for an item that is gone.

Shapes: n items judged by their own record, m later item rows, P places of the base index, C distinct category paths and B distinct brands among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genrecall.sid.filters import AllowedItems, Filter


@dataclass(frozen=True)
class JudgedItems(AllowedItems):
    """What the lists admit, and beside it items judged by themselves.

    Attributes:
        own_places: int64 [n], ascending. own_passes: bool [n].
    """

    own_places: NDArray[np.int64]
    own_passes: NDArray[np.bool_]

    def passes(self, places: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether each of the given places [m] passes."""
        passing = super().passes(places)
        if len(self.own_places):
            at = np.minimum(np.searchsorted(self.own_places, places), len(self.own_places) - 1)
            own = self.own_places[at] == places
            passing[own] = self.own_passes[at[own]]
        return passing

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(super().nbytes + self.own_places.nbytes + self.own_passes.nbytes)


@dataclass(frozen=True)
class OwnRecords:
    """The items of an index that are judged by their own record, none of them delisted.

    Attributes:
        rows, sids: int32 [n], item rows and SID rows.
        places: int64 [n], ascending.
        category_of, brand_of: int32 [n], numbers into `categories` and `brands`.
        categories: C distinct paths, root first; () where unknown. brands: B distinct names; "" where unknown.
        off_lists: int32, the item rows of the base that its lists shall no longer admit: delisted, or judged here.
        out_of_stock: int32, item rows, judged here or by the lists.
    """

    rows: NDArray[np.int32]
    sids: NDArray[np.int32]
    places: NDArray[np.int64]
    category_of: NDArray[np.int32]
    brand_of: NDArray[np.int32]
    categories: tuple[tuple[str, ...], ...]
    brands: tuple[str, ...]
    off_lists: NDArray[np.int32]
    out_of_stock: NDArray[np.int32]

    def __len__(self) -> int:
        """n, the number of items."""
        return len(self.rows)

    def passing(self, wanted: Filter) -> NDArray[np.bool_]:
        """Whether each item meets the filter, bool [n]."""
        passing = np.ones(len(self), dtype=np.bool_)
        if wanted.categories:
            paths = set(wanted.categories)
            admitted = [any(path[:depth] in paths for depth in range(1, len(path) + 1)) for path in self.categories]
            passing &= np.array(admitted, dtype=np.bool_)[self.category_of]
        if wanted.brands:
            names = set(wanted.brands) - {""}
            passing &= np.array([brand in names for brand in self.brands], dtype=np.bool_)[self.brand_of]
        if wanted.excluded:
            passing &= ~np.isin(self.rows, wanted.excluded)
        if wanted.in_stock:
            passing &= ~np.isin(self.rows, self.out_of_stock)
        return passing

    def not_by_lists(self, wanted: Filter) -> NDArray[np.int32]:
        """The item rows, int32, that the lists shall not admit by this filter, whatever they say."""
        return np.concatenate([self.off_lists, self.out_of_stock]) if wanted.in_stock else self.off_lists
