"""What the ranking model sees of a (request, item) pair: text match, popularity, price and the shopper's history.

Source: the usual features of e-commerce learning to rank (e.g. Karmaker Santu et al., SIGIR 2017, section 4). Whatever a site does not log
(prices, shoppers, brands) is nan, which LightGBM treats as "unknown". Popularity and click rate come from other requests than the one
they describe (`ranker.py` fits them out of fold), else the label would leak into the features.

Shapes: N items, R requests, P pairs, F = len(FEATURES), d embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests, flattened
from genrecall.encoders.ngram_hash import ragged_positions, words_of

FEATURES = (
    "cosine",  # of the encoder's query and item vectors
    "title_coverage",  # share of the query's words, weighted by rarity, that the title, brand or category names
    "text_coverage",  # the same with the item's description
    "title_share",  # share of the title's words that the query names
    "trigram_jaccard",  # of query and title, by sets of character trigrams
    "log_popularity",  # log(1 + training clicks)
    "click_rate",  # smoothed clicks per exposure, exposures counted by position propensity
    "prior_score",
    "log_price",
    "price_ratio",  # log price minus the mean log price of the shopper's history
    "brand_affinity",  # share of the shopper's history with the item's brand
    "category_affinity",  # mean share of the item's category path that items of the history share
    "in_history",
)
CLICK_RATE_PRIOR_EXPOSURES = 20.0
_CATEGORY_LEVELS = 4
_CHUNK_PAIRS = 1 << 17


@dataclass(frozen=True)
class ItemStatistics:
    """Training-side counts per item."""

    clicks: NDArray[np.float64]  # [N], purchases included
    exposures: NDArray[np.float64]  # [N], each counted by the propensity of its position

    def without(self, other: ItemStatistics) -> ItemStatistics:
        """The counts less those of `other`."""
        return ItemStatistics(self.clicks - other.clicks, self.exposures - other.exposures)


def item_statistics(requests: Requests, num_items: int, *, position_bias: float = 0.0) -> ItemStatistics:
    """Count clicks and exposures.

    Args:
        position_bias: eta; a shopper looks at 0-based position p with propensity (p + 1) ** -eta.
    """
    clicks, exposures = np.zeros(num_items), np.zeros(num_items)
    _, clicked = flattened(requests.clicked)
    owners, exposed = flattened(requests.exposed)
    np.add.at(clicks, clicked, 1.0)
    np.add.at(exposures, exposed, propensity(positions_in(owners), position_bias))
    return ItemStatistics(clicks, exposures)


def propensity(positions: NDArray[np.integer], position_bias: float) -> NDArray[np.float64]:
    """(p + 1) ** -eta, the chance that 0-based position p is looked at (the power model of Joachims et al., WSDM 2017)."""
    return np.asarray((positions + 1.0) ** -position_bias, dtype=np.float64)


class PairFeatures:
    """Builds feature rows; the items' side is prepared once.

    Args:
        catalog: N items.
        item_embeddings: float32 [N, d], L2-normalised.
        encode_queries: texts -> float32 [n, d], L2-normalised.
        statistics: training-side counts.
    """

    def __init__(
        self,
        catalog: Catalog,
        item_embeddings: NDArray[np.float32],
        encode_queries: Callable[[Sequence[str]], NDArray[np.float32]],
        statistics: ItemStatistics,
    ) -> None:
        self.num_items = len(catalog)
        self.statistics = statistics
        self._embeddings = item_embeddings
        self._encode_queries = encode_queries
        leaf = [" ".join(path[-1:]) for path in catalog.category_paths]
        titles = [f"{title} {brand} {last}" for title, brand, last in zip(catalog.titles, catalog.brands, leaf, strict=True)]
        title_words = [set(words_of(text)) for text in titles]
        text_words = [words | set(words_of(text)) for words, text in zip(title_words, catalog.texts, strict=True)]
        self._words: dict[str, int] = {}
        self._trigrams: dict[str, int] = {}
        self._text = _binary_rows(text_words, self._words, grow=True)
        self._title = _binary_rows(title_words, self._words, grow=True)
        self._title_sizes = np.maximum(np.diff(self._title.indptr), 1)
        self._title_trigrams = _binary_rows([_trigram_set(words) for words in title_words], self._trigrams, grow=True)
        document_frequency = np.bincount(self._text.indices, minlength=len(self._words))
        self._rarity = np.log1p(self.num_items / (1.0 + document_frequency))
        self._unseen_rarity = float(np.log1p(self.num_items))
        with np.errstate(divide="ignore", invalid="ignore"):
            log_prices = np.log(catalog.prices)
        self._log_prices = np.where(np.isfinite(log_prices), log_prices, np.nan)
        self._prior_scores = np.asarray(catalog.prior_scores, dtype=np.float64)
        self._brands = _brand_numbers(catalog.brands)
        self._categories = _prefix_numbers(catalog.category_paths)

    def table(
        self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer], *, statistics: ItemStatistics | None = None
    ) -> NDArray[np.float32]:
        """Feature rows float32 [P, F] of pairs.

        Args:
            requests: R requests.
            request_rows: int [P], rows of `requests`.
            item_rows: int [P].
            statistics: counts to use in place of the training side's, e.g. out of fold.
        """
        context = _Context(self, requests)
        table = np.empty((len(request_rows), len(FEATURES)), dtype=np.float32)
        for start in range(0, len(request_rows), _CHUNK_PAIRS):
            chunk = slice(start, start + _CHUNK_PAIRS)
            columns = self._columns(context, np.asarray(request_rows[chunk]), np.asarray(item_rows[chunk]), statistics or self.statistics)
            table[chunk] = np.stack([columns[name] for name in FEATURES], axis=1)
        return table

    def _columns(
        self, context: _Context, requests: NDArray[np.integer], items: NDArray[np.integer], statistics: ItemStatistics
    ) -> dict[str, NDArray[np.floating]]:
        queries = context.query_of[requests]
        rarity = np.maximum(context.rarity[queries], 1e-9)
        weighted = context.words[queries].multiply(self._rarity[None, :]).tocsr()
        title = self._title[items]
        shared_trigrams = _row_sums(context.trigrams[queries].multiply(self._title_trigrams[items]))
        all_trigrams = context.trigram_counts[queries] + np.diff(self._title_trigrams.indptr)[items] - shared_trigrams
        overall = statistics.clicks.sum() / max(statistics.exposures.sum(), 1.0)
        log_price = self._log_prices[items]
        return {
            "cosine": np.einsum("pd,pd->p", context.embeddings[queries], self._embeddings[items]),
            "title_coverage": _row_sums(weighted.multiply(title)) / rarity,
            "text_coverage": _row_sums(weighted.multiply(self._text[items])) / rarity,
            "title_share": _row_sums(context.words[queries].multiply(title)) / self._title_sizes[items],
            "trigram_jaccard": shared_trigrams / np.maximum(all_trigrams, 1),
            "log_popularity": np.log1p(np.maximum(statistics.clicks[items], 0.0)),
            "click_rate": (statistics.clicks[items] + CLICK_RATE_PRIOR_EXPOSURES * overall) / (statistics.exposures[items] + CLICK_RATE_PRIOR_EXPOSURES),
            "prior_score": self._prior_scores[items],
            "log_price": log_price,
            "price_ratio": log_price - context.mean_log_price[requests],
            **self._affinities(context, requests, items),
        }

    def _affinities(self, context: _Context, requests: NDArray[np.integer], items: NDArray[np.integer]) -> dict[str, NDArray[np.floating]]:
        """Every pair beside every item of its shopper's history, averaged; nan without a history."""
        lengths = context.history_lengths[requests]
        pairs = np.repeat(np.arange(len(requests)), lengths)
        past = context.history_items[ragged_positions(context.history_starts[requests], lengths)]
        now = items[pairs]
        same_prefix = (self._categories[now] == self._categories[past]) & (self._categories[now] >= 0)
        depth = np.maximum((self._categories >= 0).sum(axis=1), 1)
        with np.errstate(invalid="ignore", divide="ignore"):

            def mean(values: NDArray[np.generic], known: NDArray[np.bool_]) -> NDArray[np.float64]:
                return np.where(known & (lengths > 0), np.bincount(pairs, weights=values, minlength=len(requests)) / lengths, np.nan)

            return {
                "brand_affinity": mean(self._brands[now] == self._brands[past], self._brands[items] >= 0),
                "category_affinity": mean(same_prefix.sum(axis=1) / depth[now], self._categories[items, 0] >= 0),
                "in_history": np.where(lengths > 0, np.bincount(pairs, weights=now == past, minlength=len(requests)) > 0, np.nan),
            }


class _Context:
    """The requests' side of the features, one row per distinct query and one per request."""

    def __init__(self, features: PairFeatures, requests: Requests) -> None:
        distinct: dict[str, int] = {}
        self.query_of = np.array([distinct.setdefault(query, len(distinct)) for query in requests.queries], dtype=np.int64)
        queries = list(distinct)
        self.embeddings = features._encode_queries(queries) if queries else np.zeros((0, features._embeddings.shape[1]), dtype=np.float32)
        words = [set(words_of(query)) for query in queries]
        self.words = _binary_rows(words, features._words, grow=False)
        trigrams = [_trigram_set(one) for one in words]
        self.trigrams = _binary_rows(trigrams, features._trigrams, grow=False)
        self.trigram_counts = np.array([len(one) for one in trigrams], dtype=np.int64)
        known = np.diff(self.words.indptr)
        unknown = np.array([len(one) for one in words], dtype=np.int64) - known
        self.rarity = _row_sums(self.words.multiply(features._rarity[None, :])) + unknown * features._unseen_rarity
        owners, self.history_items = flattened(requests.history)
        self.history_lengths = np.bincount(owners, minlength=len(requests)).astype(np.int64)
        self.history_starts = np.cumsum(self.history_lengths) - self.history_lengths
        prices = features._log_prices[self.history_items]
        priced = np.isfinite(prices)
        sums = np.bincount(owners[priced], weights=prices[priced], minlength=len(requests))
        counts = np.bincount(owners[priced], minlength=len(requests))
        self.mean_log_price = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def positions_in(owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """0-based place of each value in its list, given the list each came from (ascending)."""
    starts = np.searchsorted(owners, owners, side="left")
    return np.arange(len(owners), dtype=np.int64) - starts


def _binary_rows(rows: Sequence[set[str]], columns: dict[str, int], *, grow: bool) -> sparse.csr_matrix:
    """Sets of strings as a sparse 0/1 matrix; with `grow`, new strings open new columns, else they are left out."""
    indices: list[int] = []
    indptr = [0]
    for row in rows:
        if grow:
            indices += sorted(columns.setdefault(one, len(columns)) for one in sorted(row))
        else:
            indices += sorted(columns[one] for one in row if one in columns)
        indptr.append(len(indices))
    return sparse.csr_matrix(
        (np.ones(len(indices), dtype=np.float32), np.array(indices, dtype=np.int32), np.array(indptr, dtype=np.int64)), shape=(len(rows), len(columns))
    )


def _trigram_set(words: set[str]) -> set[str]:
    return {f" {word} "[i : i + 3] for word in words for i in range(len(word))}


def _row_sums(matrix: sparse.spmatrix) -> NDArray[np.float64]:
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


def _brand_numbers(brands: Sequence[str]) -> NDArray[np.int64]:
    """A number per brand, -1 for none."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(brand, len(numbers)) if brand else -1 for brand in brands], dtype=np.int64)


def _prefix_numbers(paths: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """A number per category-path prefix, int64 [N, 4] for its first four levels; -1 beyond the end of a path."""
    numbers: dict[tuple[str, ...], int] = {}
    table = np.full((len(paths), _CATEGORY_LEVELS), -1, dtype=np.int64)
    for row, path in enumerate(paths):
        for level in range(min(len(path), _CATEGORY_LEVELS)):
            table[row, level] = numbers.setdefault(tuple(path[: level + 1]), len(numbers))
    return table
