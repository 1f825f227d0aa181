"""From requests to items: order, limits, and what an empty, unknown or hostile input gives."""

from __future__ import annotations

import numpy as np
import pytest

from genrecall.generator.examples import PromptBuilder
from genrecall.generator.model import Decoder, DecoderConfig
from genrecall.generator.retriever import MAX_BATCH, Retriever, RetrieverError, load_retriever
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

NO_HISTORY = np.zeros(0, np.int32)


@pytest.fixture(scope="module")
def retriever(catalog, encoder) -> Retriever:
    """An untrained generator over 25 SIDs of two items each."""
    rows = np.arange(50) // 2
    table = SidTable.from_item_tokens(SidSpace((5, 5, 2)), np.stack([rows // 5, rows % 5, np.zeros(50, int)], axis=1).astype(np.int32))
    tokenizer = QueryTokenizer.train(catalog.titles, 500, genders=["f", "m"], age_bands=["18-24"])
    config = DecoderConfig(
        text_vocab_size=tokenizer.vocab_size,
        level_sizes=(5, 5, 2),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=16,
        soft_prompt_dim=encoder.dim,
    )
    builder = PromptBuilder(tokenizer, config.level_offsets, max_history=2)
    index = SidIndex.build(table.item_sid, len(table), np.arange(50, dtype=np.float64))
    return Retriever(Decoder(config, seed=1), builder, Trie.from_tokens(table.tokens, (5, 5, 2)), index, table, encoder)


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
    sid_rows, scores = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=25)
    assert sorted(sid_rows[0].tolist()) == list(range(25))
    # Every (level 1, level 2) pair exists; level 3 has a second code that no SID uses, so the sum stays below 1.
    assert 0 < np.exp(scores[0]).sum() < 1


def test_beams_beyond_the_sids_are_empty(retriever):
    sid_rows, scores = retriever.generate(["red lamp"], [None], [None], [NO_HISTORY], beam_size=40)
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
def test_every_query_has_an_answer(retriever, query):
    answer = ask(retriever, query)
    assert len(answer.item_rows) == 20
    assert np.isfinite(answer.scores).all()


def test_a_batch_gives_what_each_request_gives_alone(retriever):
    queries = [f"{colour} lamp {row}" for row, colour in enumerate(["red", "blue", ""] * ((MAX_BATCH + 50) // 3))]
    genders = ["f", None] * (len(queries) // 2) + [None] * (len(queries) % 2)
    histories = [np.arange(row % 4, dtype=np.int32) for row in range(len(queries))]
    sid_rows, scores = retriever.generate(queries, genders, [None] * len(queries), histories, beam_size=5)
    assert len(queries) > MAX_BATCH
    for row in (0, 1, 2, MAX_BATCH - 1, MAX_BATCH, len(queries) - 1):
        alone_rows, alone_scores = retriever.generate([queries[row]], [genders[row]], [None], [histories[row]], beam_size=5)
        assert np.array_equal(alone_rows[0], sid_rows[row])
        assert alone_scores[0] == pytest.approx(scores[row], abs=1e-5)


def test_no_requests_no_answers(retriever):
    assert retriever.recall([], [], [], [], beam_size=3, limit=3) == []


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


def test_a_missing_stage_is_named(tmp_path):
    (tmp_path / "stage1").mkdir()
    with pytest.raises(RetrieverError, match=r"stage3: no such stage; .* holds stage1"):
        load_retriever(generator_folder=tmp_path, stage="stage3", sid_index=tmp_path, encoder=tmp_path)


def test_a_saved_generator_answers_the_same(retriever, tmp_path, encoder, monkeypatch):
    retriever.model.save_pretrained(tmp_path / "generator" / "stage2")
    retriever.prompt_builder.save(tmp_path / "generator")
    retriever.trie.save(tmp_path / "sid_index" / "trie")
    retriever.index.save(tmp_path / "sid_index" / "index")
    (tmp_path / "sid_index" / "sid_space.json").write_text(retriever.table.space.to_json())
    monkeypatch.setattr("genrecall.generator.retriever.load_encoder", lambda *_, **__: encoder)
    again = load_retriever(generator_folder=tmp_path / "generator", stage="stage2", sid_index=tmp_path / "sid_index", encoder=tmp_path, device="cpu")
    one, other = (ask(made, "red lamp", "f", np.array([1, 2], np.int32)) for made in (retriever, again))
    assert np.array_equal(one.item_rows, other.item_rows)
    assert one.scores == pytest.approx(other.scores, abs=1e-6)
