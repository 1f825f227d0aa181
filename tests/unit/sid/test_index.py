"""The SID -> items index against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.index import SidIndex, SidIndexError, load_index, load_sid_table, load_trie, served_order
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie


def plain_expand(item_sid, prior, sid_rows, limit):
    items, ranks = [], []
    for rank, sid in enumerate(sid_rows):
        members = [row for row in range(len(item_sid)) if item_sid[row] == sid]
        for row in sorted(members, key=lambda row: (-prior[row], row)):
            items.append(row)
            ranks.append(rank)
    return items[: max(limit, 0)], ranks[: max(limit, 0)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40), st.permutations(range(-1, 6)), st.integers(0, 7), st.integers(0, 50))
def test_expand_equals_a_plain_loop(items, order, take, limit):
    item_sid = np.array([sid for sid, _ in items], dtype=np.int32)
    prior = np.array([score for _, score in items], dtype=np.float64)
    index = SidIndex.build(item_sid, 6, prior)
    rows, ranks = index.expand(np.array(order[:take], dtype=np.int32), limit)
    assert (rows.tolist(), ranks.tolist()) == plain_expand(item_sid, prior, order[:take], limit)
    assert rows.dtype == ranks.dtype == np.int32


def test_items_lie_by_prior_score_then_row():
    index = SidIndex.build(np.array([1, 0, 1, 1]), 2, np.array([0.5, np.nan, 2.0, 0.5]))
    assert index.items(1).tolist() == [2, 0, 3]
    assert index.sizes().tolist() == [1, 3]
    assert index.sizes(np.array([-1, 1])).tolist() == [0, 3]
    assert index.prior.tolist() == [0.5, 0.0, 2.0, 0.5]


def test_item_logits_lie_by_place_and_start_at_half_a_click():
    # SID 1 lists items 2, 0, 3 by prior; feedback 3, 0, 1 and a half each give log 3.5, log 0.5, log 1.5.
    index = SidIndex.build(np.array([1, 0, 1, 1]), 2, np.array([0.5, 0.0, 2.0, 0.5]), feedback=np.array([0.0, 7.0, 3.0, 1.0]))
    places, _ = index.places(np.array([1, 0], dtype=np.int32), 10)
    assert index.rows_at(places).tolist() == [2, 0, 3, 1]
    assert np.exp(index.item_logits_at(places)).tolist() == pytest.approx([3.5, 0.5, 1.5, 7.5], rel=2e-3)
    assert index.item_logits_at(places).dtype == np.float32
    without = SidIndex.build(np.array([1, 0, 1, 1]), 2, np.zeros(4))
    assert np.exp(without.item_logits_at(np.arange(4))).tolist() == pytest.approx([0.5] * 4, rel=2e-3)


def test_feedback_that_cannot_be_is_refused():
    for feedback, message in (
        (np.zeros(2), r"expected one number per item \(3\), got 2"),
        (np.array([1.0, -1.0, 0.0]), "negative"),
        (np.full(3, np.nan), "nan"),
    ):
        with pytest.raises(SidIndexError, match=message):
            SidIndex.build(np.array([0, 0, 0]), 1, np.zeros(3), feedback=feedback)


def test_an_index_without_item_logits_says_which_job_to_rerun(tmp_path):
    SidIndex.build(np.array([0, 0]), 1, np.zeros(2)).save(tmp_path)
    (tmp_path / "item_logits.npy").unlink()
    with pytest.raises(SidIndexError, match=r"lacks item_logits\.npy; rerun jobs/build_sid_index\.py"):
        SidIndex.load(tmp_path)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_every_item_is_in_exactly_one_cluster(item_sid):
    index = SidIndex.build(np.array(item_sid, dtype=np.int32), 10, np.zeros(len(item_sid)))
    assert sorted(index.item_rows.tolist()) == list(range(len(item_sid)))
    assert all(item_sid[row] == sid for sid in range(10) for row in index.items(sid))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False)), max_size=30))
def test_served_order_is_that_of_a_sort_by_two_columns(pairs):
    clusters, scores = np.array([one for one, _ in pairs], dtype=np.int32), np.array([one for _, one in pairs], dtype=np.float32)
    for few in (clusters, clusters % 3):
        assert served_order(few, scores).tolist() == np.lexsort((-scores, few)).tolist()


def test_items_that_are_not_listed_keep_their_sid_and_lose_their_place(tmp_path):
    index = SidIndex.build(np.array([1, 0, 1, 1]), 3, np.array([0.5, 1.0, 2.0, 0.5]), np.array([True, False, True, True]))
    assert (index.num_items, index.num_published) == (4, 3)
    assert index.sizes().tolist() == [0, 3, 0]
    assert index.expand(np.array([0, 1], np.int32), 9)[0].tolist() == [2, 0, 3]
    assert index.sids_of(np.array([1, 2])).tolist() == [0, 1]
    index.save(tmp_path)
    assert SidIndex.load(tmp_path).items(1).tolist() == [2, 0, 3]


def test_places_lead_to_the_items_of_an_expansion():
    index = SidIndex.build(np.array([1, 0, 1, 2]), 3, np.array([1.0, 0.0, 2.0, 0.0]))
    places, rank = index.places(np.array([2, -1, 1], np.int32), 2)
    assert (places.tolist(), rank.tolist()) == ([3, 1], [0, 2])
    assert index.rows_at(places).tolist() == [3, 2]


def test_a_saved_index_reads_back_by_memory_map(tmp_path):
    index = SidIndex.build(np.array([2, 0, 2]), 3, np.array([1.0, 2.0, 3.0]))
    index.save(tmp_path)
    again = SidIndex.load(tmp_path)
    assert isinstance(again.item_rows, np.memmap)
    assert again.expand(np.array([2, 0]), 2)[0].tolist() == [2, 0]
    assert len(again) == 3


def test_bad_indexes_are_refused(tmp_path):
    with pytest.raises(SidIndexError, match="one prior score per item"):
        SidIndex.build(np.array([0]), 1, np.zeros(2))
    with pytest.raises(SidIndexError, match="expected SID rows 0 to 0, got 0 to 1"):
        SidIndex.build(np.array([0, 1]), 1, np.zeros(2))
    SidIndex.build(np.array([0, 1]), 2, np.zeros(2)).save(tmp_path)
    np.save(tmp_path / "prior.npy", np.zeros(3, np.float32))
    with pytest.raises(SidIndexError, match="do not belong together; rerun"):
        SidIndex.load(tmp_path)


def test_readers_open_a_sid_index_folder(tmp_path):
    space = SidSpace((3, 3, 3), ((1, 1),))
    table = SidTable.from_item_tokens(space, np.array([[2, 2, 3], [0, 0, 1], [2, 2, 3]]))
    (tmp_path / "sid_space.json").write_text(space.to_json())
    Trie.from_tokens(table.tokens, space.alphabet_sizes).save(tmp_path / "trie")
    SidIndex.build(table.item_sid, len(table), np.zeros(3)).save(tmp_path / "index")
    again = load_sid_table(tmp_path)
    assert again.space == space
    assert again.tokens.tolist() == table.tokens.tolist()
    assert again.item_sid.tolist() == table.item_sid.tolist()
    assert len(load_trie(tmp_path)) == 2
    assert load_index(tmp_path).items(1).tolist() == [0, 2]
