"""Prompt layouts worked by hand, and batches that follow from (seed, step, rank)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.generator.examples import Batches, ExampleSet, PromptBank, PromptBuilder, PromptBuilderError, aggregate_targets, level1_centroids, longest_prompt
from genrecall.generator.spelling import SpellingCorrector
from genrecall.generator.tokenizer import QueryTokenizer, TokenizerError

TOKENIZER = QueryTokenizer.train(["angle bracket", "shower faucet"] * 3, 400, genders=["f", "m"], age_bands=["18-24"])
OFFSETS = (400, 410, 420)
PAD, ITEM, QUERY, USER, HISTORY, ANSWER = (
    TOKENIZER.pad_id,
    TOKENIZER.item_id,
    TOKENIZER.query_id,
    TOKENIZER.user_id,
    TOKENIZER.history_id,
    TOKENIZER.answer_id,
)
ANGLE = TOKENIZER.encode_batch(["angle"], 9)[0].tolist()
SHOWER = TOKENIZER.encode_batch(["shower faucet"], 99)[0].tolist()


def builder(**settings) -> PromptBuilder:
    return PromptBuilder(TOKENIZER, OFFSETS, **{"soft_prompt": False, "max_history": 2, **settings})


def rows_of(prompts) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(prompts.token_ids, prompts.lengths, strict=True)]


def test_item_and_query_prompts():
    assert rows_of(builder().prompts(builder().item_bank(["Angle", "shower faucet"]), None, None)) == [[ITEM, *ANGLE, ANSWER], [ITEM, *SHOWER, ANSWER]]
    assert rows_of(builder().query_prompts(["angle", ""])) == [[QUERY, *ANGLE, ANSWER], [QUERY, ANSWER]]


def test_request_prompt_has_shopper_then_history_then_query():
    history = np.array([[1, 2, 3], [4, 5, 6]])
    prompts = builder().request_prompts(["angle"], ["f"], ["18-24"], [history])
    expected = [USER, TOKENIZER.gender_id("f"), TOKENIZER.age_band_id("18-24"), HISTORY, 401, 412, 423, 404, 415, 426, QUERY, *ANGLE, ANSWER]
    assert rows_of(prompts) == [expected]


def test_missing_parts_are_left_out_with_their_markers():
    none = np.zeros((0, 3), np.int32)
    one = np.array([[0, 0, 0]])
    prompts = builder().request_prompts(["angle"] * 4, [None, "unseen", "m", None], [None, None, None, "18-24"], [none, none, none, one])
    query = [QUERY, *ANGLE, ANSWER]
    assert rows_of(prompts) == [
        query,
        query,
        [USER, TOKENIZER.gender_id("m"), *query],
        [USER, TOKENIZER.age_band_id("18-24"), HISTORY, 400, 410, 420, *query],
    ]


def test_an_unknown_shopper_gets_the_query_prompt():
    anonymous = builder().request_prompts(["angle", ""], [None, None], [None, None], [np.zeros((0, 3)), np.zeros((0, 3))])
    assert rows_of(anonymous) == rows_of(builder().query_prompts(["angle", ""]))


def test_only_the_newest_clicks_are_kept_oldest_first():
    history = np.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]])
    (row,) = rows_of(builder().request_prompts([""], [None], [None], [history]))
    assert row == [HISTORY, 402, 410, 420, 403, 410, 420, QUERY, ANSWER]
    (without,) = rows_of(builder(max_history=0).request_prompts([""], [None], [None], [history]))
    assert without == [QUERY, ANSWER]


def test_related_clicks_come_before_newer_unrelated_ones():
    # The query lies on code 1: of three clicks with room for two, the related oldest one and the newest are kept.
    centroids = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    related = builder(level1_centroids=centroids, related_codes=1)
    history = np.array([[1, 0, 0], [2, 0, 0], [0, 0, 0]])
    (row,) = rows_of(related.request_prompts([""], [None], [None], [history], np.array([[0.0, 1.0]])))
    assert row == [HISTORY, 401, 410, 420, 400, 410, 420, QUERY, ANSWER]
    (by_recency,) = rows_of(related.request_prompts([""], [None], [None], [history]))
    assert by_recency[1] == 402


def test_queries_are_cut():
    prompts = builder(max_query_tokens=5).query_prompts(["x" * 10_000, "angle " * 2000])
    assert prompts.lengths.tolist() == [7, 7]


def test_no_prompt_is_longer_than_announced():
    limits = {"max_history": 3, "max_query_tokens": 4, "max_title_tokens": 6}
    made = builder(**limits)
    history = np.zeros((9, 3), np.int32)
    prompts = made.request_prompts(["x" * 99], ["f"], ["18-24"], [history])
    assert prompts.lengths.tolist() == [3 + 1 + 9 + 1 + 4 + 1] == [longest_prompt(**limits)]
    assert (
        made.prompts(made.item_bank(["x" * 99]), None, None).lengths.tolist()
        == [1 + 6 + 1]
        == [longest_prompt(**limits | {"max_history": 0, "max_query_tokens": 1})]
    )


def test_prompts_are_padded_on_the_right():
    prompts = builder().query_prompts(["", "angle"])
    assert prompts.token_ids[0].tolist() == [QUERY, ANSWER] + [PAD] * len(ANGLE)


def test_soft_vectors_go_along_and_are_required():
    vectors = np.ones((1, 4), np.float16)
    prompts = builder(soft_prompt=True).query_prompts(["angle"], vectors)
    assert prompts.soft is not None
    assert prompts.soft.tolist() == [[1.0] * 4]
    with pytest.raises(PromptBuilderError, match=r"expected 1 encoder vectors.*got none"):
        builder(soft_prompt=True).query_prompts(["angle"])
    assert builder().query_prompts(["angle"], vectors).soft is None


def test_unequal_lengths_are_refused():
    with pytest.raises(PromptBuilderError, match="expected 2 genders, age bands and histories, got 1, 2 and 2"):
        builder().request_prompts(["a", "b"], [None], [None, None], [np.zeros((0, 3))] * 2)
    with pytest.raises(PromptBuilderError, match="max_history of at least 0, got 32, 48, 8, -1"):
        builder(max_history=-1)


def test_misspelt_queries_become_the_tokens_of_the_right_words():
    spelling = SpellingCorrector({"shower": 3, "faucet": 3})
    queries = ["shwoer FAUCT", "angle"]
    assert rows_of(builder(spelling=spelling).query_prompts(queries)) == [[QUERY, *SHOWER, ANSWER], [QUERY, *ANGLE, ANSWER]]
    nobody = [[None] * 2, [None] * 2, [np.zeros((0, 3))] * 2]
    assert rows_of(builder(spelling=spelling).request_prompts(queries, *nobody)) == rows_of(builder(spelling=spelling).query_prompts(queries))
    assert rows_of(builder().query_prompts(queries))[0] != [QUERY, *SHOWER, ANSWER]


def test_saved_builder_reads_back(tmp_path):
    first = builder(level1_centroids=np.eye(3, dtype=np.float32), max_query_tokens=7, spelling=SpellingCorrector({"angle": 3}))
    first.save(tmp_path)
    again = PromptBuilder.load(tmp_path)
    assert (again.max_query_tokens, again.max_history, again.soft_prompt, again.level_offsets.tolist()) == (7, 2, False, list(OFFSETS))
    assert np.array_equal(again.level1_centroids, np.eye(3))
    assert rows_of(again.query_prompts(["angel"])) == rows_of(first.query_prompts(["angle"])) == [[QUERY, *ANGLE, ANSWER]]
    with pytest.raises(PromptBuilderError, match=r"prompts\.json: missing"):
        PromptBuilder.load(tmp_path / "elsewhere")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        PromptBuilder.load(tmp_path)


def test_centroids_are_unit_means():
    vectors = np.array([[3, 0], [0, 4], [0, 2]], np.float32)
    centroids = level1_centroids(vectors, np.array([0, 0, 2]), 3)
    assert centroids == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, 1]]))


def test_targets_of_an_owner_are_summed_by_sid():
    # Owner 0: SID 5 clicked (1) and bought (2), SID 2 clicked (1). Owner 2: SID 5 once. Owner 1: nothing.
    offsets, sids, weights = aggregate_targets(np.array([0, 2, 0, 0]), np.array([5, 5, 2, 5]), np.array([1.0, 1.0, 1.0, 2.0]), 3)
    assert offsets.tolist() == [0, 2, 2, 3]
    assert sids.tolist() == [2, 5, 5]
    assert weights.tolist() == [1.0, 3.0, 1.0]


def example_set(lengths: list[int], targets: list[dict[int, float]], weights: list[float] | None = None) -> ExampleSet:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    target_offsets = np.concatenate([[0], np.cumsum([len(one) for one in targets])])
    return ExampleSet(
        PromptBank(np.repeat(np.arange(len(lengths)), lengths).astype(np.int32), offsets.astype(np.int64)),
        np.arange(len(lengths), dtype=np.int32),
        target_offsets.astype(np.int64),
        np.array([sid for one in targets for sid in one], np.int32),
        np.array([weight for one in targets for weight in one.values()], np.float64),
        np.ones(len(lengths)) if weights is None else np.array(weights),
    )


MANY = example_set([1 + row % 13 for row in range(40)], [{row: 1.0, row + 40: 2.0} for row in range(40)])


def test_batches_follow_from_seed_step_and_rank():
    one, other = (Batches(MANY, batch_size=8, targets=3, seed=(3, 1)) for _ in range(2))
    steps = list(range(20))
    forward = {step: (one.rows(step), one.targets(one.rows(step), step)) for step in steps}
    for step in reversed(steps):  # a resumed run starts anywhere
        assert np.array_equal(other.rows(step), forward[step][0])
        assert np.array_equal(other.targets(other.rows(step), step), forward[step][1])
    assert not np.array_equal(Batches(MANY, batch_size=8, targets=3, seed=4).rows(0), forward[0][0])


def test_ranks_share_a_step_between_them():
    whole = Batches(MANY, batch_size=8, targets=1, seed=0)
    parts = [Batches(MANY, batch_size=8, targets=1, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for step in range(10):
        assert sorted(np.concatenate([part.rows(step) for part in parts])) == sorted(whole.rows(step))
        assert len(parts[0].rows(step)) == 4


def test_batches_hold_prompts_of_like_length():
    batches = Batches(MANY, batch_size=8, targets=1, seed=0)
    spread = [np.ptp(MANY.bank.lengths[batches.rows(step)]) for step in range(64)]
    assert np.mean(spread) < 3  # 13 lengths: about 11 if drawn without sorting


def test_examples_are_drawn_by_weight():
    examples = example_set([1, 1, 1], [{0: 1.0}] * 3, [1.0, 3.0, 0.0])
    batches = Batches(examples, batch_size=100, targets=1, seed=0)
    counts = np.bincount(np.concatenate([batches.rows(step) for step in range(80)]), minlength=3)
    assert counts[2] == 0
    assert counts[1] / counts.sum() == pytest.approx(0.75, abs=0.02)


def test_targets_are_drawn_by_graded_feedback():
    examples = example_set([1, 1], [{7: 2.0, 8: 1.0, 9: 1.0}, {3: 5.0}])
    batches = Batches(examples, batch_size=2, targets=4, seed=0)
    drawn = batches.targets(np.array([0, 1] * 500), 0)
    assert set(drawn[1::2].ravel()) == {3}
    # Four strata over weights 2:1:1: SID 7 fills exactly the first two, then 8, then 9.
    assert drawn[0].tolist() == [7, 7, 8, 9]
    two = Batches(examples, batch_size=2, targets=1, seed=0).targets(np.zeros(4000, np.int64), 1)
    assert np.bincount(two.ravel(), minlength=10)[7:] / 4000 == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_mixed_sets_keep_their_shares_whatever_their_sizes():
    small, large = example_set([1], [{0: 1.0}]), example_set([2] * 99, [{1: 1.0}] * 99)
    mixed = ExampleSet.mixed([(small, 0.25), (large, 0.75), (small, 0.0)])
    assert len(mixed) == 100
    assert mixed.weights[0] == pytest.approx(0.25)
    assert mixed.bank.lengths.tolist() == [1] + [2] * 99
    batches = Batches(mixed, batch_size=100, targets=1, seed=0)
    drawn = np.concatenate([batches.targets(batches.rows(step), step) for step in range(40)])
    assert np.mean(drawn == 0) == pytest.approx(0.25, abs=0.03)


def test_take_keeps_prompts_and_targets_together():
    taken = MANY.take(np.array([39, 0, 39]))
    assert taken.bank.lengths.tolist() == [1, 1, 1]
    assert taken.bank.ids.tolist() == [39, 0, 39]
    assert taken.target_sids.tolist() == [39, 79, 0, 40, 39, 79]


def test_impossible_batches_are_refused():
    with pytest.raises(PromptBuilderError, match="multiple of the 2 workers, got 3"):
        Batches(MANY, batch_size=3, targets=1, seed=0, world_size=2)
    with pytest.raises(PromptBuilderError, match="expected at least one, got none"):
        Batches(MANY.take(np.array([], np.int64)), batch_size=2, targets=1, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=6))
def test_joined_parts_equal_list_concatenation(pairs):
    def ragged(lists):
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64)
        return np.array([token for one in lists for token in one], np.int32), offsets

    bank = PromptBank.joined([ragged([left for left, _ in pairs]), ragged([right for _, right in pairs])])
    for row, (left, right) in enumerate(pairs):
        assert bank.ids[bank.offsets[row] : bank.offsets[row + 1]].tolist() == left + right
    padded, lengths = bank.padded(np.arange(len(pairs)), 99)
    assert lengths.tolist() == [len(left) + len(right) for left, right in pairs]
    assert all(row[:length].tolist() == left + right and set(row[length:]) <= {99} for row, length, (left, right) in zip(padded, lengths, pairs, strict=True))
