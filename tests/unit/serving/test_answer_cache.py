"""Kept answers: which requests share one, what is never kept, and that nothing outlives the versions that gave it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tokenizers

from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import Version
from genrecall.serving.answer_cache import AnswerCache, Key, key_of
from genrecall.serving.messages import RecalledItem, RecallRequest, RecallResponse, Timings, Versions
from genrecall.serving.recall_service import ServedBundle, answer_batch

MB = 2**20


@pytest.fixture(scope="module")
def served(untrained_line):
    return ServedBundle(Version("shop", 1, "0" * 64), load_bundle(untrained_line().path))


@pytest.fixture(scope="module")
def other(untrained_line):
    return ServedBundle(Version("shop", 2, "1" * 64), load_bundle(untrained_line(seed=1).path))


def request(**fields):
    return RecallRequest.model_validate({"query": "garden hose", **fields})


def answer(versions=None, title="hose", **fields):
    item = RecalledItem(item_id="i1", title=title, brand="", category_path=["Home"], rank=0, sid="<1,2,3>", score=-0.5)
    timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
    return RecallResponse(items=[item], sids=[], beam_size=5, versions=versions or Versions(model="shop/1", bundle="a"), timings=timings, **fields)


def key(number, versions=None):
    return Key(versions or Versions(model="shop/1", bundle="a"), bytes([number]))


ASKED = {"shopper": {"gender": "f"}, "history": ["i01", "i02"], "filters": {"brands": ["A", "B"], "excluded": ["i03", "i04"]}, "beam_size": 5, "limit": 7}


@pytest.mark.parametrize(
    "change",
    [
        {"query": "Garden  HOSE "},
        {"query": "ｇarden\those"},
        {"shopper": {"gender": " F"}},
        {"history": ["i01", "nobody", "i02"]},
        {"filters": {"brands": ["B", "A", "A"], "excluded": ["nobody", "i04", "i03"], "categories": []}},
        {"deadline_ms": 50},
    ],
)
def test_requests_that_mean_the_same_share_a_key_and_an_answer(served, change):
    assert key_of(served, request(**ASKED)) == key_of(served, request(**(ASKED | change)))
    (one,), (two,) = (answer_batch(served, [request(**(ASKED | fields))], (5, 5, 5)) for fields in ({}, change))
    assert [(item.item_id, pytest.approx(item.score, abs=1e-5)) for item in one.items] == [(item.item_id, item.score) for item in two.items]


@pytest.mark.parametrize("reads_case", ["tokenizer", "encoder"])
def test_queries_that_differ_in_case_share_no_key_where_the_model_reads_it(served, tmp_path, reads_case):
    retriever = copy.copy(served.bundle.retriever)
    if reads_case == "encoder":
        retriever.encoder = copy.copy(retriever.encoder)
        retriever.encoder.folds_text = False
    else:
        cased = tokenizers.Tokenizer(tokenizers.models.BPE())
        cased.save(str(tmp_path / "tokenizer.json"))
        retriever.prompt_builder = copy.copy(retriever.prompt_builder)
        retriever.prompt_builder.tokenizer = QueryTokenizer.from_pretrained(tmp_path)
    cased = ServedBundle(served.version, dataclasses.replace(served.bundle, retriever=retriever))
    assert key_of(served, request(query="Apple")) == key_of(served, request(query="apple"))
    assert key_of(cased, request(query="Apple")) != key_of(cased, request(query="apple"))
    assert key_of(cased, request(query="Apple")) == key_of(cased, request(query="Apple"))


@pytest.mark.parametrize(
    "change",
    [
        {"query": "garden hoses"},
        {"query": "gardenhose"},
        {"shopper": {"gender": "m"}},
        {"shopper": {"age_band": "f"}},
        {"history": ["i02", "i01"]},
        {"history": []},
        {"history": ["nobody"]},
        {"filters": {"brands": ["A", "B"]}},
        {"filters": {"brands": ["A,B"], "excluded": ["i03", "i04"]}},
        {"filters": None},
        {"beam_size": None},
        {"limit": 8},
        {"explain": True},
    ],
)
def test_requests_that_mean_another_thing_do_not(served, change):
    assert key_of(served, request(**ASKED)) != key_of(served, request(**(ASKED | change)))


def test_a_history_of_unknown_items_is_not_that_of_none(served):
    assert key_of(served, request(history=["nobody"])) != key_of(served, request())


def test_a_kept_answer_comes_back_marked():
    cache = AnswerCache(10, MB)
    given = answer()
    cache.put(key(1), given)
    found = cache.get(key(1))
    assert found.timings.cached
    assert not given.timings.cached
    assert found.model_copy(update={"timings": given.timings}) == given
    assert cache.get(key(2)) is None


def test_a_swap_and_a_rollback_never_bring_an_answer_of_another_version(served, other):
    cache = AnswerCache(100, MB)
    for turn, now in enumerate((served, other, served)):
        one = key_of(now, request())
        found = cache.get(one)
        assert (found is not None) == (turn == 2)  # back on the first, whose answer is still right
        fresh = answer_batch(now, [request()], (5, 5, 5))[0]
        if found is not None:
            assert (found.versions, found.items) == (fresh.versions, fresh.items)
        cache.put(one, fresh)


def test_a_bundle_rebuilt_under_the_same_number_is_another_version(served, other):
    same_number = ServedBundle(served.version, other.bundle)
    assert key_of(served, request()) != key_of(same_number, request())


def test_an_answer_of_a_bundle_swapped_in_meanwhile_is_not_kept(served, other):
    cache = AnswerCache(100, MB)
    asked_of_the_old = key_of(served, request())
    cache.put(asked_of_the_old, answer_batch(other, [request()], (5, 5, 5))[0])
    assert len(cache) == 0


def test_every_field_of_the_versions_is_part_of_the_key():
    """A catalogue sequence or anything else that versions come to name is so too."""

    class Extended(Versions):
        catalogue: int

    cache = AnswerCache(100, MB)
    old, new = (Extended(model="shop/1", bundle="a", catalogue=number) for number in (1, 2))
    cache.put(key(1, old), answer(old))
    assert len(cache) == 1
    assert cache.get(key(1, new)) is None


def test_degraded_answers_are_not_kept():
    cache = AnswerCache(10, MB)
    for reason in ("load", "deadline", "filters", "history"):
        cache.put(key(1), answer(degraded=True, degraded_by=[reason]))
    assert len(cache) == cache.nbytes == 0


def test_no_more_entries_are_kept_than_allowed_and_the_oldest_used_go_first():
    cache = AnswerCache(2, MB)
    cache.put(key(1), answer())
    cache.put(key(2), answer())
    cache.get(key(1))
    cache.put(key(3), answer())
    assert [cache.get(key(number)) is not None for number in (1, 2, 3)] == [True, False, True]


def test_no_more_bytes_are_kept_than_allowed():
    cache = AnswerCache(10_000, 20_000)
    for number in range(200):
        cache.put(key(number), answer(title="x" * (number * 20)))
        assert cache.nbytes <= 20_000
        assert cache.nbytes == sum(len(text) + 512 for text in cache._kept.values())
    assert 0 < len(cache) < 20
    before = len(cache), cache.nbytes
    cache.put(key(201), answer(title="x" * 20_001))
    assert (len(cache), cache.nbytes) == before
    cache.put(key(199), answer())  # another answer under the same key
    assert cache.nbytes == sum(len(text) + 512 for text in cache._kept.values())


def test_a_cache_of_no_entries_keeps_nothing():
    cache = AnswerCache(0, MB)
    cache.put(key(1), answer())
    assert len(cache) == 0
