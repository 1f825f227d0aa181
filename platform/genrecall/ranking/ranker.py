"""The downstream ranking model: LambdaMART on pair features, with its scores calibrated to click probabilities.

Source: LambdaMART (Burges, MSR-TR-2010-82) as in LightGBM; calibration by Platt's sigmoid (1999), fitted on shown items only where the
log holds shown items that were not clicked, so that a probability means "clicked, if shown". Random unexposed items join each group as negatives: recall asks the model about
items that production never showed. Trees and calibration are stored as text and JSON, never pickled.

Shapes: N items, R requests, P pairs, F features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, flattened, load_requests
from genrecall.encoders.text_encoder import load_encoder
from genrecall.ranking.features import FEATURES, ItemStatistics, PairFeatures, item_statistics, positions_in, propensity
from genrecall.storage import Artifact, Stage

ALGORITHM_VERSION = 2

EXPOSURE_LABEL, CLICK_LABEL, PURCHASE_LABEL = 0, 1, 3
_MAX_INVERSE_PROPENSITY = 10.0


class RankerError(ValueError):
    """A ranking model that cannot be trained or read."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """LambdaMART and its training groups."""

    trees: int = 200
    leaves: int = 31
    learning_rate: float = 0.08
    min_rows_per_leaf: int = 30
    early_stopping_trees: int = 20
    random_negatives: int = 8  # unexposed items that join each group
    max_train_requests: int = 20_000
    statistics_folds: int = 5
    position_bias: float = 0.0  # eta of the position propensity (p + 1) ** -eta; 0 trusts clicks at every position alike
    seed: int = 0

    def problems(self) -> list[str]:
        found = [
            f"{name}: expected at least {least}, got {getattr(self, name)}"
            for name, least in (
                ("trees", 1),
                ("leaves", 2),
                ("min_rows_per_leaf", 1),
                ("early_stopping_trees", 1),
                ("max_train_requests", 1),
                ("statistics_folds", 2),
            )
            if getattr(self, name) < least
        ]
        found += [f"{name}: expected at least 0, got {getattr(self, name)}" for name in ("random_negatives", "position_bias") if getattr(self, name) < 0]
        return found


@dataclass(frozen=True)
class Calibration:
    """Raw score -> probability: sigmoid(slope * score + intercept), slope > 0."""

    slope: float
    intercept: float

    def __call__(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(special.expit(self.slope * scores + self.intercept), dtype=np.float64)


class Ranker:
    """Scores (request, item) pairs.

    Args:
        booster: LightGBM trees over FEATURES.
        calibration: raw score -> click probability.
        features: builds the rows.
    """

    def __init__(self, booster: lightgbm.Booster, calibration: Calibration, features: PairFeatures) -> None:
        self._booster = booster
        self._calibration = calibration
        self.features = features

    def raw_score(self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer], *, num_threads: int = 1) -> NDArray[np.float64]:
        """LambdaMART's score float64 [P] of pairs; comparable within a request."""
        if not len(request_rows):
            return np.zeros(0)
        table = self.features.table(requests, request_rows, item_rows)
        return np.asarray(self._booster.predict(table, num_threads=num_threads), dtype=np.float64)

    def score(self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer], *, num_threads: int = 1) -> NDArray[np.float64]:
        """Probability float64 [P] that the item is clicked when it is shown for the request.

        Args:
            requests: R requests; queries and histories are read.
            request_rows: int [P], rows of `requests`.
            item_rows: int [P].
            num_threads: threads that the trees may use.
        """
        return self._calibration(self.raw_score(requests, request_rows, item_rows, num_threads=num_threads))


def load_ranker(folder: Path, *, catalog: Catalog, encoder_folder: Path) -> Ranker:
    """Read a ranker from its artifact folder, for the catalogue and encoder that it was trained with.

    Raises:
        RankerError: features or item count differ from those at training.
    """
    facts = json.loads((folder / "ranker.json").read_text())
    if tuple(facts["features"]) != FEATURES:
        raise RankerError(
            f"{folder}: trained on the features {', '.join(facts['features'])}, this version builds {', '.join(FEATURES)}; rerun jobs/train_ranker.py"
        )
    counts = np.load(folder / "item_statistics.npy", allow_pickle=False)
    if len(counts) != len(catalog):
        raise RankerError(f"{folder}: trained on {len(counts)} items, the catalogue has {len(catalog)}; rerun jobs/train_ranker.py on this dataset")
    statistics = ItemStatistics(clicks=counts[:, 0], exposures=counts[:, 1])
    features = PairFeatures(catalog, _item_embeddings(encoder_folder), load_encoder(encoder_folder).encode_queries, statistics)
    booster = lightgbm.Booster(model_file=str(folder / "model.txt"))
    return Ranker(booster, Calibration(**facts["calibration"]), features)


def train_ranker(config: RankerConfig, *, dataset: Artifact, encoder: Artifact, uri: str, force: bool = False) -> Artifact:
    """Train the ranking model on the training split, calibrate and measure it on the validation split.

    Where the validation split has no request with a click, the last tenth of the training requests takes its place.

    Raises:
        RankerError: no training request has both a clicked (or well judged) and another item.
    """
    stage = Stage(
        kind="ranker",
        uri=uri,
        config=config,
        algorithm_version=ALGORITHM_VERSION,
        parents={"dataset": dataset, "encoder": encoder},
        seed=config.seed,
        job="train_ranker",
    )
    if done := stage.current(force=force):
        return done
    catalog = load_catalog(dataset)
    train, validation = load_requests(dataset, "train", catalog), load_requests(dataset, "validation", catalog)
    train, validation = _with_clicks(train, validation)
    statistics = item_statistics(train, len(catalog), position_bias=config.position_bias)
    features = PairFeatures(catalog, _item_embeddings(encoder.path), load_encoder(encoder.path).encode_queries, statistics)
    booster, calibration, metrics = fit_ranker(config, features, train, validation)
    with stage.write() as draft:
        booster.save_model(str(draft.path / "model.txt"))
        np.save(draft.path / "item_statistics.npy", np.stack([statistics.clicks, statistics.exposures], axis=1), allow_pickle=False)
        facts = {
            "features": list(FEATURES),
            "calibration": {"slope": calibration.slope, "intercept": calibration.intercept},
            "trees": booster.num_trees(),
            "metrics": {name: value if np.isfinite(value) else None for name, value in metrics.items()},
            "gain": dict(zip(FEATURES, booster.feature_importance("gain").round(3).tolist(), strict=True)),
        }
        (draft.path / "ranker.json").write_text(json.dumps(facts, indent=2))
        draft.row_counts.update(train_requests=len(train), validation_requests=len(validation))
    return stage.open()


def fit_ranker(config: RankerConfig, features: PairFeatures, train: Requests, validation: Requests) -> tuple[lightgbm.Booster, Calibration, dict[str, float]]:
    """Fit trees on `train`; early stopping, calibration and metrics on `validation`.

    Raises:
        RankerError: nothing to learn from.
    """
    rng = np.random.default_rng(config.seed)
    pairs = _draw_pairs(config, train, features.num_items, rng, limit=config.max_train_requests)
    if not len(pairs.groups):
        raise RankerError(
            "training split: no request has both a clicked (or better judged) and another item, so there is nothing to rank; "
            "check that clicks are logged, and exposures beside them or random_negatives above 0"
        )
    held_out = _draw_pairs(config, validation, features.num_items, rng, limit=config.max_train_requests)
    data = lightgbm.Dataset(
        _out_of_fold(config, features, train, pairs),
        label=pairs.labels,
        group=pairs.groups,
        weight=_click_weights(pairs, config.position_bias),
        feature_name=list(FEATURES),
        free_raw_data=False,
    )
    parameters: dict[str, Any] = {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [10],
        "num_leaves": config.leaves,
        "learning_rate": config.learning_rate,
        "min_data_in_leaf": config.min_rows_per_leaf,
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "seed": config.seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    held_out_features = features.table(validation, held_out.requests, held_out.items)
    valid_sets: list[lightgbm.Dataset] = []
    callbacks: list[Callable[..., Any]] = []
    if len(held_out.groups):
        valid_sets = [lightgbm.Dataset(held_out_features, label=held_out.labels, group=held_out.groups, reference=data)]
        callbacks = [lightgbm.early_stopping(config.early_stopping_trees, verbose=False)]
    booster = lightgbm.train(parameters, data, num_boost_round=config.trees, valid_sets=valid_sets, callbacks=callbacks)
    scores = np.asarray(booster.predict(held_out_features), dtype=np.float64) if len(held_out.groups) else np.zeros(0)
    clicked = (held_out.labels > 0).astype(np.float64)
    shown = held_out.shown & _in_group_with_contrast(held_out)
    asked = _calibrated_on(held_out)
    calibration = fit_calibration(scores[asked], clicked[asked])

    def shown_ndcg(by: NDArray[np.floating]) -> float:
        sizes = np.bincount(held_out.requests[shown], minlength=len(validation))
        return ndcg(by[shown].astype(np.float64), held_out.labels[shown], sizes[sizes > 0], depth=10)

    metrics = {
        "ndcg@10": shown_ndcg(scores),
        "ndcg@10_logged_order": shown_ndcg(-held_out.positions.astype(np.float64)),
        "ndcg@10_cosine": shown_ndcg(held_out_features[:, 0]),
        "ndcg@10_with_random": ndcg(scores, held_out.labels, held_out.groups, depth=10),
        "ndcg@10_with_random_cosine": ndcg(held_out_features[:, 0].astype(np.float64), held_out.labels, held_out.groups, depth=10),
        "calibration_error": calibration_error(calibration(scores[asked]), clicked[asked]),
        "calibrated_on_shown": float(shown.any()),
        "validation_groups": float(len(held_out.groups)),
        "train_groups": float(len(pairs.groups)),
    }
    return booster, calibration, metrics


def calibrate(
    config: RankerConfig,
    raw_score: Callable[[Requests, NDArray[np.int64], NDArray[np.int32]], NDArray[np.float64]],
    train: Requests,
    validation: Requests,
    num_items: int,
) -> Calibration:
    """The calibration of another model's scores, fitted on the same validation pairs as that of our own.

    Args:
        raw_score: (requests, request rows [P], item rows [P]) -> score [P]. Pairs whose score is not finite are left out.
    """
    _, validation = _with_clicks(train, validation)
    pairs = _draw_pairs(config, validation, num_items, np.random.default_rng(config.seed), limit=config.max_train_requests)
    asked = _calibrated_on(pairs)
    scores = raw_score(validation, pairs.requests[asked], pairs.items[asked])
    usable = np.isfinite(scores)
    return fit_calibration(scores[usable], (pairs.labels[asked][usable] > 0).astype(np.float64))


def fit_calibration(scores: NDArray[np.float64], clicked: NDArray[np.float64]) -> Calibration:
    """Platt's sigmoid by maximum likelihood, with his smoothed targets, so that perfectly separated scores stay finite.

    Args:
        scores: float64 [P].
        clicked: float64 [P], 0 or 1.
    """
    positives, negatives = float(clicked.sum()), float((1.0 - clicked).sum())
    prior = float(np.log((positives + 1.0) / (negatives + 1.0)))
    if not positives or not negatives:
        return Calibration(slope=1.0, intercept=prior)
    targets = np.where(clicked > 0, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
    centre, spread = float(scores.mean()), float(scores.std()) or 1.0
    standard = (scores - centre) / spread

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = parameters[0] * standard + parameters[1]
        error = special.expit(logits) - targets
        value = float(np.mean(np.logaddexp(0.0, logits) - targets * logits))
        return value, np.array([np.mean(error * standard), np.mean(error)])

    fitted = optimize.minimize(loss, np.array([1.0, prior]), jac=True, method="L-BFGS-B", bounds=[(1e-3, None), (None, None)]).x
    slope = float(fitted[0]) / spread
    return Calibration(slope=slope, intercept=float(fitted[1]) - slope * centre)


def calibration_error(probabilities: NDArray[np.float64], clicked: NDArray[np.float64], *, bins: int = 10) -> float:
    """Mean absolute difference between predicted and observed click rate over bins of equal size; nan without pairs."""
    if not len(probabilities):
        return float("nan")
    parts = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    return float(sum(abs(probabilities[part].mean() - clicked[part].mean()) * len(part) for part in parts if len(part)) / len(probabilities))


def ndcg(scores: NDArray[np.float64], labels: NDArray[np.integer], groups: NDArray[np.integer], *, depth: int) -> float:
    """Mean NDCG@depth over groups with a label above 0, gain 2^label - 1; nan without such a group.

    Args:
        scores, labels: [P], group after group; equal scores stay in the order given.
        groups: group sizes, summing to P.
    """
    owners = np.repeat(np.arange(len(groups)), groups)

    def dcg(by: NDArray[np.floating]) -> NDArray[np.float64]:
        order = np.lexsort((-by, owners))
        ranks = positions_in(owners)  # owners[order] == owners: sorted by owner first
        gains = (2.0 ** labels[order] - 1.0) / np.log2(ranks + 2.0) * (ranks < depth)
        return np.asarray(np.bincount(owners, weights=gains, minlength=len(groups)), dtype=np.float64)

    best = dcg(labels.astype(np.float64))
    measured = best > 0
    return float(np.mean(dcg(scores)[measured] / best[measured])) if measured.any() else float("nan")


@dataclass(frozen=True)
class _Pairs:
    """Pairs of requests that can teach, group after group: shown items and random ones, in random order."""

    requests: NDArray[np.int64]
    items: NDArray[np.int32]
    labels: NDArray[np.int64]
    shown: NDArray[np.bool_]
    positions: NDArray[np.int64]  # on the page; 0 for a random one
    groups: NDArray[np.int64]  # sizes


def _labels_by_request(requests: Requests) -> list[NDArray[np.int64]]:
    """Labels beside `requests.exposed`: a grade of 1 to 3 as 0 to 3 where there is one, else purchase 3, click 1, exposure 0."""
    owners, items = flattened(requests.exposed)
    keys = owners << 32 | items
    labels = np.full(len(keys), EXPOSURE_LABEL, dtype=np.int64)
    for label, lists in ((CLICK_LABEL, requests.clicked), (PURCHASE_LABEL, requests.purchased)):
        by, chosen = flattened(lists)
        labels[np.isin(keys, by << 32 | chosen)] = label
    grades = np.concatenate(requests.grades) if len(requests) else np.zeros(0)
    judged = np.isfinite(grades)
    labels[judged] = np.round((grades[judged] - 1.0) * 1.5).astype(np.int64)
    return np.split(labels, np.cumsum([len(one) for one in requests.exposed])[:-1]) if len(requests) else []


def _draw_pairs(config: RankerConfig, requests: Requests, num_items: int, rng: np.random.Generator, *, limit: int) -> _Pairs:
    """The shown items of at most `limit` requests that can teach, and random items that they did not show."""
    labels = _labels_by_request(requests)
    rows = np.array(
        [row for row, one in enumerate(labels) if len(one) and one.max() > 0 and (config.random_negatives or one.min() < one.max())], dtype=np.int64
    )
    if len(rows) > limit:
        rows = np.sort(rng.choice(rows, limit, replace=False))
    owners, items = flattened([requests.exposed[row] for row in rows])
    shown_requests = rows[owners]
    extra_requests = np.repeat(rows, config.random_negatives)
    extra = rng.integers(0, num_items, size=len(extra_requests), dtype=np.int32)
    fresh = ~np.isin(extra_requests << 32 | extra, shown_requests << 32 | items)
    extra_requests, extra = extra_requests[fresh], extra[fresh]
    nothing = np.zeros(len(extra), dtype=np.int64)
    all_requests = np.concatenate([shown_requests, extra_requests])
    order = np.lexsort((rng.random(len(all_requests)), all_requests))  # in page order, ties of a small model would look like the logged order
    shown_labels = np.concatenate([labels[row] for row in rows]) if len(rows) else np.zeros(0, dtype=np.int64)
    sizes = np.bincount(all_requests, minlength=len(requests))
    return _Pairs(
        requests=all_requests[order],
        items=np.concatenate([items, extra])[order],
        labels=np.concatenate([shown_labels, nothing])[order],
        shown=np.concatenate([np.ones(len(items), dtype=bool), np.zeros(len(extra), dtype=bool)])[order],
        positions=np.concatenate([positions_in(owners), nothing])[order],
        groups=sizes[sizes > 0],
    )


def _with_clicks(train: Requests, validation: Requests) -> tuple[Requests, Requests]:
    """The two splits; where no validation request has a click, the last tenth of the training requests takes its place."""
    if any(len(clicked) for clicked in validation.clicked):
        return train, validation
    last_tenth = len(train) - max(1, len(train) // 10)
    return train.take(np.arange(last_tenth)), train.take(np.arange(last_tenth, len(train)))


def _calibrated_on(pairs: _Pairs) -> NDArray[np.bool_]:
    """Which pairs tell a probability of "clicked, if shown": bool [P]; all of them where the log holds nothing shown and not clicked."""
    shown = pairs.shown & _in_group_with_contrast(pairs)
    return shown if shown.any() else np.ones(len(shown), dtype=bool)


def _in_group_with_contrast(pairs: _Pairs) -> NDArray[np.bool_]:
    """Which pairs belong to a request whose shown items differ in label: bool [P]."""
    count = int(pairs.requests.max(initial=-1)) + 1
    highest, lowest = np.full(count, -1), np.full(count, np.iinfo(np.int64).max)
    np.maximum.at(highest, pairs.requests[pairs.shown], pairs.labels[pairs.shown])
    np.minimum.at(lowest, pairs.requests[pairs.shown], pairs.labels[pairs.shown])
    return np.asarray((highest > lowest)[pairs.requests], dtype=bool)


def _click_weights(pairs: _Pairs, position_bias: float) -> NDArray[np.float64]:
    """Weight of each pair: a click far down the page counts for the shoppers who never looked there (at most 10-fold), all else 1."""
    inverse = np.minimum(1.0 / propensity(pairs.positions, position_bias), _MAX_INVERSE_PROPENSITY)
    return np.where(pairs.labels > 0, inverse, 1.0)


def _out_of_fold(config: RankerConfig, features: PairFeatures, train: Requests, pairs: _Pairs) -> NDArray[np.float32]:
    """Feature rows in which no item's counts contain the request they describe; counts are scaled up to the whole split's size."""
    table = np.empty((len(pairs.requests), len(FEATURES)), dtype=np.float32)
    fold_of = np.arange(len(train)) * config.statistics_folds // len(train)
    for fold in range(config.statistics_folds):
        inside = fold_of[pairs.requests] == fold
        if not inside.any():
            continue
        left_out = item_statistics(train.take(np.flatnonzero(fold_of == fold)), features.num_items, position_bias=config.position_bias)
        rest = features.statistics.without(left_out)
        scale = len(train) / max(1, int((fold_of != fold).sum()))
        statistics = ItemStatistics(clicks=rest.clicks * scale, exposures=rest.exposures * scale)
        table[inside] = features.table(train, pairs.requests[inside], pairs.items[inside], statistics=statistics)
    return table


def _item_embeddings(encoder_folder: Path) -> NDArray[np.float32]:
    embeddings: NDArray[np.float32] = np.load(encoder_folder / "item_embeddings.npy", mmap_mode="r", allow_pickle=False)
    return embeddings
