"""The ranking model: labels, calibration, NDCG by hand; training on a world whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from genrecall.config import ConfigError, from_dict
from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.ranking import ranker as module
from genrecall.ranking.features import FEATURES, ItemStatistics, PairFeatures, item_statistics
from genrecall.ranking.ranker import (
    Calibration,
    Ranker,
    RankerConfig,
    RankerError,
    calibration_error,
    fit_calibration,
    fit_ranker,
    load_ranker,
    ndcg,
)

WORDS = ["lamp", "chair", "sofa", "table", "desk", "rug"]
COLOURS = ["red", "blue", "green", "white", "black"]


def world(count: int, seed: int, *, prices: bool = True) -> tuple[Catalog, Requests]:
    """30 items (colour x thing); a shopper asks for a thing, sees eight items, and clicks those of that thing most of the time."""
    rng = np.random.default_rng(seed)
    titles = [f"{colour} {word}" for word in WORDS for colour in COLOURS]
    catalog = Catalog(
        item_ids=np.array([f"i{n:02d}" for n in range(30)], dtype=object),
        titles=titles,
        category_paths=[(word,) for word in WORDS for _ in COLOURS],
        brands=[""] * 30,
        texts=[""] * 30,
        prices=np.arange(1.0, 31.0) if prices else np.full(30, np.nan),
        prior_scores=np.zeros(30),
        first_seen=np.full(30, np.datetime64("NaT"), dtype="datetime64[us]"),
    )
    asked = rng.integers(0, 6, count)
    exposed = [np.concatenate([[a * 5 + rng.integers(0, 5)], rng.choice(30, 7, replace=False)]).astype(np.int32) for a in asked]
    exposed = [np.array(list(dict.fromkeys(rng.permutation(one).tolist())), dtype=np.int32) for one in exposed]
    clicked = [one[(one // 5 == a) & (rng.random(len(one)) < 0.9)] for one, a in zip(exposed, asked, strict=True)]
    requests = Requests(
        request_ids=[str(n) for n in range(count)],
        user_ids=[None] * count,
        queries=[WORDS[a] for a in asked],
        genders=[None] * count,
        age_bands=[None] * count,
        times=np.arange(count, dtype=np.int64),
        exposed=exposed,
        clicked=clicked,
        purchased=[one[:0] for one in clicked],
        history=[np.zeros(0, dtype=np.int32)] * count,
        grades=[np.full(len(one), np.nan, dtype=np.float32) for one in exposed],
    )
    return catalog, requests


def flat_encoder(texts) -> np.ndarray:
    return np.ones((len(texts), 1), dtype=np.float32)


def built(catalog: Catalog, train: Requests) -> PairFeatures:
    return PairFeatures(catalog, np.ones((len(catalog), 1), dtype=np.float32), flat_encoder, item_statistics(train, len(catalog)))


def one_request(exposed, clicked=(), purchased=(), grades=None) -> Requests:
    def array(values):
        return np.array(values, dtype=np.int32)

    return Requests(
        request_ids=["r"],
        user_ids=[None],
        queries=["q"],
        genders=[None],
        age_bands=[None],
        times=np.zeros(1, dtype=np.int64),
        exposed=[array(exposed)],
        clicked=[array(clicked)],
        purchased=[array(purchased)],
        history=[array([])],
        grades=[np.array(grades if grades is not None else [np.nan] * len(exposed), dtype=np.float32)],
    )


SMALL = RankerConfig(trees=40, leaves=7, min_rows_per_leaf=5, random_negatives=4, max_train_requests=400)


def test_model_learns_what_shoppers_click():
    catalog, requests = world(600, 0)
    train, validation = requests.take(np.arange(450)), requests.take(np.arange(450, 600))
    features = built(catalog, train)
    booster, calibration, metrics = fit_ranker(SMALL, features, train, validation)
    assert metrics["ndcg@10"] > 0.95 > metrics["ndcg@10_logged_order"]
    assert metrics["calibration_error"] < 0.08
    ranker = Ranker(booster, calibration, features)
    ask = one_request([0])
    ask.queries[0] = "sofa"
    wanted, other = ranker.score(ask, np.zeros(5, dtype=np.int64), np.arange(10, 15)), ranker.score(ask, np.zeros(5, dtype=np.int64), np.arange(0, 5))
    assert wanted.min() > 0.5 > 0.3 > other.max()


def test_training_is_the_same_for_the_same_seed():
    catalog, requests = world(200, 1)
    features = built(catalog, requests)
    first, second = (fit_ranker(SMALL, features, requests, requests)[0].model_to_string() for _ in range(2))
    assert first == second


def test_ranker_survives_its_files(tmp_path, monkeypatch):
    catalog, requests = world(200, 2, prices=False)
    features = built(catalog, requests)
    booster, calibration, _ = fit_ranker(SMALL, features, requests, requests)
    booster.save_model(str(tmp_path / "model.txt"))
    facts = {"features": list(FEATURES), "calibration": {"slope": calibration.slope, "intercept": calibration.intercept}}
    (tmp_path / "ranker.json").write_text(json.dumps(facts))
    statistics = features.statistics
    np.save(tmp_path / "item_statistics.npy", np.stack([statistics.clicks, statistics.exposures], axis=1))
    np.save(tmp_path / "item_embeddings.npy", np.ones((30, 1), dtype=np.float32))
    monkeypatch.setattr(module, "load_encoder", lambda folder: type("Encoder", (), {"encode_queries": staticmethod(flat_encoder)}))
    again = load_ranker(tmp_path, catalog=catalog, encoder_folder=tmp_path)
    rows, items = np.repeat(np.arange(20), 30), np.tile(np.arange(30), 20)
    np.testing.assert_allclose(again.score(requests, rows, items), Ranker(booster, calibration, features).score(requests, rows, items), rtol=1e-9)
    assert again.score(requests, rows[:0], items[:0]).shape == (0,)

    np.save(tmp_path / "item_statistics.npy", np.zeros((29, 2)))
    with pytest.raises(RankerError, match=r"trained on 29 items, the catalogue has 30; rerun jobs/train_ranker\.py"):
        load_ranker(tmp_path, catalog=catalog, encoder_folder=tmp_path)
    (tmp_path / "ranker.json").write_text(json.dumps({**facts, "features": ["magic"]}))
    with pytest.raises(RankerError, match="trained on the features magic, this version builds cosine"):
        load_ranker(tmp_path, catalog=catalog, encoder_folder=tmp_path)


def test_labels_are_purchase_click_exposure():
    assert module._labels_by_request(one_request([4, 5, 6], clicked=[5, 6], purchased=[6]))[0].tolist() == [0, 1, 3]


def test_labels_are_grades_where_judged():
    judged = one_request([1, 2, 3, 4, 5], clicked=[5], grades=[1.0, 1.67, 2.33, 3.0, math.nan])
    assert module._labels_by_request(judged)[0].tolist() == [0, 1, 2, 3, 1]


def pairs_of(requests, num_items=30, **settings):
    return module._draw_pairs(RankerConfig(**settings), requests, num_items, np.random.default_rng(0), limit=100)


@pytest.mark.parametrize("request_", [one_request([1, 2]), one_request([1, 2], clicked=[1, 2])])
def test_request_without_contrast_teaches_nothing(request_):
    catalog, _ = world(1, 0)
    with pytest.raises(RankerError, match="no request has both a clicked"):
        fit_ranker(RankerConfig(random_negatives=0), built(catalog, request_), request_, request_)


def test_log_of_clicks_alone_learns_against_random_items_and_says_so():
    catalog, requests = world(300, 6)
    clicks_only = replace(requests, exposed=requests.clicked, grades=[np.full(len(one), np.nan, dtype=np.float32) for one in requests.clicked])
    _, _, metrics = fit_ranker(SMALL, built(catalog, clicks_only), clicks_only, clicks_only)
    assert metrics["ndcg@10_with_random"] > 0.9
    assert math.isnan(metrics["ndcg@10"])
    assert metrics["calibrated_on_shown"] == 0.0


def test_training_rows_never_count_their_own_click():
    catalog, requests = world(50, 3)
    features = built(catalog, requests)
    pairs = pairs_of(requests, random_negatives=0)
    table = module._out_of_fold(RankerConfig(statistics_folds=50), features, requests, pairs)
    popularity = np.expm1(table[:, FEATURES.index("log_popularity")])
    own = np.array([item in requests.clicked[row] for row, item in zip(pairs.requests, pairs.items, strict=True)])
    np.testing.assert_allclose(popularity, (features.statistics.clicks[pairs.items] - own) * 50 / 49, rtol=1e-4)


def test_random_negatives_are_unexposed_and_labelled_zero():
    _, requests = world(40, 4)
    pairs = pairs_of(requests, random_negatives=6)
    assert 0 < (~pairs.shown).sum() <= 6 * len(pairs.groups)
    assert (pairs.labels[~pairs.shown] == 0).all()
    assert not any(item in requests.exposed[row] for row, item in zip(pairs.requests[~pairs.shown], pairs.items[~pairs.shown], strict=True))
    assert pairs.groups.sum() == len(pairs.labels)
    assert (np.diff(pairs.requests) >= 0).all()


def test_contrast_is_seen_among_shown_items_only():
    requests = replace(
        world(2, 0)[1],
        exposed=[np.array([1, 2], dtype=np.int32)] * 2,
        clicked=[np.array([1, 2], dtype=np.int32), np.array([2], dtype=np.int32)],
        purchased=[np.zeros(0, dtype=np.int32)] * 2,
        grades=[np.full(2, np.nan, dtype=np.float32)] * 2,
    )
    pairs = pairs_of(requests, random_negatives=2)
    contrast = module._in_group_with_contrast(pairs)
    assert not contrast[pairs.requests == 0].any()
    assert contrast[pairs.requests == 1].all()


def test_clicks_far_down_the_page_weigh_more():
    pairs = pairs_of(one_request(list(range(14)), clicked=[3, 13]), random_negatives=0)
    weights = dict(zip(pairs.items.tolist(), module._click_weights(pairs, 1.0).tolist(), strict=True))
    assert weights == {**dict.fromkeys(range(14), 1.0), 3: 4.0, 13: 10.0}  # not 14
    assert pairs.positions.tolist() == pairs.items.tolist() != list(range(14))


def test_ndcg_by_hand():
    # Group 1: labels by score 0, 3, 1 -> gains 0, 7, 1: dcg = 7 / log2(3) + 1 / 2; ideal 7 + 1 / log2(3). Group 2 has no gain.
    scores = np.array([0.9, 0.5, 0.1, 0.3, 0.2])
    labels = np.array([0, 3, 1, 0, 0])
    expected = (7 / math.log2(3) + 1 / 2) / (7 + 1 / math.log2(3))
    assert ndcg(scores, labels, np.array([3, 2]), depth=10) == pytest.approx(expected)
    assert ndcg(scores, labels, np.array([3, 2]), depth=1) == 0.0
    assert math.isnan(ndcg(scores[3:], labels[3:], np.array([2]), depth=10))


def test_calibration_recovers_the_truth():
    rng = np.random.default_rng(0)
    scores = rng.normal(3.0, 5.0, 20_000)
    clicked = (rng.random(20_000) < 1 / (1 + np.exp(-(0.4 * scores - 2.0)))).astype(np.float64)
    fitted = fit_calibration(scores, clicked)
    assert fitted.slope == pytest.approx(0.4, abs=0.02)
    assert fitted.intercept == pytest.approx(-2.0, abs=0.08)
    assert calibration_error(fitted(scores), clicked) < 0.02


def test_calibration_of_separated_scores_stays_finite_and_rises():
    fitted = fit_calibration(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert math.isfinite(fitted.slope)
    assert fitted.slope > 0
    low, high = fitted(np.array([0.0, 3.0]))
    assert 0.0 < low < 0.5 < high < 1.0


def test_calibration_never_inverts_the_order():
    assert fit_calibration(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.0])).slope > 0


@pytest.mark.parametrize(("clicked", "rate"), [([0.0, 0.0, 0.0], 1 / 5), ([1.0, 1.0, 1.0], 4 / 5), ([], 1 / 2)])
def test_calibration_without_contrast_is_the_smoothed_rate(clicked, rate):
    fitted = fit_calibration(np.zeros(len(clicked)), np.array(clicked))
    assert fitted(np.zeros(1))[0] == pytest.approx(rate)


def test_calibration_error_by_hand():
    assert calibration_error(np.array([0.2, 0.2, 0.8, 0.8]), np.array([0.0, 1.0, 1.0, 1.0]), bins=2) == pytest.approx((0.3 + 0.2) / 2)
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0)))
    assert Calibration(slope=2.0, intercept=0.0)(np.array([0.0]))[0] == 0.5


def test_statistics_subtract():
    left = ItemStatistics(np.array([3.0]), np.array([5.0])).without(ItemStatistics(np.array([1.0]), np.array([2.0])))
    assert (left.clicks[0], left.exposures[0]) == (2.0, 3.0)


def test_impossible_settings_are_listed_together():
    with pytest.raises(ConfigError, match=r"(?s)trees: expected at least 1, got 0.*random_negatives: expected at least 0, got -1"):
        from_dict(RankerConfig, {"trees": 0, "random_negatives": -1})
