"""Filters and their posting lists against plain loops over the catalogue."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.filters import AllowedItems, Filter, FilterError, FilterPostings, load_filters
from genrecall.sid.index import SidIndex

PATHS = [(), ("Home",), ("Home", "Lamps"), ("Home", "Lamps", "Desk"), ("Homes",), ("Home\x00", "Lamps"), ("Home\x01", "Lamps"), ("Garden", "灯"), ("Garden",)]
BRANDS = ["", "Acme", "Acme Tools", "acme", "Zenith\x00", "灯"]
UNKNOWN = [("Attic",), ("Home", "Lamps", "Desk", "Small"), ("Hom",)]


@dataclasses.dataclass(frozen=True)
class Shop:
    """A catalogue by item row."""

    paths: list[tuple[str, ...]]
    brands: list[str]
    listed: np.ndarray
    index: SidIndex

    def postings(self) -> FilterPostings:
        return FilterPostings.build(self.paths, self.brands, self.index)


def some_shop(seed: int, items: int = 400, sids: int = 60) -> Shop:
    """A few items of most categories and brands, and many of some."""
    rng = np.random.default_rng(seed)
    item_sid = rng.integers(0, sids, items).astype(np.int32)
    shares = [rng.dirichlet(np.full(size, 0.4)) for size in (len(PATHS), len(BRANDS))]
    paths, brands = ([values[number] for number in rng.choice(len(values), items, p=share)] for values, share in zip((PATHS, BRANDS), shares, strict=True))
    listed = rng.random(items) < 0.9
    return Shop(paths, brands, listed, SidIndex.build(item_sid, sids, rng.random(items), listed))


def passing_rows(shop: Shop, wanted: Filter, out_of_stock: set[int] = frozenset()) -> set[int]:
    """What the filter's own words say, item by item."""
    return {
        row
        for row in range(len(shop.paths))
        if shop.listed[row]
        and (not wanted.categories or any(shop.paths[row][: len(path)] == path for path in wanted.categories))
        and (not wanted.brands or (shop.brands[row] != "" and shop.brands[row] in wanted.brands))
        and not (wanted.in_stock and row in out_of_stock)
        and row not in wanted.excluded
    }


def check(shop: Shop, allowed: AllowedItems, expected: set[int]) -> None:
    places = np.arange(-2, shop.index.num_published + 40)  # some before, some beyond
    passing = places[allowed.passes(places)]
    assert set(shop.index.item_rows[passing].tolist()) == expected
    assert (np.diff(passing) > 0).all()
    assert allowed.count == len(expected) == len(passing)
    assert np.flatnonzero(allowed.leaves).tolist() == sorted({int(shop.index.item_sid[row]) for row in expected})


FILTERS = st.builds(
    Filter,
    categories=st.lists(st.sampled_from([*PATHS[1:], *UNKNOWN]), max_size=4).map(tuple),
    brands=st.lists(st.sampled_from([*BRANDS, "Nobody"]), max_size=3).map(tuple),
    in_stock=st.booleans(),
    excluded=st.lists(st.integers(0, 450), max_size=30).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 30), wanted=FILTERS, gone=st.sets(st.integers(0, 420), max_size=200))
def test_a_filter_admits_what_a_loop_over_the_catalogue_finds(seed: int, wanted: Filter, gone: set[int]) -> None:
    shop = some_shop(seed)
    postings = shop.postings().with_stock(np.array(sorted(gone), dtype=np.int64))
    check(shop, postings.resolve(wanted), passing_rows(shop, wanted, gone))


def test_few_items_are_listed_and_many_are_bits() -> None:
    # 9 of 288 items take 36 bytes, as a bitmap of 288 bits does; a tenth item makes the list the longer of the two.
    for count, listed in ((0, True), (9, True), (10, False), (288, False)):
        brands = ["Acme"] * count + ["Other"] * (288 - count)
        shop = Shop([()] * 288, brands, np.ones(288, bool), SidIndex.build(np.arange(288, dtype=np.int32) % 7, 7, np.zeros(288)))
        for postings, wanted in ((shop.postings(), Filter(brands=("Acme",))), (shop.postings().with_stock(np.arange(count, 288)), Filter(in_stock=True))):
            allowed = postings.resolve(wanted)
            check(shop, allowed, set(range(count)))
            assert (allowed.places is not None, allowed.bitmap is not None) == ((listed, not listed))
            assert allowed.nbytes == 7 + (4 * count if listed else 36)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.95])
def test_excluded_items_are_taken_off_whichever_form_the_rest_has(share: float) -> None:
    rng = np.random.default_rng(3)
    item_sid = np.sort(rng.integers(0, 100, 300)).astype(np.int32)
    brands = ["Acme" if one < share else "Other" for one in rng.random(300)]
    shop = Shop([()] * 300, brands, np.ones(300, bool), SidIndex.build(item_sid, 100, np.zeros(300)))
    postings = shop.postings()
    whole = postings.resolve(Filter(brands=("Acme",)))
    of_a_sid = shop.index.items(int(item_sid[brands.index("Acme")])).tolist()
    for rows in ([], of_a_sid, of_a_sid[:1], list(range(0, 300, 3)), list(range(300)), [299, 299, 500, 10**9]):
        rest = postings.without(whole, np.array(rows, dtype=np.int64))
        places = np.arange(300)
        kept = [row for row in range(300) if brands[row] == "Acme" and row not in rows]
        assert sorted(shop.index.item_rows[places[rest.passes(places)]].tolist()) == kept
        assert np.flatnonzero(rest.leaves).tolist() == sorted({int(item_sid[row]) for row in kept})
        assert rest.count == len(kept)
    assert whole.count == brands.count("Acme")  # untouched
    assert postings.without(whole, np.array([brands.index("Other")])) is whole


def test_a_category_admits_all_below_it_and_no_namesake() -> None:
    shop = Shop(PATHS, [""] * len(PATHS), np.ones(len(PATHS), bool), SidIndex.build(np.arange(len(PATHS), dtype=np.int32), len(PATHS), np.zeros(len(PATHS))))
    postings = shop.postings()

    def admitted(*paths: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [PATHS[sid] for sid in np.flatnonzero(postings.resolve(Filter(categories=paths)).leaves)]

    assert admitted(("Home",)) == [("Home",), ("Home", "Lamps"), ("Home", "Lamps", "Desk")]
    assert admitted(("Home", "Lamps")) == [("Home", "Lamps"), ("Home", "Lamps", "Desk")]
    assert admitted(("Homes",), ("Garden", "灯")) == [("Homes",), ("Garden", "灯")]
    assert admitted(("Home\x00",)) == [("Home\x00", "Lamps")]
    assert admitted(("Home\x01", "Lamps")) == [("Home\x01", "Lamps")]
    assert admitted(("Home\x00Lamps",)) == admitted(("Ho",)) == admitted(("Lamps",)) == admitted(("\ud800",)) == []


def test_keys_keep_paths_apart_and_below_each_other_whatever_the_names_hold() -> None:
    names = ["", "a", "\x00", "\x01", "\x01\x01", "\x02", "a\x00", "a\x01", "é", "\ud800"]
    paths = [path for depth in (1, 2) for path in itertools.product(names, repeat=depth)]
    index = SidIndex.build(np.zeros(len(paths), dtype=np.int32), 1, np.zeros(len(paths)))
    postings = FilterPostings.build(paths, ["b"] * len(paths), index)
    for path in paths:
        found = postings.resolve(Filter(categories=(path,)))
        places = np.arange(len(paths))
        assert {paths[row] for row in index.item_rows[places[found.passes(places)]]} == {one for one in paths if one[: len(path)] == path}


def test_the_smaller_clause_leads_whichever_it_is() -> None:
    # 3 lamps among 2,000 items of one brand, 2 items of the other brand among 1,997 tools: both ways round the answer is one item.
    paths = [("Lamps",)] * 3 + [("Tools", str(row % 7)) for row in range(1_997)]
    brands = ["Acme"] * 2_000
    brands[1] = brands[10] = "Other"
    shop = Shop(paths, brands, np.ones(2_000, bool), SidIndex.build(np.arange(2_000, dtype=np.int32) % 50, 50, np.zeros(2_000)))
    for wanted, expected in (
        (Filter(categories=(("Lamps",),), brands=("Acme",)), {0, 2}),
        (Filter(categories=(("Lamps",),), brands=("Acme", "Other")), {0, 1, 2}),
        (Filter(categories=(("Tools",),), brands=("Other",)), {10}),
        (Filter(categories=(("Tools", "0"), ("Lamps",)), brands=("Other",)), {1, 10}),
        (Filter(categories=(("Tools", "1"),), brands=("Other",)), set()),
    ):
        check(shop, shop.postings().resolve(wanted), expected)
        sold_out = shop.postings().with_stock(np.array([0, 10, 99]))
        check(shop, sold_out.resolve(wanted), expected)
        check(shop, sold_out.resolve(dataclasses.replace(wanted, in_stock=True)), expected - {0, 10})


def test_no_filter_admits_every_listed_item() -> None:
    shop = some_shop(1)
    check(shop, shop.postings().resolve(Filter()), {row for row in range(400) if shop.listed[row]})


def test_stock_shares_the_lists_and_comes_back() -> None:
    postings = some_shop(2).postings()
    sold_out = postings.with_stock(np.arange(0, 400, 2))
    assert sold_out.categories is postings.categories
    assert sold_out.category_of is postings.category_of
    assert sold_out.resolve(Filter(in_stock=True)).count < postings.resolve(Filter(in_stock=True)).count == postings.resolve(Filter()).count
    assert sold_out.resolve(Filter()).count == postings.resolve(Filter()).count
    assert sold_out.with_stock(np.zeros(0, np.int64)).stock is None


def test_equal_filters_are_one_however_they_are_written() -> None:
    one = Filter(categories=(("Home",), ("Garden", "Hoses")), brands=("b", "a"), excluded=(5, 3))
    other = Filter(categories=(("Garden", "Hoses"), ("Home", "Lamps"), ("Home",), ("Home",)), brands=("a", "b", "b"), excluded=(3, 5, 3))
    assert one == other
    assert hash(one) == hash(other)
    assert other.categories == (("Garden", "Hoses"), ("Home",))
    assert Filter(categories=[["Home"]], excluded=np.array([2, 1], np.int32)) == Filter(categories=(("Home",),), excluded=(1, 2))
    assert not Filter()
    assert all((Filter(in_stock=True), Filter(excluded=(0,)), Filter(brands=("a",)), Filter(categories=(("a",),))))
    assert Filter(categories=(("Home", "a"), ("Home", "b"))).categories == (("Home", "a"), ("Home", "b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"categories": ("Home",)}, r"categories: expected paths of at least one name, root first, such as .* got 'Home'"),
        ({"categories": ((),)}, r"categories: .* got \(\)"),
        ({"categories": "Home"}, "categories: expected a tuple, got 'Home'"),
        ({"categories": ((1,),)}, r"categories: .* got \(1,\)"),
        ({"brands": "Acme"}, "brands: expected a tuple, got 'Acme'"),
        ({"brands": (None,)}, "brands: expected names, got None"),
        ({"in_stock": 1}, "in_stock: expected True or False, got 1"),
        ({"excluded": (-1,)}, "excluded: expected item rows, 0 or more, got -1"),
        ({"excluded": ("i01",)}, "excluded: expected item rows, 0 or more, got 'i01'"),
        ({"brands": (1,), "excluded": (True,)}, "brands: expected names, got 1; excluded: expected item rows, 0 or more, got True"),
    ],
)
def test_a_senseless_filter_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(FilterError, match=message):
        Filter(**values)


@pytest.mark.parametrize("gone", [[], [3, 4, 5, 100]])
def test_saved_lists_read_back_by_memory_map(tmp_path, gone: list[int]) -> None:
    shop = some_shop(5)
    postings = shop.postings().with_stock(np.array(gone, dtype=np.int64))
    shop.index.save(tmp_path / "index")
    postings.save(tmp_path / "filters")
    assert {path.suffix for path in (tmp_path / "filters").iterdir()} == {".npy"}
    again = load_filters(tmp_path)
    assert isinstance(again.brands.places.base, np.memmap)
    assert (again.stock is None) == (not gone)
    for wanted in (Filter(in_stock=True), Filter(brands=("Acme", "灯")), Filter(categories=(("Home",),), brands=("Acme",), excluded=(1, 2))):
        check(shop, again.resolve(wanted), passing_rows(shop, wanted, set(gone)))


def test_lists_of_a_large_catalogue_take_ten_bytes_an_item(tmp_path) -> None:
    rng = np.random.default_rng(0)
    index = SidIndex.build(rng.integers(0, 2_000, 50_000).astype(np.int32), 2_000, np.zeros(50_000))
    paths = [(f"c{number // 40}", f"c{number}") for number in range(1_000)]
    brands = [f"brand {number}" for number in range(500)]
    FilterPostings.from_codes(rng.integers(0, 1_000, 50_000), paths, rng.integers(0, 500, 50_000), brands, index).save(tmp_path)
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    # Two lists of four bytes an item, and two bytes for its category among fewer than 65,536.
    assert sizes["brand_places"] < 4 * 50_000 + 200
    assert sizes["category_of"] < 2 * 50_000 + 200
    assert sum(sizes.values()) < 10 * 50_000 + 50_000


def test_lists_that_do_not_fit_are_refused(tmp_path) -> None:
    shop = some_shop(6)
    with pytest.raises(FilterError, match="expected a category and a brand for each of 400 items, got 399 and 400"):
        FilterPostings.build(shop.paths[1:], shop.brands, shop.index)
    with pytest.raises(FilterError, match=r"brand: \('a',\) is listed twice; list each once"):
        FilterPostings.from_codes(np.zeros(400, int), [("c",)], np.zeros(400, int), ["a", "b", "a"], shop.index)
    with pytest.raises(FilterError, match=r"has no category_key_offsets\.npy; rerun jobs/build_sid_index"):
        FilterPostings.load(tmp_path, shop.index)
    shop.postings().save(tmp_path)
    with pytest.raises(FilterError, match=r"holds \d+ places, its index \d+; rerun"):
        FilterPostings.load(tmp_path, some_shop(7).index)
    np.save(tmp_path / "brand_places.npy", np.zeros(3, np.int32))
    with pytest.raises(FilterError, match="the brand files do not belong together; rerun"):
        FilterPostings.load(tmp_path, shop.index)


def test_a_catalogue_without_categories_and_brands_has_lists_too() -> None:
    shop = Shop([()] * 5, [""] * 5, np.ones(5, bool), SidIndex.build(np.zeros(5, dtype=np.int32), 1, np.zeros(5)))
    postings = shop.postings()
    check(shop, postings.resolve(Filter()), set(range(5)))
    for wanted in (Filter(brands=("a",)), Filter(categories=(("a",),)), Filter(brands=("a",), categories=(("a",),)), Filter(brands=("",))):
        check(shop, postings.resolve(wanted), set())
    nothing = Shop([()] * 2, [""] * 2, np.zeros(2, bool), SidIndex.build(np.zeros(2, dtype=np.int32), 1, np.zeros(2), np.zeros(2, bool)))
    check(nothing, nothing.postings().resolve(Filter(in_stock=True)), set())
