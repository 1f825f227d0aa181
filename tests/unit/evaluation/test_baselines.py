from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np
import pandas as pd
import pytest

from genrecall.data.adapters import home_depot
from genrecall.evaluation.baselines import Bm25, DenseRetriever, analyse, popular_items
from genrecall.evaluation.metrics import Targets, hit_at, mean_over_requests, ranking_positions, recall_at


def test_analysis_splits_letters_from_digits_and_stems() -> None:
    assert analyse(["12ft Angle-Brackets, 3/4in"]) == [["12", "ft", "angl", "bracket", "3", "4", "in"]]
    assert analyse(["红色 iPhone15"]) == [["红", "色", "iphon", "15"]]
    assert analyse(["", "--- !"]) == [[], []]


def test_ranking_equals_bm25s_own_search() -> None:
    rng = np.random.default_rng(0)
    words = [f"{letter}{letter}" for letter in "abcdefghijklmnop"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(200)]
    queries = [" ".join(rng.choice(words, size=rng.integers(1, 4))) for _ in range(20)]
    ranked, matches = Bm25(texts).search(queries, 30)
    plain = bm25s.BM25(k1=1.2, b=0.5, method="lucene")
    plain.index(analyse(texts), show_progress=False)
    for query, row, count in zip(analyse(queries), ranked, matches, strict=True):
        scores = plain.get_scores(query)
        assert count == np.count_nonzero(scores)
        expected = np.lexsort((np.arange(200), -np.round(scores, 4)))[: min(30, count)]
        np.testing.assert_allclose(scores[row[row >= 0]], scores[expected], rtol=1e-4)
        assert (row >= 0).sum() == min(30, count)


def test_only_items_that_share_a_word_are_returned() -> None:
    ranked, matches = Bm25(["red lamp", "blue lamp", "drill"]).search(["lamps", "unknown", ""], 3)
    assert sorted(ranked[0][:2].tolist()) == [0, 1]
    assert ranked[0][2] == -1
    assert matches.tolist() == [2, 0, 0]
    assert (ranked[1:] == -1).all()


def test_a_catalogue_without_a_word_finds_nothing() -> None:
    ranked, matches = Bm25(["", "..."]).search(["lamp"], 2)
    assert (ranked == -1).all()
    assert matches.tolist() == [0]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_dense_channel_finds_the_nearest_and_pads_small_catalogues(kind: str) -> None:
    items = np.eye(4, dtype=np.float32)
    found = DenseRetriever(items, kind=kind).search(np.array([[0.1, 0.9, 0.2, 0.0]], dtype=np.float32), 6)
    assert found[0].tolist() == [1, 2, 0, 3, -1, -1]


def test_dense_channel_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="expected item embeddings"):
        DenseRetriever(np.zeros((0, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="expected 'flat' or 'hnsw'"):
        DenseRetriever(np.eye(2, dtype=np.float32), kind="ivf")


def test_popularity_leaves_out_items_without_an_event() -> None:
    assert popular_items(np.array([0.0, 3.0, 1.0, 3.0]), 2, 4).tolist() == [[1, 3, 2, -1]] * 2


def test_tuned_bm25_reaches_its_calibration_on_home_depot(real_data: Callable[[str], Path]) -> None:
    """Over all shipped queries with a target: hit@10 .70 and recall@100 .757 (plain bm25s: .61 and .67)."""
    folder = real_data("home_depot")
    products, judgments = pd.read_csv(folder / "products.csv.gz"), pd.read_csv(folder / "judgments.csv.gz")
    good = judgments[judgments["relevance"] >= home_depot.CLICK_GRADE]
    good = good.assign(row=pd.Index(products["product_uid"]).get_indexer(good["product_uid"]))
    clicked = good.groupby("search_term")["row"].apply(np.array)
    titles = products["product_title"].fillna("").tolist()
    targets = Targets.from_lists(list(clicked))
    positions = ranking_positions(Bm25(titles).search(list(clicked.index), 100)[0], targets)
    assert len(clicked) == pytest.approx(8815, abs=10)
    assert mean_over_requests(hit_at(positions, targets, 10)) >= 0.69
    assert mean_over_requests(recall_at(positions, targets, 100)) >= 0.75
