from __future__ import annotations

import numpy as np
import pytest

from genrecall.data.marketplace import Marketplace
from genrecall.evaluation.ab_simulation import build_pages, false_alarm_rate, simulate_ab


@pytest.fixture(scope="module")
def market() -> Marketplace:
    return Marketplace("tiny", 0)


@pytest.fixture(scope="module")
def request_ids() -> list[str]:
    return [f"r{number:08d}" for number in range(900, 1400)]


def test_a_channel_of_relevant_items_raises_clicks(market: Marketplace, request_ids: list[str]) -> None:
    oracle = np.argsort(-market.relevance(request_ids, np.arange(len(market.catalog))), axis=1)[:, :50].astype(np.int32)
    result = simulate_ab(market, request_ids, oracle, samples=300)
    assert result.gains["clicks"].low is not None
    assert result.gains["clicks"].low > 0
    assert 0 < result.shares["click_only_share"] < result.shares["click_share"] <= 1


def test_an_empty_channel_changes_no_page(market: Marketplace, request_ids: list[str]) -> None:
    result = simulate_ab(market, request_ids, np.full((len(request_ids), 5), -1, dtype=np.int32), samples=300)
    assert result.shares == {f"{action}_{kind}": 0.0 for action in ("exposure", "click", "purchase") for kind in ("share", "only_share")}
    clicks = result.gains["clicks"]
    assert clicks.low < 0 < clicks.high  # type: ignore[operator]


def test_pages_rank_the_union_and_keep_items_that_had_not_arrived_out(market: Marketplace, request_ids: list[str]) -> None:
    requests = market.requests(request_ids[:1])
    arrived = np.zeros(len(market.catalog), dtype=np.int64)
    arrived[7] = requests.times[0] + 1
    site = (np.array([0, 0]), np.array([3, 5]))
    ours = np.array([[5, 7, 9, -1]], dtype=np.int32)
    pages = build_pages(requests, site, ours, arrived, lambda which, rows: rows.astype(float), page_size=4)
    assert pages.rows.tolist() == [[9, 5, 3, -1]]
    assert pages.from_site.tolist() == [[False, True, True, False]]
    assert pages.from_ours.tolist() == [[True, True, False, False]]


def test_a_a_tests_rarely_look_significant(market: Marketplace, request_ids: list[str]) -> None:
    assert 0.0 <= false_alarm_rate(market, request_ids, runs=60, samples=200) <= 0.15


def test_a_ranking_per_request_is_needed(market: Marketplace, request_ids: list[str]) -> None:
    with pytest.raises(ValueError, match="one row of item rows per request"):
        simulate_ab(market, request_ids, np.zeros((3, 5), dtype=np.int32))
