"""The marketplace's parts on their own: catalogue, shoppers, truth, and the request ids that lead back to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.data.marketplace import Marketplace, MarketplaceError
from genrecall.data.marketplace_catalog import SIZES, MarketplaceSize
from genrecall.data.marketplace_production import _noise, _uniform
from genrecall.data.marketplace_shoppers import BLOCK, MarketRequests, _geometric, _misspell
from genrecall.data.marketplace_truth import MISSED_BRAND, MISSED_VALUE, SUBSTITUTE, Truth, examination, grades
from genrecall.data.marketplace_vocabulary import attribute_values, product_types
from genrecall.data.schema import EVENTS, ITEMS, USERS

SMALLEST = MarketplaceSize("smallest", items=150, users=40, requests=BLOCK + 100, departments=1, brands_per_department=4)


@pytest.fixture(scope="module")
def market() -> Marketplace:
    return Marketplace("tiny", seed=3)


def _wish(market: Marketplace, like_row: int, *, values: tuple[int, int] = (-1, -1), brand: int = -1) -> MarketRequests:
    """One hand-made request by the first shopper for the product type of an item."""
    whole = market.requests(["r00000000"])
    return MarketRequests(
        numbers=whole.numbers,
        times=whole.times,
        users=np.array([0], dtype=np.int32),
        types=market.catalog.type_of[[like_row]],
        wanted=np.array([values], dtype=np.int16),
        brands=np.array([brand], dtype=np.int32),
        mood=np.array([0], dtype=np.int8),
        queries=["anything"],
    )


def test_relevance_multiplies_type_values_and_brand(market: Marketplace) -> None:
    catalog = market.catalog
    row = 5
    met, other_brand = int(catalog.values[row, 0]), int(catalog.brand_of[row]) + 1
    missed = next(v for v in range(len(attribute_values())) if v not in catalog.values[row])
    expectations = [
        (_wish(market, row), 1.0),
        (_wish(market, row, values=(met, -1)), 1.0),
        (_wish(market, row, values=(met, missed)), MISSED_VALUE),
        (_wish(market, row, values=(missed, missed)), MISSED_VALUE**2),
        (_wish(market, row, brand=int(catalog.brand_of[row])), 1.0),
        (_wish(market, row, values=(missed, -1), brand=other_brand), MISSED_VALUE * MISSED_BRAND),
    ]
    for request, expected in expectations:
        assert market.relevance(request, np.array([row]))[0, 0] == pytest.approx(expected)


def test_another_type_of_the_aisle_is_a_substitute_and_another_aisle_is_nothing(market: Marketplace) -> None:
    catalog = market.catalog
    aisle = catalog.type_aisle[catalog.type_of]
    row = 0
    substitute = int(np.flatnonzero((aisle == aisle[row]) & (catalog.type_of != catalog.type_of[row]))[0])
    stranger = int(np.flatnonzero(aisle != aisle[row])[0])
    relevance = market.relevance(_wish(market, row), np.array([[row, substitute, stranger, -1]]))
    assert relevance.tolist() == [pytest.approx([1.0, SUBSTITUTE, 0.0, 0.0])]
    assert market.grades(_wish(market, row), np.array([row, substitute, stranger, -1])).tolist() == [[3, 1, 0, 0]]


def test_grades_by_bounds() -> None:
    assert grades(np.array([0.0, 0.05, 0.12, 0.35, 0.45, 0.8, 1.0])).tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_a_favourite_brand_adds_its_weight_to_taste_and_raises_the_chance_of_a_click(market: Marketplace) -> None:
    catalog, shoppers = market.catalog, market.shoppers
    department = int(catalog.type_department[catalog.type_of[0]])
    row = int(np.flatnonzero(catalog.brand_of == shoppers.favourite_brands[0, department, 0])[0])
    indifferent = Truth(catalog, replace(shoppers, favourite_brands=np.full_like(shoppers.favourite_brands, -1)))
    request, pair = _wish(market, row), (np.array([0]), np.array([row]))
    assert market.truth.taste(request, *pair)[0] == pytest.approx(indifferent.taste(request, *pair)[0] + 1.1, abs=1e-5)
    assert 0.0 < indifferent.click_probability(request, *pair)[0] < market.click_probability(request, pair[1])[0, 0] < 1.0


def test_examination_falls_with_the_place() -> None:
    assert examination(3).tolist() == pytest.approx([1.0, 2**-0.6, 3**-0.6])


def test_simulated_pages_respect_empty_places_and_the_order_of_actions(market: Marketplace) -> None:
    requests = market.requests([f"r{n:08d}" for n in range(400)])
    pages = np.stack([np.pad(market.relevant_items(one, at_least=0.1)[:6], (0, 6), constant_values=-1)[:6] for one in requests.request_ids])
    outcome = market.simulate_page(requests, pages, np.random.default_rng(0))
    again = market.simulate_page(requests.request_ids, pages, np.random.default_rng(0))
    assert np.array_equal(outcome.clicks, again.clicks)
    assert outcome.clicks.any()
    assert not outcome.clicks[pages < 0].any()
    assert not (outcome.carts & ~outcome.clicks).any()
    assert not (outcome.purchases & ~outcome.carts).any()
    prices = np.where(pages >= 0, market.catalog.prices[pages], 0.0)
    assert outcome.gmv == pytest.approx((outcome.purchases * prices).sum(axis=1))


def test_click_rate_of_a_simulated_page_is_examination_times_probability(market: Marketplace) -> None:
    row = 7
    request = _wish(market, row)
    many = request.take(np.zeros(20_000, dtype=np.int64))
    outcome = market.simulate_page(many, np.full((20_000, 2), row), np.random.default_rng(1))
    expected = float(market.click_probability(request, np.array([row]))[0, 0]) * examination(2)
    assert outcome.clicks.mean(axis=0) == pytest.approx(expected, abs=0.015)


def test_requests_come_back_in_the_order_asked_and_alone_or_together_alike(market: Marketplace) -> None:
    ids = ["r00001300", "r00000002", "r00001300", "r00000900"]
    together = market.requests(ids)
    assert together.request_ids == ids
    for n, one in enumerate(ids):
        alone = market.requests([one])
        assert alone.queries == [together.queries[n]]
        assert alone.times[0] == together.times[n]
        assert np.array_equal(alone.wanted[0], together.wanted[n])


def test_item_ids_and_rows_are_one_to_one(market: Marketplace) -> None:
    rows = np.array([0, 17, 399])
    assert market.catalog.rows_of(market.catalog.item_ids(rows)).tolist() == rows.tolist()
    assert market.catalog.rows_of(["i0000400", "x", ""]).tolist() == [-1, -1, -1]


def test_tables_have_the_canonical_schemas_and_sorted_ids(market: Marketplace) -> None:
    items, users = pa.concat_tables(market.items()), pa.concat_tables(market.users())
    assert items.schema == ITEMS
    assert users.schema == USERS
    assert items["item_id"].to_pylist() == sorted(items["item_id"].to_pylist())
    assert next(iter(market.events())).schema == EVENTS


def test_a_request_does_not_depend_on_how_many_shoppers_search_after_it() -> None:
    longer = Marketplace(MarketplaceSize("longer", **{**_counts(SMALLEST), "requests": 2 * BLOCK}), seed=1)
    shorter = Marketplace(SMALLEST, seed=1)
    ids = [f"r{n:08d}" for n in range(BLOCK, BLOCK + 100)]
    assert shorter.requests(ids).users.tolist() == longer.requests(ids).users.tolist()


def _counts(size: MarketplaceSize) -> dict[str, int]:
    return {name: value for name, value in vars(size).items() if name != "name"}


@pytest.mark.parametrize("request_id", ["r00001500", "x00000001", "r", "r-1", ""])
def test_a_foreign_request_id_is_an_error(market: Marketplace, request_id: str) -> None:
    with pytest.raises(MarketplaceError, match=f"request id {request_id!r}: this marketplace has r00000000 to r00001499"):
        market.requests([request_id])


def test_wrong_use_is_an_error(market: Marketplace) -> None:
    with pytest.raises(MarketplaceError, match="marketplace size 'huge': expected one of tiny, small, medium, large"):
        Marketplace("huge")
    with pytest.raises(MarketplaceError, match="item_rows: expected rows from -1 to 399, got 0 to 400"):
        market.relevance(["r00000000"], np.array([0, 400]))
    with pytest.raises(MarketplaceError, match="expected at least one request id"):
        market.requests([])
    with pytest.raises(ValueError, match=r"pages: expected one row of item rows for each of 1 requests, got shape \(2, 1\)"):
        market.simulate_page(["r00000000"], np.zeros((2, 1), dtype=int), np.random.default_rng(0))
    with pytest.raises(ValueError, match="all counts must be at least 1 and departments at most 10"):
        MarketplaceSize("none", items=0, users=1, requests=1, departments=1, brands_per_department=1)


def test_the_smallest_marketplaces_work() -> None:
    one = Marketplace(MarketplaceSize("one", items=1, users=1, requests=3, departments=1, brands_per_department=1), seed=0)
    events = pa.concat_tables(one.events())
    assert set(events["item_id"].to_pylist()) <= {"i0000000"}


def test_no_brand_is_a_known_name() -> None:
    known = {
        "sony",
        "apple",
        "samsung",
        "nike",
        "adidas",
        "bosch",
        "makita",
        "ikea",
        "philips",
        "braun",
        "lego",
        "dyson",
        "canon",
        "puma",
        "asics",
        "weber",
        "tefal",
    }
    for size in SIZES.values():
        brands = Marketplace(MarketplaceSize(size.name, **{**_counts(size), "items": 500, "users": 5, "requests": 5})).catalog.brand_names
        assert len(set(brands)) == size.departments * size.brands_per_department
        assert not known & {brand.lower() for brand in brands}
    assert all(name == name.lower() for kind in product_types(10) for name in kind.titles + kind.colloquial)


def test_shoppers_words_differ_from_title_names() -> None:
    for kind in product_types(10):
        assert not set(kind.titles) & set(kind.colloquial), kind


@given(st.text("abcdefgh ", min_size=1, max_size=30), st.floats(0, 0.999), st.floats(0, 0.999), st.floats(0, 0.999))
def test_a_misspelling_is_one_slip(text: str, which: float, where: float, how: float) -> None:
    changed = _misspell(text, which, where, how)
    assert abs(len(changed) - len(text)) <= 1
    assert len(changed.split(" ")) == len(text.split(" "))
    assert changed[:1] == text[:1]


@given(st.floats(0, 0.999999), st.integers(1, 6))
def test_geometric_places_are_in_range(u: float, count: int) -> None:
    assert 0 <= _geometric(u, 0.5, count) < count


def test_geometric_halves_each_time() -> None:
    places = [_geometric(u, 0.5, 3) for u in np.linspace(0, 0.9999, 7000)]
    assert np.bincount(places) / len(places) == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.001)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_hashed_numbers_are_the_same_alone_and_in_company(first: int, second: int) -> None:
    alone = _uniform(np.array([first]), np.array([second]), 5)
    company = _uniform(np.array([1, first]), np.array([2, second]), 5)
    assert alone[0] == company[1]
    assert 0.0 <= alone[0] < 1.0


def test_hashed_noise_is_standard() -> None:
    noise = _noise(np.arange(50_000) // 100, np.arange(50_000) % 100, 0)
    assert (noise.mean(), noise.std()) == pytest.approx((0.0, 1.0), abs=0.02)
