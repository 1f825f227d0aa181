"""What the generators find: one search per variant and stage at the widest beam, and which stage of the main variant is served.

Shapes: R evaluated requests, V validation requests, B widest beam.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genrecall.data.interactions import Requests
from genrecall.evaluation.evaluated_data import EvaluatedData
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.request_metrics import Columns, Tiers, item_lists, sid_columns
from genrecall.evaluation.results_table import barred_line
from genrecall.evaluation.served_stage import choose_served, falls_beyond_noise
from genrecall.generator.calibration import weighted_decoder
from genrecall.generator.retriever import GeneratedSids, Retriever, load_retriever
from genrecall.sid.index import load_index
from genrecall.storage import Artifact

logger = logging.getLogger(__name__)

ALIGNED = "aligned"
STAGE_OF = {("semantic", True): "stage2", ("personalised", True): "stage3", ("personalised", False): "stage4"}
"""The generator's stage behind a row of the main variant: (table, whether it is the supervised row)."""


@dataclass(frozen=True)
class StageSearch:
    """What one stage of the main variant finds.

    Attributes:
        retriever, personalised: what searched, and whether its prompts held the shopper.
        seconds: that a thousand test requests took.
        items: int32 [R, at least the depth], -1 padded, for the test requests.
        validated: int32 [V, depth], for the validation requests.
        guarded: metric -> float64 [V], those that an alignment must not lower.
    """

    retriever: Retriever
    personalised: bool
    seconds: float
    items: np.ndarray
    validated: np.ndarray
    guarded: Columns


@dataclass(frozen=True)
class Searches:
    """What all variants and stages find for the test requests.

    Attributes:
        sids: (table, row) -> SID rows int32 [R, B]. items: (table, row) -> items int32 [R, K], -1 padded, as they are served.
        stages: of the main variant, by name, earlier ones first.
    """

    sids: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    items: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    stages: dict[str, StageSearch] = field(default_factory=dict)


def search_variants(
    config: EvaluationConfig,
    data: EvaluatedData,
    *,
    sid_indexes: Mapping[str, Artifact],
    generators: Mapping[str, Artifact],
    encoder_of: Mapping[str, Artifact],
    aligned: Artifact | None,
) -> Searches:
    """Search with stages 2 and 3 of every variant, and with stage 4 of the main one; those of the main one search the validation requests too.

    Args:
        sid_indexes, generators, encoder_of: by variant.
        aligned: stage 4; None: there is none.
    """
    found, beam = Searches(), max(config.beams)
    main_index, targets = load_index(sid_indexes[config.main].path), Tiers.of(data.validation)
    for variant in generators:
        for table, row, retriever, personalised in _runs(config, variant, sid_indexes, generators, encoder_of[variant], aligned):
            sids, seconds = _search(retriever, data.requests, beam, personalised=personalised)
            found.sids[table, row] = sids.sid_rows
            found.items[table, row] = items = item_lists(retriever, sids, max(config.depth, *config.item_budgets))
            if variant != config.main:
                continue
            validated, _ = _search(retriever, data.validation, beam, personalised=personalised)
            found.stages[STAGE_OF[table, row == variant]] = StageSearch(
                retriever=retriever,
                personalised=personalised,
                seconds=seconds,
                items=items,
                validated=item_lists(retriever, validated, config.depth),
                guarded=sid_columns(validated.sid_rows, main_index, targets, beams=(1, 10), budgets=(10,), cut_items=config.cut_items, cut_beams=(1,)),
            )
    return found


@dataclass(frozen=True)
class Served:
    """The stage of the main variant that is served, chosen on the validation requests.

    Attributes:
        stage: its name. recalls: stage -> recall there.
        falls: guarded metric that falls from stage 3 to stage 4 beyond noise -> its relative gain as value, low, high; then stage 4 is not served.
    """

    stage: str
    recalls: dict[str, dict[str, float | None]]
    falls: dict[str, dict[str, float | None]]


def served_of(config: EvaluationConfig, data: EvaluatedData, stages: Mapping[str, StageSearch]) -> Served:
    """Choose the stage to serve."""
    falls: dict[str, dict[str, float | None]] = {}
    if {"stage3", "stage4"} <= set(stages):
        gains = falls_beyond_noise(stages["stage4"].guarded, stages["stage3"].guarded, samples=config.bootstrap_samples, seed=config.seed)
        falls = {metric: {"value": gain.value, "low": gain.low, "high": gain.high} for metric, gain in gains.items()}
    if falls:
        logger.warning("evaluate: %s", barred_line({"stage4_falls": falls}))
    rankings = {name: one.validated for name, one in stages.items()}
    stage, recalls = choose_served(rankings, Tiers.of(data.validation).clicked, config.cuts, barred=["stage4"] if falls else [])
    return Served(stage, recalls, falls)


def guidance_alone(config: EvaluationConfig, data: EvaluatedData, served: StageSearch) -> dict[str, np.ndarray]:
    """The served generator's ranking with its decoder's logits at 0, int32 [R, depth] as `guidance`: the encoder and the query's words alone, under the level
    weights that were trained beside the decoder. Nothing where the generator is not guided."""
    if served.retriever.model.guidance is None:
        return {}
    with weighted_decoder(served.retriever.model, 0.0):
        found, _ = _search(served.retriever, data.requests, max(config.beams), personalised=served.personalised)
        return {"guidance": item_lists(served.retriever, found, config.depth)}


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
