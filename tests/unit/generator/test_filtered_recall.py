"""Filtered recall against an enumeration of all SIDs, expanded and then filtered item by item."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genrecall.generator import retriever as retriever_module
from genrecall.generator.filter_cache import FilterCache
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.retriever import RecallResult, Retriever, RetrieverError
from genrecall.sid.filters import Filter, FilterPostings
from genrecall.sid.segments import SegmentedIndex
from genrecall.sid.semantic_id import SidSpace, SidTable

NO_HISTORY = np.zeros(0, np.int32)
SIZES = (6, 5, 3)
BRANDS = ["Acme", "Bolt", "Cord", ""]
OUT_OF_STOCK = np.array([0, 7, 12, 13, 14, 15, 30, 48])
QUERIES = ["red lamp", "steel drill no 7", "", "carpet"]


@pytest.fixture(scope="module")
def make_retriever(catalog, untrained_retriever):
    """Some thirty SIDs of one to five of the fifty items, with brands that cut across them."""
    rng = np.random.default_rng(8)
    tokens = np.stack([rng.integers(0, 4, 50), rng.integers(0, 3, 50), rng.integers(0, 3, 50)], axis=1).astype(np.int32)
    table, priors = SidTable.from_item_tokens(SidSpace(SIZES), tokens), rng.random(50)

    def make(**guidance: float) -> Retriever:
        made = untrained_retriever(table, priors, **guidance)
        with torch.no_grad():
            made.model.tokens.codes.mul_(20)  # spread the logits, so that the order is not within rounding
        postings = FilterPostings.build(catalog.category_paths, [BRANDS[row % 7 % 4] for row in range(50)], made.index).with_stock(OUT_OF_STOCK)
        parts = (made.model, made.prompt_builder, made.trie, made.index, made.table, made.encoder)
        return Retriever(*parts, support=made.support, filters=FilterCache(postings, made.trie))

    return make


@pytest.fixture(scope="module", params=["plain", "guided", "worded"])
def retriever(request, make_retriever) -> Retriever:
    return make_retriever(**{"plain": {"sharpness": 0.0}, "guided": {"sharpness": 8.0}, "worded": {"sharpness": 8.0, "lexical": 3.0}}[request.param])


def ask(retriever: Retriever, query: str, only: Filter | None, **settings) -> RecallResult:
    return retriever.recall([query], [None], [None], [NO_HISTORY], filters=[only], **{"beam_size": 60, "limit": 100, **settings})[0]


def passes(catalog, row: int, only: Filter | None) -> bool:
    if only is None:
        return True
    return (
        (not only.categories or any(catalog.category_paths[row][: len(path)] == path for path in only.categories))
        and (not only.brands or BRANDS[row % 7 % 4] in only.brands)
        and not (only.in_stock and row in OUT_OF_STOCK)
        and row not in only.excluded
    )


def enumerated(retriever: Retriever, query: str) -> RecallResult:
    """All items in order: every SID scored by itself, sorted and expanded, without a search."""
    prompts = retriever.prompts([query], [None], [None], [NO_HISTORY])
    tokens = retriever.trie.tokens_of(torch.arange(len(retriever.trie)))[None]
    with torch.no_grad():
        scores = group_log_probs(retriever.model, prompts, tokens, support=retriever.support, trie=retriever.trie).sum(-1)[0].numpy()
    order = np.lexsort((np.arange(len(scores)), -scores)).astype(np.int32)
    return retriever.expand(order, scores[order], (prompts.soft[0], prompts.token_ids[0, : int(prompts.lengths[0])]), 100)


def check_filtered(catalog, answer: RecallResult, everything: RecallResult, only: Filter | None) -> None:
    kept = [at for at, row in enumerate(everything.item_rows.tolist()) if passes(catalog, row, only)]
    assert answer.item_rows.tolist() == everything.item_rows[kept].tolist()
    assert answer.sid_rows.tolist() == everything.sid_rows[kept].tolist()
    assert answer.scores.tolist() == pytest.approx(everything.scores[kept].tolist(), rel=2e-6, abs=1e-5)


FILTERS = st.builds(
    Filter,
    categories=st.lists(st.sampled_from([("shop", "lamp"), ("shop", "drill"), ("shop", "carpet"), ("attic",)]), max_size=2).map(tuple),
    brands=st.lists(st.sampled_from([*BRANDS[:3], "Nobody"]), max_size=2).map(tuple),
    in_stock=st.booleans(),
    excluded=st.lists(st.integers(0, 60), max_size=12).map(tuple),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(only=FILTERS, query=st.sampled_from(QUERIES))
def test_a_beam_that_covers_everything_gives_the_enumeration_filtered(retriever, catalog, only: Filter, query: str) -> None:
    check_filtered(catalog, ask(retriever, query, only), enumerated(retriever, query), only)


def test_a_batch_of_different_filters_and_none_answers_each_as_alone(retriever, catalog) -> None:
    filters = [Filter(brands=("Acme",)), None, Filter(), Filter(categories=(("shop", "lamp"),), in_stock=True), Filter(brands=("Acme",)), Filter(brands=("x",))]
    queries = ["red lamp", "red lamp", "drill", "red lamp", "drill", "drill"]
    nothing = [None] * 6
    answers = retriever.recall(queries, nothing, nothing, [NO_HISTORY] * 6, beam_size=60, limit=100, filters=filters)
    for query, only, answer in zip(queries, filters, answers, strict=True):
        check_filtered(catalog, answer, enumerated(retriever, query), only)
    assert len(answers[5].item_rows) == 0


@pytest.mark.parametrize("filters", [[None] * 3, [Filter()] * 3, [Filter(), None, Filter()], None])
def test_empty_filters_change_nothing_and_need_no_lists(retriever, monkeypatch, filters) -> None:
    monkeypatch.setattr(retriever, "filters", None)
    arguments = (["red lamp", "drill", ""], [None] * 3, [None] * 3, [NO_HISTORY] * 3)
    plain = retriever.recall(*arguments, beam_size=7, limit=20)
    for answer, expected in zip(retriever.recall(*arguments, beam_size=7, limit=20, filters=filters), plain, strict=True):
        assert answer.item_rows.tolist() == expected.item_rows.tolist()
        assert answer.scores.tolist() == expected.scores.tolist()


@pytest.mark.parametrize("only", [Filter(brands=("Nobody",)), Filter(categories=(("attic",),), in_stock=True), Filter(excluded=tuple(range(50)))])
def test_a_filter_that_admits_nothing_gives_an_empty_answer(retriever, only: Filter) -> None:
    generated = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=5, filters=[only])
    assert (generated.sid_rows == -1).all()
    assert np.isneginf(generated.scores).all()
    answer = ask(retriever, "red lamp", only, beam_size=5)
    assert len(answer.item_rows) == len(answer.sid_rows) == len(answer.scores) == 0


@pytest.mark.parametrize("beam_size", [1, 2, 4, 9])
def test_a_narrow_beam_is_filled_with_sids_that_pass(retriever, catalog, beam_size: int) -> None:
    # An unfiltered beam spends places on what fails. (Which SIDs a narrow beam finds may differ: others take those places, and may push a prefix out.)
    found = kept = 0
    for only in (
        Filter(brands=("Bolt",)),
        Filter(categories=(("shop", "drill"),)),
        Filter(in_stock=True, excluded=(1, 2, 3)),
        Filter(brands=("Cord",), in_stock=True),
    ):
        passing = [row for row in range(50) if passes(catalog, row, only)]
        for query in QUERIES:
            answer, plain = (ask(retriever, query, one, beam_size=beam_size) for one in (only, None))
            sids = set(answer.sid_rows.tolist())
            assert set(answer.item_rows.tolist()) == {row for row in passing if int(retriever.table.item_sid[row]) in sids}
            assert len(sids) == min(beam_size, len({int(retriever.table.item_sid[row]) for row in passing}))
            afterwards = np.isin(plain.item_rows, passing)
            assert len(sids) >= len(set(plain.sid_rows[afterwards].tolist()))
            found, kept = found + len(answer.item_rows), kept + int(afterwards.sum())
    assert found > kept


def test_a_limit_counts_the_items_that_pass(retriever) -> None:
    only = Filter(brands=("Acme", "Bolt"), excluded=(7, 8))
    whole = ask(retriever, "red lamp", only)
    for limit in (0, 1, 5, 17):
        part = ask(retriever, "red lamp", only, limit=limit)
        assert part.item_rows.tolist() == whole.item_rows[:limit].tolist()
        assert part.scores.tolist() == whole.scores[:limit].tolist()


def test_masks_that_would_grow_large_are_searched_in_parts(retriever, monkeypatch) -> None:
    filters = [Filter(brands=(BRANDS[row % 3],), categories=(("shop", ("lamp", "drill")[row % 2]),)) if row % 4 else None for row in range(7)]
    arguments = ([f"lamp {row}" for row in range(7)], [None] * 7, [None] * 7, [NO_HISTORY] * 7)
    whole = retriever.generate(*arguments, beam_size=4, filters=filters)
    batches = []
    search = retriever_module.beam_search
    monkeypatch.setattr(
        retriever_module, "beam_search", lambda model, prompts, *rest, **named: batches.append(len(prompts)) or search(model, prompts, *rest, **named)
    )
    monkeypatch.setattr(retriever_module, "MAX_MASK_BYTES", 2 * sum(retriever._mask_widths) + 1)
    parts = retriever.generate(*arguments, beam_size=4, filters=filters)
    assert batches == [2, 2, 2, 1]
    assert parts.sid_rows.tolist() == whole.sid_rows.tolist()
    assert retriever.generate(*arguments, beam_size=4, filters=[None] * 7).sid_rows.shape == (7, 4)
    assert batches[4:] == [7]


def test_new_stock_takes_effect_in_the_retriever_that_brings_it(retriever) -> None:
    only = Filter(in_stock=True)
    restocked = retriever.with_index(retriever.index, FilterCache(retriever.filters.postings.with_stock(np.array([1, 2])), retriever.trie))
    assert set(ask(restocked, "red lamp", only).item_rows.tolist()) == set(range(50)) - {1, 2}
    assert set(ask(retriever, "red lamp", only).item_rows.tolist()) == set(range(50)) - set(OUT_OF_STOCK.tolist())


def test_filters_hold_while_the_index_changes_and_until_it_is_compacted(retriever, catalog) -> None:
    only = Filter(brands=("Acme",))
    later = np.arange(3, dtype=np.int32)
    gone = [row for row in range(50) if passes(catalog, row, only)][::2]
    words = [np.array([5])] * 3
    changed = SegmentedIndex(retriever.index).added(later, np.ones(3), vectors=np.zeros((3, 16)), tokens=words).without(np.array(gone))
    answer = ask(retriever.with_index(changed), "red lamp", only)
    assert set(answer.item_rows.tolist()) == {row for row in range(50) if passes(catalog, row, only)} - set(gone)  # no newcomer
    assert {50, 51, 52} <= set(ask(retriever.with_index(changed), "red lamp", None).item_rows.tolist())
    if retriever.model.guidance is None:
        with pytest.raises(RetrieverError, match="filters: they hold the places of another index; after compaction"):
            retriever.with_index(changed.compacted())
        postings = FilterPostings.build(
            catalog.category_paths + [("shop",)] * 3, [BRANDS[row % 7 % 4] for row in range(50)] + ["Acme"] * 3, changed.compacted()
        )
        compacted = retriever.with_index(changed.compacted(), FilterCache(postings, retriever.trie))
        assert set(ask(compacted, "red lamp", only).item_rows.tolist()) == set(answer.item_rows.tolist()) | {50, 51, 52}


def test_a_filter_where_there_are_no_lists_and_wrong_counts_are_refused(retriever, monkeypatch) -> None:
    with pytest.raises(RetrieverError, match=r"filters: expected one \(or None\) for each of 1 requests, got 2"):
        retriever.generate(["lamp"], [None], [None], [NO_HISTORY], beam_size=1, filters=[None, None])
    monkeypatch.setattr(retriever, "filters", None)
    with pytest.raises(RetrieverError, match=r"filters: this retriever has none; rerun jobs/build_sid_index\.py"):
        ask(retriever, "lamp", dataclasses.replace(Filter(), in_stock=True))
