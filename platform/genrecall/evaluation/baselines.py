"""The recall channels a site already has: tuned BM25, a dense two-tower on FAISS, popularity.

Source: BM25 with eager sparse scoring (bm25s, arXiv:2407.03618); Snowball stemming. The analysis is tuned, because a channel is judged by
what it adds to a good baseline: letters and digits are split ("12ft" matches "12 ft"), words are stemmed, scripts without spaces are cut
into single characters; k1 1.2 and b 0.5 were the best of a small grid on real queries.

Shapes: R queries, N catalogue items, K depth, d embedding size. Rankings are int32 [R, K] item rows, best first, -1 padded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import bm25s
import faiss
import numpy as np
import scipy.sparse
import Stemmer

from genrecall.data.catalog import Catalog

# Runs of letters or digits; Chinese, Japanese and Thai letters one by one, since nothing marks where their words end.
_WORDS = re.compile(r"[぀-ヿ㐀-䶿一-鿿ก-๛]|[^\W\d_぀-ヿ㐀-䶿一-鿿ก-๛]+|\d+")


def analyse(texts: Sequence[str]) -> list[list[str]]:
    """Lower-cased, letter/digit-split and stemmed words of each text."""
    stemmer = Stemmer.Stemmer("english")
    return [stemmer.stemWords(_WORDS.findall(text.lower())) for text in texts]


def document_texts(catalog: Catalog) -> list[str]:
    """What the lexical index holds of each item: title, brand, category names and text."""
    parts = zip(catalog.titles, catalog.brands, catalog.category_paths, catalog.texts, strict=True)
    return [" ".join([title, brand, " ".join(path), text]) for title, brand, path, text in parts]


class Bm25:
    """BM25 over the catalogue.

    Args:
        texts: one document per item, in item-row order.
        k1: saturation of term frequency.
        b: strength of length normalisation.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.5) -> None:
        self.num_items = len(texts)
        words = analyse(texts)
        self._vocabulary: dict[str, int] = {}
        self._scores = scipy.sparse.csr_array((0, self.num_items), dtype=np.float32)
        if any(words):
            index = bm25s.BM25(k1=k1, b=b, method="lucene")
            index.index(words, show_progress=False)
            self._vocabulary = index.vocab_dict
            scores: dict[str, Any] = index.scores
            # bm25s keeps a column per word; read as rows, it is the [words, items] matrix that a query row multiplies.
            self._scores = scipy.sparse.csr_array((scores["data"], scores["indices"], scores["indptr"]), shape=(len(scores["indptr"]) - 1, self.num_items))

    def search(self, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The `depth` best items of each query.

        Returns:
            rankings int32 [R, depth], only items that share a word with the query; and int64 [R], how many items do.
        """
        ranked = np.full((len(queries), depth), -1, dtype=np.int32)
        matches = np.zeros(len(queries), dtype=np.int64)
        step = 256
        for begin in range(0, len(queries), step):
            scores = (self._query_matrix(queries[begin : begin + step]) @ self._scores).tocsr()
            scores.sort_indices()
            for row in range(scores.shape[0]):
                span = slice(scores.indptr[row], scores.indptr[row + 1])
                items, values = scores.indices[span], scores.data[span]
                matches[begin + row] = len(items)
                best = _top(values, depth)
                ranked[begin + row, : len(best)] = items[best]
        return ranked, matches

    def _query_matrix(self, queries: Sequence[str]) -> scipy.sparse.csr_array:
        known = [[self._vocabulary[word] for word in words if word in self._vocabulary] for words in analyse(queries)]
        rows = np.repeat(np.arange(len(known)), [len(ids) for ids in known])
        columns = np.array([number for ids in known for number in ids], dtype=np.int64)
        return scipy.sparse.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(len(queries), self._scores.shape[0]))


class DenseRetriever:
    """Nearest items by inner product of the two-tower's embeddings, on FAISS.

    Args:
        item_embeddings: float32 [N, d], L2-normalised.
        kind: `"flat"` is exact; `"hnsw"` is approximate and fast on catalogues beyond a few hundred thousand items.
    """

    def __init__(self, item_embeddings: np.ndarray, *, kind: str = "flat") -> None:
        if item_embeddings.ndim != 2 or not len(item_embeddings):
            raise ValueError(f"dense retriever: expected item embeddings [N, d] with N > 0, got shape {item_embeddings.shape}; rerun jobs/train_encoder.py")
        dim = item_embeddings.shape[1]
        if kind == "flat":
            self._index: Any = faiss.IndexFlatIP(dim)
        elif kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = 200
            self._index.hnsw.efSearch = 256
        else:
            raise ValueError(f"dense retriever: kind is {kind!r}; expected 'flat' or 'hnsw'")
        self._index.add(np.ascontiguousarray(item_embeddings, dtype=np.float32))

    def search(self, query_embeddings: np.ndarray, depth: int) -> np.ndarray:
        """The `depth` nearest items of each query embedding [R, d]: int32 [R, depth], -1 padded on small catalogues."""
        _, rows = self._index.search(np.ascontiguousarray(query_embeddings, dtype=np.float32), min(depth, self._index.ntotal))
        return np.pad(rows.astype(np.int32), ((0, 0), (0, depth - rows.shape[1])), constant_values=-1)


def popular_items(popularity: np.ndarray, num_requests: int, depth: int) -> np.ndarray:
    """The same `depth` most clicked and bought training items for every request: int32 [R, depth]. Items without an event are left out."""
    best = _top(popularity, depth)
    best = best[popularity[best] > 0]
    ranked = np.full(depth, -1, dtype=np.int32)
    ranked[: len(best)] = best
    return np.tile(ranked, (num_requests, 1))


def _top(values: np.ndarray, depth: int) -> np.ndarray:
    """Indices of the `depth` highest values, highest first, ties by index."""
    if len(values) > depth:
        limit = np.partition(values, len(values) - depth)[len(values) - depth]
        above = np.flatnonzero(values > limit)
        candidates = np.sort(np.concatenate([above, np.flatnonzero(values == limit)[: depth - len(above)]]))
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")]
