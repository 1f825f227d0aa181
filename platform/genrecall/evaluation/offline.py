"""The evaluation stage: every variant and channel on the same test requests, as records with intervals, per-request arrays and a report.

Source: the offline protocol of CQ-SID and EG-GRPO (arXiv:2605.14434): `semantic` is the stage-2 model reading the query alone,
`personalised` stage 3 (and stage 4, after alignment) reading the shopper too. Deviations: one search at the widest beam per variant, whose
top N stand for beam N; item-level hits, item budgets, recall beside the site's other channels and what ours adds to them. Where the served
generator is guided, the channel `guidance` is its own search with the decoder silenced: what the trained decoder adds to it.

Shapes: R evaluated requests, N items, B widest beam, K channel depth.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genrecall.config import to_dict
from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, load_requests, popularity
from genrecall.data.marketplace import Marketplace
from genrecall.encoders.text_encoder import load_encoder
from genrecall.evaluation.ab_simulation import RankerFunction, simulate_ab
from genrecall.evaluation.baselines import Bm25, DenseRetriever, document_texts, popular_items
from genrecall.evaluation.fusion import fuse, gather_candidates, tune_weights
from genrecall.evaluation.leaks import check_no_leaks
from genrecall.evaluation.records import Record, RecordMaker, Results
from genrecall.evaluation.report import write_report
from genrecall.evaluation.request_metrics import Columns, Tiers, channel_columns, item_lists, sid_columns
from genrecall.evaluation.results_table import barred_line
from genrecall.evaluation.served_stage import choose_served, falls_beyond_noise
from genrecall.evaluation.slices import Sample, Slice, cold_items, request_slices, sample_requests
from genrecall.generator.calibration import weighted_decoder
from genrecall.generator.retriever import GeneratedSids, Retriever, load_retriever
from genrecall.ranking.ranker import load_ranker
from genrecall.sid.index import load_index
from genrecall.storage import Artifact, Stage

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 8
HYBRIDS = {"rrf_bm25_dense": ("bm25", "dense"), "rrf_all": ("bm25", "dense", "generative")}
EXISTING = ("bm25", "dense", "rrf_bm25_dense")
"""What a site has without us: marginal recall is what these do not find."""
ALIGNED = "aligned"
STAGE_OF = {("semantic", True): "stage2", ("personalised", True): "stage3", ("personalised", False): "stage4"}
"""The generator's stage behind a row of the main variant: (table, whether it is the supervised row)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and on how many requests.

    Attributes:
        main: the variant that becomes the `generative` channel.
        beams: N of clk@N and its like; the widest is the channel's beam.
        item_budgets: M of hit@items M.
        cuts: k of recall@k.
        cut_items, cut_beams: the cut-to-M curve.
        channels: beside `generative`; hybrids are built from those present.
        max_requests: test requests measured; None for all. max_validation_requests: for tuning the fusion weights.
        depth: items that each channel hands over, to hybrids too.
        dense_index: "hnsw" for catalogues beyond a few hundred thousand items.
        ab_requests: requests of the simulated A/B test (marketplace only), drawn from the measured ones; 0 leaves it out.
        ab_ranker: what orders the pages of both arms: the marketplace's own ranker, or the `ranker` artifact.
    """

    seed: int = 0
    main: str = "cqsid"
    beams: tuple[int, ...] = (1, 10, 100)
    item_budgets: tuple[int, ...] = (10, 50, 100, 1000)
    cuts: tuple[int, ...] = (10, 100)
    cut_items: int = 1000
    cut_beams: tuple[int, ...] = (10, 20, 40, 60, 80, 100)
    channels: tuple[Literal["bm25", "dense", "popularity"], ...] = ("bm25", "dense", "popularity")
    depth: int = 100
    max_requests: int | None = 1000
    max_validation_requests: int = 1000
    bootstrap_samples: int = 1000
    dense_index: Literal["flat", "hnsw"] = "flat"
    bm25_k1: float = 1.2
    bm25_b: float = 0.5
    ab_requests: int = 1000
    ab_ranker: Literal["production", "learned"] = "production"

    def problems(self) -> list[str]:
        found = [
            f"{name}: expected at least one value, all at least 1, got {values}"
            for name in ("beams", "item_budgets", "cuts", "cut_beams")
            if not (values := getattr(self, name)) or min(values) < 1
        ]
        least = {"cut_items": 1, "depth": 1, "max_validation_requests": 1, "bootstrap_samples": 1, "ab_requests": 0}
        found += [f"{name}: expected at least {low}, got {getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]
        if self.max_requests is not None and self.max_requests < 1:
            found.append(f"max_requests: expected at least 1 or none, got {self.max_requests}")
        if not found and max(self.cuts) > self.depth:
            found.append(f"depth={self.depth}: channels hand over fewer items than the largest of cuts={self.cuts}")
        if not found and max(self.cut_beams) > max(self.beams):
            found.append(f"cut_beams={self.cut_beams}: the widest search is max(beams)={max(self.beams)}")
        return found


@dataclass(frozen=True)
class Loaded:
    """The evaluated data."""

    catalog: Catalog
    train: Requests
    requests: Requests
    validation: Requests
    sample: Sample
    query_kind: str


def evaluate(
    config: EvaluationConfig,
    *,
    dataset: Artifact,
    encoder: Artifact,
    sid_indexes: Mapping[str, Artifact],
    generators: Mapping[str, Artifact],
    uri: str,
    aligned: Artifact | None = None,
    quantizers: Mapping[str, Artifact] | None = None,
    encoders: Mapping[str, Artifact] | None = None,
    ranker: Artifact | None = None,
    force: bool = False,
) -> Artifact:
    """Evaluate all variants and channels.

    Args:
        config: see there.
        dataset, encoder: artifacts; the encoder is also the dense channel.
        sid_indexes, generators: variant name -> artifact, the same names in both; `config.main` must be among them.
        uri: where the artifact goes.
        aligned: stage 4 of the main variant; the `generative` channel serves the stage that finds most on the validation requests, stage 4 only if no
            guarded metric falls beyond noise there.
        quantizers: variant name -> artifact, for the pictures of the report.
        encoders: variant name -> the encoder it was trained with, where that is not `encoder`.
        ranker: orders the pages of the simulated A/B test where `config.ab_ranker` is "learned"; else not read.
        force: evaluate even if `uri` already holds the result.

    Returns:
        artifact of kind "evaluation": `metrics.json`, `per_request/*.npz`, `report.html`.

    Raises:
        ValueError: variants do not match, or a ranker is missing. LeakError: the test side shows in the training side.
    """
    _check_variants(config, sid_indexes, generators)
    quantizers, encoders = quantizers or {}, encoders or {}
    if config.ab_ranker == "learned" and ranker is None:
        raise ValueError("evaluate: ab_ranker='learned' needs the ranker artifact; run jobs/train_ranker.py or set ab_ranker=production")
    ranker = ranker if config.ab_ranker == "learned" else None
    parents = _parents(config.main, dataset, encoder, sid_indexes, generators, aligned, quantizers, encoders)
    parents |= {"ranker": ranker} if ranker is not None else {}
    stage = Stage(kind="evaluation", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents=parents, seed=config.seed, job="evaluate")
    if done := stage.current(force=force):
        return done
    check_no_leaks(dataset)
    stats = dataset.json("stats.json")
    data = _load(config, dataset, stats["query_kind"])
    tiers, validation_tiers = Tiers.of(data.requests), Tiers.of(data.validation)
    main_index = load_index(sid_indexes[config.main].path)
    maker = RecordMaker(str(stats["source"]), config.bootstrap_samples, config.seed)
    lists: dict[tuple[str, str], np.ndarray] = {}
    ranked: dict[tuple[str, str], np.ndarray] = {}
    seconds: dict[str, float] = {}
    searches: dict[str, float] = {}
    on_validation: dict[str, np.ndarray] = {}
    guarded: dict[str, Columns] = {}
    retrievers: dict[str, tuple[Retriever, bool]] = {}
    for variant in generators:
        for table, row, retriever, personalised in _runs(config, variant, sid_indexes, generators, encoders.get(variant, encoder), aligned):
            found, elapsed = _search(retriever, data.requests, max(config.beams), personalised=personalised)
            lists[table, row] = found.sid_rows
            ranked[table, row] = item_lists(retriever, found, max(config.depth, *config.item_budgets))
            if variant == config.main:
                stage_name = STAGE_OF[table, row == variant]
                searches[stage_name], retrievers[stage_name] = elapsed, (retriever, personalised)
                validated, _ = _search(retriever, data.validation, max(config.beams), personalised=personalised)
                on_validation[stage_name] = item_lists(retriever, validated, config.depth)
                guarded[stage_name] = sid_columns(
                    validated.sid_rows, main_index, validation_tiers, beams=(1, 10), budgets=(10,), cut_items=config.cut_items, cut_beams=(1,)
                )
    falls = _falls(config, guarded)
    served_stage, validation_recall = choose_served(on_validation, validation_tiers.clicked, config.cuts, barred=["stage4"] if falls else [])
    seconds["generative"] = searches[served_stage]
    served_table, is_supervised = next(key for key, name in STAGE_OF.items() if name == served_stage)
    served = ranked[served_table, config.main if is_supervised else f"{config.main}_{ALIGNED}"][:, : config.depth]
    rankings, weights, matches = _channels(config, data, encoder, served, on_validation[served_stage], seconds)
    rankings |= _guidance_alone(config, data.requests, *retrievers[served_stage])
    indexes = {variant: load_index(artifact.path) for variant, artifact in sid_indexes.items()}

    def measure(targets: Tiers) -> Results:
        results = Results()
        for (table, row), sid_rows in lists.items():
            index = indexes.get(row, main_index)
            shape = {"beams": config.beams, "budgets": config.item_budgets, "cut_items": config.cut_items, "cut_beams": config.cut_beams}
            results.add(table, row, sid_columns(sid_rows, index, targets, ranked[table, row], **shape))  # type: ignore[arg-type]
        channels = channel_columns(rankings, targets, num_items=len(data.catalog), cuts=config.cuts, existing=EXISTING, ours="generative")
        for channel, columns in channels.items():
            results.add("channels", channel, columns)
        return results

    results = measure(tiers)
    slices = request_slices(data.requests, data.train, data.sample, query_kind=data.query_kind, bm25_matches=matches)
    records = maker.means(results, data.sample.primary) + _gains(maker, config, results, data.sample.primary)
    for one in slices:
        records += _slice_records(maker, config, results, one)
    cold = Slice("cold_items", "only targets without a training click or purchase", data.sample.primary)
    if bool(cold_items(popularity(data.train, len(data.catalog)))[tiers.clicked.item].any()):
        records += _slice_records(maker, config, measure(tiers.only_items(cold_items(popularity(data.train, len(data.catalog))))), cold)
        slices.append(cold)
    for variant, index in indexes.items():
        for table in [table for table, row in lists if row == variant]:
            records.append(maker.constant(table, variant, "items_per_sid", len(data.catalog) / len(index), len(data.catalog)))
    records += [maker.constant("cost", channel, "seconds_per_1000_queries", one, len(data.requests)) for channel, one in seconds.items()]
    records += _ab_records(config, maker, dataset, encoder, ranker, data, served)
    metrics = {
        "format": 1,
        "dataset": maker.dataset,
        "dataset_hash": dataset.hash,
        "split": stats["split"],
        "query_kind": data.query_kind,
        "counts": _counts(stats, data, tiers),
        "main": config.main,
        "served": served_stage,
        "validation_recall": validation_recall,
        "stage4_falls": falls,
        "fusion_weights": weights,
        "slices": {one.name: one.about for one in slices},
        "notes": _notes(data, stats),
        "config": to_dict(config),
        "parts": {
            name: {"kind": parent.kind, "hash": parent.hash, "algorithm_version": parent.manifest.get("algorithm_version")} for name, parent in parents.items()
        },
        "records": records,
    }
    with stage.write() as draft:
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
        _write_per_request(draft.path / "per_request", data, results, rankings, lists)
        write_report(draft.path / "report.html", metrics, sid_index=sid_indexes[config.main], quantizer=quantizers.get(config.main), aligned=aligned)
        draft.row_counts |= {"requests": len(data.requests), "records": len(records)}
    return stage.open()


def _check_variants(config: EvaluationConfig, sid_indexes: Mapping[str, Artifact], generators: Mapping[str, Artifact]) -> None:
    if set(sid_indexes) != set(generators):
        raise ValueError(f"evaluate: sid_indexes are {sorted(sid_indexes)}, generators {sorted(generators)}; give the same variants in both")
    if config.main not in generators:
        raise ValueError(f"evaluate: main={config.main!r} is not among the variants {sorted(generators)}")
    for name, generator in generators.items():
        built_on = generator.manifest["parents"].get("sid_index", {}).get("hash")
        if built_on not in (None, sid_indexes[name].hash):
            raise ValueError(
                f"evaluate: generator {name!r} ({generator.uri}) was trained on another sid_index than {sid_indexes[name].uri}; rerun jobs/train_generator.py"
            )


def _parents(
    main: str,
    dataset: Artifact,
    encoder: Artifact,
    sid_indexes: Mapping[str, Artifact],
    generators: Mapping[str, Artifact],
    aligned: Artifact | None,
    quantizers: Mapping[str, Artifact],
    encoders: Mapping[str, Artifact],
) -> dict[str, Artifact]:
    """All inputs by name; those of the main variant have the plain names, by which a bundle checks its lineage."""
    parents = {"dataset": dataset, "encoder": encoder}
    for kind, artifacts in (("sid_index", sid_indexes), ("generator", generators), ("quantizer", quantizers), ("encoder", encoders)):
        for variant, artifact in artifacts.items():
            parents[kind if variant == main and kind != "encoder" else f"{kind}_{variant}"] = artifact
    return parents | ({"aligned": aligned} if aligned is not None else {})


def _load(config: EvaluationConfig, dataset: Artifact, query_kind: str) -> Loaded:
    catalog = load_catalog(dataset)
    train, validation, test = (load_requests(dataset, split, catalog) for split in ("train", "validation", "test"))
    sample = sample_requests(test, train, catalog, query_kind=query_kind, max_requests=config.max_requests, seed=config.seed)
    if len(validation):
        tuned_on = sample_requests(validation, train, catalog, query_kind=query_kind, max_requests=config.max_validation_requests, seed=config.seed)
        validation = validation.take(tuned_on.indices[tuned_on.primary])
    return Loaded(catalog, train, test.take(sample.indices), validation, sample, query_kind)


def _runs(
    config: EvaluationConfig,
    variant: str,
    sid_indexes: Mapping[str, Artifact],
    generators: Mapping[str, Artifact],
    encoder: Artifact,
    aligned: Artifact | None,
) -> list[tuple[str, str, Retriever, bool]]:
    """What is searched for a variant: (table, row, retriever, whether the prompt holds the shopper)."""
    folder = generators[variant].path
    stages: list[tuple[str, str, Path, bool]] = [("semantic", variant, folder / "stage2", False), ("personalised", variant, folder / "stage3", True)]
    if aligned is not None and variant == config.main:
        stages.append(("personalised", f"{variant}_{ALIGNED}", aligned.file("stage4"), True))
    found = []
    for table, row, stage, personalised in stages:
        if not stage.is_dir():
            logger.warning("evaluate: %s has no %s, so the table %r lacks the row %r", generators[variant].uri, stage.name, table, row)
            continue
        support = json.loads((stage.parent / "training.json").read_text())["support"]
        retriever = load_retriever(generator_folder=folder, stage=stage.absolute(), sid_index=sid_indexes[variant].path, encoder=encoder.path, support=support)
        found.append((table, row, retriever, personalised))
    return found


def _search(retriever: Retriever, requests: Requests, beam_size: int, *, personalised: bool) -> tuple[GeneratedSids, float]:
    """The SIDs of requests and the seconds that a thousand queries take."""
    begin = time.perf_counter()
    found = retriever.generate(requests.queries, requests.genders, requests.age_bands, requests.history, beam_size=beam_size, personalised=personalised)
    return found, 1000 * (time.perf_counter() - begin) / max(len(requests), 1)


def _falls(config: EvaluationConfig, guarded: Mapping[str, Columns]) -> dict[str, dict[str, float | None]]:
    """{guarded metric that falls from stage 3 to stage 4 beyond noise: its relative gain as value, low, high}; empty without an alignment too."""
    if not {"stage3", "stage4"} <= set(guarded):
        return {}
    gains = falls_beyond_noise(guarded["stage4"], guarded["stage3"], samples=config.bootstrap_samples, seed=config.seed)
    falls = {metric: {"value": gain.value, "low": gain.low, "high": gain.high} for metric, gain in gains.items()}
    if falls:
        logger.warning("evaluate: %s", barred_line({"stage4_falls": falls}))
    return falls


def _guidance_alone(config: EvaluationConfig, requests: Requests, retriever: Retriever, personalised: bool) -> dict[str, np.ndarray]:
    """The served generator's ranking with its decoder's logits at 0, int32 [R, K] as `guidance`: the encoder and the query's words alone, under the level
    weights that were trained beside the decoder. Nothing where the generator is not guided."""
    if retriever.model.guidance is None:
        return {}
    with weighted_decoder(retriever.model, 0.0):
        found, _ = _search(retriever, requests, max(config.beams), personalised=personalised)
        return {"guidance": item_lists(retriever, found, config.depth)}


def _channels(
    config: EvaluationConfig, data: Loaded, encoder: Artifact, served: np.ndarray, on_validation: np.ndarray, seconds: dict[str, float]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]], np.ndarray]:
    """Rankings of every channel and hybrid, the fusion weights, and how many items BM25 matches for each request."""
    test: dict[str, np.ndarray] = {}
    tuning: dict[str, np.ndarray] = {}
    bm25 = Bm25(document_texts(data.catalog), k1=config.bm25_k1, b=config.bm25_b)
    begin = time.perf_counter()
    lexical, matches = bm25.search(data.requests.queries, config.depth)
    if "bm25" in config.channels:
        seconds["bm25"] = 1000 * (time.perf_counter() - begin) / len(data.requests)
        test["bm25"], tuning["bm25"] = lexical, bm25.search(data.validation.queries, config.depth)[0]
    if "dense" in config.channels:
        text_encoder = load_encoder(encoder.path)
        dense = DenseRetriever(np.load(encoder.file("item_embeddings.npy"), allow_pickle=False), kind=config.dense_index)
        begin = time.perf_counter()
        test["dense"] = dense.search(text_encoder.encode_queries(data.requests.queries), config.depth)
        seconds["dense"] = 1000 * (time.perf_counter() - begin) / len(data.requests)
        tuning["dense"] = dense.search(text_encoder.encode_queries(data.validation.queries), config.depth)
    if "popularity" in config.channels:
        test["popularity"] = popular_items(popularity(data.train, len(data.catalog)), len(data.requests), config.depth)
    test["generative"], tuning["generative"] = served, on_validation
    targets = Tiers.of(data.validation).clicked
    weights = {}
    for hybrid, parts in HYBRIDS.items():
        if all(part in test for part in parts):
            tuned = tune_weights({part: tuning[part] for part in parts}, targets, depth=config.depth, cuts=config.cuts)
            weights[hybrid] = tuned
            test[hybrid] = fuse(gather_candidates([test[part] for part in parts], config.depth), [tuned[part] for part in parts], config.depth)
    return test, weights, matches


def _gain_pairs(config: EvaluationConfig, results: Results) -> list[tuple[str, str, str]]:
    """(table, row, base) of the paired gains."""
    pairs = []
    for table in ("semantic", "personalised"):
        rows = results.rows(table)
        pairs += [(table, row, "rqvae") for row in rows if row != "rqvae"]
        pairs += [(table, config.main, row) for row in rows if row not in (config.main, "rqvae") and not row.endswith(f"_{ALIGNED}")]
        pairs.append((table, f"{config.main}_{ALIGNED}", config.main))
    channels = [("generative", base) for base in ("bm25", "dense", "popularity", "guidance")] + [("rrf_all", base) for base in ("rrf_bm25_dense", "bm25")]
    return pairs + [("channels", row, base) for row, base in channels]


def _gains(maker: RecordMaker, config: EvaluationConfig, results: Results, requests: np.ndarray) -> list[Record]:
    records = []
    recalls, hits = [f"recall@{k}" for k in config.cuts], [f"hit@items{budget}" for budget in config.item_budgets]
    lists = [f"{name}@{n}" for name in ("clk", "exp", "pvr", "buy") for n in config.beams] + hits
    misses = [f"clk@{max(config.beams)}", *hits]
    for table, row, base in _gain_pairs(config, results):
        names, lost = (recalls, []) if table == "channels" else (lists, misses)
        records += maker.gains(results, requests, table, row, base, metrics=names, misses=lost)
    return records


def _slice_records(maker: RecordMaker, config: EvaluationConfig, results: Results, one: Slice) -> list[Record]:
    by_cut = [f"{name}@{k}" for name in ("recall", "hit", "marginal", "missed_found", "junk") for k in config.cuts]
    by_list = [*(f"clk@{n}" for n in config.beams), *(f"hit@items{budget}" for budget in config.item_budgets)]
    records = maker.means(results, one.requests, slice_name=one.name, weights=one.weights, metrics=by_cut + by_list)
    recalls = [f"recall@{k}" for k in config.cuts]
    for row, base in (("rrf_all", "rrf_bm25_dense"), ("generative", "dense")):
        gains = maker.gains(results, one.requests, "channels", row, base, metrics=recalls, slice_name=one.name, weights=one.weights)
        records += gains
    return records


def _ab_records(
    config: EvaluationConfig, maker: RecordMaker, dataset: Artifact, encoder: Artifact, ranker: Artifact | None, data: Loaded, served: np.ndarray
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


def _counts(stats: Mapping[str, Any], data: Loaded, tiers: Tiers) -> dict[str, int]:
    return {
        "items": len(data.catalog),
        "train_requests": len(data.train),
        "test_requests": int(stats["requests"]["test"]),
        "evaluated_requests": len(data.requests),
        "headline_requests": int(data.sample.primary.sum()),
        "validation_requests": len(data.validation),
        "clicked_targets": len(tiers.clicked.item),
        "judged_pairs": len(tiers.judged.item),
    }


def _notes(data: Loaded, stats: Mapping[str, Any]) -> list[str]:
    notes = ["Intervals are 95 % bootstrap intervals over requests of one training run; they do not hold the spread over training seeds."]
    if data.query_kind == "derived":
        notes.append("Queries are derived from the item bought, so lexical channels are strong by construction.")
        notes.append("Headline rows use test queries that are unseen in training and free of their targets' category words; other queries are slices.")
    if data.query_kind == "simulated":
        notes.append("Requests come from the built-in marketplace simulator: compare rows with each other, not with a real site.")
    if any(len(grades) and not np.isnan(grades).all() for grades in data.requests.grades):
        notes.append("Only judged items count as found; an unjudged item may be relevant too, so condensed-list numbers stand beside the raw ones.")
    if stats["split"] == "by_query":
        notes.append("The split is by query: no test query occurs in training, and each query counts once, whatever its traffic.")
    if not len(data.validation):
        notes.append("There is no validation request, so the fusion weights are all 1.")
    return notes


def _write_per_request(folder: Path, data: Loaded, results: Results, rankings: Mapping[str, np.ndarray], lists: Mapping[tuple[str, str], np.ndarray]) -> None:
    folder.mkdir()
    ids = np.array(data.requests.request_ids, dtype=str)
    np.savez_compressed(folder / "requests.npz", request_id=ids, primary=data.sample.primary, uniform=data.sample.uniform)
    np.savez_compressed(folder / "rankings.npz", allow_pickle=False, **dict(rankings))
    np.savez_compressed(folder / "sid_lists.npz", allow_pickle=False, **{f"{table}.{row}": one for (table, row), one in lists.items()})
    for (table, row), columns in results.columns.items():
        np.savez_compressed(folder / f"{table}.{row}.npz", allow_pickle=False, **{name: column.astype(np.float32) for name, column in columns.items()})
