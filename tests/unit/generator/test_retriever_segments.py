"""A retriever over an index with changes: later items and delisted ones, guided or not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genrecall.encoders.embed import item_text
from genrecall.generator.retriever import Retriever, RetrieverError
from genrecall.sid.segments import SegmentedIndex
from genrecall.sid.semantic_id import SidSpace, SidTable

NO_HISTORY = np.zeros(0, np.int32)
PUBLISHED = 40
"""Of the fifty items; the last ten come later."""
SID_OF = (np.arange(50) * 7 % 50 // 2).astype(np.int32)


@pytest.fixture(scope="module")
def make_retriever(untrained_retriever):
    """25 SIDs, of which the first `published` items are in the base."""

    def make(*, sharpness: float, lexical: float, published: int = PUBLISHED) -> Retriever:
        sids = np.arange(25)
        table = SidTable(SidSpace((5, 5, 1)), np.stack([sids // 5, sids % 5, 0 * sids], axis=1).astype(np.int32), SID_OF[:published])
        return untrained_retriever(table, np.arange(published, dtype=np.float64), sharpness=sharpness, lexical=lexical, counted=PUBLISHED)

    return make


def with_later_items(retriever: Retriever, catalog, encoder) -> SegmentedIndex:
    """In two segments, as they would come in."""
    index, texts = SegmentedIndex(retriever.index), item_text(catalog)
    for start, end in ((PUBLISHED, 43), (43, 50)):
        tokens = [retriever.prompt_builder.tokenizer.encode_batch([text], 128)[0] for text in texts[start:end]]
        index = index.added(SID_OF[start:end], np.arange(start, end), vectors=encoder.encode_items(texts[start:end]), tokens=tokens)
    return index


KINDS = {"plain": (0.0, 0.0), "guided": (8.0, 0.0), "worded": (8.0, 3.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_expansion_is_that_of_a_retriever_rebuilt_with_all_items(make_retriever, kind, catalog, encoder):
    sharpness, lexical = KINDS[kind]
    small = make_retriever(sharpness=sharpness, lexical=lexical)
    rebuilt = make_retriever(sharpness=sharpness, lexical=lexical, published=50)
    changed = small.with_index(with_later_items(small, catalog, encoder))
    found = small.generate(["red lamp", "grey carpet"], ["f", None], [None] * 2, [NO_HISTORY] * 2, beam_size=25)
    for row in range(2):
        one, other = (made.expand(*found.of(row), 30) for made in (changed, rebuilt))
        assert one.item_rows.tolist() == other.item_rows.tolist()
        assert one.sid_rows.tolist() == other.sid_rows.tolist()
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert one.item_rows.max() >= PUBLISHED
        assert small.expand(*found.of(row), 50).item_rows.max() < PUBLISHED  # the one it came from is as it was


def test_what_delisted_items_leave_behind_shares_their_sids_probability(make_retriever, catalog, encoder):
    retriever = make_retriever(sharpness=8.0, lexical=3.0)
    gone = np.array([3, 10, 41])  # 3 and 10 are all of SID 10, 41 is one of two
    changed = retriever.with_index(with_later_items(retriever, catalog, encoder).without(gone))
    found = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=25).of(0)
    answer = changed.expand(*found, 100)
    assert sorted(answer.item_rows.tolist()) == sorted(set(range(50)) - set(gone.tolist()))
    by_sid = np.bincount(answer.sid_rows, weights=np.exp(answer.scores), minlength=25)
    expected = [0.0 if sid == 10 else math.exp(score) for sid, score in zip(found[0].tolist(), found[1].tolist(), strict=True)]
    assert by_sid[found[0]] == pytest.approx(expected, rel=1e-4)


def test_a_later_item_in_the_history_counts_as_its_sid(make_retriever, catalog, encoder):
    retriever = make_retriever(sharpness=0.0, lexical=0.0)
    changed = retriever.with_index(with_later_items(retriever, catalog, encoder))
    later = 44
    twin = int(np.flatnonzero(SID_OF[:PUBLISHED] == SID_OF[later])[0])
    scores = [
        made.generate(["lamp"], [None], [None], [np.array([row], np.int32)], beam_size=5).scores.tolist()
        for made, row in ((changed, later), (changed, twin), (retriever, later), (retriever, -1))
    ]
    assert scores[0] == scores[1] != scores[2] == scores[3]


def test_a_compacted_index_takes_the_compacted_trie(make_retriever, catalog, encoder):
    retriever = make_retriever(sharpness=8.0, lexical=0.0)
    index = with_later_items(retriever, catalog, encoder).without(np.array([5, 45]))
    with pytest.raises(RetrieverError, match=r"the vectors of 40 items, the index 48 postings; .* needs SegmentedIndex\.compacted_trie"):
        retriever.with_index(index.compacted())
    parts = (retriever.model, retriever.prompt_builder, index.compacted_trie(retriever.trie), index.compacted(), retriever.table, encoder)
    found = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=25).of(0)
    one, other = retriever.with_index(index).expand(*found, 100), Retriever(*parts, support="trie").expand(*found, 100)
    assert one.item_rows.tolist() == other.item_rows.tolist()
    assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_later_items_without_what_guidance_reads_are_refused(make_retriever, encoder):
    one, vector = (np.zeros(1, np.int32), np.zeros(1)), np.zeros((1, encoder.dim))
    for lexical, given, missing in ((0.0, {}, "vectors"), (3.0, {"vectors": vector}, "tokens")):
        retriever = make_retriever(sharpness=8.0, lexical=lexical)
        with pytest.raises(RetrieverError, match=rf"the 1 later items need their {missing}; give them to SegmentedIndex\.added"):
            retriever.with_index(SegmentedIndex(retriever.index).added(*one, **given))
    make_retriever(sharpness=8.0, lexical=0.0).with_index(SegmentedIndex(retriever.index).added(*one, vectors=vector))
    plain = make_retriever(sharpness=0.0, lexical=0.0)
    plain.with_index(SegmentedIndex(plain.index).added(*one))
