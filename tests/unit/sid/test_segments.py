"""An index with changes against one rebuilt from scratch, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.index import SidIndex, SidIndexError
from genrecall.sid.segments import ItemWords, SegmentedIndex
from genrecall.sid.trie import Trie

SIDS = 5
ITEM = st.tuples(st.integers(0, SIDS - 1), st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan")]))
ADD = st.lists(ITEM, max_size=8)
REMOVE = st.lists(st.integers(0, 60), max_size=8)
CHANGES = st.lists(st.one_of(ADD.map(lambda items: ("add", items)), REMOVE.map(lambda rows: ("remove", rows))), max_size=8)


def arrays(items):
    return np.array([sid for sid, _ in items], dtype=np.int32), np.array([score for _, score in items], dtype=np.float32)


def plain_expand(items, gone, sid_rows, limit):
    found = []
    for rank, sid in enumerate(sid_rows):
        members = [row for row, (own, _) in enumerate(items) if own == sid and row not in gone]
        found += [(row, rank) for row in sorted(members, key=lambda row: (-np.nan_to_num(items[row][1]), row))]
    found = found[: max(limit, 0)]
    return [row for row, _ in found], [rank for _, rank in found]


@settings(deadline=None, max_examples=150)
@given(ADD, CHANGES, st.permutations(range(-1, SIDS)), st.integers(0, 6), st.integers(-1, 40))
def test_any_sequence_of_changes_answers_as_a_rebuilt_index(base_items, changes, order, take, limit):
    items, gone = list(base_items), set()
    seen = np.arange(len(items)) % 3.0  # clicks of the base's items; those that come later have none
    index = SegmentedIndex(SidIndex.build(*arrays(items)[:1], SIDS, arrays(items)[1], feedback=seen))
    for kind, what in changes:
        before, old = index, (index.expand(np.arange(SIDS), 1000), index.num_items)
        if kind == "add":
            index = index.added(*arrays(what))
            items += what
        else:
            rows = [row for row in what if row < len(items)]
            index = index.without(np.array(rows, dtype=np.int64))
            gone |= set(rows)
        assert before.num_items == old[1]  # what a search under way holds
        assert [one.tolist() for one in before.expand(np.arange(SIDS), 1000)] == [one.tolist() for one in old[0]]
    listed = np.array([row not in gone for row in range(len(items))], dtype=bool)
    feedback = np.concatenate([seen, np.zeros(len(items) - len(seen))])
    rebuilt = SidIndex.build(arrays(items)[0], SIDS, arrays(items)[1], listed, feedback=feedback)
    asked = np.array(order[:take], dtype=np.int32)

    rows, ranks = index.expand(asked, limit)
    assert (rows.tolist(), ranks.tolist()) == plain_expand(items, gone, asked.tolist(), limit)
    assert rows.dtype == ranks.dtype == np.int32
    assert index.sizes().tolist() == rebuilt.sizes().tolist()
    grid = np.stack([asked, asked])
    assert index.sizes(grid).tolist() == rebuilt.sizes(grid).tolist()
    assert [index.items(sid).tolist() for sid in range(SIDS)] == [rebuilt.items(sid).tolist() for sid in range(SIDS)]
    logits, plain = (one.item_logits_at(one.places(np.arange(SIDS, dtype=np.int32), 1000)[0]) for one in (index, rebuilt))
    assert logits.tolist() == plain.tolist()
    assert index.num_items == len(items)
    assert index.item_sid.tolist() == rebuilt.item_sid.tolist() == [sid for sid, _ in items]
    assert index.sids_of(np.arange(len(items))).tolist() == [sid for sid, _ in items]
    compact = index.compacted()
    for name in ("offsets", "item_rows", "item_sid", "prior", "item_logits"):
        one, other = getattr(compact, name), getattr(rebuilt, name)
        assert one.tolist() == other.tolist()
        assert one.dtype == other.dtype


def test_an_emptied_sid_yields_nothing_until_an_item_is_added():
    index = SegmentedIndex(SidIndex.build(np.array([0, 1, 1], np.int32), 2, np.zeros(3))).without(np.array([1, 2]))
    assert index.expand(np.array([1, 0], np.int32), 10)[0].tolist() == [0]
    assert index.sizes().tolist() == [1, 0]
    assert index.added(np.array([1], np.int32), np.zeros(1)).items(1).tolist() == [3]
    assert index.without(np.array([1])).items(1).tolist() == []


def test_a_compacted_index_is_saved_and_changed_again(tmp_path):
    index = SegmentedIndex(SidIndex.build(np.array([0, 1, 1], np.int32), 2, np.array([0.0, 1.0, 2.0]))).without(np.array([2]))
    index.added(np.array([1], np.int32), np.array([5.0])).compacted().save(tmp_path)
    again = SidIndex.load(tmp_path)
    assert (again.num_items, again.num_published) == (4, 3)
    assert again.items(1).tolist() == [3, 1]
    assert SegmentedIndex(again).added(np.array([1], np.int32), np.array([3.0])).items(1).tolist() == [3, 4, 1]


def test_a_compacted_trie_holds_the_vectors_in_the_order_of_the_compacted_index():
    trie = Trie.from_tokens(np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1]], np.int32), (2, 2, 2))
    vectors = np.arange(12, dtype=np.float32).reshape(6, 2)
    base = SidIndex.build(np.array([2, 0, 2, 1], np.int32), 3, np.array([1.0, 0.0, 5.0, 0.0]))
    index = SegmentedIndex(base).added(np.array([2], np.int32), np.array([3.0]), vectors=vectors[4:5]).without(np.array([3, 0]))
    index = index.added(np.array([0], np.int32), np.array([9.0]), vectors=vectors[5:])
    whole = index.compacted_trie(trie.with_items(vectors[:4][base.item_rows], base.offsets))
    compact = index.compacted()
    assert compact.item_rows.tolist() == [5, 1, 2, 4]
    assert whole.item_vectors.tolist() == vectors[compact.item_rows].tolist()
    assert whole.item_offsets.tolist() == compact.offsets.tolist() == [0, 2, 2, 4]
    with pytest.raises(SidIndexError, match="compacted_trie: expected the trie with the base's 4 item vectors"):
        index.compacted_trie(trie)


def test_words_of_later_items_are_kept_once_each_in_their_order():
    index = SegmentedIndex(SidIndex.build(np.zeros(1, np.int32), 1, np.zeros(1)))
    index = index.added(np.zeros(2, np.int32), np.zeros(2), tokens=[np.array([7, 2, 7]), np.array([], int)])
    words = index.added(np.zeros(1, np.int32), np.zeros(1), tokens=[np.array([3])]).later.words
    assert (words.offsets.tolist(), words.tokens.tolist()) == ([0, 2, 2, 3], [2, 7, 3])
    assert ItemWords.of([]).offsets.tolist() == [0]


def test_changes_that_cannot_be_are_refused():
    index = SegmentedIndex(SidIndex.build(np.array([0, 1], np.int32), 2, np.zeros(2)))
    one, zero = np.array([1], np.int32), np.zeros(1)
    with pytest.raises(SidIndexError, match="item_sid: expected SID rows 0 to 1, got 2 to 2"):
        index.added(np.array([2], np.int32), zero)
    with pytest.raises(SidIndexError, match=r"one prior score per item \(1\), got 2"):
        index.added(one, np.zeros(2))
    with pytest.raises(SidIndexError, match="vectors: expected one for each of the 1 new items, got 2"):
        index.added(one, zero, vectors=np.zeros((2, 3)))
    with pytest.raises(SidIndexError, match="vectors: expected some, as with the 1 items added before"):
        index.added(one, zero, vectors=np.zeros((1, 3))).added(one, zero)
    with pytest.raises(SidIndexError, match="tokens: expected none, as with the 1 items added before"):
        index.added(one, zero).added(one, zero, tokens=[one])
    for rows in ([2], [-1, 0]):
        with pytest.raises(SidIndexError, match="item_rows: expected rows 0 to 1, got"):
            index.without(np.array(rows))
