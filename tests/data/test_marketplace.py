"""The marketplace as a whole: the same for a seed, streamed, position-biased, explored, and worth learning from."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from genrecall.data.marketplace import Marketplace
from genrecall.data.marketplace_catalog import NEW_ITEM_SHARE, WINDOW_END, WINDOW_START, MarketplaceSize
from genrecall.data.marketplace_production import EXPLORATION
from genrecall.data.marketplace_shoppers import BLOCK
from genrecall.data.schema import EVENTS


@pytest.fixture(scope="module")
def market() -> Marketplace:
    return Marketplace("small", seed=0)


@pytest.fixture(scope="module")
def log(market: Marketplace) -> pd.DataFrame:
    frame = pa.concat_tables(market.events()).to_pandas()
    frame["row"] = market.catalog.rows_of(frame["item_id"].tolist())
    return frame


def _digest(market: Marketplace) -> int:
    tables = [pa.concat_tables(chunks).to_pandas().astype(str) for chunks in (market.items(), market.users(), market.events())]
    return sum(int(pd.util.hash_pandas_object(table, index=True).sum() % 2**60) for table in tables)


def test_a_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert _digest(Marketplace("tiny", seed=4)) == _digest(Marketplace("tiny", seed=4))
    assert _digest(Marketplace("tiny", seed=4)) != _digest(Marketplace("tiny", seed=5))


def test_sizes_are_as_documented(market: Marketplace, log: pd.DataFrame) -> None:
    assert len(market.catalog) == 2_000
    assert log.request_id.nunique() == 8_000
    assert 70_000 < (log.action == "exposure").sum() < 100_000
    categorised = market.catalog.categorised.mean()
    assert 0.93 < categorised < 0.97


def test_events_stream_in_time_order_in_bounded_chunks(market: Marketplace) -> None:
    latest = np.datetime64(WINDOW_START)
    for chunk in market.events():
        assert chunk.schema == EVENTS
        assert chunk.num_rows < 20 * BLOCK
        times = chunk["timestamp"].to_numpy()
        assert (np.diff(times) >= np.timedelta64(0)).all()
        assert times[0] >= latest
        latest = times[-1]
    assert latest < WINDOW_END + np.timedelta64(1, "h")


def test_memory_does_not_grow_with_the_number_of_requests() -> None:
    def peak(requests: int) -> int:
        size = MarketplaceSize("stream", items=500, users=100, requests=requests, departments=2, brands_per_department=5)
        market = Marketplace(size, seed=0)
        market.production._cache.clear()
        tracemalloc.start()
        stream: Iterator[pa.Table] = market.events()
        rows = sum(chunk.num_rows for chunk in stream)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows > 8 * requests
        return top

    small, large = peak(2 * BLOCK), peak(8 * BLOCK)
    assert large < 1.4 * small + 4e6  # the cache of query matches fills up to its bound


def test_clicks_fall_with_position_at_equal_relevance(market: Marketplace, log: pd.DataFrame) -> None:
    exposures = log[log.action == "exposure"]
    requests = market.requests(list(dict.fromkeys(exposures.request_id)))
    number = {one: n for n, one in enumerate(requests.request_ids)}
    which = exposures.request_id.map(number).to_numpy()
    relevance = market.truth.relevance(requests, which, exposures.row.to_numpy())
    clicked = set(zip(log[log.action == "click"].request_id, log[log.action == "click"].row, strict=True))
    full = exposures[relevance >= 0.99]
    hit = np.array([pair in clicked for pair in zip(full.request_id, full.row, strict=True)])
    rate = pd.Series(hit).groupby(full.position.to_numpy()).mean()
    assert rate[0] > 1.3 * rate[1] > 1.3 * rate[4]
    assert rate[0] > 3.0 * rate[9]


def test_one_place_in_twenty_is_exploration_and_is_known(market: Marketplace, log: pd.DataFrame) -> None:
    explored = places = 0
    for block in range(4):
        requests = market._block(block)
        pages = market.production.pages(requests, np.random.default_rng([market.seed, 404, block]))
        explored, places = explored + int(pages.explored.sum()), places + int((pages.rows >= 0).sum())
    assert explored / places == pytest.approx(EXPLORATION, abs=0.006)


def test_the_page_of_a_request_can_be_asked_for_again(market: Marketplace, log: pd.DataFrame) -> None:
    for request_id in ("r00000000", "r00003333", "r00007999"):
        logged = log[(log.request_id == request_id) & (log.action == "exposure")].sort_values("position").row.tolist()
        page = market.shown(request_id)
        assert page.rows[0][page.rows[0] >= 0].tolist() == logged
        assert not page.explored[page.rows < 0].any()


def test_nothing_is_shown_before_it_has_arrived(market: Marketplace, log: pd.DataFrame) -> None:
    first_seen = market.catalog.first_seen[log.row.to_numpy()]
    assert (log.timestamp.astype("int64").to_numpy() >= first_seen).all()
    arrivals = market.catalog.first_seen >= WINDOW_START.astype(np.int64)
    assert arrivals.mean() == pytest.approx(NEW_ITEM_SHARE, abs=0.03)
    shown_new = np.isin(np.flatnonzero(arrivals), log.row.unique()).mean()
    assert shown_new > 0.5


def test_truth_reaches_items_that_were_never_shown(market: Marketplace, log: pd.DataFrame) -> None:
    shown = log[log.action == "exposure"].groupby("request_id").row.agg(set)
    unseen = [len(set(market.relevant_items(one).tolist()) - shown[one]) for one in shown.index[:300]]
    assert np.mean([count > 0 for count in unseen]) > 0.3


def test_next_day_queries_include_heads_and_unseen_ones(log: pd.DataFrame) -> None:
    queries = log.drop_duplicates("request_id")["query"].tolist()
    cut = int(0.9 * len(queries))
    seen = set(queries[:cut])
    unseen = np.mean([query not in seen for query in queries[cut:]])
    assert 0.3 < unseen < 0.7
    counts = pd.Series(queries).value_counts()
    assert counts.iloc[:100].sum() / len(queries) > 0.15
    assert counts.iloc[0] > 40


def test_feedback_is_plausible(log: pd.DataFrame) -> None:
    count = log.action.value_counts()
    assert 0.05 < count["click"] / count["exposure"] < 0.15
    assert 0.1 < count["purchase"] / log.request_id.nunique() < 0.4
    keys = {action: set(zip(part.request_id, part.row, strict=True)) for action, part in log.groupby("action")}
    assert keys["purchase"] <= keys["cart"] <= keys["click"] <= keys["exposure"]


def test_words_alone_miss_a_share_of_the_clicked_items(market: Marketplace, log: pd.DataFrame) -> None:
    words = [set(title.lower().split()) for title in market.catalog.titles]
    clicks = log[log.action == "click"].iloc[:3000]
    without_a_word = np.mean([not words[row] & set(query.split()) for row, query in zip(clicks.row, clicks["query"], strict=True)])
    assert 0.15 < without_a_word < 0.5


def test_history_tells_what_a_shopper_will_click(market: Marketplace, log: pd.DataFrame) -> None:
    """The brand of a clicked item was clicked before by the same shopper more often than that of the items shown beside it."""
    before: dict[str, set[int]] = {}
    clicked_known, shown_known = [], []
    brand = market.catalog.brand_of
    for user, action, row in zip(log.user_id, log.action, log.row, strict=True):
        known = before.setdefault(user, set())
        if len(known) >= 3 and action in ("click", "exposure"):
            (clicked_known if action == "click" else shown_known).append(int(brand[row]) in known)
        if action == "click":
            known.add(int(brand[row]))
    assert np.mean(clicked_known) > np.mean(shown_known) + 0.05


def test_popularity_drifts_over_the_window(market: Marketplace) -> None:
    requests = market.requests([f"r{n:08d}" for n in range(8_000)])
    kinds = len(market.catalog.types)
    first, last = (np.bincount(part, minlength=kinds) / 2_000 for part in (requests.types[:2_000], requests.types[-2_000:]))
    assert 0.05 < 0.5 * np.abs(first - last).sum() < 0.5


def test_large_is_built_and_streams_its_first_chunk() -> None:
    market = Marketplace("large", seed=0)
    assert len(market.catalog) == 100_000
    assert next(iter(market.events())).num_rows > 8 * BLOCK
