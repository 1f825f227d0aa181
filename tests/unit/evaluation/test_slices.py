from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import Requests, load_requests
from genrecall.evaluation.slices import cold_items, frequency_parts, request_slices, sample_requests
from genrecall.storage import Artifact

Log = dict[str, list[dict[str, Any]]]


@pytest.fixture
def loaded(make_dataset: Callable[..., Artifact], log: Log, tmp_path: Path) -> Callable[..., tuple[Any, Requests, Requests]]:
    def load(log: Log = log) -> tuple[Any, Requests, Requests]:
        dataset = make_dataset(tmp_path / "d", log)
        catalog = load_catalog(dataset)
        return catalog, load_requests(dataset, "train", catalog), load_requests(dataset, "test", catalog)

    return load


def test_a_third_of_the_traffic_each() -> None:
    # 12 requests: a makes 4 (starts at 0), b 4 (starts at 4 = one third), c 2 (starts at 8 = two thirds), d and e 1 each.
    assert frequency_parts(Counter(a=4, b=4, c=2, d=1, e=1)) == {"a": "head", "b": "torso", "c": "tail", "d": "tail", "e": "tail"}
    assert frequency_parts(Counter(a=9, b=1)) == {"a": "head", "b": "tail"}


def test_sample_is_seeded_and_bounded(loaded: Callable[..., Any]) -> None:
    catalog, train, test = loaded()
    first = sample_requests(test, train, catalog, query_kind="real", max_requests=12, seed=1)
    assert len(first.indices) == 12
    assert first.primary.all()
    assert np.array_equal(first.indices, sample_requests(test, train, catalog, query_kind="real", max_requests=12, seed=1).indices)
    assert not np.array_equal(first.indices, sample_requests(test, train, catalog, query_kind="real", max_requests=12, seed=2).indices)
    assert len(sample_requests(test, train, catalog, query_kind="real", max_requests=None, seed=0).indices) == len(test)


def test_headline_of_derived_queries_is_unseen_and_free_of_category_words(loaded: Callable[..., Any], log: Log) -> None:
    queries = ["zzz one", "carpet zzz", str(log["train"][0]["query"])]  # clean; holds its target's category word; seen in training
    rows = [row | {"request_id": f"{row['request_id']}#title", "query": query, "clicked": ["i024"]} for row, query in zip(log["test"], queries, strict=False)]
    catalog, train, test = loaded(log | {"test": rows})
    sample = sample_requests(test, train, catalog, query_kind="derived", max_requests=None, seed=0)
    assert [test.queries[row] for row in sample.indices[sample.primary]] == ["zzz one"]
    assert sample.uniform.all()
    slices = {one.name: one for one in request_slices(test, train, sample, query_kind="derived", bm25_matches=np.array([50, 5, 0]))}
    assert slices["all_queries"].requests.all()
    assert slices["kind_title"].requests.all()
    assert slices["bm25_few"].requests.tolist() == [False, True, False]
    assert slices["bm25_none"].requests.tolist() == [False, False, True]


def test_slices_of_real_queries(loaded: Callable[..., Any]) -> None:
    catalog, train, test = loaded()
    sample = sample_requests(test, train, catalog, query_kind="real", max_requests=None, seed=0)
    slices = {one.name: one for one in request_slices(test, train, sample, query_kind="real", bm25_matches=np.full(len(test), 50))}
    parts = [slices[name].requests for name in ("head", "torso", "tail", "unseen") if name in slices]
    assert (np.sum(parts, axis=0) == 1).all()  # every request lies in exactly one of them
    assert [query.endswith("zzz") for query in test.queries] <= slices["unseen"].requests.tolist()
    assert "without_history" not in slices  # every request is in it: nothing to tell apart
    weights = slices["distinct_queries"].weights
    assert weights is not None
    assert weights.sum() == pytest.approx(len({" ".join(query.casefold().split()) for query in test.queries}))


def test_empty_test_split_is_an_error(loaded: Callable[..., Any], log: Log) -> None:
    catalog, train, test = loaded(log | {"test": []})
    with pytest.raises(ValueError, match="no request with a clicked or exposed item"):
        sample_requests(test, train, catalog, query_kind="real", max_requests=10, seed=0)


def test_cold_items_have_no_training_click_or_purchase() -> None:
    assert cold_items(np.array([0.0, 2.0])).tolist() == [True, False]
