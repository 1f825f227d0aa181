"""What the cache of resolved filters keeps, drops and counts; and the masks it makes, against plain loops."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from genrecall.generator.filter_cache import FilterCache
from genrecall.generator.prefix_masks import PrefixMasks, _any_in_segment
from genrecall.sid.filters import Filter, FilterError, FilterPostings
from genrecall.sid.index import SidIndex
from genrecall.sid.trie import Trie

BRANDS = [f"b{number}" for number in range(20)]


def some_trie(rng: np.random.Generator, count: int, alphabet_sizes=(6, 5, 9)) -> Trie:
    """Level-1 token 0 and the last one have no SID."""
    first, second, third = alphabet_sizes
    keys = np.sort(rng.choice(np.arange(second * third, (first - 1) * second * third), count, replace=False))
    return Trie.from_tokens(np.stack([keys // (second * third), keys // third % second, keys % third], axis=1), alphabet_sizes)


@pytest.fixture
def postings() -> FilterPostings:
    rng = np.random.default_rng(0)
    index = SidIndex.build(rng.integers(0, 50, 1_000).astype(np.int32), 50, np.zeros(1_000))
    return FilterPostings.build([("c", str(row % 3)) for row in range(1_000)], [BRANDS[min(int(one), 19)] for one in rng.exponential(4, 1_000)], index)


@pytest.fixture
def trie() -> Trie:
    return some_trie(np.random.default_rng(1), 50)


def brand(number: int, **clauses) -> Filter:
    return Filter(brands=(BRANDS[number],), **clauses)


def test_masks_allow_exactly_the_prefixes_of_allowed_leaves_on_every_device() -> None:
    rng = np.random.default_rng(2)
    for count, share in ((1, 0.5), (30, 0.1), (120, 0.0), (120, 0.03), (120, 0.6), (120, 1.0)):
        trie = some_trie(rng, count)
        leaves = torch.from_numpy(rng.random((3, count)) < share)
        masks = PrefixMasks.from_leaves(trie, leaves)
        paths = trie.tokens_of(torch.arange(count)).tolist()
        nodes = sorted({(path[0], path[1]) for path in paths})
        for row in range(3):
            allowed = [path for path, kept in zip(paths, leaves[row].tolist(), strict=True) if kept]
            assert masks.level1[row].tolist() == [any(path[0] == token for path in allowed) for token in range(6)]
            assert masks.nodes2[row].tolist() == [any((path[0], path[1]) == node for path in allowed) for node in nodes]
        # What other devices than the CPU do.
        assert torch.equal(_any_in_segment(leaves, trie.offsets3), masks.nodes2)
        assert torch.equal(_any_in_segment(masks.nodes2, trie.offsets2), masks.level1)


def test_masks_less_some_sids_are_those_of_the_rest() -> None:
    rng = np.random.default_rng(3)
    for count, share, gone in ((1, 1.0, 1), (120, 0.5, 1), (120, 0.5, 20), (120, 1.0, 120), (120, 0.2, 60)):
        trie = some_trie(rng, count)
        leaves = torch.from_numpy(rng.random((1, count)) < share)
        sid_rows = torch.from_numpy(rng.choice(count, gone, replace=False))
        before = PrefixMasks.from_leaves(trie, leaves)
        kept = [mask.clone() for mask in before]
        rest = leaves.clone()
        rest[0, sid_rows] = False
        for mask, expected in zip(before.without(trie, sid_rows), PrefixMasks.from_leaves(trie, rest), strict=True):
            assert torch.equal(mask, expected)
        assert all(torch.equal(mask, unchanged) for mask, unchanged in zip(before, kept, strict=True))


def test_a_filter_is_resolved_once_and_equal_ones_share_it(postings, trie) -> None:
    cache = FilterCache(postings, trie)
    first = cache.get(Filter(brands=("b1", "b2"), categories=(("c", "1"),)))
    assert cache.get(Filter(brands=("b2", "b1", "b1"), categories=(("c", "1"),))) is first
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1)
    assert first.masks.leaves[0].tolist() == first.items.leaves.tolist()
    assert first.items.count == postings.resolve(Filter(brands=("b1", "b2"), categories=(("c", "1"),))).count
    assert cache.nbytes == first.nbytes == 6 + len(trie.tokens2) + 50 + first.items.nbytes


@pytest.mark.parametrize("rest", [brand(0), brand(15), Filter(), Filter(categories=(("c", "1"),), in_stock=True)])
def test_what_is_excluded_comes_off_the_kept_rest(postings, trie, rest: Filter) -> None:
    cache = FilterCache(postings.with_stock(np.arange(0, 1_000, 5)), trie)
    of_a_sid = tuple(postings.index.items(7).tolist())
    for excluded in ((3,), of_a_sid, (*of_a_sid, 5, 2_000), tuple(range(500))):
        wanted = dataclasses.replace(rest, excluded=excluded)
        found, plain = cache.get(wanted), cache.postings.resolve(wanted)
        places = np.arange(1_000)
        assert np.array_equal(found.items.passes(places), plain.passes(places))
        assert not found.items.passes(places)[np.isin(postings.index.item_rows, excluded)].any()
        assert np.array_equal(found.masks.leaves[0].numpy(), plain.leaves)
        for mask, expected in zip(found.masks, PrefixMasks.from_leaves(trie, torch.from_numpy(plain.leaves)[None]), strict=True):
            assert torch.equal(mask, expected)
    assert (cache.hits, cache.misses, len(cache)) == (0, 4, 5)  # the rest is kept and not counted


def test_the_filters_asked_for_longest_ago_go_first(postings, trie) -> None:
    cache = FilterCache(postings, trie, capacity=3)
    for number in (0, 1, 2, 0, 3):
        cache.get(brand(number))
    misses = cache.misses
    for number in (0, 2, 3):
        cache.get(brand(number))
    assert (len(cache), cache.misses) == (3, misses)
    cache.get(brand(1))
    assert cache.misses == misses + 1


def test_the_bytes_are_bounded_too(postings, trie) -> None:
    sizes = [FilterCache(postings, trie).get(brand(number)).nbytes for number in range(10)]
    bound = sum(sizes[-3:])
    cache = FilterCache(postings, trie, max_bytes=bound)
    for number in range(10):
        cache.get(brand(number))
        assert cache.nbytes <= bound
    assert cache.nbytes == sum(sizes[-len(cache) :])
    assert len(cache) >= 3
    small = FilterCache(postings, trie, max_bytes=min(sizes) - 1)
    assert small.get(brand(0)).items.count > 0
    assert (len(small), small.nbytes) == (0, 0)


def test_threads_may_ask_at_once(postings, trie) -> None:
    cache = FilterCache(postings, trie, capacity=5)
    counts = [postings.resolve(brand(number)).count for number in range(20)]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 20, 200).tolist():
            if cache.get(brand(number)).items.count != counts[number]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.hits + cache.misses == 1_600
    assert len(cache) == 5
    assert cache.nbytes == sum(one.nbytes for one in cache._kept.values())


def test_a_cache_of_another_trie_or_without_room_is_refused(postings, trie) -> None:
    with pytest.raises(FilterError, match="the filters' index has 50 SIDs, the trie 49; use those of one sid_index"):
        FilterCache(postings, some_trie(np.random.default_rng(1), 49))
    with pytest.raises(FilterError, match="at least 1, got 0 and"):
        FilterCache(postings, trie, capacity=0)
