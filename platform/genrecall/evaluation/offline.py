"""The evaluation stage: every variant and channel on the same test requests, as records with intervals, per-request arrays and a report.

Source: the offline protocol of CQ-SID and EG-GRPO (arXiv:2605.14434): `semantic` is the stage-2 model reading the query alone,
`personalised` stage 3 (and stage 4, after alignment) reading the shopper too. Deviations: one search at the widest beam per variant, whose
top N stand for beam N; item-level hits, item budgets, recall beside the site's other channels and what ours adds to them. Where the served
generator is guided, the channel `guidance` is its own search with the decoder silenced: what the trained decoder adds to it.

Shapes: R evaluated requests, N items, B widest beam, K channel depth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genrecall.config import to_dict
from genrecall.data.interactions import popularity
from genrecall.evaluation.channels import build_channels
from genrecall.evaluation.evaluated_data import EvaluatedData, load_evaluated
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.leaks import check_no_leaks
from genrecall.evaluation.offline_records import ab_records, gain_records, slice_records
from genrecall.evaluation.records import RecordMaker, Results
from genrecall.evaluation.report import write_report
from genrecall.evaluation.request_metrics import Tiers, channel_columns, sid_columns
from genrecall.evaluation.slices import Slice, cold_items, request_slices
from genrecall.evaluation.stage_searches import Searches, guidance_alone, search_variants, served_of
from genrecall.sid.index import SidIndex, load_index
from genrecall.storage import Artifact, Stage

ALGORITHM_VERSION = 10
EXISTING = ("bm25", "dense", "rrf_bm25_dense")
"""What a site has without us: marginal recall is what these do not find."""


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
    data = load_evaluated(config, dataset, stats["query_kind"])
    maker = RecordMaker(str(stats["source"]), config.bootstrap_samples, config.seed)
    encoder_of = {variant: encoders.get(variant, encoder) for variant in generators}
    searches = search_variants(config, data, sid_indexes=sid_indexes, generators=generators, encoder_of=encoder_of, aligned=aligned)
    served = served_of(config, data, searches.stages)
    ours = searches.stages[served.stage]
    channels = build_channels(config, data, encoder, ours.items[:, : config.depth], ours.validated, ours.retriever.prompt_builder.spelling)
    rankings = channels.rankings | guidance_alone(config, data, ours)
    indexes = {variant: load_index(artifact.path) for variant, artifact in sid_indexes.items()}

    def measure(targets: Tiers) -> Results:
        return _measured(config, searches, rankings, indexes, targets, num_items=len(data.catalog))

    tiers = Tiers.of(data.requests)
    results = measure(tiers)
    slices = request_slices(data.requests, data.train, data.sample, query_kind=data.query_kind, bm25_matches=channels.matches)
    records = maker.means(results, data.sample.primary) + gain_records(maker, config, results, data.sample.primary)
    for one in slices:
        records += slice_records(maker, config, results, one)
    untrained = cold_items(popularity(data.train, len(data.catalog)))
    if bool(untrained[tiers.clicked.item].any()):
        slices.append(Slice("cold_items", "only targets without a training click or purchase", data.sample.primary))
        records += slice_records(maker, config, measure(tiers.only_items(untrained)), slices[-1])
    for variant, index in indexes.items():
        size = len(data.catalog) / len(index)
        records += [maker.constant(table, variant, "items_per_sid", size, len(data.catalog)) for table, row in searches.sids if row == variant]
    seconds = {"generative": ours.seconds} | channels.seconds
    records += [maker.constant("cost", channel, "seconds_per_1000_queries", one, len(data.requests)) for channel, one in seconds.items()]
    records += ab_records(config, maker, dataset, encoder, ranker, data, rankings["generative"])
    metrics = {
        "format": 1,
        "dataset": maker.dataset,
        "dataset_hash": dataset.hash,
        "split": stats["split"],
        "query_kind": data.query_kind,
        "counts": _counts(stats, data, tiers),
        "main": config.main,
        "served": served.stage,
        "validation_recall": served.recalls,
        "stage4_falls": served.falls,
        "fusion_weights": channels.weights,
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
        _write_per_request(draft.path / "per_request", data, results, rankings, searches.sids)
        write_report(draft.path / "report.html", metrics, sid_index=sid_indexes[config.main], quantizer=quantizers.get(config.main), aligned=aligned)
        draft.row_counts |= {"requests": len(data.requests), "records": len(records)}
    return stage.open()


def _measured(
    config: EvaluationConfig, searches: Searches, rankings: Mapping[str, np.ndarray], indexes: Mapping[str, SidIndex], targets: Tiers, *, num_items: int
) -> Results:
    """The columns of every row and channel for the targets of the R requests."""
    results = Results()
    shape = {"beams": config.beams, "budgets": config.item_budgets, "cut_items": config.cut_items, "cut_beams": config.cut_beams}
    for (table, row), sid_rows in searches.sids.items():
        index = indexes.get(row, indexes[config.main])  # the aligned row has the main variant's
        results.add(table, row, sid_columns(sid_rows, index, targets, searches.items[table, row], **shape))  # type: ignore[arg-type]
    for channel, columns in channel_columns(rankings, targets, num_items=num_items, cuts=config.cuts, existing=EXISTING, ours="generative").items():
        results.add("channels", channel, columns)
    return results


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


def _counts(stats: Mapping[str, Any], data: EvaluatedData, tiers: Tiers) -> dict[str, int]:
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


def _notes(data: EvaluatedData, stats: Mapping[str, Any]) -> list[str]:
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


def _write_per_request(
    folder: Path, data: EvaluatedData, results: Results, rankings: Mapping[str, np.ndarray], lists: Mapping[tuple[str, str], np.ndarray]
) -> None:
    folder.mkdir()
    ids = np.array(data.requests.request_ids, dtype=str)
    np.savez_compressed(folder / "requests.npz", request_id=ids, primary=data.sample.primary, uniform=data.sample.uniform)
    np.savez_compressed(folder / "rankings.npz", allow_pickle=False, **dict(rankings))
    np.savez_compressed(folder / "sid_lists.npz", allow_pickle=False, **{f"{table}.{row}": one for (table, row), one in lists.items()})
    for (table, row), columns in results.columns.items():
        np.savez_compressed(folder / f"{table}.{row}.npz", allow_pickle=False, **{name: column.astype(np.float32) for name, column in columns.items()})
