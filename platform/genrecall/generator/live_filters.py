"""Resolved filters over a catalogue that has changed since the bundle was built.

What the lists admit is resolved once and shared by every state of the catalogue; the items judged by their own record are joined to it anew in each,
with the masks of the search set and cleared for the SIDs that they touch.
"""

from __future__ import annotations

import numpy as np
import torch

from genrecall.generator.filter_cache import FilterCache, ResolvedFilter
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.sid.filters import Filter
from genrecall.sid.own_records import JudgedItems, OwnRecords
from genrecall.sid.trie import Trie

_MAX_BYTES = 64 * 2**20
"""Of one state of the catalogue, beside what the states share."""


class LiveFilterCache(FilterCache):
    """The filters of one state of the catalogue.

    Args:
        published: those of the bundle.
        records: the items that are judged by their own record.
    """

    def __init__(self, published: FilterCache, records: OwnRecords) -> None:
        super().__init__(published.postings, published.trie, capacity=published.capacity, max_bytes=min(published.max_bytes, _MAX_BYTES))
        self._published = published
        self._records = records

    def _resolve(self, wanted: Filter) -> ResolvedFilter:
        listed = self._published.get(wanted)
        rest = self.postings.without(listed.items, self._records.not_by_lists(wanted))
        passing = self._records.passing(wanted)
        leaves = rest.leaves.copy()
        leaves[self._records.sids[passing]] = True
        items = JudgedItems(rest.count + int(passing.sum()), leaves, rest.places, rest.bitmap, self._records.places, passing)
        with torch.inference_mode(False):  # kept, whoever asks first
            masks = listed.masks
            emptied, filled = (np.flatnonzero(one) for one in (listed.items.leaves & ~leaves, leaves & ~listed.items.leaves))
            if len(emptied):
                masks = masks.without(self.trie, torch.from_numpy(emptied).to(self.trie.device))
            if len(filled):
                masks = _with_sids(masks, self.trie, torch.from_numpy(filled).to(self.trie.device))
        resolved = ResolvedFilter(masks, items)
        self._keep(wanted, resolved)
        return resolved


def _with_sids(masks: PrefixMasks, trie: Trie, sid_rows: torch.Tensor) -> PrefixMasks:
    """Masks of one row that also allow SIDs int64 [n] and their prefixes."""
    nodes = trie.node_of_leaf[sid_rows].long()
    level1, nodes2, leaves = (mask.clone() for mask in masks)
    leaves[:, sid_rows] = True
    nodes2[:, nodes] = True
    level1[:, trie.level1_of_node[nodes].long()] = True
    return PrefixMasks(level1, nodes2, leaves)
