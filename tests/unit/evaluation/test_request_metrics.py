"""Columns of SID lists and the item lists behind them, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from genrecall.evaluation.metrics import Targets
from genrecall.evaluation.request_metrics import Tiers, invalid_share, item_lists, sid_columns
from genrecall.generator.retriever import GeneratedSids
from genrecall.sid.index import SidIndex

# Seven items in three clusters of equal prior: SID 0 = {0, 1, 2}, SID 1 = {3, 4}, SID 2 = {5, 6}.
INDEX = SidIndex.build(np.array([0, 0, 0, 1, 1, 2, 2], dtype=np.int32), 3, np.zeros(7))
SIDS = np.array([[1, 0], [2, -1]], dtype=np.int32)
SHAPE = {"beams": (1, 2), "budgets": (1, 2, 4), "cut_items": 2, "cut_beams": (2,)}


def clicks(*lists: list[int]) -> Tiers:
    nothing = Targets.from_lists([np.zeros(0, dtype=np.int64)] * len(lists))
    return Tiers(Targets.from_lists([np.array(one, dtype=np.int64) for one in lists]), nothing, nothing, nothing, np.zeros(0))


def test_without_a_ranking_items_of_a_cluster_share_its_places() -> None:
    columns = sid_columns(SIDS, INDEX, clicks([4, 0], [0]), **SHAPE)
    # Request 0: item 4 is one of the two of SID 1, on places 1 and 2; item 0 one of the three of SID 0, on places 3 to 5.
    assert columns["hit@items1"].tolist() == pytest.approx([(1 / 2 + 0) / 2, 0])
    assert columns["hit@items2"].tolist() == pytest.approx([(1 + 0) / 2, 0])
    assert columns["hit@items4"].tolist() == pytest.approx([(1 + 2 / 3) / 2, 0])


def test_a_ranking_of_items_says_what_is_within_the_budget_and_nothing_else() -> None:
    tiers = clicks([4, 0], [0])
    ranked = np.array([[0, 3, 1, 4, 2], [5, 6, -1, -1, -1]], dtype=np.int32)
    columns, plain = sid_columns(SIDS, INDEX, tiers, ranked, **SHAPE), sid_columns(SIDS, INDEX, tiers, **SHAPE)
    assert [columns[f"hit@items{budget}"].tolist() for budget in (1, 2, 4)] == [[0.5, 0], [0.5, 0], [1, 0]]
    for name in plain.keys() - {"hit@items1", "hit@items2", "hit@items4"}:
        np.testing.assert_array_equal(columns[name], plain[name])


def test_invalid_are_sids_that_do_not_exist_or_repeat_an_earlier_one() -> None:
    sid_rows = np.array(
        [
            [0, 1, 2, -1],  # three that are right, the rest is padding
            [2, 0, 2, 2],  # SID 2 comes twice too often
            [0, 3, 1, -1],  # there are SIDs 0 to 2
            [7, 7, -2, 1],  # one that does not exist is wrong once each time, whether it repeats or not
            [-1, -1, -1, -1],
        ],
        dtype=np.int32,
    )
    assert invalid_share(sid_rows, 3).tolist() == pytest.approx([0, 2 / 4, 1 / 3, 3 / 4, np.nan], nan_ok=True)
    repeated = sid_columns(np.array([[1, 1], [2, -1]], dtype=np.int32), INDEX, clicks([4], [0]), **SHAPE)
    assert repeated["invalid@2"].tolist() == [0.5, 0]


def test_items_at_n_is_the_size_of_what_the_first_sids_hold() -> None:
    # SID 1 holds two items and SID 0 three; request 1 has SID 2 alone.
    columns = sid_columns(SIDS, INDEX, clicks([4, 0], [0]), **SHAPE)
    assert columns["items@1"].tolist() == [2, 2]
    assert columns["items@2"].tolist() == [5, 2]


def test_item_lists_are_the_retrievers_answers_padded() -> None:
    found = GeneratedSids(SIDS, np.log(np.array([[0.5, 0.25], [0.5, 0.0]], np.float32) + 1e-9), np.arange(2, dtype=np.float32)[:, None])

    def expand(sid_rows: np.ndarray, scores: np.ndarray, vector: np.ndarray, limit: int) -> SimpleNamespace:
        items = INDEX.expand(sid_rows, limit)[0]
        return SimpleNamespace(item_rows=items[::-1] if vector[0] else items)  # the request's own vector arrives

    ranked = item_lists(SimpleNamespace(expand=expand), found, 4)  # type: ignore[arg-type]
    assert ranked.tolist() == [[3, 4, 0, 1], [6, 5, -1, -1]]
    assert ranked.dtype == np.int32
