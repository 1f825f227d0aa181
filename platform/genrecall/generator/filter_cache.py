"""Resolved filters, kept for the requests that come with them again: most of a site's requests share few category pages and brand pages.

What a shopper excludes is rarely asked for twice, so it is taken off the kept rest of the filter, in the time of the excluded items' clusters.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch

from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.sid.filters import AllowedItems, Filter, FilterError, FilterPostings
from genrecall.sid.trie import Trie


class ResolvedFilter(NamedTuple):
    """What a filter admits: the search's masks, of one row, on the trie's device, and the items."""

    masks: PrefixMasks
    items: AllowedItems

    @property
    def nbytes(self) -> int:
        """Bytes held at most; on the CPU masks and items may share their SIDs."""
        return sum(mask.numel() for mask in self.masks) + self.items.nbytes


class FilterCache:
    """The filters asked for last, of one trie and its posting lists; for any number of threads.

    Two threads that miss the same filter at once both resolve it.

    Args:
        postings: of the trie's index.
        trie: on the device of the search.
        capacity: filters kept at most.
        max_bytes: bytes kept at most; a filter that is larger by itself is not kept.

    Attributes:
        hits, misses: calls of `get` answered from the cache, and others.

    Raises:
        FilterError: lists of another trie, or a bound below 1.
    """

    def __init__(self, postings: FilterPostings, trie: Trie, *, capacity: int = 256, max_bytes: int = 256 * 2**20) -> None:
        if len(postings.index) != len(trie):
            raise FilterError(f"the filters' index has {len(postings.index)} SIDs, the trie {len(trie)}; use those of one sid_index")
        if min(capacity, max_bytes) < 1:
            raise FilterError(f"expected a capacity and a number of bytes of at least 1, got {capacity} and {max_bytes}")
        self.postings, self.trie = postings, trie
        self.capacity, self.max_bytes = capacity, max_bytes
        self.hits = self.misses = 0
        self._bytes = 0
        self._kept: OrderedDict[Filter, ResolvedFilter] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._bytes

    def get(self, wanted: Filter) -> ResolvedFilter:
        """What `wanted` admits."""
        found = self._look_up(wanted)
        with self._lock:
            self.hits += found is not None
            self.misses += found is None
        return self._resolve(wanted) if found is None else found

    def _resolve(self, wanted: Filter) -> ResolvedFilter:
        if wanted.excluded:
            rest = dataclasses.replace(wanted, excluded=())
            kept = self._look_up(rest) or self._resolve(rest)
            items = self.postings.without(kept.items, np.asarray(wanted.excluded, dtype=np.int64))
            emptied = np.flatnonzero(items.leaves != kept.items.leaves)
            with torch.inference_mode(False):  # kept, whoever asks first
                masks = kept.masks.without(self.trie, torch.from_numpy(emptied).to(self.trie.device)) if len(emptied) else kept.masks
            resolved = ResolvedFilter(masks, items)
        else:
            items = self.postings.resolve(wanted)
            resolved = ResolvedFilter(self._masks(items), items)
        self._keep(wanted, resolved)
        return resolved

    def _masks(self, items: AllowedItems) -> PrefixMasks:
        with torch.inference_mode(False):  # kept, whoever asks first
            return PrefixMasks.from_leaves(self.trie, torch.from_numpy(items.leaves)[None].to(self.trie.device))

    def _look_up(self, wanted: Filter) -> ResolvedFilter | None:
        with self._lock:
            found = self._kept.get(wanted)
            if found is not None:
                self._kept.move_to_end(wanted)
            return found

    def _keep(self, wanted: Filter, resolved: ResolvedFilter) -> None:
        if resolved.nbytes > self.max_bytes:
            return
        with self._lock:
            if wanted not in self._kept:
                self._kept[wanted] = resolved
                self._bytes += resolved.nbytes
            while len(self._kept) > self.capacity or self._bytes > self.max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes
