"""Pair features, worked out on a catalogue of four items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.ranking.features import (
    CLICK_RATE_PRIOR_EXPOSURES,
    FEATURES,
    PairFeatures,
    item_statistics,
    positions_in,
    propensity,
)

VECTORS = np.eye(4, dtype=np.float32)


def catalog(**changes) -> Catalog:
    columns = {
        "item_ids": np.array(["a", "b", "c", "d"], dtype=object),
        "titles": ["red lamp", "blue lamp", "red chair", "sofa"],
        "category_paths": [("home", "light"), ("home", "light"), ("home", "seat"), ()],
        "brands": ["lux", "lux", "sit", ""],
        "texts": ["warm glow", "", "oak", ""],
        "prices": np.array([10.0, 20.0, 40.0, np.nan]),
        "prior_scores": np.array([0.1, 0.2, 0.3, 0.0]),
        "first_seen": np.full(4, np.datetime64("NaT"), dtype="datetime64[us]"),
        **changes,
    }
    return Catalog(**columns)


def requests(queries, history=None, exposed=None, clicked=None, purchased=None) -> Requests:
    count = len(queries)

    def arrays(lists):
        return [np.array(one, dtype=np.int32) for one in (lists or [[]] * count)]

    return Requests(
        request_ids=[str(i) for i in range(count)],
        user_ids=[None] * count,
        queries=list(queries),
        genders=[None] * count,
        age_bands=[None] * count,
        times=np.arange(count, dtype=np.int64),
        exposed=arrays(exposed),
        clicked=arrays(clicked),
        purchased=arrays(purchased),
        history=arrays(history),
        grades=[np.full(len(one), np.nan, dtype=np.float32) for one in arrays(exposed)],
    )


def encode(texts) -> np.ndarray:
    return np.tile(np.array([[0.6, 0.8, 0.0, 0.0]], dtype=np.float32), (len(texts), 1))


def features(seen: Requests | None = None, **changes) -> PairFeatures:
    return PairFeatures(catalog(**changes), VECTORS, encode, item_statistics(seen or requests([]), 4))


def row(query="red lamp", history=(), item=0, **kwargs) -> dict[str, float]:
    table = features(**kwargs).table(requests([query], history=[list(history)]), np.array([0]), np.array([item]))
    return dict(zip(FEATURES, table[0].tolist(), strict=True))


def test_cosine_is_that_of_the_encoder():
    assert row(item=0)["cosine"] == pytest.approx(0.6)
    assert row(item=1)["cosine"] == pytest.approx(0.8)


def test_coverage_weighs_words_by_rarity():
    # "warm" is in one item, so its rarity is log(1 + 4 / 2); "red" is in two: log(1 + 4 / 3); "zzz" in none: log(1 + 4).
    warm, red, unseen = math.log(3), math.log(7 / 3), math.log(5)
    found = row("red warm zzz", item=0)
    assert found["title_coverage"] == pytest.approx(red / (warm + red + unseen), rel=1e-5)
    assert found["text_coverage"] == pytest.approx((red + warm) / (warm + red + unseen), rel=1e-5)


def test_title_share_counts_title_brand_and_leaf_category():
    assert row("red lamp", item=0)["title_share"] == pytest.approx(2 / 4)  # red, lamp of red, lamp, lux, light


def test_trigram_jaccard_is_exact_also_for_trigrams_the_catalogue_lacks():
    # query " sofas " has _so sof ofa fas as_; item " sofa " has _so sof ofa fa_: 3 shared of 6
    assert row("sofas", item=3)["trigram_jaccard"] == pytest.approx(3 / 6)


def test_empty_query_matches_nothing():
    found = row("", item=0)
    assert [found[name] for name in ("title_coverage", "text_coverage", "title_share", "trigram_jaccard")] == [0.0] * 4


def test_prices():
    found = row(history=[1, 2, 3], item=0)  # mean of log 20 and log 40; item 3 has no price
    assert found["log_price"] == pytest.approx(math.log(10), rel=1e-6)
    assert found["price_ratio"] == pytest.approx(math.log(10) - (math.log(20) + math.log(40)) / 2, rel=1e-6)


def test_affinities_to_the_history():
    found = row(history=[1, 2, 1], item=0)
    assert found["brand_affinity"] == pytest.approx(2 / 3)
    assert found["category_affinity"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert found["in_history"] == 0.0
    assert row(history=[1, 0], item=0)["in_history"] == 1.0


def test_what_a_site_does_not_log_is_nan():
    no_history = row(item=0)
    assert all(math.isnan(no_history[name]) for name in ("price_ratio", "brand_affinity", "category_affinity", "in_history"))
    bare = row(history=[0], item=3)
    assert all(math.isnan(bare[name]) for name in ("log_price", "price_ratio", "brand_affinity", "category_affinity"))
    assert math.isnan(row(item=0, prices=np.full(4, np.nan))["log_price"])
    assert math.isnan(row(item=0, prices=np.zeros(4))["log_price"])


def test_popularity_and_smoothed_click_rate():
    seen = requests(["x", "y"], exposed=[[0, 1], [0, 2]], clicked=[[0], [0]])
    found = row(item=0, seen=seen)
    assert found["log_popularity"] == pytest.approx(math.log(3))
    assert found["click_rate"] == pytest.approx((2 + CLICK_RATE_PRIOR_EXPOSURES * 0.5) / (2 + CLICK_RATE_PRIOR_EXPOSURES))


def test_exposures_count_by_the_propensity_of_their_position():
    seen = item_statistics(requests(["x"], exposed=[[2, 0, 1]], clicked=[[1]]), 4, position_bias=1.0)
    assert seen.exposures.tolist() == pytest.approx([1 / 2, 1 / 3, 1.0, 0.0])
    assert seen.clicks.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert propensity(np.array([0, 3]), 0.5).tolist() == [1.0, 0.5]


def test_places_in_ragged_lists():
    assert positions_in(np.array([0, 0, 0, 2, 5, 5])).tolist() == [0, 1, 2, 0, 0, 1]


def test_a_pair_has_the_same_features_alone_and_in_company(monkeypatch):
    built = features()
    some = requests(["red lamp", "sofa", "red lamp", ""], history=[[1], [], [0, 2], [3]])
    pairs = np.array([[r, i] for r in range(4) for i in range(4)])
    together = built.table(some, pairs[:, 0], pairs[:, 1])
    alone = np.concatenate([built.table(some.take(np.array([r])), np.array([0]), np.array([i])) for r, i in pairs])
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    monkeypatch.setattr("genrecall.ranking.features._CHUNK_PAIRS", 3)
    np.testing.assert_allclose(built.table(some, pairs[:, 0], pairs[:, 1]), together, rtol=1e-6)


def test_no_pairs_give_an_empty_table():
    assert features().table(requests(["x"]), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).shape == (0, len(FEATURES))
