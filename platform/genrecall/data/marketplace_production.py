"""The search engine that the built-in marketplace already has, whose pages are what the log records.

Candidates come from lexical match (sum of inverse document frequencies of the query's words in the title, exact words only) and from
category browse: a product type recognised in the query (all title names, half of the shoppers' words), or, where nothing is
recognised, the type that a third of the shoppers then open by hand. A ranker that sees relevance through noise, popularity, the
lexical score and a little of the shopper's taste orders them into a page of 10 (15 %: 20). Each place is given with chance
`EXPLORATION` to an item drawn uniformly from the recognised aisle, or from the whole catalogue where nothing was recognised.
Only items that have arrived by the time of the request take part.

Shapes: R requests, n pairs (request, item), N items.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from genrecall.data.marketplace_catalog import MarketplaceCatalog
from genrecall.data.marketplace_shoppers import MarketRequests
from genrecall.data.marketplace_truth import Truth

PAGE = 10
LONG_PAGE = 20
LONG_PAGE_SHARE = 0.15
EXPLORATION = 0.05
_LEXICAL_CANDIDATES = 100
_BROWSE_CANDIDATES = 80
_FEWEST = 5  # a thin page is filled up with what sells best
_BROWSE_BY_HAND = 0.35
_KNOWN_COLLOQUIAL = 0.5
_CACHED_QUERIES = 4096
_TITLE_WORDS = 20
_QUERY_WORDS = 12
_STREAM = 303


@dataclass(frozen=True)
class Pages:
    """Pages shown: item rows int32 [R, 20] (-1 where empty), and which of them were exploration, bool [R, 20]."""

    rows: np.ndarray
    explored: np.ndarray


class Production:
    """The existing channels and their ranker."""

    def __init__(self, catalog: MarketplaceCatalog, truth: Truth, seed: int) -> None:
        self._catalog, self._truth, self._seed = catalog, truth, seed
        rng = np.random.default_rng([seed, _STREAM])
        self._vocabulary: dict[str, int] = {}
        self._title_words = np.full((len(catalog), _TITLE_WORDS), -1, dtype=np.int32)
        for row, title in enumerate(catalog.titles):
            words = {self._vocabulary.setdefault(word, len(self._vocabulary)) for word in _words(title)}
            self._title_words[row, : len(words)] = sorted(words)
        rows, columns = np.nonzero(self._title_words >= 0)
        words_flat = self._title_words[rows, columns]
        order = np.argsort(words_flat, kind="stable")
        self._postings = rows[order].astype(np.int32)
        counts = np.bincount(words_flat, minlength=len(self._vocabulary))
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._idf = np.log(1.0 + len(catalog) / (1.0 + counts)).astype(np.float32)
        self._known_names: dict[str, int] = {}
        for number, kind in enumerate(catalog.types):
            known = [*kind.titles, *(name for name in kind.colloquial if rng.random() < _KNOWN_COLLOQUIAL)]
            for name in known:
                self._known_names.setdefault(name, number)
        self.popularity = (0.8 * catalog.appeal + rng.normal(scale=0.5, size=len(catalog))).astype(np.float32)
        best_first = np.argsort(-self.popularity, kind="stable")
        self._best_of_type = [best_first[catalog.type_of[best_first] == t].astype(np.int32) for t in range(len(catalog.types))]
        # By hand one sees the categories: items without one are only found by words or by chance.
        self._best_of_type = [rows[catalog.categorised[rows]] for rows in self._best_of_type]
        self._best = best_first[:200].astype(np.int32)
        aisle_of = catalog.type_aisle[catalog.type_of]
        self._of_aisle = [np.flatnonzero(aisle_of == aisle).astype(np.int32) for aisle in range(int(catalog.type_aisle.max()) + 1)]
        self._cache: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()

    def candidates(self, requests: MarketRequests) -> tuple[np.ndarray, np.ndarray]:
        """Candidates of each request: pairs (index into `requests` int64 [n], item row int32 [n]), sorted by request, no pair twice."""
        types = self._browsed_types(requests)
        found = []
        for n, query in enumerate(requests.queries):
            lexical, _ = self._lookup(query)
            parts = [lexical] if types[n] < 0 else [lexical, self._best_of_type[types[n]][:_BROWSE_CANDIDATES]]
            rows = np.unique(np.concatenate(parts)) if len(parts) > 1 else lexical
            rows = rows[self._catalog.first_seen[rows] <= requests.times[n]]
            if len(rows) < _FEWEST:
                rows = np.unique(np.concatenate([rows, self._best[self._catalog.first_seen[self._best] <= requests.times[n]][:_FEWEST]]))
            found.append(rows)
        which = np.repeat(np.arange(len(requests)), [len(rows) for rows in found])
        return which, np.concatenate(found)

    def rank_scores(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The ranker's scores of pairs, float32 [n], higher is better; any item row may be asked for, so other channels can be ranked too."""
        noise = _noise(requests.numbers[which], rows, self._seed)
        judged = self._truth.relevance(requests, which, rows) + 0.22 * noise
        taste = self._truth.taste(requests, which, rows)
        lexical = self._lexical_share(requests, which, rows)
        return np.asarray(1.6 * judged + 0.8 * lexical + 0.15 * self.popularity[rows] + 0.12 * taste, dtype=np.float32)

    def pages(self, requests: MarketRequests, rng: np.random.Generator) -> Pages:
        """The pages shown for requests; `rng` decides page lengths and exploration."""
        count = len(requests)
        which, rows = self.candidates(requests)
        scores = self.rank_scores(requests, which, rows)
        order = np.lexsort((-scores, which))
        which, rows = which[order], rows[order]
        place = np.arange(len(which)) - np.searchsorted(which, which)
        top = place < LONG_PAGE
        page = np.full((count, LONG_PAGE), -1, dtype=np.int32)
        page[which[top], place[top]] = rows[top]
        long_page = rng.random(count) < LONG_PAGE_SHARE
        page[~long_page, PAGE:] = -1
        return Pages(page, self._explore(requests, page, rng))

    def _explore(self, requests: MarketRequests, page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Give places of `page` (changed in place) to random items; returns which, bool [R, 20]."""
        chosen = (rng.random(page.shape) < EXPLORATION) & (page >= 0)
        types = self._browsed_types(requests)
        for n, place in np.argwhere(chosen).tolist():
            pool = self._of_aisle[self._catalog.type_aisle[types[n]]] if types[n] >= 0 else None
            for u in rng.random(8).tolist():  # draws again when the item has not arrived yet or stands on the page already
                row = int(pool[int(u * len(pool))]) if pool is not None else int(u * len(self._catalog))
                if self._catalog.first_seen[row] <= requests.times[n] and row not in page[n]:
                    page[n, place] = row
                    break
            else:
                chosen[n, place] = False
        return chosen

    def _browsed_types(self, requests: MarketRequests) -> np.ndarray:
        """Product type browsed in each request, int64 [R], -1 where none: recognised in the query, else opened by hand."""
        recognised = np.array([self._lookup(query)[1] for query in requests.queries], dtype=np.int64)
        by_hand = _uniform(requests.numbers, np.full(len(requests), -7), self._seed) < _BROWSE_BY_HAND
        return np.where(recognised >= 0, recognised, np.where(by_hand, requests.types, -1))

    def _lookup(self, query: str) -> tuple[np.ndarray, int]:
        """Best lexical matches of a query (sorted rows) and the type recognised in it, or -1; recent queries are kept."""
        if query in self._cache:
            self._cache.move_to_end(query)
            return self._cache[query]
        answer = self._match(query), self._recognise(query)
        self._cache[query] = answer
        if len(self._cache) > _CACHED_QUERIES:
            self._cache.popitem(last=False)
        return answer

    def _match(self, query: str) -> np.ndarray:
        words = [self._vocabulary[word] for word in dict.fromkeys(_words(query)) if word in self._vocabulary]
        if not words:
            return np.empty(0, dtype=np.int32)
        postings = [self._postings[self._offsets[word] : self._offsets[word + 1]] for word in words]
        weights = np.repeat(self._idf[words], [len(one) for one in postings])
        scores = np.bincount(np.concatenate(postings), weights=weights, minlength=len(self._catalog))
        rows = np.flatnonzero(scores)
        if len(rows) > _LEXICAL_CANDIDATES:
            ranked = scores[rows] + 1e-3 * self.popularity[rows]
            rows = np.sort(rows[np.argpartition(-ranked, _LEXICAL_CANDIDATES)[:_LEXICAL_CANDIDATES]])
        return rows.astype(np.int32)

    def _recognise(self, query: str) -> int:
        """The type with the longest known name in the query; plural endings are ignored."""
        words = query.split()
        singular = [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words]
        for length in range(min(4, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                for spelled in (words, singular):
                    found = self._known_names.get(" ".join(spelled[start : start + length]))
                    if found is not None:
                        return found
        return -1

    def _lexical_share(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Share of the query's weight that the title holds, float32 [n] in [0, 1]; unknown words weigh as the rarest."""
        words = np.full((len(requests), _QUERY_WORDS), -2, dtype=np.int32)
        weight = np.zeros((len(requests), _QUERY_WORDS), dtype=np.float32)
        rarest = float(self._idf.max())
        for n, query in enumerate(requests.queries):
            for place, word in enumerate(list(dict.fromkeys(_words(query)))[:_QUERY_WORDS]):
                number = self._vocabulary.get(word, -2)
                words[n, place] = number
                weight[n, place] = self._idf[number] if number >= 0 else rarest
        total = np.maximum(weight.sum(axis=1), 1e-6)
        share = np.zeros(len(which), dtype=np.float32)
        titles = self._title_words[rows]
        for place in range(_QUERY_WORDS):
            wanted = words[which, place]
            if (wanted < 0).all():
                continue
            share += weight[which, place] * ((titles == wanted[:, None]) & (wanted >= 0)[:, None]).any(axis=1)
        return np.asarray(share / total[which])


def _words(text: str) -> list[str]:
    return [word for word in text.lower().replace("-", " ").split() if word]


def _uniform(first: np.ndarray, second: np.ndarray, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) hashed from pairs of integers (SplitMix64's mixing steps): the same wherever a pair is asked for."""
    with np.errstate(over="ignore"):
        x = first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + second.astype(np.int64).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(seed * 0x2545F4914F6CDD1D % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.asarray((x >> np.uint64(11)).astype(np.float64) / 2.0**53)


def _noise(first: np.ndarray, second: np.ndarray, seed: int) -> np.ndarray:
    """Nearly normal numbers, mean 0 and deviation 1, hashed from pairs of integers."""
    total = np.sum([_uniform(first, second, 3 * seed + k) for k in (1, 2, 3)], axis=0)
    return np.asarray(2.0 * (total - 1.5))
