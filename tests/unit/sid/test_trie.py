"""The trie against a plain dict."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.trie import Trie, TrieError

SIZES = (5, 4, 6)
triples = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5))
sid_sets = st.sets(triples, min_size=1, max_size=60)


def trie_of(sids):
    return Trie.from_tokens(np.array(sorted(sids), dtype=np.int32), SIZES)


@settings(deadline=None)
@given(sid_sets, st.lists(st.tuples(*[st.integers(-2, 7)] * 3), min_size=1, max_size=30))
def test_find_equals_a_dict(sids, wanted):
    rows = {sid: row for row, sid in enumerate(sorted(sids))}
    found = trie_of(sids).find(torch.tensor(wanted))
    assert found.tolist() == [rows.get(sid, -1) for sid in wanted]


@settings(deadline=None)
@given(sid_sets)
def test_every_published_sid_is_found_at_its_row_and_has_its_tokens(sids):
    trie = trie_of(sids)
    tokens = torch.tensor(sorted(sids))
    assert trie.find(tokens.view(1, -1, 3)).tolist() == [list(range(len(sids)))]
    assert trie.tokens_of(torch.arange(len(sids))).tolist() == tokens.tolist()


@settings(deadline=None)
@given(sid_sets)
def test_children_equal_those_of_a_dict(sids):
    trie = trie_of(sids)
    assert trie.level1_valid.tolist() == [any(sid[0] == token for sid in sids) for token in range(SIZES[0])]
    widest2 = widest3 = 0
    for first in range(SIZES[0]):
        nodes = range(int(trie.offsets2[first]), int(trie.offsets2[first + 1]))
        seconds = sorted({sid[1] for sid in sids if sid[0] == first})
        assert [int(trie.tokens2[node]) for node in nodes] == seconds
        widest2 = max(widest2, len(seconds))
        for node, second in zip(nodes, seconds, strict=True):
            thirds = sorted(sid[2] for sid in sids if sid[:2] == (first, second))
            assert trie.tokens3[int(trie.offsets3[node]) : int(trie.offsets3[node + 1])].tolist() == thirds
            assert trie.find_node(torch.tensor(first), torch.tensor(second)).item() == node
            widest3 = max(widest3, len(thirds))
    assert (trie.max_children2, trie.max_children3) == (widest2, widest3)


def test_find_accepts_int32_tokens():
    assert trie_of({(0, 0, 0), (4, 3, 5)}).find(torch.tensor([[4, 3, 5], [4, 3, 4]], dtype=torch.int32)).tolist() == [1, -1]


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_trie_reads_back_the_same(tmp_path, mmap):
    trie = trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (4, 3, 0)})
    trie.save(tmp_path / "trie")
    again = Trie.load(tmp_path / "trie", mmap=mmap)
    assert again.alphabet_sizes == SIZES
    assert (again.max_children2, again.max_children3) == (1, 2)
    for name in ("offsets2", "tokens2", "offsets3", "tokens3", "level1_valid"):
        assert torch.equal(getattr(again, name), getattr(trie, name))


def test_a_trie_with_mixed_files_is_refused(tmp_path):
    trie_of({(0, 1, 2), (0, 1, 3)}).save(tmp_path)
    np.save(tmp_path / "tokens3.npy", np.zeros(3, np.int32))
    with pytest.raises(TrieError, match="do not belong together; rerun"):
        Trie.load(tmp_path)


def with_items(trie):
    """SIDs of 2, 1, 3 and 1 items."""
    return trie.with_items(np.arange(14, dtype=np.float32).reshape(7, 2) / 8, np.array([0, 2, 3, 6, 7]))


def test_items_lie_beside_their_sids_and_belong_to_prefixes():
    trie = trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (2, 3, 0)})
    held = with_items(trie)
    assert (trie.item_vectors, trie.item_offsets) == (None, None)  # the trie itself is left as it was
    assert held.item_vectors.dtype == torch.float16
    assert held.guide_vectors.tolist() == (torch.arange(14).view(7, 2) / 8).tolist()  # eighths are exact in half precision
    assert held.sid_of_item.tolist() == [0, 0, 1, 2, 2, 2, 3]
    # Level-2 nodes: <0, 1> with two SIDs, <2, 0> and <2, 3> with one each.
    assert held.node_of_leaf.tolist() == [0, 0, 1, 2]
    assert held.level1_of_node.tolist() == [0, 2, 2]


@settings(deadline=None)
@given(sid_sets)
def test_owners_are_the_prefixes_of_the_tokens(sids):
    trie = trie_of(sids)
    tokens = trie.tokens_of(torch.arange(len(trie)))
    assert torch.equal(trie.node_of_leaf, trie.find_node(tokens[:, 0], tokens[:, 1]))
    assert torch.equal(trie.level1_of_node[trie.node_of_leaf], tokens[:, 0])


@pytest.mark.parametrize("mmap", [True, False])
def test_items_are_saved_loaded_and_moved_with_the_trie(tmp_path, mmap):
    trie = with_items(trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (4, 3, 0)}))
    trie.save(tmp_path / "trie")
    again = Trie.load(tmp_path / "trie", mmap=mmap)
    for name in ("item_vectors", "item_offsets", "tokens3"):
        assert torch.equal(getattr(again, name), getattr(trie, name))
        assert getattr(again, name).dtype == getattr(trie, name).dtype
    moved = again.to("meta")
    assert (moved.item_vectors.device.type, moved.item_offsets.device.type) == ("meta", "meta")
    assert moved.item_vectors.shape == (7, 2)


def test_what_is_derived_of_items_in_a_search_serves_training_later():
    trie = with_items(trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (4, 3, 0)}))
    with torch.inference_mode():
        derived = (trie.guide_vectors, trie.sid_of_item, trie.node_of_leaf, trie.level1_of_node)
    assert not any(tensor.is_inference() for tensor in derived)
    assert trie.guide_vectors is derived[0]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 2, 7], r"expected 5 offsets that end at the number of vectors \(7\), got 3 that end at 7"), ([0, 1, 2, 3, 4], "got 5 that end at 4")],
)
def test_offsets_of_other_items_are_refused(offsets, message):
    trie = trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (4, 3, 0)})
    with pytest.raises(TrieError, match=message):
        trie.with_items(np.zeros((7, 2)), np.array(offsets))


@pytest.mark.parametrize(
    ("name", "array"),
    [("item_vectors", np.zeros((6, 2), np.float16)), ("item_vectors", np.zeros(7, np.float16)), ("item_offsets", np.array([0, 7]))],
)
def test_a_folder_whose_items_do_not_fit_is_refused(tmp_path, name, array):
    with_items(trie_of({(0, 1, 2), (0, 1, 3), (2, 0, 5), (4, 3, 0)})).save(tmp_path)
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(TrieError, match=r"its items do not belong to the trie; rerun jobs/build_sid_index\.py with --force"):
        Trie.load(tmp_path)


def test_moving_to_the_same_device_copies_nothing():
    trie = trie_of({(0, 0, 0)})
    assert trie.to("cpu") is trie


def test_bad_tokens_are_refused():
    with pytest.raises(TrieError, match=r"row 1: .* does not fit the alphabets"):
        Trie.from_tokens(np.array([[0, 0, 0], [0, 4, 0]]), SIZES)
    with pytest.raises(TrieError, match="row 1 does not follow the one before"):
        Trie.from_tokens(np.array([[0, 0, 1], [0, 0, 1]]), SIZES)
    with pytest.raises(TrieError, match="S >= 1"):
        Trie.from_tokens(np.zeros((0, 3), np.int32), SIZES)
