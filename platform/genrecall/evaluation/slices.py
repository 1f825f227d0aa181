"""Which test requests are evaluated, and the slices in which results are also shown.

The headline rows use the *primary* requests: a uniform sample of the test split or, where queries are derived from the items bought, the
test queries that are unseen in training and free of the words of their targets' category paths (anything else hands over part of the
answer). Mean over requests is traffic-weighted, since a frequent query is many requests; `distinct_queries` counts each query once.

Shapes: R evaluated requests.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from genrecall.data.adapters.amazon import query_kind_of, shares_category_word
from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.data.splits import normal_query

FEW_RESULTS = 10


@dataclass(frozen=True)
class Slice:
    """Some of the evaluated requests.

    Attributes:
        name: as in the records.
        about: one sentence for the report.
        requests: bool [R].
        weights: float64 [R] or None for equal weights.
    """

    name: str
    about: str
    requests: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """Evaluated test requests.

    Attributes:
        indices: int64 [R] into the test split, ascending.
        primary: bool [R], requests behind the headline rows.
        uniform: bool [R], requests that are a uniform sample of the test split; slices are made of these.
    """

    indices: np.ndarray
    primary: np.ndarray
    uniform: np.ndarray


def sample_requests(test: Requests, train: Requests, catalog: Catalog, *, query_kind: str, max_requests: int | None, seed: int) -> Sample:
    """Choose at most `max_requests` headline requests (and, for derived queries, half as many for the slices), seeded.

    Raises:
        ValueError: the test split has no request with a clicked or exposed item.
    """
    usable = np.array([len(test.clicked[row]) + len(test.exposed[row]) > 0 for row in range(len(test))], dtype=bool)
    if not usable.any():
        raise ValueError("evaluation: the test split has no request with a clicked or exposed item; raise test_fraction in prepare_data")
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(np.flatnonzero(usable))
    if query_kind != "derived":
        chosen = np.sort(shuffled[:max_requests])
        return Sample(chosen, np.ones(len(chosen), dtype=bool), np.ones(len(chosen), dtype=bool))
    headline = shuffled[_is_headline(test, train, catalog)[shuffled]][:max_requests]
    if not len(headline):
        headline = shuffled[:max_requests]
    uniform = shuffled[: None if max_requests is None else max(1, max_requests // 2)]
    chosen = np.union1d(headline, uniform)
    return Sample(chosen, np.isin(chosen, headline), np.isin(chosen, uniform))


def request_slices(requests: Requests, train: Requests, sample: Sample, *, query_kind: str, bm25_matches: np.ndarray) -> list[Slice]:
    """Slices of the evaluated requests; empty ones and those that hold every request are left out.

    Args:
        requests: the R evaluated requests.
        bm25_matches: int64 [R], items that share a word with the query.
    """
    queries = [normal_query(query) for query in requests.queries]
    traffic = Counter(normal_query(query) for query in train.queries)
    parts = frequency_parts(traffic)
    part = np.array([parts.get(query, "unseen") for query in queries])
    history = np.array([len(rows) > 0 for rows in requests.history])
    found = [
        Slice("head", "queries that make up the most frequent third of training traffic", part == "head"),
        Slice("torso", "queries of the middle third of training traffic", part == "torso"),
        Slice("tail", "queries of the last third of training traffic", part == "tail"),
        Slice("unseen", "queries that training never saw", part == "unseen"),
        Slice("with_history", "shoppers with earlier clicks", history),
        Slice("without_history", "shoppers without earlier clicks", ~history),
        Slice("bm25_none", "queries for which BM25 finds nothing", bm25_matches == 0),
        Slice("bm25_few", f"queries for which BM25 finds fewer than {FEW_RESULTS} items", (bm25_matches > 0) & (bm25_matches < FEW_RESULTS)),
    ]
    counts = Counter(query for query, inside in zip(queries, sample.uniform, strict=True) if inside)
    if max(counts.values(), default=1) > 1:
        weights = np.array([1.0 / counts[query] if query in counts else 0.0 for query in queries])
        found.append(Slice("distinct_queries", "each distinct query counted once, whatever its traffic", np.ones(len(queries), dtype=bool), weights))
    if query_kind == "derived":
        kinds = np.array([query_kind_of(request_id) for request_id in requests.request_ids])
        found += [Slice(f"kind_{kind}", f"queries derived as {kind}", kinds == kind) for kind in sorted(set(kinds))]
        found.append(Slice("all_queries", "all derived queries, seen ones and those with category words too", np.ones(len(queries), dtype=bool)))
    cut = [Slice(one.name, one.about, one.requests & sample.uniform, one.weights) for one in found]
    return [one for one in cut if one.requests.any() and (one.weights is not None or not np.array_equal(one.requests, sample.primary))]


def frequency_parts(traffic: Counter[str]) -> dict[str, str]:
    """Each training query's part: head, torso or tail, a third of the traffic each; a query that straddles a border counts as the more frequent part."""
    total = sum(traffic.values())
    parts, before = {}, 0
    for query, count in sorted(traffic.items(), key=lambda pair: (-pair[1], pair[0])):
        parts[query] = "head" if 3 * before < total else "torso" if 3 * before < 2 * total else "tail"
        before += count
    return parts


def cold_items(train_popularity: np.ndarray) -> np.ndarray:
    """bool [N]: items without a training click or purchase."""
    return np.asarray(train_popularity == 0, dtype=bool)


def _is_headline(test: Requests, train: Requests, catalog: Catalog) -> np.ndarray:
    seen = {normal_query(query) for query in train.queries}
    return np.array(
        [
            normal_query(query) not in seen and not any(shares_category_word(query, catalog.category_paths[item]) for item in clicked)
            for query, clicked in zip(test.queries, test.clicked, strict=True)
        ],
        dtype=bool,
    )
