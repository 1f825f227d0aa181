"""Words for SIDs and their prefixes: the commonest category below one, and the words of its titles that tell it from the rest of the catalogue.

Ours. A word's weight is p log(p / q), with p and q the shares (add-half) of the prefix's and of the catalogue's titles that hold it: its part of the
divergence between the two. Both shares are of evenly spaced samples, so a label costs the same whatever the catalogue's size. Labels describe the
published items. Those of whole SIDs are made once, with the bundle; those of shorter prefixes when first asked for, and the last ones are kept.

Shapes: S SIDs, P places of the index.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidTable

WORDS = 3
MAX_WORD_CHARACTERS = 24
MAX_LEAF_CHARACTERS = 48
_PREFIX_SAMPLE = 128
_CATALOGUE_SAMPLE = 8192
_LEAST_SHARE = 0.15
"""A word or a category of fewer of the sampled items names nothing."""
_WORD = re.compile(r"[^\W\d_]{3,}")


class PrefixLabel(NamedTuple):
    """A prefix of a SID, e.g. `<12,5>`, its label ("" where the titles and categories say nothing) and the number of published items below it."""

    prefix: str
    label: str
    size: int


class SidLabels:
    """Labels of one bundle's SIDs; for any number of threads.

    Args:
        titles: Arrow strings [N] by item row, nulls allowed.
        category_paths: Arrow lists of strings [N] by item row, nulls and empty ones allowed.
        index, table: of the published items.
        of_sids: labels made before, Arrow strings [S]; None: they are made when asked for, as a prefix's.
        capacity: labels kept at most.
    """

    def __init__(
        self,
        titles: pa.ChunkedArray,
        category_paths: pa.ChunkedArray,
        index: SidIndex,
        table: SidTable,
        *,
        of_sids: pa.ChunkedArray | None = None,
        capacity: int = 20_000,
    ) -> None:
        self._titles, self._category_paths = _in_one_piece(titles), _in_one_piece(category_paths)
        self._index, self._table = index, table
        self._of_sids = None if of_sids is None else _in_one_piece(of_sids)
        self._capacity = capacity
        self._kept: OrderedDict[tuple[int, int], PrefixLabel] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Labels kept."""
        return len(self._kept)

    def made_before(self, sid_rows: np.ndarray) -> list[str] | list[None]:
        """The labels of int [n] SID rows, at the price of a look-up; n times None where none were made before."""
        return [None] * len(sid_rows) if self._of_sids is None else self._of_sids.take(pa.array(sid_rows, pa.int64())).to_pylist()

    def make_all(self) -> pa.Array:
        """The labels of all SIDs, Arrow strings [S]."""
        bounds = self._index.offsets.tolist()
        return pa.array([self._describe_span(begin, end) for begin, end in itertools.pairwise(bounds)], pa.string())

    def path(self, sid_row: int) -> list[PrefixLabel]:
        """The prefixes of a SID row, from the root; the last one is the SID itself."""
        tokens = self._table.tokens
        first, end, steps = 0, len(tokens), []
        for level in range(3):
            column = tokens[first:end, level]
            token = tokens[sid_row, level]
            first, end = first + int(np.searchsorted(column, token)), first + int(np.searchsorted(column, token, side="right"))
            steps.append(self._label(first, end, sid_row, level))
        return steps

    def _label(self, first: int, end: int, sid_row: int, level: int) -> PrefixLabel:
        """The label of SID rows first to end - 1, which share the first `level` + 1 tokens."""
        key = (first, level)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        text = self._table.text(sid_row)
        prefix = text if level == 2 else ",".join(text.split(",")[: level + 1]) + ">"
        begin, stop = int(self._index.offsets[first]), int(self._index.offsets[end])
        known = self.made_before(np.array([sid_row]))[0] if level == 2 else None
        made = PrefixLabel(prefix, self._describe_span(begin, stop) if known is None else known, stop - begin)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return made

    def _describe_span(self, begin: int, end: int) -> str:
        """The label of what lies at places begin to end - 1 of the index."""
        return self._describe(self._index.item_rows[_spaced(begin, end, _PREFIX_SAMPLE)])

    def _describe(self, item_rows: np.ndarray) -> str:
        """What the items have in common: "Brackets: angle, galvanized"."""
        if not len(item_rows):
            return ""
        rows = pa.array(item_rows, pa.int32())
        leaf = _commonest([path[-1] for path in self._category_paths.take(rows).to_pylist() if path], least=_LEAST_SHARE * len(rows))
        leaf = leaf[:MAX_LEAF_CHARACTERS]
        held = Counter(word for title in self._titles.take(rows).to_pylist() for word in _words(title))
        said = _words(leaf)
        weights = {word: self._weight(count, len(rows), word) for word, count in held.items() if word not in said and count >= max(_LEAST_SHARE * len(rows), 1)}
        telling = sorted((word for word, weight in weights.items() if weight > 0), key=lambda word: (-weights[word], word))[:WORDS]
        return ": ".join(part for part in (leaf, ", ".join(telling)) if part)

    def _weight(self, count: int, total: int, word: str) -> float:
        catalogue_count, catalogue_total = self._catalogue[0][word], self._catalogue[1]
        share = (count + 0.5) / (total + 1)
        return share * math.log(share / ((catalogue_count + 0.5) / (catalogue_total + 1)))

    @cached_property
    def _catalogue(self) -> tuple[Counter[str], int]:
        """How many of a sample of all titles hold each word, and the sample's size."""
        rows = _spaced(0, len(self._titles), _CATALOGUE_SAMPLE)
        titles = self._titles.take(pa.array(rows, pa.int64())).to_pylist()
        return Counter(word for title in titles for word in _words(title)), len(titles)


def _in_one_piece(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in as few chunks as hold it: to take a few values of several chunks Arrow joins them all, every time."""
    return pa.table({"": column}).combine_chunks().column(0)


def _spaced(begin: int, end: int, most: int) -> np.ndarray:
    """At most `most` positions int64, evenly spaced between `begin` and `end` - 1."""
    return begin + np.arange(min(most, end - begin), dtype=np.int64) * (end - begin) // max(min(most, end - begin), 1)


def _words(title: str | None) -> set[str]:
    return {word[:MAX_WORD_CHARACTERS] for word in _WORD.findall((title or "").lower())}


def _commonest(names: Sequence[str], *, least: float) -> str:
    """The name that occurs most, the first in the alphabet among equals; "" where none occurs `least` times."""
    counts = Counter(names)
    best = min(counts, key=lambda name: (-counts[name], name), default="")
    return best if counts[best] >= least else ""
