"""Records of an evaluation beyond plain means: paired gains, slices, and the simulated A/B test.

Shapes: R evaluated requests, K channel depth.
"""

from __future__ import annotations

import numpy as np

from genrecall.data.marketplace import Marketplace
from genrecall.evaluation.ab_simulation import RankerFunction, simulate_ab
from genrecall.evaluation.evaluated_data import EvaluatedData
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.records import Record, RecordMaker, Results
from genrecall.evaluation.slices import Slice
from genrecall.evaluation.stage_searches import ALIGNED
from genrecall.ranking.ranker import load_ranker
from genrecall.storage import Artifact


def _gain_pairs(config: EvaluationConfig, results: Results) -> list[tuple[str, str, str]]:
    """(table, row, base) of the paired gains."""
    pairs = []
    for table in ("semantic", "personalised"):
        rows = results.rows(table)
        pairs += [(table, row, "rqvae") for row in rows if row != "rqvae"]
        pairs += [(table, config.main, row) for row in rows if row not in (config.main, "rqvae") and not row.endswith(f"_{ALIGNED}")]
        pairs.append((table, f"{config.main}_{ALIGNED}", config.main))
    channels = [("generative", base) for base in ("bm25", "dense", "popularity", "guidance")] + [("rrf_all", base) for base in ("rrf_bm25_dense", "bm25")]
    channels += [("rrf_all_corrected", "rrf_bm25_corrected_dense"), ("rrf_bm25_corrected_dense", "rrf_bm25_dense")]
    return pairs + [("channels", row, base) for row, base in channels]


def gain_records(maker: RecordMaker, config: EvaluationConfig, results: Results, requests: np.ndarray) -> list[Record]:
    """Paired gains of the variants over RQ-VAE and of the channels, over the requests marked in bool [R]."""
    records = []
    recalls, hits = [f"recall@{k}" for k in config.cuts], [f"hit@items{budget}" for budget in config.item_budgets]
    lists = [f"{name}@{n}" for name in ("clk", "exp", "pvr", "buy") for n in config.beams] + hits
    misses = [f"clk@{max(config.beams)}", *hits]
    for table, row, base in _gain_pairs(config, results):
        names, lost = (recalls, []) if table == "channels" else (lists, misses)
        records += maker.gains(results, requests, table, row, base, metrics=names, misses=lost)
    return records


def slice_records(maker: RecordMaker, config: EvaluationConfig, results: Results, one: Slice) -> list[Record]:
    """What is reported of a slice: the channels, the variants' lists, and what our channel gains there."""
    by_cut = [f"{name}@{k}" for name in ("recall", "hit", "marginal", "missed_found", "junk") for k in config.cuts]
    by_list = [*(f"clk@{n}" for n in config.beams), *(f"hit@items{budget}" for budget in config.item_budgets)]
    records = maker.means(results, one.requests, slice_name=one.name, weights=one.weights, metrics=by_cut + by_list)
    recalls = [f"recall@{k}" for k in config.cuts]
    for row, base in (("rrf_all", "rrf_bm25_dense"), ("generative", "dense")):
        gains = maker.gains(results, one.requests, "channels", row, base, metrics=recalls, slice_name=one.name, weights=one.weights)
        records += gains
    return records


def ab_records(
    config: EvaluationConfig, maker: RecordMaker, dataset: Artifact, encoder: Artifact, ranker: Artifact | None, data: EvaluatedData, served: np.ndarray
) -> list[Record]:
    """Records of the simulated A/B test, where the dataset is the built-in marketplace."""
    prepared = dataset.manifest["config"]
    if prepared.get("source") != "marketplace" or not config.ab_requests:
        return []
    marketplace = Marketplace(prepared["marketplace_size"], prepared["seed"])
    chosen = ab_sample(data.sample.uniform, config.ab_requests, seed=config.seed)
    # The marketplace numbers all of its items; the catalogue may lack some that preparation rejected.
    theirs = np.asarray(marketplace.catalog.rows_of(data.catalog.item_ids.tolist()))
    rows = np.where(served[chosen] >= 0, theirs[np.maximum(served[chosen], 0)], -1)
    requests = data.requests.take(chosen)
    rank: RankerFunction | None = None
    if ranker is not None:
        learned = load_ranker(ranker.path, catalog=data.catalog, encoder_folder=encoder.path)
        ours = np.asarray(data.catalog.rows_of(marketplace.catalog.item_ids(np.arange(len(marketplace.catalog)))))
        rank = lambda which, items: np.where(ours[items] >= 0, learned.raw_score(requests, which, np.maximum(ours[items], 0)), -np.inf)  # noqa: E731
    result = simulate_ab(marketplace, requests.request_ids, rows, rank=rank, samples=config.bootstrap_samples, seed=config.seed)
    records = [maker.record("ab", "control", name, one) for name, one in result.control.items()]
    records += [maker.record("ab", "with_channel", name, one) for name, one in result.treatment.items()]
    records += [maker.record("ab", "with_channel", f"{name}_gain_vs_control", one) for name, one in result.gains.items()]
    return records + [maker.constant("ab", "with_channel", name, share, len(chosen)) for name, share in result.shares.items()]


def ab_sample(uniform: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """int64, ascending: a seeded draw of at most `count` of the requests marked in `uniform` (bool [R]), which are ordered by time."""
    rows = np.flatnonzero(uniform)
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows)[:count])
