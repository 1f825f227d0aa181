"""The recall channels of an evaluation: a site's own, ours, and their hybrids, each as a ranking of the same requests.

Shapes: R requests, K channel depth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from genrecall.data.interactions import popularity
from genrecall.encoders.text_encoder import load_encoder
from genrecall.evaluation.baselines import Bm25, DenseRetriever, document_texts, popular_items
from genrecall.evaluation.evaluated_data import EvaluatedData
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.fusion import fuse_by_budget, tune_weights
from genrecall.evaluation.request_metrics import Tiers
from genrecall.generator.spelling import SpellingCorrector
from genrecall.storage import Artifact

HYBRIDS = {
    "rrf_bm25_dense": ("bm25", "dense"),
    "rrf_all": ("bm25", "dense", "generative"),
    "rrf_bm25_corrected_dense": ("bm25_corrected", "dense"),
    "rrf_all_corrected": ("bm25_corrected", "dense", "generative"),
}
"""Of which channels. Where our channel corrects the spelling of queries, BM25 is measured with corrected queries too, alone and in hybrids:
what else our channel adds."""


@dataclass(frozen=True)
class Channels:
    """What the channels return.

    Attributes:
        rankings: channel or hybrid -> items int32 [R, K], -1 padded.
        weights: hybrid -> item budget -> its parts' weights, tuned on the validation requests.
        matches: int64 [R], items that hold a word of the query, as BM25 reads it.
        seconds: channel -> those that a thousand queries take.
    """

    rankings: dict[str, np.ndarray]
    weights: dict[str, dict[int, dict[str, float]]]
    matches: np.ndarray
    seconds: dict[str, float]


def build_channels(
    config: EvaluationConfig, data: EvaluatedData, encoder: Artifact, served: np.ndarray, on_validation: np.ndarray, spelling: SpellingCorrector | None
) -> Channels:
    """Search with every channel and fuse.

    Args:
        encoder: of the dense channel.
        served, on_validation: our channel's items int32 [R, K] and [V, K], -1 padded, for the test and the validation requests.
        spelling: what our channel corrects queries by; None where it reads them as typed.
    """
    test: dict[str, np.ndarray] = {}
    tuning: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    per_thousand = 1000 / len(data.requests)
    bm25 = Bm25(document_texts(data.catalog), k1=config.bm25_k1, b=config.bm25_b)
    begin = time.perf_counter()
    lexical, matches = bm25.search(data.requests.queries, config.depth)
    if "bm25" in config.channels:
        seconds["bm25"] = per_thousand * (time.perf_counter() - begin)
        test["bm25"], tuning["bm25"] = lexical, bm25.search(data.validation.queries, config.depth)[0]
        if spelling is not None:
            test["bm25_corrected"], tuning["bm25_corrected"] = (
                bm25.search([spelling.corrected(query) for query in requests.queries], config.depth)[0] for requests in (data.requests, data.validation)
            )
    if "dense" in config.channels:
        text_encoder = load_encoder(encoder.path)
        dense = DenseRetriever(np.load(encoder.file("item_embeddings.npy"), allow_pickle=False), kind=config.dense_index)
        begin = time.perf_counter()
        test["dense"] = dense.search(text_encoder.encode_queries(data.requests.queries), config.depth)
        seconds["dense"] = per_thousand * (time.perf_counter() - begin)
        tuning["dense"] = dense.search(text_encoder.encode_queries(data.validation.queries), config.depth)
    if "popularity" in config.channels:
        test["popularity"] = popular_items(popularity(data.train, len(data.catalog)), len(data.requests), config.depth)
    test["generative"], tuning["generative"] = served, on_validation
    targets = Tiers.of(data.validation).clicked
    weights = {}
    for hybrid, parts in HYBRIDS.items():
        if all(part in test for part in parts):
            weights[hybrid] = tune_weights({part: tuning[part] for part in parts}, targets, depth=config.depth, cuts=config.cuts)
            test[hybrid] = fuse_by_budget({part: test[part] for part in parts}, weights[hybrid], config.depth)
    return Channels(test, weights, matches, seconds)
