"""Guidance: its lexicon by hand, its probabilities against a plain loop over items, and a decoder that has nothing to add to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genrecall.generator.beam_search import beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.guidance import FEEDBACK_ITEMS, LARGEST_SPREAD, Guidance, Guide, log_guide
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.sid.trie import Trie

SIZES = (4, 3, 3)
DIM = 6
VOCAB = 12
"""Text tokens; 0 and 1 are markers, which no item's text holds."""

prompt_rows = st.lists(st.lists(st.integers(0, VOCAB + 3), min_size=1, max_size=6), min_size=2, max_size=2)
"""Two prompts of text tokens, markers and SIDs (12 and above)."""


def some_trie(seed: int = 0, size: int = 14) -> Trie:
    """`size` of the 36 SIDs, each with one to four items."""
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.choice(36, size, replace=False))
    offsets = np.concatenate([[0], rng.integers(1, 5, size).cumsum()])
    vectors = rng.standard_normal((offsets[-1], DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Trie.from_tokens(np.stack([codes // 9, codes // 3 % 3, codes % 3], axis=1).astype(np.int32), SIZES).with_items(vectors, offsets)


def some_vectors(count: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def lexicon_of(texts: Sequence[Sequence[int]], vocab_size: int = VOCAB, counted: Sequence[bool] | None = None) -> Lexicon:
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, texts)])
    return Lexicon.build(ids, offsets, vocab_size, np.ones(len(texts), dtype=bool) if counted is None else np.array(counted, dtype=bool))


def some_lexicon(items: int, seed: int = 0) -> Lexicon:
    """Texts of none to five tokens; about a third of the items do not count."""
    rng = np.random.default_rng(seed)
    return lexicon_of([rng.integers(2, VOCAB, rng.integers(0, 6)).tolist() for _ in range(items)], counted=rng.random(items) < 0.7)


def guided_by(lexicon: Lexicon, *, sharpness: float = 5.0, lexical_weight: float = 3.0, feedback: float = 0.0, vocab_size: int = VOCAB) -> Guidance:
    sizes = {"vocab_size": vocab_size, "items": len(lexicon.item_offsets) - 1, "entries": len(lexicon.item_tokens)}
    guidance = Guidance(sharpness, lexical_weight=lexical_weight, feedback=feedback, **sizes)
    if lexical_weight:
        guidance.set_lexicon(lexicon)
    return guidance


def guide_of(guidance: Guidance, rows: Sequence[Sequence[int]], vectors: Tensor, trie: Trie) -> Guide:
    prompts = Prompts.from_rows(rows, vectors)
    guide: Guide = guidance(prompts.soft, prompts.token_ids, prompts.lengths, trie)
    return guide


def plain_logits(trie: Trie, vector: Tensor, sharpness: float, lexicon: Lexicon | None = None, weight: float = 0.0, row: Sequence[int] = ()) -> list[float]:
    """s of every item: sharpness times cosine, and weight times the item's share of what the query's words are worth."""
    logits = [sharpness * sum(a * b for a, b in zip(item, vector.tolist(), strict=True)) for item in trie.item_vectors.tolist()]
    if lexicon is None:
        return logits
    ends, idf = lexicon.item_offsets.tolist(), lexicon.token_idf.tolist()
    asked = {token for token in row if token < len(idf)}
    total = sum(idf[token] for token in asked)
    for item in range(len(logits)):
        held = asked & set(lexicon.item_tokens[ends[item] : ends[item + 1]].tolist())
        logits[item] += weight * sum(idf[token] for token in held) / total if total else 0.0
    return logits


def moved_by_feedback(trie: Trie, vector: Tensor, logits: Sequence[float], feedback: float) -> list[float]:
    """The query's vector after feedback: its best items' vectors, weighted by the softmax of their logits, are added at length `feedback`, and the sum is scaled to length 1."""
    best = sorted(range(len(logits)), key=lambda item: -logits[item])[:FEEDBACK_ITEMS]
    weights = {item: math.exp(logits[item] - logits[best[0]]) for item in best}
    items = trie.item_vectors.tolist()
    mean = [sum(weight * items[item][place] for item, weight in weights.items()) for place in range(DIM)]
    moved = [one + feedback * other / math.hypot(*mean) for one, other in zip(vector.tolist(), mean, strict=True)]
    return [one / math.hypot(*moved) for one in moved]


def mass_of(trie: Trie, logits: Sequence[float]) -> list[float]:
    """p(SID | query): the softmax over items of their logits, summed by SID."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    ends = trie.item_offsets.tolist()
    return [sum(weights[ends[sid] : ends[sid + 1]]) / sum(weights) for sid in range(len(trie))]


def assert_is_guide_of(guide: Guide, row: int, logits: Sequence[float], trie: Trie, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Row `row` of the guide against sums over all SIDs below each prefix."""
    paths, mass = trie.tokens_of(torch.arange(len(trie))).tolist(), mass_of(trie, logits)

    def below(prefix: list[int]) -> float:
        return sum(one for one, path in zip(mass, paths, strict=True) if path[: len(prefix)] == prefix)

    for sid, path in enumerate(paths):
        found = [guide.level1[row, path[0]], guide.nodes2[row, int(trie.node_of_leaf[sid])], guide.leaves[row, sid]]
        expected = [weight * math.log(below(path[:level]) / below(path[: level - 1])) for level, weight in zip((1, 2, 3), level_weights, strict=True)]
        assert [float(one.detach()) for one in found] == pytest.approx(expected, abs=2e-5)


def test_a_lexicon_by_hand() -> None:
    # The last item does not count: of the other three, token 1 is in two, token 3 in one and token 4 in none.
    lexicon = lexicon_of([[3, 1, 3], [], [1], [4, 1]], vocab_size=6, counted=[True, True, True, False])
    assert lexicon.item_offsets.tolist() == [0, 2, 2, 3, 5]
    assert lexicon.item_tokens.tolist() == [1, 3, 1, 1, 4]  # each token of an item once, ascending
    idf = {1: math.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 3: math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))}
    assert lexicon.token_idf.tolist() == pytest.approx([0.0, idf[1], 0.0, idf[3], 0.0, 0.0])
    assert [part.dtype for part in lexicon] == [torch.int32, torch.int32, torch.float32, torch.int32]


def test_a_lexicon_of_stems_counts_tokens_as_what_they_stand_for() -> None:
    # 3 counts as 1 and 4 as 2, in the items and in queries.
    stems = np.array([0, 1, 2, 1, 2, 5], dtype=np.int32)
    ids, offsets, counted = np.array([3, 1, 4, 5], dtype=np.int32), np.array([0, 2, 3, 4]), np.ones(3, dtype=bool)
    lexicon = Lexicon.build(ids, offsets, 6, counted, stems)
    plain = Lexicon.build(stems[ids], offsets, 6, counted)
    for one, other in zip(lexicon[:3], plain[:3], strict=True):
        assert torch.equal(one, other)
    assert lexicon.token_stems.tolist() == stems.tolist()
    assert plain.token_stems.tolist() == list(range(6))
    vectors = np.tile([1.0, 0.0], (3, 1))
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 1, 2], [2, 1, 0]], dtype=np.int32), SIZES).with_items(vectors, np.arange(4))
    guidance, query = guided_by(lexicon, vocab_size=8), torch.tensor([[0.6, 0.8]])  # the decoder's vocabulary may be larger
    assert guidance.token_stems.tolist() == [*stems.tolist(), 6, 7]
    for row, same in (([3], [1]), ([1, 3, 4], [1, 2]), ([4, 5, 9, 6], [2, 5, 6])):
        for one, other in zip(guide_of(guidance, [row], query, trie), guide_of(guided_by(plain, vocab_size=8), [same], query, trie), strict=True):
            torch.testing.assert_close(one, other)
    assert guidance.lexicon_ids(np.array([5, 4, 3])).tolist() == [5, 2, 1]
    assert Guidance(5.0).lexicon_ids(np.array([5, 4, 3])).tolist() == [5, 4, 3]


@settings(max_examples=50, deadline=None)
@given(items=st.lists(st.tuples(st.lists(st.integers(0, VOCAB - 1), max_size=8), st.booleans()), min_size=1, max_size=12))
def test_a_lexicon_equals_a_plain_count(items: list[tuple[list[int], bool]]) -> None:
    texts, counted = zip(*items, strict=True)
    lexicon = lexicon_of(texts, counted=counted)
    ends = lexicon.item_offsets.tolist()
    assert [lexicon.item_tokens[start:end].tolist() for start, end in itertools.pairwise(ends)] == [sorted(set(text)) for text in texts]
    frequencies = [sum(token in text for text, counts in items if counts) for token in range(VOCAB)]
    expected = [math.log(1 + (sum(counted) - one + 0.5) / (one + 0.5)) if one else 0.0 for one in frequencies]
    assert lexicon.token_idf.tolist() == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 36), sharpness=st.floats(0.1, 20.0))
def test_log_guide_equals_a_plain_loop(seed: int, size: int, sharpness: float) -> None:
    trie, queries = some_trie(seed, size), some_vectors(2, seed)
    logits = [plain_logits(trie, query, sharpness) for query in queries]
    guide = log_guide(torch.tensor(logits).T, trie)
    for row in range(2):
        assert_is_guide_of(guide, row, logits[row], trie)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 36), rows=prompt_rows, weight=st.floats(0.5, 8.0))
def test_guidance_by_vectors_and_words_equals_a_plain_loop(seed: int, size: int, rows: list[list[int]], weight: float) -> None:
    trie, queries = some_trie(seed, size), some_vectors(2, seed)
    lexicon = some_lexicon(len(trie.item_vectors), seed)
    guidance = guided_by(lexicon, lexical_weight=weight)
    with torch.no_grad():
        guidance.level_weights.copy_(torch.tensor([0.5, 2.0, 1.25]))
    guide = guide_of(guidance, rows, queries, trie)
    for row in range(2):
        assert_is_guide_of(guide, row, plain_logits(trie, queries[row], 5.0, lexicon, weight, rows[row]), trie, (0.5, 2.0, 1.25))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 36), rows=prompt_rows, weight=st.sampled_from([0.0, 3.0]), feedback=st.floats(0.05, 2.0))
def test_guidance_with_feedback_equals_a_plain_loop(seed: int, size: int, rows: list[list[int]], weight: float, feedback: float) -> None:
    trie, queries = some_trie(seed, size), some_vectors(2, seed)  # up to 144 items, so that often some are left out of the mean
    lexicon = some_lexicon(len(trie.item_vectors), seed)
    words = (lexicon, weight) if weight else (None, 0.0)
    prompts = Prompts.from_rows(rows, queries)
    guide, vectors = guided_by(lexicon, lexical_weight=weight, feedback=feedback).with_vectors(prompts.soft, prompts.token_ids, prompts.lengths, trie)
    for row in range(2):
        moved = moved_by_feedback(trie, queries[row], plain_logits(trie, queries[row], 5.0, *words, rows[row]), feedback)
        assert vectors[row].tolist() == pytest.approx(moved, abs=1e-5)
        assert_is_guide_of(guide, row, plain_logits(trie, torch.tensor(moved), 5.0, *words, rows[row]), trie)


def test_feedback_finds_what_lies_beside_the_best_items() -> None:
    # At t = 20 the query's nearest item has nearly all the weight: the one beside it comes before the one that is as near to the query on the other side.
    angles = np.array([0.3, 0.9, -0.8])
    trie = Trie.from_tokens(np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], dtype=np.int32), SIZES).with_items(
        np.stack([np.cos(angles), np.sin(angles)], axis=1), np.arange(4)
    )
    query = torch.tensor([[1.0, 0.0]])
    plain, fed = (guide_of(Guidance(20.0, feedback=feedback), [[2]], query, trie) for feedback in (0.0, 0.5))
    assert plain.level1[0, :3].argsort(descending=True).tolist() == [0, 2, 1]
    assert fed.level1[0, :3].argsort(descending=True).tolist() == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=prompt_rows,
    weight=st.sampled_from([0.0, 3.0]),
    feedback=st.sampled_from([0.0, 0.4]),
    positions=st.lists(st.integers(0, 13), max_size=20),
)
def test_logits_of_chosen_items_are_those_of_the_whole_product(seed: int, rows: list[list[int]], weight: float, feedback: float, positions: list[int]) -> None:
    trie, prompts = some_trie(seed), Prompts.from_rows(rows, some_vectors(2, seed))
    guidance = guided_by(some_lexicon(len(trie.item_vectors), seed), lexical_weight=weight, feedback=feedback)
    with torch.no_grad():
        guidance.level_weights.copy_(torch.tensor([9.0, 9.0, 0.5]))
    whole, moved = guidance._item_logits(prompts.soft, prompts.token_ids, prompts.lengths, trie)
    chosen = torch.tensor(positions, dtype=torch.int64)
    for row in range(2):
        found = guidance.logits_of_items((prompts.soft if moved is None else moved)[row], torch.tensor(rows[row]), chosen, trie)
        torch.testing.assert_close(found, 0.5 * whole[chosen, row])


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ([5, 2], 2),
        ([2, 5, 5, 2, 2], 5),  # repeated
        ([0, 2, 5, 1], 4),  # between markers
        ([VOCAB, VOCAB + 3, 2, 5], 4),  # after SIDs
        ([2, 5, 7, 7], 2),  # padded with a token that items hold
        ([2, 5, 11], 3),  # beside a word that no item holds
    ],
)
def test_only_the_querys_own_words_count_and_each_once(row: list[int], length: int) -> None:
    trie, vector = some_trie(), some_vectors(1)
    texts = [[2, 7], [5], [2, 5], [7, 8], [9]] * len(trie.item_vectors)
    guidance = guided_by(lexicon_of(texts[: len(trie.item_vectors)]))
    expected = guide_of(guidance, [[2, 5]], vector, trie)
    found = guidance(vector, torch.tensor([row]), torch.tensor([length]), trie)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(guide_of(guidance, [[2, 5, 7]], vector, trie).leaves, expected.leaves)  # which a word more does change


def test_words_that_no_item_holds_leave_the_vectors_alone() -> None:
    trie, vector = some_trie(), some_vectors(1)
    dense = guide_of(Guidance(5.0), [[2]], vector, trie)
    items = len(trie.item_vectors)
    for lexicon in (some_lexicon(items), lexicon_of([[]] * items)):  # also where no item has a text at all
        for one, other in zip(guide_of(guided_by(lexicon), [[0, 1, VOCAB]], vector, trie), dense, strict=True):
            torch.testing.assert_close(one, other)
    found = guided_by(lexicon_of([[]] * items)).logits_of_items(vector[0], torch.tensor([2]), torch.arange(items), trie)
    assert found.tolist() == pytest.approx(plain_logits(trie, vector[0], 5.0), abs=1e-5)


def test_a_lexicon_of_fewer_tokens_than_the_decoder_has_leaves_the_others_worthless() -> None:
    trie, vector = some_trie(), some_vectors(1)
    lexicon = some_lexicon(len(trie.item_vectors))
    small, large = guided_by(lexicon), guided_by(lexicon, vocab_size=VOCAB + 8)
    assert large.token_idf.tolist() == [*lexicon.token_idf.tolist(), *[0.0] * 8]
    for one, other in zip(*(guide_of(guidance, [[2, VOCAB + 1, 3]], vector, trie) for guidance in (small, large)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_lexicon_survives_bfloat16() -> None:
    # bfloat16 has whole numbers up to 256 only: offsets and tokens must stay what they are.
    trie, queries, rows = some_trie(), some_vectors(2), [[997, 3], [401, 998, 5]]
    rng = np.random.default_rng(0)
    lexicon = lexicon_of([rng.integers(2, 1000, 20).tolist() + [997, 401, 998][: item % 4] for item in range(len(trie.item_vectors))], vocab_size=1000)
    whole = guided_by(lexicon, vocab_size=1000)
    expected, half = guide_of(whole, rows, queries, trie), whole.to(torch.bfloat16)
    assert torch.equal(half.item_offsets, lexicon.item_offsets)
    assert torch.equal(half.item_tokens, lexicon.item_tokens)
    torch.testing.assert_close(half.token_idf.float(), lexicon.token_idf, rtol=2**-8, atol=0)
    for one, other in zip(guide_of(half, rows, queries, trie), expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)


@pytest.mark.parametrize("sharpness", [1.0, 20.0, 500.0])
def test_probabilities_of_the_children_of_every_prefix_add_to_one(sharpness: float) -> None:
    trie = some_trie()
    guide = log_guide(sharpness * trie.guide_vectors @ some_vectors(3).T, trie)
    assert all(torch.isfinite(level).all() for level in guide)  # also where a weight is 0 in single precision, and at codes without a SID
    torch.testing.assert_close(guide.level1[:, trie.level1_valid].exp().sum(-1), torch.ones(3))
    for token in torch.nonzero(trie.level1_valid).flatten().tolist():
        torch.testing.assert_close(guide.nodes2[:, trie.level1_of_node == token].exp().sum(-1), torch.ones(3))
    for node in range(len(trie.tokens2)):
        torch.testing.assert_close(guide.leaves[:, trie.node_of_leaf == node].exp().sum(-1), torch.ones(3))


def test_scores_as_far_apart_as_settings_allow_still_tell_items_apart() -> None:
    # Two SIDs under one level-1 code, whose items lie `LARGEST_SPREAD` and a little less below the best item, in the other code.
    trie = Trie.from_tokens(np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1]], dtype=np.int32), SIZES).with_items(np.eye(3, DIM), np.arange(4))
    guide = log_guide(torch.tensor([[0.0], [-LARGEST_SPREAD], [1 - LARGEST_SPREAD]]), trie)
    assert guide.leaves[0].tolist() == pytest.approx([0.0, -math.log1p(math.e), 1 - math.log1p(math.e)], abs=1e-5)
    assert guide.level1[0, 1].item() == pytest.approx(math.log1p(math.e) - LARGEST_SPREAD, abs=1e-4)


def test_a_query_is_guided_the_same_in_any_batch() -> None:
    trie = some_trie()
    item = trie.guide_vectors[:1]
    far = torch.linalg.svd(item).Vh[1:2]  # at a right angle to that item: beside it, its own weights must not vanish
    guidance = guided_by(some_lexicon(len(trie.item_vectors)), sharpness=500.0, feedback=0.3)
    alone = guide_of(guidance, [[2, 3]], far, trie)
    together = guide_of(guidance, [[2, 3], [4, 5, 6, 7]], torch.cat((far, item)), trie)
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], both[0])


def test_a_sid_of_two_items_has_the_mass_of_both() -> None:
    # Weights e^(ln 4 * cosine): items at cosines 1, 0.5, 0, 0.5 weigh 4, 2, 1, 2. SIDs {0, 1}, {2}, {3} have 6, 1 and 2 of 9.
    cosines = np.array([1.0, 0.5, 0.0, 0.5])
    vectors = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 0, 2], [2, 1, 0]], dtype=np.int32), SIZES).with_items(vectors, np.array([0, 2, 3, 4]))
    guide = guide_of(Guidance(math.log(4)), [[2]], torch.tensor([[1.0, 0.0]]), trie)
    assert guide.level1[0, [0, 2]].exp().tolist() == pytest.approx([7 / 9, 2 / 9])
    assert guide.level1[0, [1, 3]].exp().tolist() == pytest.approx([0.0, 0.0])
    assert guide.nodes2[0].exp().tolist() == pytest.approx([1.0, 1.0])
    assert guide.leaves[0].exp().tolist() == pytest.approx([6 / 7, 1 / 7, 1.0])


def test_an_items_words_weigh_by_their_share_of_the_querys_idf() -> None:
    # Tokens 2 and 3 are in one item of three each, so they are worth the same, and 4 is in none. Of the query "2 3 4" the items hold a half, a
    # half and nothing; with w = 2 ln 3 they weigh 3, 3 and 1, the vectors being alike.
    vectors = np.tile([1.0, 0.0], (3, 1))
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 1, 2], [2, 1, 0]], dtype=np.int32), SIZES).with_items(vectors, np.arange(4))
    guidance = guided_by(lexicon_of([[2], [3], []]), lexical_weight=2 * math.log(3))
    guide = guide_of(guidance, [[2, 3, 4]], torch.tensor([[0.6, 0.8]]), trie)
    assert guide.level1[0, [0, 2]].exp().tolist() == pytest.approx([6 / 7, 1 / 7])
    assert guide.nodes2[0].exp().tolist() == pytest.approx([1 / 2, 1 / 2, 1.0])


def test_level_weights_start_at_one_and_are_learned() -> None:
    trie, guidance = some_trie(), guided_by(some_lexicon(len(some_trie().item_vectors)))
    assert guidance.level_weights.tolist() == [1.0, 1.0, 1.0]
    assert [name for name, _ in guidance.named_parameters()] == ["level_weights"]  # the lexicon is no parameter
    guide = guide_of(guidance, [[2, 3]], some_vectors(1), trie)
    (guide.level1[:, trie.level1_valid].sum() + 2 * guide.nodes2.sum() + 3 * guide.leaves.sum()).backward()
    logs = (guide.level1[:, trie.level1_valid], 2 * guide.nodes2, 3 * guide.leaves)
    torch.testing.assert_close(guidance.level_weights.grad, torch.stack([level.detach().sum() for level in logs]))


@pytest.mark.parametrize("lexical_weight", [0.0, 6.0])
def test_a_decoder_without_an_opinion_ranks_by_the_guidances_mass(lexical_weight: float) -> None:
    trie, queries, rows = some_trie(), some_vectors(3), [[2], [2, 3], [4, 5, 4]]
    lexicon = some_lexicon(len(trie.item_vectors)) if lexical_weight else None
    config = DecoderConfig(
        text_vocab_size=VOCAB,
        level_sizes=SIZES,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=16,
        soft_prompt_dim=DIM,
        guide_sharpness=20.0,
        guide_lexical=lexical_weight,
        guide_items=len(lexicon.item_offsets) - 1 if lexicon else 0,
        guide_entries=len(lexicon.item_tokens) if lexicon else 0,
    )
    model = Decoder(config, seed=1)
    if lexicon is not None:
        model.guidance.set_lexicon(lexicon)
    with torch.no_grad():
        model.tokens.codes.zero_()  # the head's rows too
    found = beam_search(model, Prompts.from_rows(rows, queries), trie, beam_size=len(trie), support="trie")
    for row in range(3):
        mass = mass_of(trie, plain_logits(trie, queries[row], 20.0, lexicon, lexical_weight, rows[row]))
        assert found.sid_rows[row].tolist() == sorted(range(len(trie)), key=lambda sid, mass=mass: -mass[sid])
        assert found.scores[row].tolist() == pytest.approx(sorted(map(math.log, mass), reverse=True), abs=1e-4)
        assert float(found.scores[row].exp().sum()) == pytest.approx(1.0, abs=1e-5)
