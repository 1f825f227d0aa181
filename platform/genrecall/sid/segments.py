"""An index that takes in new items and loses delisted ones without being rebuilt: an immutable base and the clusters that changed.

New items land on published SIDs (`assign.py`), so the trie stays as it is. Every SID that gains or loses an item gets its whole list anew, in
served order; all others are read from the base. So a search merges nothing: it looks up which of its SIDs have a list of their own. Each change
gives a new object that shares the base, and a search under way keeps the one it began with.

A new item's row follows the last one's; a delisted item keeps its row and its SID, so that shoppers' histories stay readable. Places (see
`index.py`) of later items follow those of the base: place P + j is the j-th later item.

Shapes: S SIDs, N items and P postings of the base, m later items, k touched SIDs, d dimensions of the items' vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrecall.sid.index import NO_FEEDBACK, SidIndex, SidIndexError, checked_scores, served_order, slices
from genrecall.sid.trie import Trie

_ALL = np.iinfo(np.int64).max
_Value = TypeVar("_Value", bound=np.generic)


class ItemWords(NamedTuple):
    """The text tokens of items: those of item j are `tokens[offsets[j]:offsets[j + 1]]`, each once. offsets: int64 [m + 1]. tokens: int32."""

    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]

    @classmethod
    def of(cls, tokens: Sequence[NDArray[np.integer]]) -> ItemWords:
        """From the token ids of each item's text, with repeats or not."""
        distinct = [np.unique(one) for one in tokens]
        offsets = np.cumsum([0, *(len(one) for one in distinct)], dtype=np.int64)
        return cls(offsets, np.concatenate([np.zeros(0, np.int32), *distinct]).astype(np.int32))


class LaterItems(NamedTuple):
    """The items added to a base, in the order of their rows.

    item_sid: int32 [m]. prior: float32 [m]. vectors: float16 [m, d], the encoder's; None where no decoder is guided. words: None where no decoder
    is guided by words.
    """

    item_sid: NDArray[np.int32]
    prior: NDArray[np.float32]
    vectors: NDArray[np.float16] | None = None
    words: ItemWords | None = None


class Touched(NamedTuple):
    """The SIDs with a list of their own: `places[offsets[j]:offsets[j + 1]]` are those of `sids[j]`.

    sids: int32 [k], ascending. offsets: int64 [k + 1]. places: int64.
    """

    sids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    places: NDArray[np.int64]


_NOTHING_LATER = LaterItems(np.zeros(0, np.int32), np.zeros(0, np.float32))
_UNTOUCHED = Touched(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class SegmentedIndex:
    """A `SidIndex` with changes; answers as one rebuilt over all items that are listed.

    Attributes:
        base: never changed, may be memory-mapped.
        later: items that came after the base was built.
        touched: SIDs that differ from the base.
    """

    base: SidIndex
    later: LaterItems = _NOTHING_LATER
    touched: Touched = _UNTOUCHED

    def __len__(self) -> int:
        """S, the number of SIDs."""
        return len(self.base)

    @property
    def num_items(self) -> int:
        """N + m, the number of item rows, delisted ones included."""
        return self.base.num_items + len(self.later.item_sid)

    @property
    def num_published(self) -> int:
        """P: a place below it is one of the base, whose vector the trie holds."""
        return self.base.num_published

    @cached_property
    def item_sid(self) -> NDArray[np.int32]:
        """int32 [N + m], the SID row of each item row; a copy of the base's, made at the first call: `sids_of` reads a few without it."""
        return np.concatenate([self.base.item_sid, self.later.item_sid])

    @cached_property
    def prior(self) -> NDArray[np.float32]:
        """float32 [N + m], the prior score of each item row; a copy likewise."""
        return np.concatenate([self.base.prior, self.later.prior])

    def added(
        self,
        item_sid: NDArray[np.int32],
        prior: NDArray[np.floating],
        *,
        vectors: NDArray[np.floating] | None = None,
        tokens: Sequence[NDArray[np.integer]] | None = None,
    ) -> SegmentedIndex:
        """With n more items, whose rows follow the last.

        Args:
            item_sid: int32 [n], SID rows. prior: float [n]; nan counts as 0.
            vectors: float [n, d] by the bundle's encoder; a guided decoder needs those of all later items.
            tokens: the token ids of each item's text, by the generator's tokenizer; a decoder guided by words needs those of all later items.

        Raises:
            SidIndexError: a SID row that is not published, lengths that differ, or vectors or tokens of some later items only.
        """
        scores = checked_scores(item_sid, len(self), prior)
        old, count = self.later, len(scores)
        for name, given, held in (("vectors", vectors, old.vectors), ("tokens", tokens, old.words)):
            if given is not None and len(given) != count:
                raise SidIndexError(f"{name}: expected one for each of the {count} new items, got {len(given)}")
            if count and len(old.item_sid) and (given is None) != (held is None):
                raise SidIndexError(f"{name}: expected {'none' if held is None else 'some'}, as with the {len(old.item_sid)} items added before")
        if not count:
            return self
        later = LaterItems(
            np.concatenate([old.item_sid, np.asarray(item_sid, dtype=np.int32)]),
            np.concatenate([old.prior, scores]),
            None if vectors is None else _rows_joined(old.vectors, np.asarray(vectors, dtype=np.float16)),
            None if tokens is None else _words_joined(old.words, ItemWords.of(tokens)),
        )
        places = self.num_published + len(old.item_sid) + np.arange(count, dtype=np.int64)
        return SegmentedIndex(self.base, later, self.touched)._changed(later.item_sid[len(old.item_sid) :], places, np.zeros(0, np.int64))

    def without(self, item_rows: NDArray[np.integer]) -> SegmentedIndex:
        """With items delisted; those that are already make no difference.

        Raises:
            SidIndexError: a row that is no item's.
        """
        rows = np.unique(np.asarray(item_rows, dtype=np.int64))
        if not len(rows):
            return self
        if rows[0] < 0 or rows[-1] >= self.num_items:
            raise SidIndexError(f"item_rows: expected rows 0 to {self.num_items - 1}, got {int(rows[0])} to {int(rows[-1])}")
        return self._changed(self.sids_of(rows), np.zeros(0, np.int64), rows)

    def items(self, sid_row: int) -> NDArray[np.int32]:
        """As `SidIndex.items`."""
        return self.expand(np.array([sid_row], dtype=np.int32), _ALL)[0]

    def sizes(self, sid_rows: NDArray[np.int32] | None = None) -> NDArray[np.int64]:
        """As `SidIndex.sizes`."""
        own = np.diff(self.touched.offsets)
        sizes = self.base.sizes(sid_rows)
        if sid_rows is None:
            sizes[self.touched.sids] = own
            return sizes
        slot, hit = self._slots(np.asarray(sid_rows))
        return np.where(hit, own[slot], sizes) if hit.any() else sizes

    def expand(self, sid_rows: NDArray[np.int32], limit: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """As `SidIndex.expand`."""
        places, rank = self.places(sid_rows, limit)
        return self.rows_at(places), rank

    def places(self, sid_rows: NDArray[np.int32], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """As `SidIndex.places`."""
        sid_rows = np.asarray(sid_rows)
        slot, hit = self._slots(sid_rows)
        if not hit.any():
            return self.base.places(sid_rows, limit)
        begins, sizes = self.base.offsets[np.maximum(sid_rows, 0)], self.base.sizes(sid_rows)
        at, own = np.flatnonzero(hit), self.touched
        begins[at] = own.offsets[slot[at]]
        sizes[at] = own.offsets[slot[at] + 1] - begins[at]
        places, rank = slices(begins, sizes, limit)
        inside = np.flatnonzero(hit[rank])
        places[inside] = own.places[places[inside]]
        return places, rank

    def rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        """The item rows int32 [n] at places [n]."""
        later = np.flatnonzero(places >= self.num_published)
        if not len(later):
            return self.base.rows_at(places)
        rows = np.empty(len(places), dtype=np.int32)
        if self.num_published:
            rows[:] = self.base.item_rows[np.minimum(places, self.num_published - 1)]
        rows[later] = places[later] + (self.base.num_items - self.num_published)
        return rows

    def item_logits_at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `SidIndex.item_logits_at`; nobody has been seen to click a later item."""
        if not len(self.later.item_sid):
            return self.base.item_logits_at(places)
        return _picked(places, self.base.item_logits, self._later_logits).astype(np.float32)

    @property
    def _later_logits(self) -> NDArray[np.float16]:
        return np.full(len(self.later.item_sid), NO_FEEDBACK)

    def sids_of(self, item_rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """The SID rows int32 [n] of item rows [n], each 0 to N + m - 1."""
        return _picked(np.asarray(item_rows), self.base.item_sid, self.later.item_sid)

    def compacted(self) -> SidIndex:
        """One index of the same answers, to be saved or served; the rows of delisted items stay, their postings go.

        A guided decoder then needs `compacted_trie`, and one guided by words a lexicon made for it (jobs/train_generator.py).
        """
        every = np.arange(len(self), dtype=np.int32)
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.sizes(), out=offsets[1:])
        places, _ = self.places(every, _ALL)
        return SidIndex(offsets, self.rows_at(places), self.item_sid, self.prior, _picked(places, self.base.item_logits, self._later_logits))

    def compacted_trie(self, trie: Trie) -> Trie:
        """The base's trie with the vectors of the items of `compacted`.

        Raises:
            SidIndexError: later items without vectors, or a trie of other items than the base's.
        """
        if trie.item_vectors is None or len(trie.item_vectors) != self.num_published or (len(self.later.item_sid) and self.later.vectors is None):
            raise SidIndexError(f"compacted_trie: expected the trie with the base's {self.num_published} item vectors, and later items added with theirs")
        places, rank = self.places(np.arange(len(self), dtype=np.int32), _ALL)
        held = trie.item_vectors.cpu().numpy()
        vectors = _picked(places, held, held[:0] if self.later.vectors is None else self.later.vectors)
        return trie.with_items(vectors, np.searchsorted(rank, np.arange(len(self) + 1)))

    def later_on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The later items' vectors float16 [m, d] and words, for guidance; kept on the device between calls."""
        if device not in self._later_on:
            assert self.later.vectors is not None, "checked by the retriever"
            words = self.later.words and tuple(torch.from_numpy(part).to(device) for part in self.later.words)
            self._later_on[device] = torch.from_numpy(self.later.vectors).to(device), (words[0], words[1]) if words else None
        return self._later_on[device]

    @cached_property
    def _later_on(self) -> dict[torch.device, tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        return {}

    def _slots(self, sid_rows: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each SID row is among the touched, and whether it is."""
        if not len(self.touched.sids):
            return np.zeros(sid_rows.shape, np.int64), np.zeros(sid_rows.shape, bool)
        slot = np.minimum(np.searchsorted(self.touched.sids, sid_rows), len(self.touched.sids) - 1)
        return slot, self.touched.sids[slot] == sid_rows

    def _changed(self, sids: NDArray[np.int32], new_places: NDArray[np.int64], gone_rows: NDArray[np.int64]) -> SegmentedIndex:
        """With the SIDs [n] of `new_places` (or of `gone_rows`) listed anew."""
        changed = np.unique(sids)
        places, owner = self.places(changed, _ALL)
        if len(new_places):
            places, owner = np.concatenate([places, new_places]), np.concatenate([owner, np.searchsorted(changed, sids)])
        rows = self.rows_at(places)
        # Lists are in served order already and new rows are the highest, so that equal scores stay ordered by row.
        left = np.flatnonzero(~np.isin(rows, gone_rows))
        order = left[served_order(owner[left], _picked(rows[left], self.base.prior, self.later.prior))]
        sizes = np.bincount(owner[order], minlength=len(changed))

        old = self.touched
        kept = ~np.isin(old.sids, changed)
        touched = np.concatenate([old.sids[kept], changed])
        begins = np.concatenate([old.offsets[:-1][kept], len(old.places) + np.cumsum(sizes) - sizes])
        sizes = np.concatenate([np.diff(old.offsets)[kept], sizes])
        by_sid = np.argsort(touched)
        at, _ = slices(begins[by_sid], sizes[by_sid], _ALL)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[by_sid])])
        lists = np.concatenate([old.places, places[order]])[at]
        return SegmentedIndex(self.base, self.later, Touched(touched[by_sid], offsets, lists))


ServedIndex = SidIndex | SegmentedIndex
"""What answers a search."""


def _picked(numbers: NDArray[np.integer], base: NDArray[_Value], later: NDArray[_Value]) -> NDArray[_Value]:
    """Entries of the two arrays, as if joined."""
    is_later = numbers >= len(base)
    picked: NDArray[Any] = np.empty((len(numbers), *base.shape[1:]), dtype=base.dtype)
    picked[~is_later] = base[numbers[~is_later]]
    picked[is_later] = later[numbers[is_later] - len(base)]
    return picked


def _rows_joined(before: NDArray[np.float16] | None, rows: NDArray[np.float16]) -> NDArray[np.float16]:
    return rows if before is None else np.concatenate([before, rows])


def _words_joined(before: ItemWords | None, words: ItemWords) -> ItemWords:
    if before is None:
        return words
    return ItemWords(np.concatenate([before.offsets, before.offsets[-1] + words.offsets[1:]]), np.concatenate([before.tokens, words.tokens]))
