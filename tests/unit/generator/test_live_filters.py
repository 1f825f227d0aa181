"""Filters over a changed catalogue: items and masks against plain loops over what is listed now."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.generator.filter_cache import FilterCache
from genrecall.generator.live_filters import LiveFilterCache
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.sid.filters import Filter, FilterPostings
from genrecall.sid.index import SidIndex
from genrecall.sid.own_records import OwnRecords
from genrecall.sid.segments import SegmentedIndex
from genrecall.sid.trie import Trie

SIDS = 30
PATHS = [(), ("Home",), ("Home", "Lamps"), ("Homes",), ("Garden", "灯")]
BRANDS = ["", "Acme", "Zenith"]


def some_trie(rng):
    keys = np.sort(rng.choice(4 * 5 * 6, SIDS, replace=False))
    return Trie.from_tokens(np.stack([keys // 30, keys // 6 % 5, keys % 6], axis=1), (4, 5, 6))


FILTERS = st.builds(
    Filter,
    categories=st.lists(st.sampled_from([*PATHS[1:], ("Garden",), ("Attic",)]), max_size=2).map(tuple),
    brands=st.lists(st.sampled_from([*BRANDS, "Nobody"]), max_size=2).map(tuple),
    in_stock=st.booleans(),
    excluded=st.lists(st.integers(0, 140), max_size=10).map(tuple),
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 20),
    wanted=FILTERS,
    items=st.integers(1, 120),
    later=st.integers(0, 15),
    moved=st.integers(0, 10),
    gone=st.integers(0, 30),
    sold=st.integers(0, 30),
)
def test_a_filter_admits_what_a_loop_over_the_newest_records_finds_and_masks_exactly_its_sids(seed, wanted, items, later, moved, gone, sold):
    rng = np.random.default_rng(seed)
    trie = some_trie(rng)
    shop = [(PATHS[rng.integers(len(PATHS))], BRANDS[rng.integers(len(BRANDS))]) for _ in range(items)]
    base = SidIndex.build(rng.integers(0, SIDS, items).astype(np.int32), SIDS, rng.random(items))
    published = FilterCache(FilterPostings.build([path for path, _ in shop], [brand for _, brand in shop], base), trie)

    delisted = rng.choice(items, min(gone, items), replace=False)
    judged = np.setdiff1d(rng.choice(items, min(moved, items), replace=False), delisted)
    for row in judged.tolist():
        shop[row] = (PATHS[rng.integers(len(PATHS))], BRANDS[rng.integers(len(BRANDS))])
    index = SegmentedIndex(base).without(delisted).added(rng.integers(0, SIDS, later).astype(np.int32), rng.random(later))
    shop += [(PATHS[rng.integers(len(PATHS))], BRANDS[rng.integers(len(BRANDS))]) for _ in range(later)]
    place_of = {int(row): place for place, row in enumerate(base.item_rows)} | {items + number: items + number for number in range(later)}
    rows = np.array(sorted([*judged.tolist(), *range(items, items + later)], key=place_of.get), dtype=np.int32)
    records = OwnRecords(
        rows=rows,
        sids=index.sids_of(rows),
        places=np.array([place_of[row] for row in rows.tolist()], dtype=np.int64),
        category_of=np.array([PATHS.index(shop[row][0]) for row in rows], dtype=np.int32),
        brand_of=np.array([BRANDS.index(shop[row][1]) for row in rows], dtype=np.int32),
        categories=tuple(PATHS),
        brands=tuple(BRANDS),
        off_lists=np.union1d(judged, delisted).astype(np.int32),
        out_of_stock=(out := rng.choice(items + later, min(sold, items + later), replace=False).astype(np.int32)),
    )
    cache = LiveFilterCache(published, records)
    found = cache.get(wanted)

    expected = {
        row
        for row, (path, brand) in enumerate(shop)
        if row not in delisted
        and (not wanted.categories or any(path[: len(one)] == one for one in wanted.categories))
        and (not wanted.brands or (brand != "" and brand in wanted.brands))
        and row not in wanted.excluded
        and not (wanted.in_stock and row in out)
    }
    places = np.arange(items + later)
    assert set(index.rows_at(places[found.items.passes(places)]).tolist()) == expected
    assert found.items.count == len(expected)
    leaves = np.zeros(SIDS, dtype=bool)
    leaves[index.sids_of(np.array(sorted(expected), dtype=np.int64))] = True
    assert found.items.leaves.tolist() == leaves.tolist()
    for mask, plain in zip(found.masks, PrefixMasks.from_leaves(trie, torch.from_numpy(leaves)[None]), strict=True):
        assert torch.equal(mask, plain)
    assert cache.get(wanted) is found
    assert found.nbytes > 0


def test_states_of_the_catalogue_share_what_the_lists_admit():
    rng = np.random.default_rng(0)
    base = SidIndex.build(rng.integers(0, SIDS, 50).astype(np.int32), SIDS, np.zeros(50))
    published = FilterCache(FilterPostings.build([("Home",)] * 50, ["Acme"] * 50, base), some_trie(rng))
    none = np.zeros(0, np.int32)
    nothing = OwnRecords(none, none, none.astype(np.int64), none, none, (), (), none, none)
    wanted = Filter(brands=("Acme",))
    first, second = (LiveFilterCache(published, nothing).get(wanted) for _ in range(2))
    assert (published.misses, published.hits) == (1, 1)
    assert first.masks.leaves is second.masks.leaves is published.get(wanted).masks.leaves
