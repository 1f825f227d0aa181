"""The query constraint: bidirectional InfoNCE between item latents and projected query embeddings, and the pairs it draws.

Source: CQ-SID (arXiv:2605.14434): cosine similarity, temperature 0.1, in-batch negatives, items without a query masked out.

Shapes: B rows of a batch (an item each, with one of its queries or none), P click/purchase pairs, Q queries, N items, Z latents.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrecall.encoders.ngram_hash import ragged_positions


def bidirectional_info_nce(items: Tensor, queries: Tensor, has_query: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE from query to item and from item to query, averaged.

    Args:
        items: [B, Z], latents before quantisation.
        queries: [B, Z], the projected query of each row; rows without one may hold anything finite.
        has_query: bool [B]; rows without a query take no part, not even as negatives.
        positive: bool [B, B]; [i, j] says that query i is known to go with item j. Such pairs are no negatives.
        temperature: divides the cosine.

    Returns:
        scalar: the mean over rows with a query; 0 (with zero gradient) when there is none.
    """
    logits = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(items, dim=1).T / temperature
    own = torch.eye(len(items), dtype=torch.bool, device=items.device)
    barred = (positive | ~has_query[:, None] | ~has_query[None, :]) & ~own
    logits = logits.masked_fill(barred, float("-inf"))
    # A row without a query keeps only its own entry, so both its terms are exactly 0.
    to_item = logits.logsumexp(dim=1) - logits.diagonal()
    to_query = logits.logsumexp(dim=0) - logits.diagonal()
    return 0.5 * (to_item + to_query).sum() / has_query.sum().clamp(min=1)


class QueryPairs:
    """Click/purchase pairs, ready to draw one query per item and to tell which other pairs of a batch are positives.

    Args:
        queries: integer [P], query number of each pair.
        items: integer [P], item row of each pair.
        weights: float [P], how often a pair is drawn relative to the item's others.
        num_queries, num_items: Q and N.
    """

    def __init__(self, queries: NDArray[np.integer], items: NDArray[np.integer], weights: NDArray[np.floating], *, num_queries: int, num_items: int) -> None:
        keys, place = np.unique(items.astype(np.int64) * max(num_queries, 1) + queries, return_inverse=True)
        by_item_queries = (keys % max(num_queries, 1)).astype(np.int32)
        by_item_items = (keys // max(num_queries, 1)).astype(np.int32)
        summed = np.bincount(place, weights=weights, minlength=len(keys))
        self._item_offsets = np.concatenate([[0], np.cumsum(np.bincount(by_item_items, minlength=num_items))])
        self._item_queries = by_item_queries
        self._cumulative = np.concatenate([[0.0], np.cumsum(summed)])
        by_query = np.argsort(by_item_queries, kind="stable")
        self._query_offsets = np.concatenate([[0], np.cumsum(np.bincount(by_item_queries, minlength=num_queries))])
        self._query_items = by_item_items[by_query]
        self._num_items = num_items

    def __len__(self) -> int:
        """The number of distinct (query, item) pairs."""
        return len(self._item_queries)

    def draw(self, items: NDArray[np.integer], rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """One query for each item row of a batch, and the batch's positives.

        Args:
            items: integer [B], distinct item rows.
            rng: draws in proportion to the pairs' weights.

        Returns:
            query numbers int32 [B] (-1 for an item with no pair) and positive bool [B, B]: [i, j] when query i goes with item j.
        """
        begins, ends = self._item_offsets[items], self._item_offsets[items + 1]
        known = ends > begins
        low, high = self._cumulative[begins], self._cumulative[ends]
        at = np.searchsorted(self._cumulative, low + rng.random(len(items)) * (high - low), side="right") - 1
        queries = np.full(len(items), -1, dtype=np.int32)
        queries[known] = self._item_queries[np.clip(at, begins, ends - 1)[known]]

        positive = np.zeros((len(items), len(items)), dtype=bool)
        rows = np.flatnonzero(known)
        first = self._query_offsets[queries[rows]]
        counts = self._query_offsets[queries[rows] + 1] - first
        flat = ragged_positions(first, counts)
        column_of = np.full(self._num_items, -1, dtype=np.int32) if self._num_items <= 1_000_000 else None
        if column_of is not None:
            column_of[items] = np.arange(len(items))
            columns = column_of[self._query_items[flat]]
        else:  # a table over all items would cost more than looking the batch up
            order = np.argsort(items)
            at = np.minimum(np.searchsorted(items[order], self._query_items[flat]), len(items) - 1)
            columns = np.where(items[order][at] == self._query_items[flat], order[at], -1).astype(np.int32)
        inside = columns >= 0
        positive[np.repeat(rows, counts)[inside], columns[inside]] = True
        return queries, positive
