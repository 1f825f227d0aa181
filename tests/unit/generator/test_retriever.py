"""From requests to items: order, limits, and what an empty, unknown or hostile input gives."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from genrecall.encoders.embed import item_text
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.retriever import MAX_BATCH, Retriever, RetrieverError, load_retriever
from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

NO_HISTORY = np.zeros(0, np.int32)


@pytest.fixture(scope="module")
def make_retriever(untrained_retriever):
    """25 SIDs of two items each."""
    rows = np.arange(50) // 2
    table = SidTable.from_item_tokens(SidSpace((5, 5, 2)), np.stack([rows // 5, rows % 5, np.zeros(50, int)], axis=1).astype(np.int32))
    return functools.partial(untrained_retriever, table, np.arange(50, dtype=np.float64))


@pytest.fixture(scope="module")
def retriever(make_retriever) -> Retriever:
    return make_retriever(sharpness=0.0)


@pytest.fixture
def guided(make_retriever) -> Retriever:
    """By the encoder alone."""
    return make_retriever(sharpness=8.0)


@pytest.fixture
def worded(make_retriever) -> Retriever:
    """By the encoder and the query's words."""
    return make_retriever(sharpness=8.0, lexical=3.0)


@pytest.fixture
def fed(make_retriever) -> Retriever:
    """By the encoder and the query's words, with feedback."""
    return make_retriever(sharpness=8.0, lexical=3.0, feedback=0.4)


def ask(retriever: Retriever, query: str, gender: str | None = None, history: np.ndarray = NO_HISTORY, **settings):
    return retriever.recall([query], [gender], [None], [history], **{"beam_size": 10, "limit": 100, **settings})[0]


def test_items_come_in_the_order_of_their_sids_scores(retriever):
    answer = ask(retriever, "red lamp")
    assert len(answer.item_rows) == 20  # ten SIDs of two items
    assert (np.diff(answer.scores) <= 0).all()
    assert (answer.scores < 0).all()
    assert np.array_equal(answer.sid_rows, retriever.table.item_sid[answer.item_rows])
    assert len(set(answer.item_rows.tolist())) == 20


def test_inside_a_sid_the_index_order_holds(retriever):
    pairs = ask(retriever, "red lamp").item_rows.reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1] + 1).all()  # the higher row has the higher prior


def test_scores_are_log_probabilities_of_the_generated_sids(retriever):
    sid_rows, scores, _ = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=25)
    assert sorted(sid_rows[0].tolist()) == list(range(25))
    # Every (level 1, level 2) pair exists; level 3 has a second code that no SID uses, so the sum stays below 1.
    assert 0 < np.exp(scores[0]).sum() < 1


def test_beams_beyond_the_sids_are_empty(retriever):
    sid_rows, scores, _ = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=40)
    assert (sid_rows[0, 25:] == -1).all()
    assert np.isneginf(scores[0, 25:]).all()
    assert len(ask(retriever, "red lamp", beam_size=40).item_rows) == 50


def test_limit_cuts_the_answer(retriever):
    whole = ask(retriever, "red lamp").item_rows
    assert ask(retriever, "red lamp", limit=7).item_rows.tolist() == whole[:7].tolist()
    assert len(ask(retriever, "red lamp", limit=0).item_rows) == 0


def test_the_shopper_changes_personalised_answers_only(retriever):
    history = np.array([4, 9], np.int32)
    anonymous = ask(retriever, "lamp").scores
    assert not np.allclose(ask(retriever, "lamp", "f", history).scores, anonymous)
    assert np.array_equal(ask(retriever, "lamp", "f", history, personalised=False).scores, ask(retriever, "lamp", personalised=False).scores)
    assert np.array_equal(ask(retriever, "lamp", personalised=False).scores, anonymous)


def test_unknown_values_and_items_count_as_absent(retriever):
    assert np.array_equal(ask(retriever, "lamp", "unseen", np.array([-1, 99])).scores, ask(retriever, "lamp").scores)


@pytest.mark.parametrize("query", ["", "   ", "x" * 10_000, "lamp " * 2_000, "[ANSWER]", "灯 ランプ \x00"])
def test_every_query_has_an_answer(retriever, guided, worded, query):
    for made in (retriever, guided, worded):
        answer = ask(made, query)
        assert len(answer.item_rows) == 20
        assert np.isfinite(answer.scores).all()


@pytest.mark.parametrize("name", ["retriever", "worded"])
def test_a_batch_gives_what_each_request_gives_alone(name, request):
    retriever = request.getfixturevalue(name)
    queries = [f"{colour} lamp {row}" for row, colour in enumerate(["red", "blue", ""] * ((MAX_BATCH + 50) // 3))]
    genders = ["f", None] * (len(queries) // 2) + [None] * (len(queries) % 2)
    histories = [np.arange(row % 4, dtype=np.int32) for row in range(len(queries))]
    sid_rows, scores, prompts = retriever.generate(queries, genders, [None] * len(queries), histories, beam_size=5)
    assert len(queries) > MAX_BATCH
    for row in (0, 1, 2, MAX_BATCH - 1, MAX_BATCH, len(queries) - 1):
        alone = retriever.generate([queries[row]], [genders[row]], [None], [histories[row]], beam_size=5)
        assert np.array_equal(alone.sid_rows[0], sid_rows[row])
        assert alone.scores[0] == pytest.approx(scores[row], abs=1e-5)
        assert all(torch.equal(one, other) for one, other in zip(alone.prompts[0], prompts[row], strict=True))


def test_no_requests_no_answers(retriever):
    assert retriever.recall([], [], [], [], beam_size=3, limit=3) == []


def test_prompts_come_with_the_sids_where_they_hold_query_vectors(retriever, encoder):
    found = retriever.generate(["red lamp", "drill"], ["f", None], [None] * 2, [np.array([3], np.int32), NO_HISTORY], beam_size=3)
    vectors = encoder.encode_queries(["red lamp", "drill"])
    np.testing.assert_array_equal(torch.stack([vector for vector, _ in found.prompts]), vectors)
    builder, tokens = retriever.prompt_builder, retriever.table.tokens
    read = builder.request_prompts(["red lamp", "drill"], ["f", None], [None] * 2, [tokens[[1]], tokens[:0]], vectors)
    assert read.lengths[0] > read.lengths[1]
    assert [ids.tolist() for _, ids in found.prompts] == [ids[:length].tolist() for ids, length in zip(read.token_ids, read.lengths, strict=True)]
    sid_rows, scores, prompt = found.of(1)
    assert np.array_equal(sid_rows, found.sid_rows[1])
    assert np.array_equal(scores, found.scores[1])
    assert prompt is found.prompts[1]
    builder = PromptBuilder(retriever.prompt_builder.tokenizer, retriever.prompt_builder.level_offsets, soft_prompt=False)
    bare = Retriever(retriever.model, builder, retriever.trie, retriever.index, retriever.table, None)
    assert bare.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=3).prompts is None
    assert bare.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=3).of(0)[2] is None


def words_of(retriever: Retriever, catalog, text: str) -> list[float]:
    """w times the share of the idf of the text's tokens that each item's text holds, by item row."""
    tokens = [set(retriever.prompt_builder.tokenizer.encode_batch([one], 128)[0].tolist()) for one in (text, *item_text(catalog))]
    frequency = {token: sum(token in held for held in tokens[1:]) for token in tokens[0]}
    idf = {token: math.log(1 + (50 - count + 0.5) / (count + 0.5)) for token, count in frequency.items() if count}
    return [retriever.model.guidance.lexical_weight * sum(idf[token] for token in held if token in idf) / sum(idf.values()) for held in tokens[1:]]


@pytest.mark.parametrize("name", ["guided", "worded", "fed"])
def test_a_guided_items_score_is_its_sids_plus_its_share_of_the_sid(name, request, catalog):
    guided = request.getfixturevalue(name)
    found = guided.generate(["red lamp"], ["f"], [None], [np.array([3], np.int32)], beam_size=25)
    answer = guided.expand(*found.of(0), 100)
    words = words_of(guided, catalog, "red lamp")
    assert (max(words) > min(words)) == (name != "guided")
    assert np.allclose(found.prompts[0][0], guided.encoder.encode_queries(["red lamp"])[0]) == (
        name != "fed"
    )  # items are ordered by the vector that found their SIDs
    expected = []
    for sid, score in zip(found.sid_rows[0].tolist(), found.scores[0].tolist(), strict=True):
        start, end = guided.trie.item_offsets[sid : sid + 2].tolist()
        cosines = [float(one) for one in guided.trie.item_vectors[start:end].float() @ found.prompts[0][0]]
        members = guided.index.items(sid).tolist()
        logits = [0.6 * (8.0 * cosine + words[item]) for item, cosine in zip(members, cosines, strict=True)]
        total = sum(math.exp(logit) for logit in logits)
        expected += [(score + logit - math.log(total), item, sid) for item, logit in zip(members, logits, strict=True)]
    expected.sort(key=lambda one: -one[0])
    assert answer.scores.tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)
    assert answer.item_rows.tolist() == [item for _, item, _ in expected]
    assert answer.sid_rows.tolist() == [sid for _, _, sid in expected]
    assert answer.scores.dtype == np.float32
    assert (np.diff(answer.scores) <= 0).all()


@pytest.mark.parametrize("name", ["guided", "worded", "fed"])
def test_probabilities_of_a_sids_items_add_to_the_sids(name, request):
    guided = request.getfixturevalue(name)
    found = guided.generate(["blue carpet"], [None], [None], [NO_HISTORY], beam_size=25)
    answer = guided.expand(*found.of(0), 100)
    by_sid = np.bincount(answer.sid_rows, weights=np.exp(answer.scores), minlength=25)
    np.testing.assert_allclose(by_sid[found.sid_rows[0]], np.exp(found.scores[0]), rtol=1e-5)
    assert by_sid.sum() == pytest.approx(1.0, abs=1e-5)  # the beam holds every SID


def test_words_bring_an_item_forward_inside_its_sid(worded):
    # Items 30 and 31, the red and the blue lamp, are alike to the encoder here; the index's order is 31, 30.
    sid = int(worded.table.item_sid[30])
    start, end = worded.trie.item_offsets[sid : sid + 2].tolist()
    worded.trie.item_vectors[start:end] = 0
    for query, expected in (("red lamp", [30, 31]), ("blue lamp", [31, 30]), ("lamp", [31, 30]), ("zzz", [31, 30])):
        prompt = worded.generate([query], [None], [None], [NO_HISTORY], beam_size=1).of(0)[2]
        assert worded.expand(np.array([sid], np.int32), np.zeros(1, np.float32), prompt, 10).item_rows.tolist() == expected


def test_a_large_sids_best_item_may_come_before_a_small_sids(guided):
    # SID 4 (p = 0.4) has items at cosines 0 and 1, of which e^(ln 3 * cosine) makes 1/4 and 3/4; those of SID 2 (p = 0.5) are alike.
    guided.model.guidance.sharpness = math.log(3)
    with torch.no_grad():
        guided.model.guidance.level_weights.fill_(1.0)
    guided.trie.item_vectors[8:10] = torch.eye(16)[[1, 0]]
    guided.trie.item_vectors[4:6] = torch.eye(16)[[2, 3]]
    sids, scores = np.array([2, -1, 4], np.int32), np.log(np.array([0.5, 1e-30, 0.4], np.float32))
    answer = guided.expand(sids, scores, (torch.eye(16)[0], torch.tensor([5])), 10)
    near, far = guided.index.items(4)[[1, 0]]
    assert answer.item_rows.tolist() == [near, *guided.index.items(2), far]  # items of equal score in the index's order
    assert answer.sid_rows.tolist() == [4, 2, 2, 4]
    assert np.exp(answer.scores).tolist() == pytest.approx([0.3, 0.25, 0.25, 0.1])


@pytest.mark.parametrize("name", ["guided", "worded", "fed"])
def test_a_guided_answer_is_cut_after_ordering(name, request):
    guided = request.getfixturevalue(name)
    found = guided.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=40).of(0)
    whole = guided.expand(*found, 1000)
    assert len(whole.item_rows) == 50
    for limit in (0, 1, 7, 49):
        part = guided.expand(*found, limit)
        assert part.item_rows.tolist() == whole.item_rows[:limit].tolist()
        assert part.scores.tolist() == whole.scores[:limit].tolist()
    nothing = guided.expand(np.full(3, -1, np.int32), np.full(3, -np.inf, np.float32), (torch.zeros(16), torch.tensor([5])), 5)
    assert len(nothing.item_rows) == len(nothing.scores) == 0


def test_without_guidance_a_sids_items_share_it_by_their_feedback(retriever):
    # SID 3 (p = 0.5) has items 7 and 6, SID 1 (p = 0.4) items 3 and 2, the higher row first by prior. Without feedback each has half of its SID, whatever the prompt.
    sids, scores = np.array([3, 1], np.int32), np.log(np.array([0.5, 0.4], np.float32))
    for prompt in (None, (torch.ones(16), torch.tensor([5]))):
        answer = retriever.expand(sids, scores, prompt, 3)
        assert answer.item_rows.tolist() == [7, 6, 3]
        assert answer.sid_rows.tolist() == [3, 3, 1]
        assert np.exp(answer.scores).tolist() == pytest.approx([0.25, 0.25, 0.2])
    # One click of item 2 gives it 1.5 / 2 of SID 1: 0.3, before the items of SID 3, and leaves 0.1 for item 3.
    feedback = np.zeros(50)
    feedback[2] = 1.0
    clicked = SidIndex.build(retriever.table.item_sid, len(retriever.table), retriever.index.prior, feedback=feedback)
    answer = retriever.with_index(clicked).expand(sids, scores, None, 10)
    assert answer.item_rows.tolist() == [2, 7, 6, 3]
    assert np.exp(answer.scores).tolist() == pytest.approx([0.3, 0.25, 0.25, 0.1], rel=1e-3)


def test_wrong_arguments_are_refused(retriever):
    with pytest.raises(RetrieverError, match="beam_size: expected at least 1, got 0"):
        ask(retriever, "lamp", beam_size=0)
    with pytest.raises(RetrieverError, match="expected 1 genders, age bands and histories, got 2, 1 and 1"):
        retriever.generate(["lamp"], [None, None], [None], [NO_HISTORY], beam_size=1)


def test_parts_of_different_sid_spaces_are_refused(retriever):
    other = Trie.from_tokens(np.array([[0, 0, 0]], np.int32), (5, 5, 2))
    with pytest.raises(RetrieverError, match="do not belong together; rerun jobs/train_generator"):
        Retriever(retriever.model, retriever.prompt_builder, other, retriever.index, retriever.table, retriever.encoder)
    with pytest.raises(RetrieverError, match="encoder: needed"):
        Retriever(retriever.model, retriever.prompt_builder, retriever.trie, retriever.index, retriever.table, None)


def test_a_guided_generator_without_its_support_or_its_items_is_refused(worded):
    parts = (worded.index, worded.table, worded.encoder)
    with pytest.raises(RetrieverError, match=r"the generator is guided: it needs support 'trie' \(got 'level'\) and a trie with its items' vectors"):
        Retriever(worded.model, worded.prompt_builder, worded.trie, *parts, support="level")
    bare = Trie.from_tokens(worded.table.tokens, (5, 5, 2))
    with pytest.raises(RetrieverError, match=r"its items' vectors \(missing: rerun jobs/build_sid_index\.py\)"):
        Retriever(worded.model, worded.prompt_builder, bare, *parts, support="trie")


def test_a_missing_stage_is_named(tmp_path):
    (tmp_path / "stage1").mkdir()
    with pytest.raises(RetrieverError, match=r"stage3: no such stage; .* holds stage1"):
        load_retriever(generator_folder=tmp_path, stage="stage3", sid_index=tmp_path, encoder=tmp_path)


@pytest.mark.parametrize("name", ["retriever", "guided", "worded"])
def test_a_saved_generator_answers_the_same(name, request, tmp_path, encoder, monkeypatch):
    retriever = request.getfixturevalue(name)
    retriever.model.save_pretrained(tmp_path / "generator" / "stage2")
    retriever.prompt_builder.save(tmp_path / "generator")
    retriever.trie.save(tmp_path / "sid_index" / "trie")
    retriever.index.save(tmp_path / "sid_index" / "index")
    (tmp_path / "sid_index" / "sid_space.json").write_text(retriever.table.space.to_json())
    monkeypatch.setattr("genrecall.generator.retriever.load_encoder", lambda *_, **__: encoder)
    again = load_retriever(
        generator_folder=tmp_path / "generator", stage="stage2", sid_index=tmp_path / "sid_index", encoder=tmp_path, support=retriever.support, device="cpu"
    )
    one, other = (ask(made, "red lamp", "f", np.array([1, 2], np.int32)) for made in (retriever, again))
    assert np.array_equal(one.item_rows, other.item_rows)
    assert one.scores == pytest.approx(other.scores, abs=1e-6)
