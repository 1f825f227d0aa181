"""Request-time filters: what a request admits, and the inverted lists that say which items pass before anything is searched.

Ours; CQ-SID (arXiv:2605.14434) leaves filters to later stages. Lists hold the *places* of items in the index, SID after SID, so that ascending places are
ascending SIDs. A filter's clauses are joined by AND and intersected from the shortest list; the SIDs that hold a passing item become the masks
of the search, and the same items are kept when SIDs are expanded. So filters are exact: what fails is never returned, and never takes a beam.

Names are kept as sorted byte strings. A path's key begins with the key of every path above it, so a category with everything below is one run of the
lists, and a brand is a path of one name.

Shapes: N items, P places (N unless items are delisted), S SIDs, C distinct category paths, V values of a list, k passing items.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrecall.sid.index import SidIndex, load_index

_ITEMS_PER_PLACE = 32
"""A place takes as many bits as this many items of a bitmap."""
_BITS_BELOW = np.array([(1 << bit) - 1 for bit in range(8)], dtype=np.uint8)


class FilterError(ValueError):
    """A filter that says nothing sensible, or posting lists that do not fit their index."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What a request admits: items that meet every clause that is given. Equal filters compare equal however they were written; an empty one is false.

    Attributes:
        categories: paths, root first; an item of any of them, or of a category below, passes. None given: all items.
        brands: an item of any of them passes. None given: all items.
        in_stock: only items in stock.
        excluded: item rows that do not pass; rows outside the index are ignored.

    Names are compared as they are, letter by letter. One that no item has admits nothing and is not an error.

    Raises:
        FilterError: a value of another kind, an empty path or a negative row; all of them at once.
    """

    categories: tuple[tuple[str, ...], ...] = ()
    brands: tuple[str, ...] = ()
    in_stock: bool = False
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise FilterError("; ".join(problems))
        object.__setattr__(self, "categories", _topmost({tuple(path) for path in self.categories}))
        object.__setattr__(self, "brands", tuple(sorted(set(self.brands))))
        object.__setattr__(self, "excluded", tuple(sorted({int(row) for row in self.excluded})))

    def problems(self) -> list[str]:
        """What is wrong, one line a clause."""
        found: list[str] = []
        for path in _listed("categories", self.categories, found):
            if isinstance(path, str) or not isinstance(path, Sequence) or not path or not all(isinstance(name, str) for name in path):
                found.append(f"categories: expected paths of at least one name, root first, such as ('Home', 'Lamps'), got {path!r}")
                break
        for brand in _listed("brands", self.brands, found):
            if not isinstance(brand, str):
                found.append(f"brands: expected names, got {brand!r}")
                break
        if not isinstance(self.in_stock, bool):
            found.append(f"in_stock: expected True or False, got {self.in_stock!r}")
        for row in _listed("excluded", self.excluded, found):
            if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or row < 0:
                found.append(f"excluded: expected item rows, 0 or more, got {row!r}")
                break
        return found

    def __bool__(self) -> bool:
        return bool(self.categories or self.brands or self.in_stock or self.excluded)


def _listed(name: str, values: Any, problems: list[str]) -> Iterable[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        problems.append(f"{name}: expected a tuple, got {values!r}")
        return ()
    return values


def _topmost(paths: set[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The paths in order, without those that lie below another."""
    kept: list[tuple[str, ...]] = []
    for path in sorted(paths):  # what lies below a path follows it at once
        if not kept or path[: len(kept[-1])] != kept[-1]:
            kept.append(path)
    return tuple(kept)


@dataclass(frozen=True)
class AllowedItems:
    """The items that pass, as ascending places or as a bitmap, whichever is smaller.

    Attributes:
        count: k.
        leaves: bool [S], the SIDs with a passing item.
        places: int32 [k]; None where there is a bitmap.
        bitmap: uint8 [ceil(P / 8)], the lowest bit first; None where there are places.
    """

    count: int
    leaves: NDArray[np.bool_]
    places: NDArray[np.int32] | None
    bitmap: NDArray[np.uint8] | None

    def passes(self, places: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether each of the given places [m] passes; one that the lists do not know, such as a newcomer's or -1, never does."""
        if self.places is None:
            assert self.bitmap is not None
            known = (places >= 0) & (places < 8 * len(self.bitmap))
            return _bits_at(self.bitmap, np.where(known, places, 0)) & known
        if not len(self.places):
            return np.zeros(len(places), dtype=np.bool_)
        at = np.searchsorted(self.places, places.astype(np.int32, copy=False))  # of one type: the long list is not converted
        return np.asarray(self.places[np.minimum(at, len(self.places) - 1)] == places)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = self.bitmap if self.places is None else self.places
        assert held is not None
        return int(held.nbytes + self.leaves.nbytes)


class _Keys(Sequence[bytes]):
    """Sorted byte strings in two arrays, int64 offsets [V + 1] and uint8 text, which can be memory-mapped; a dict of 10^6 brands would take 10^8 bytes."""

    def __init__(self, offsets: NDArray[np.int64], text: NDArray[np.uint8]) -> None:
        self.offsets, self.text = offsets, text

    @classmethod
    def of(cls, keys: Sequence[bytes]) -> _Keys:
        return cls(np.cumsum([0, *map(len, keys)], dtype=np.int64), np.frombuffer(b"".join(keys), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: Any) -> Any:
        return self.text[self.offsets[number] : self.offsets[number + 1]].tobytes()

    def range_below(self, key: bytes) -> tuple[int, int]:
        """First and end of the keys that begin with `key`, which ends with a zero byte."""
        first = bisect.bisect_left(self, key)
        return first, bisect.bisect_left(self, key[:-1] + b"\x01", lo=first)


def _key(path: Sequence[str]) -> bytes:
    """Each name ended by a zero byte, which escapes keep out of the names, so that one key begins with another where one path does."""
    names = (name.encode("utf-8", "surrogatepass").replace(b"\x01", b"\x01\x02").replace(b"\x00", b"\x01\x01") for name in path)
    return b"".join(name + b"\x00" for name in names)


@dataclass(frozen=True)
class _Postings:
    """Places by value: those of value v are `places[offsets[v]:offsets[v + 1]]`, ascending; items without a value are in no list.

    keys: of the V values. offsets: int64 [V + 1]. places: int32 [at most P].
    """

    keys: _Keys
    offsets: NDArray[np.int64]
    places: NDArray[np.int32]

    def ranges(self, paths: Iterable[Sequence[str]]) -> NDArray[np.int64]:
        """First and end of the values at or below each path, int64 [len(paths), 2]; ascending and apart where the paths are."""
        return np.array([self.keys.range_below(_key(path)) for path in paths], dtype=np.int64).reshape(-1, 2)

    def count(self, ranges: NDArray[np.int64]) -> int:
        return int((self.offsets[ranges[:, 1]] - self.offsets[ranges[:, 0]]).sum())

    def of(self, ranges: NDArray[np.int64]) -> NDArray[np.int32]:
        """The places of ranges of values, list after list: int32, each once."""
        lists = [self.places[self.offsets[first] : self.offsets[end]] for first, end in ranges.tolist()]
        return np.concatenate([np.zeros(0, np.int32), *lists])


_STORED = {f"{name}_{part}": (name, part) for name in ("category", "brand") for part in ("key_offsets", "key_text", "offsets", "places")}


@dataclass(frozen=True)
class FilterPostings:
    """The inverted lists of one index.

    Attributes:
        index: whose places they hold.
        categories, brands: places by category path and by brand; items without one are in no list.
        category_of: uint8, uint16 or uint32 [P], the number of each place's category path; C where it has none.
        stock: uint8 [ceil(P / 8)], the places in stock, lowest bit first; None: all are.
    """

    index: SidIndex
    categories: _Postings
    brands: _Postings
    category_of: NDArray[np.unsignedinteger]
    stock: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        """P, the number of places."""
        return len(self.category_of)

    @classmethod
    def build(cls, category_paths: Sequence[Sequence[str]], brands: Sequence[str], index: SidIndex) -> FilterPostings:
        """Build from the category path (empty: unknown) and the brand ("": unknown) of every item row.

        Raises:
            FilterError: not one of each per item of the index.
        """
        category_codes, categories = _coded(map(tuple, category_paths))
        brand_codes, names = _coded((brand,) if brand else () for brand in brands)
        return cls.from_codes(category_codes, categories, brand_codes, [name for (name,) in names], index)

    @classmethod
    def from_codes(
        cls,
        category_codes: NDArray[np.integer],
        category_paths: Sequence[Sequence[str]],
        brand_codes: NDArray[np.integer],
        brands: Sequence[str],
        index: SidIndex,
    ) -> FilterPostings:
        """Build from numbers into distinct category paths and brands: integers [N] by item row, -1 where unknown.

        Raises:
            FilterError: not one of each per item of the index, or a path or brand that is listed twice.
        """
        if not len(category_codes) == len(brand_codes) == index.num_items:
            raise FilterError(f"expected a category and a brand for each of {index.num_items} items, got {len(category_codes)} and {len(brand_codes)}")
        categories, category_of = _inverted("category path", category_codes, category_paths, index)
        listed, _ = _inverted("brand", brand_codes, [(brand,) for brand in brands], index)
        return cls(index, categories, listed, category_of)

    def with_stock(self, rows_out_of_stock: NDArray[np.integer]) -> FilterPostings:
        """The same lists with another stock: all items but the given rows, of which those outside the index are ignored."""
        rows = np.asarray(rows_out_of_stock)
        in_stock = np.ones(self.index.num_items, dtype=np.bool_)
        in_stock[rows[(rows >= 0) & (rows < len(in_stock))]] = False
        flags = in_stock[self.index.item_rows]
        return dataclasses.replace(self, stock=None if flags.all() else np.packbits(flags, bitorder="little"))

    def resolve(self, wanted: Filter) -> AllowedItems:
        """The items and SIDs that pass; the time is that of the shortest list, plus S bytes, where few do, and of one pass over the index where many do."""
        return self.without(self._admitted(self._listed(wanted), wanted.in_stock), np.asarray(wanted.excluded, dtype=np.int64))

    def without(self, allowed: AllowedItems, rows: NDArray[np.integer]) -> AllowedItems:
        """`allowed` less the given item rows; the time is that of their clusters and of a copy."""
        gone = self._places_of(rows)
        gone = gone[allowed.passes(gone)]
        if not len(gone):
            return allowed
        places, bitmap = allowed.places, allowed.bitmap
        if places is not None:
            places = np.delete(places, np.searchsorted(places, gone.astype(np.int32)))
        else:
            assert bitmap is not None
            bitmap = bitmap.copy()
            np.bitwise_and.at(bitmap, gone >> 3, ~(np.uint8(1) << (gone & 7).astype(np.uint8)))
        rest = dataclasses.replace(allowed, count=allowed.count - len(gone), places=places, bitmap=bitmap)
        sids = np.unique(self.index.sids_of(self.index.rows_at(gone)))
        members, owner = self._members(sids)
        empty = sids[np.bincount(owner[rest.passes(members)], minlength=len(sids)) == 0]
        if not len(empty):
            return rest
        leaves = allowed.leaves.copy()
        leaves[empty] = False
        return dataclasses.replace(rest, leaves=leaves)

    def _listed(self, wanted: Filter) -> NDArray[np.int32] | None:
        """The places that categories and brands admit, in any order; None: all."""
        if not wanted.categories and not wanted.brands:
            return None
        categories = self.categories.ranges(wanted.categories)
        brands = self.brands.ranges((brand,) for brand in wanted.brands)
        if not wanted.brands:
            return self.categories.of(categories)
        if not wanted.categories:
            return self.brands.of(brands)
        few, many = self.categories.count(categories), self.brands.count(brands)
        if few * len(brands) < many:  # look each up in the brands' lists
            found = self.categories.of(categories)
            kept = np.zeros(len(found), dtype=np.bool_)
            for one in brands[:, None]:
                kept |= _is_in(self.brands.of(one), found)
            return found[kept]
        found = self.brands.of(brands)
        number = self.category_of[found]
        at = np.searchsorted(categories[:, 0], number, side="right") - 1
        return np.asarray(found[(at >= 0) & (number < categories[at, 1])], dtype=np.int32)

    def _admitted(self, found: NDArray[np.int32] | None, in_stock: bool) -> AllowedItems:
        """What passes of the places `found` (None: of all), those in stock alone if asked."""
        stock = self.stock if in_stock else None
        if found is not None and len(found) * _ITEMS_PER_PLACE <= len(self):
            found = np.sort(found)
            return self._as_places(found if stock is None else found[_bits_at(stock, found)])
        if found is None and stock is not None:
            bitmap = stock
        else:
            flags = np.full(len(self), found is None)
            if found is not None:
                flags[found] = True
            bitmap = np.packbits(flags, bitorder="little")
            if stock is not None:
                bitmap &= stock
        counts = np.cumsum(np.bitwise_count(bitmap), dtype=np.int32)
        count = int(counts[-1]) if len(counts) else 0
        if count * _ITEMS_PER_PLACE <= len(self):
            return self._as_places(np.flatnonzero(np.unpackbits(bitmap, count=len(self), bitorder="little")).astype(np.int32))
        return AllowedItems(count, _any_in_slices(bitmap, counts, self.index.offsets), None, bitmap)

    def _as_places(self, places: NDArray[np.int32]) -> AllowedItems:
        leaves = np.zeros(len(self.index), dtype=np.bool_)
        leaves[self.index.sids_of(self.index.rows_at(places.astype(np.int64)))] = True
        return AllowedItems(len(places), leaves, places, None)

    def _places_of(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """The places of item rows, ascending, each once; rows outside the index are skipped."""
        rows = np.unique(rows[(rows >= 0) & (rows < self.index.num_items)])
        members, _ = self._members(np.unique(self.index.sids_of(rows)))
        return members[np.isin(self.index.rows_at(members), rows)]

    def _members(self, sids: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """All places of SIDs, and beside each where in `sids` its SID is."""
        return self.index.places(sids, len(self))

    def save(self, folder: Path) -> None:
        """Write the lists as npy files into `folder`; `stock.npy` only where something is out of stock."""
        folder.mkdir(parents=True, exist_ok=True)
        for file, (name, part) in _STORED.items():
            postings = self.categories if name == "category" else self.brands
            owner = postings.keys if part.startswith("key_") else postings
            np.save(folder / f"{file}.npy", getattr(owner, part.removeprefix("key_")), allow_pickle=False)
        np.save(folder / "category_of.npy", self.category_of, allow_pickle=False)
        if self.stock is not None:
            np.save(folder / "stock.npy", self.stock, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, index: SidIndex) -> FilterPostings:
        """Read lists written by `save`; pages are read when first touched.

        Raises:
            FilterError: files that are missing, or that belong neither together nor to `index`.
        """
        again = "rerun jobs/build_sid_index.py with --force"
        wanted = (*_STORED, "category_of", *(["stock"] if (folder / "stock.npy").is_file() else []))
        if missing := [name for name in wanted if not (folder / f"{name}.npy").is_file()]:
            raise FilterError(f"{folder}: has no {missing[0]}.npy; {again}")
        # As plain arrays: slices of a np.memmap cost a microsecond each, and a look-up of a name takes forty.
        read = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in wanted}
        parts = []
        for name in ("category", "brand"):
            keys = _Keys(read[f"{name}_key_offsets"], read[f"{name}_key_text"])
            parts.append(_Postings(keys, read[f"{name}_offsets"], read[f"{name}_places"]))
            if len(parts[-1].offsets) != len(keys) + 1 or parts[-1].offsets[-1] != len(parts[-1].places) or keys.offsets[-1] != len(keys.text):
                raise FilterError(f"{folder}: the {name} files do not belong together; {again}")
        stock = read.get("stock")
        if len(read["category_of"]) != len(index.item_rows) or (stock is not None and len(stock) != (len(index.item_rows) + 7) // 8):
            raise FilterError(f"{folder}: holds {len(read['category_of'])} places, its index {len(index.item_rows)}; {again}")
        return cls(index, parts[0], parts[1], read["category_of"], stock)


def load_filters(artifact_path: Path, index: SidIndex | None = None) -> FilterPostings:
    """The posting lists of a `sid_index` artifact, memory-mapped; `index` where it is loaded already."""
    return FilterPostings.load(artifact_path / "filters", load_index(artifact_path) if index is None else index)


def _coded(paths: Iterable[tuple[str, ...]]) -> tuple[NDArray[np.int64], list[tuple[str, ...]]]:
    """A number for each path, -1 for an empty one, and the distinct paths."""
    numbers: dict[tuple[str, ...], int] = {}
    codes = np.fromiter((numbers.setdefault(path, len(numbers)) if path else -1 for path in paths), dtype=np.int64)
    return codes, list(numbers)


def _inverted(what: str, codes: NDArray[np.integer], paths: Sequence[Sequence[str]], index: SidIndex) -> tuple[_Postings, NDArray[np.unsignedinteger]]:
    """The lists of numbers [N] into distinct paths, and each place's number among the sorted paths (V: none)."""
    keys = [_key(path) for path in paths]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [keys[number] for number in order]
    if repeated := next((number for number in range(1, len(keys)) if ordered[number] == ordered[number - 1]), 0):
        raise FilterError(f"{what}: {paths[order[repeated]]!r} is listed twice; list each once")
    number_of = np.empty(len(keys) + 1, dtype=np.min_scalar_type(len(keys)))
    number_of[order] = np.arange(len(keys))
    number_of[-1] = len(keys)  # the code -1
    values = number_of[np.asarray(codes)[index.item_rows]]
    places = np.argsort(values, kind="stable").astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(values, minlength=len(keys) + 1))]).astype(np.int64)
    return _Postings(_Keys.of(ordered), offsets[:-1], places[: offsets[-2]]), values


def _bits_at(bitmap: NDArray[np.uint8], places: NDArray[np.integer]) -> NDArray[np.bool_]:
    return np.asarray((bitmap[places >> 3] >> (places & 7).astype(np.uint8)) & 1, dtype=np.bool_)


def _is_in(ascending: NDArray[np.int32], values: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each of `values` is in `ascending`."""
    if not len(ascending):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.searchsorted(ascending, values)
    return np.asarray(ascending[np.minimum(at, len(ascending) - 1)] == values)


def _any_in_slices(bitmap: NDArray[np.uint8], counts: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether any bit is set in each slice `offsets[i]:offsets[i + 1]`, bool [S], given the bits set up to the end of each byte int32 [len(bitmap)]."""
    byte = offsets >> 3
    inside = np.append(bitmap, np.uint8(0))[byte] & _BITS_BELOW[offsets & 7]
    before = np.concatenate([np.zeros(1, np.int32), counts])[byte] + np.bitwise_count(inside)
    return np.asarray(before[1:] > before[:-1])
