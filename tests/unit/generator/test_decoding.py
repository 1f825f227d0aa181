"""Search, sampling and group scores against plain references and against transformers' generate."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2ForCausalLM

from genrecall.generator.beam_search import _Search, beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.group_sampling import sample_group
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import SUPPORTS, DecodingError
from genrecall.sid.trie import Trie

CONFIG = DecoderConfig(
    text_vocab_size=30,
    level_sizes=(5, 4, 6),
    groups=((0, 1), (3, 1), (3, 2)),
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    soft_prompt_dim=8,
    soft_prompt_tokens=2,
    max_positions=64,
)
ALL_PATHS = np.array(list(itertools.product(*map(range, CONFIG.alphabet_sizes))), dtype=np.int32)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 5, 31], [9]]
ITEMS = 90
"""Items of every trie, however many SIDs it has."""
GUIDED, WORDED = "guided", "worded"
BY_ENCODER = (GUIDED, WORDED)
SAMPLED = ("level", "trie", *BY_ENCODER)
KINDS = (*SUPPORTS, *BY_ENCODER)
"""A support, or a decoder guided by vectors, or by vectors and words, whose support is "trie"."""


@functools.cache
def some_lexicon() -> Lexicon:
    """One to six of the thirty text tokens an item; a fifth of the items do not count."""
    rng = np.random.default_rng(6)
    offsets = np.concatenate([[0], rng.integers(1, 7, ITEMS).cumsum()])
    return Lexicon.build(rng.integers(0, CONFIG.text_vocab_size, offsets[-1]), offsets, CONFIG.text_vocab_size, rng.random(ITEMS) < 0.8)


@functools.cache
def decoder(kind: str = "level") -> Decoder:
    config = dataclasses.replace(CONFIG, guide_sharpness=3.0 if kind in BY_ENCODER else 0.0)
    if kind == WORDED:
        config = dataclasses.replace(config, guide_lexical=4.0, guide_items=ITEMS, guide_entries=len(some_lexicon().item_tokens))
    model = Decoder(config, seed=2)
    if kind == WORDED:
        model.guidance.set_lexicon(some_lexicon())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("tokens."):  # spread the logits, so that the order is not within rounding
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(9))
        if model.guidance is not None:
            model.guidance.level_weights.copy_(torch.tensor([0.7, 1.2, 0.5]))
    return model


def support_of(kind: str) -> str:
    return "trie" if kind in BY_ENCODER else kind


def trie_of(rows: Sequence[int]) -> Trie:
    """SIDs that share `ITEMS` items, at least one each."""
    rng = np.random.default_rng(len(rows))
    offsets = np.concatenate([[0], np.sort(rng.choice(np.arange(1, ITEMS), len(rows) - 1, replace=False)), [ITEMS]])
    vectors = rng.standard_normal((ITEMS, CONFIG.soft_prompt_dim)) / 3
    return Trie.from_tokens(ALL_PATHS[sorted(rows)], CONFIG.alphabet_sizes).with_items(vectors, offsets)


@functools.cache
def some_trie(size: int = 40) -> Trie:
    return trie_of(np.random.default_rng(4).choice(len(ALL_PATHS), size, replace=False).tolist())


def some_prompts(*, soft: bool = True) -> Prompts:
    return Prompts.from_rows(ROWS, torch.randn(3, 8, generator=torch.Generator().manual_seed(7)) if soft else None)


def paths_of(trie: Trie) -> Tensor:
    return trie.tokens_of(torch.arange(len(trie)))


def plain_words(ids: Sequence[int]) -> list[float]:
    """The share of the idf of the prompt's text tokens that each item holds."""
    ends, tokens, idf, _ = (part.tolist() for part in some_lexicon())
    asked = {token for token in ids if token < CONFIG.text_vocab_size}
    total = sum(idf[token] for token in asked)
    return [sum(idf[token] for token in asked & set(tokens[start:end])) / total for start, end in itertools.pairwise(ends)]


def plain_guide(model: Decoder, vector: Tensor, ids: Sequence[int], prefix: list[int], trie: Trie) -> Tensor:
    """Log of the share that each child of a prefix has in the guidance's mass below the prefix; 0 at other tokens."""
    below = [0.0] * CONFIG.alphabet_sizes[len(prefix)]
    logits = model.guidance.sharpness * (trie.item_vectors.float() @ vector)
    if model.guidance.lexical_weight:
        logits = logits + model.guidance.lexical_weight * torch.tensor(plain_words(ids))
    weights = logits.exp().tolist()
    for sid_row, path in enumerate(paths_of(trie).tolist()):
        if path[: len(prefix)] == prefix:
            below[path[len(prefix)]] += sum(weights[trie.item_offsets[sid_row] : trie.item_offsets[sid_row + 1]])
    return torch.tensor([math.log(mass / sum(below)) if mass else 0.0 for mass in below])


def plain_log_prob(model: Decoder, prompts: Prompts, row: int, prefix: list[int], support: str, trie: Trie) -> Tensor:
    """Next token's log-probabilities over its level's alphabet, from one unpadded sequence, without any cache."""
    level = len(prefix)
    single = prompts.take(slice(row, row + 1))
    prompt = single.token_ids[0, : int(single.lengths[0])].tolist()
    ids = [*prompt, *(offset + token for offset, token in zip(CONFIG.level_offsets, prefix, strict=False))]
    embedded, _ = model.embed_prompts(Prompts(torch.tensor([ids]), torch.tensor([len(ids)]), single.soft))
    logits = model.logits(model(embedded))[0, -1]
    first = CONFIG.level_offsets[level]
    if support == "full":
        return logits.log_softmax(-1)[first : first + CONFIG.alphabet_sizes[level]]
    logits = logits[first : first + CONFIG.alphabet_sizes[level]]
    if model.guidance is not None:
        logits = logits + model.guidance.level_weights[level] * plain_guide(model, single.soft[0], prompt, prefix, trie)
    if support == "trie":
        children = {path[level] for path in paths_of(trie).tolist() if path[:level] == prefix}
        logits = logits.masked_fill(torch.tensor([token not in children for token in range(len(logits))]), -math.inf)
    return logits.log_softmax(-1)


def plain_beam_search(model: Decoder, prompts: Prompts, row: int, trie: Trie, beam_size: int, support: str) -> list[tuple[float, list[int]]]:
    paths = paths_of(trie).tolist()
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for level in range(3):
        grown = []
        for score, prefix in beams:
            log_probs = plain_log_prob(model, prompts, row, prefix, support, trie)
            children = sorted({path[level] for path in paths if path[:level] == prefix})
            grown += [(score + float(log_probs[token].detach()), [*prefix, token]) for token in children]
        beams = sorted(grown, key=lambda beam: (-beam[0], beam[1]))[:beam_size]
    return beams


@pytest.mark.parametrize(("kind", "soft"), [*itertools.product(SUPPORTS, [True, False]), (GUIDED, True), (WORDED, True)])
def test_a_beam_that_covers_everything_finds_what_enumeration_finds(kind: str, soft: bool) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts(soft=soft)
    found = beam_search(model, prompts, trie, beam_size=45, support=support)
    for row in range(3):
        scores = [
            sum(float(plain_log_prob(model, prompts, row, path[:level], support, trie)[path[level]].detach()) for level in range(3))
            for path in paths_of(trie).tolist()
        ]
        order = sorted(range(len(scores)), key=lambda sid_row: -scores[sid_row])
        assert found.sid_rows[row, :40].tolist() == order
        torch.testing.assert_close(found.scores[row, :40], torch.tensor([scores[sid_row] for sid_row in order]), atol=1e-4, rtol=0)
    assert torch.equal(found.tokens[:, :40], trie.tokens_of(found.sid_rows[:, :40]))


@settings(max_examples=20, deadline=None)
@given(rows=st.sets(st.integers(0, len(ALL_PATHS) - 1), min_size=1, max_size=30), beam_size=st.integers(1, 12), kind=st.sampled_from(KINDS))
def test_search_equals_a_plain_one_at_any_beam_on_any_trie(rows: set[int], beam_size: int, kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), trie_of(list(rows)), some_prompts().take(slice(0, 2))
    found = beam_search(model, prompts, trie, beam_size=beam_size, support=support)
    assert found.sid_rows.shape == found.scores.shape == (2, beam_size)
    for row in range(2):
        expected = plain_beam_search(model, prompts, row, trie, beam_size, support)
        assert found.tokens[row, : len(expected)].tolist() == [path for _, path in expected]
        torch.testing.assert_close(found.scores[row, : len(expected)], torch.tensor([score for score, _ in expected]), atol=1e-4, rtol=0)
        assert torch.equal(found.sid_rows[row, : len(expected)].long(), trie.find(found.tokens[row, : len(expected)]))
        assert (found.sid_rows[row, len(expected) :] == -1).all()
        assert (found.tokens[row, len(expected) :] == -1).all()
        assert (found.scores[row, len(expected) :] == -math.inf).all()


class TrieProcessor(LogitsProcessor):
    """The constraint of a support, for `generate`, which hands over log-probabilities over the whole vocabulary."""

    def __init__(self, trie: Trie, prompt_length: int, support: str) -> None:
        self.paths, self.prompt_length, self.support = paths_of(trie).tolist(), prompt_length, support

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = input_ids.shape[1] - self.prompt_length
        first, size = CONFIG.level_offsets[level], CONFIG.alphabet_sizes[level]
        constrained = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids.tolist()):
            prefix = [token - offset for token, offset in zip(ids[self.prompt_length :], CONFIG.level_offsets, strict=False)]
            children = sorted({first + path[level] for path in self.paths if path[:level] == prefix})
            if not children:
                continue
            over = {"full": scores[row], "level": scores[row, first : first + size], "trie": scores[row, children]}[self.support]
            constrained[row, children] = scores[row, children] - over.logsumexp(-1)
        return constrained


@pytest.mark.parametrize("support", SUPPORTS)
def test_search_equals_transformers_generate_position_by_position(tmp_path: Path, support: str) -> None:
    model, trie, prompts = decoder(), some_trie(), some_prompts(soft=False)
    model.save_pretrained(tmp_path)
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for beam_size in (1, 4, 10):
        found = beam_search(model, prompts, trie, beam_size=beam_size, support=support)
        for row, ids in enumerate(ROWS):
            generated = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                num_beams=beam_size,
                num_return_sequences=beam_size,
                max_new_tokens=3,
                do_sample=False,
                length_penalty=0.0,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([TrieProcessor(trie, len(ids), support)]),
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens = generated.sequences[:, len(ids) :] - torch.tensor(CONFIG.level_offsets)
            assert found.tokens[row].tolist() == tokens.tolist()
            # One beam is greedy search there: it has no sequence scores, but the processor's output is log-probabilities all the same.
            scores = generated.sequences_scores if beam_size > 1 else torch.stack([step.max(-1).values for step in generated.scores]).sum(0)
            torch.testing.assert_close(found.scores[row], scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unequal_prompts_equals_single_searches(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    together = beam_search(model, prompts, trie, beam_size=7, support=support)
    for row in range(3):
        single = Prompts.from_rows([ROWS[row]], prompts.soft[row : row + 1])
        alone = beam_search(model, single, trie, beam_size=7, support=support)
        assert together.sid_rows[row].tolist() == alone.sid_rows[0].tolist()
        torch.testing.assert_close(together.scores[row], alone.scores[0], atol=1e-4, rtol=0)


def test_the_soft_prompt_changes_the_answer_of_its_row_only() -> None:
    model, trie, prompts = decoder(), some_trie(), some_prompts()
    before = beam_search(model, prompts, trie, beam_size=5)
    changed = Prompts(prompts.token_ids, prompts.lengths, prompts.soft.clone())
    changed.soft[1] = -3 * changed.soft[1]
    after = beam_search(model, changed, trie, beam_size=5)
    torch.testing.assert_close(after.scores[[0, 2]], before.scores[[0, 2]], atol=1e-5, rtol=0)
    assert (after.scores[1] - before.scores[1]).abs().max() > 1e-2


def test_equal_scores_rank_by_smaller_sid_first() -> None:
    model = Decoder(CONFIG, seed=0)
    with torch.no_grad():
        model.tokens.codes.zero_()
        model.tokens.group_terms.zero_()
    trie = some_trie()
    # Every token has the same probability 1/5 * 1/4 * 1/9 = 1/180, so a beam of 6 keeps the first six prefixes of each level.
    found = beam_search(model, some_prompts(), trie, beam_size=6)
    assert found.sid_rows.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    torch.testing.assert_close(found.scores, torch.full((3, 6), -math.log(180)))


@settings(max_examples=20, deadline=None)
@given(allowed=st.lists(st.sets(st.integers(0, 39), max_size=12), min_size=3, max_size=3), kind=st.sampled_from(KINDS))
def test_a_filter_gives_the_enumeration_filtered(allowed: list[set[int]], kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    everything = beam_search(model, prompts, trie, beam_size=40, support=support)
    leaves = torch.zeros(3, len(trie), dtype=torch.bool)
    for row, sids in enumerate(allowed):
        leaves[row, list(sids)] = True
    found = beam_search(model, prompts, trie, beam_size=40, support=support, allowed=PrefixMasks.from_leaves(trie, leaves))
    for row, sids in enumerate(allowed):
        expected = [(sid, score) for sid, score in zip(everything.sid_rows[row].tolist(), everything.scores[row].tolist(), strict=True) if sid in sids]
        assert found.sid_rows[row].tolist() == [sid for sid, _ in expected] + [-1] * (40 - len(expected))
        torch.testing.assert_close(found.scores[row, : len(expected)], torch.tensor([score for _, score in expected]))


def test_a_beam_whose_children_are_all_barred_dies() -> None:
    model = decoder()
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 1, 1], [2, 3, 4]], dtype=np.int32), CONFIG.alphabet_sizes)
    # The prefixes stay open, only the two leaves under token 0 are barred: with one beam for token 0 nothing else remains.
    leaves = torch.tensor([[False, False, True]])
    open_prefixes = PrefixMasks(torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool), leaves)
    found = beam_search(model, some_prompts(), trie, beam_size=3, allowed=open_prefixes)
    assert found.sid_rows.tolist() == [[2, -1, -1]] * 3
    assert found.tokens[:, 1:].eq(-1).all()
    nothing = PrefixMasks.from_leaves(trie, torch.zeros(1, 3, dtype=torch.bool))
    for support in SUPPORTS:
        assert beam_search(model, some_prompts(), trie, beam_size=2, support=support, allowed=nothing).sid_rows.eq(-1).all()


@pytest.mark.parametrize("kind", ["trie", GUIDED])
def test_prefixes_with_a_single_child_are_not_read_and_change_no_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, extend = decoder(kind), some_prompts(), Decoder.extend
    sizes = model.config.alphabet_sizes
    # (0, 0) has three children, (1, 1) two, the others one: of six beams two are read at level 3, and none where every prefix has one child.
    several = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 2], [2, 0, 0], [2, 1, 1]]
    for rows, read in ((several, 2), ([row for row in several if row[2] == 0], 0)):
        tokens = np.array(rows, dtype=np.int32)
        trie = Trie.from_tokens(tokens, sizes)
        if kind == GUIDED:
            trie = trie.with_items(np.random.default_rng(0).standard_normal((len(rows), model.config.soft_prompt_dim)), np.arange(len(rows) + 1))
        widths: list[int] = []
        monkeypatch.setattr(Decoder, "extend", lambda self, embedded, *rest, widths=widths: widths.append(embedded.shape[1]) or extend(self, embedded, *rest))
        found = beam_search(model, prompts, trie, beam_size=6, support="trie")
        assert widths[1:] == ([read] if read else [])
        monkeypatch.setattr(_Search, "_open", lambda *_: None)
        everything = beam_search(model, prompts, trie, beam_size=6, support="trie")
        monkeypatch.undo()
        assert torch.equal(found.sid_rows, everything.sid_rows)
        assert torch.allclose(found.scores, everything.scores, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_and_a_sample_never_wait_for_data(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the meta device tensors have shapes and no values, so anything that reads a value fails. It has no sparse product: for that one step of
    # the words a dense matrix of the same shape stands in, and what the step does on a GPU is not seen here.
    monkeypatch.setattr(torch, "sparse_csr_tensor", lambda offsets, tokens, values, size, **_: torch.empty(size, device=values.device))
    model, support = copy.deepcopy(decoder(kind)).to("meta"), support_of(kind)
    trie, prompts = some_trie().to("meta"), some_prompts().to("meta")
    masks = PrefixMasks.from_leaves(trie, torch.ones(3, 40, dtype=torch.bool, device="meta"))
    assert beam_search(model, prompts, trie, beam_size=7, support=support, allowed=masks).sid_rows.shape == (3, 7)
    if support != "full":
        assert sample_group(model, prompts, trie, group_size=2, support=support, uniforms=torch.zeros(3, 2, 3, device="meta")).tokens.shape == (3, 2, 3)


def test_prefix_masks_allow_exactly_the_prefixes_of_allowed_leaves() -> None:
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 3], [2, 3, 4]], dtype=np.int32), CONFIG.alphabet_sizes)
    masks = PrefixMasks.from_leaves(trie, torch.tensor([[False, False, True, False], [False, False, False, True]]))
    assert masks.nodes2.tolist() == [[False, True, False], [False, False, True]]
    assert masks.level1.tolist() == [[True, False, False, False, False], [False, False, True, False, False]]


def full_sequences(model: Decoder, prompts: Prompts, tokens: Tensor, support: str, trie: Trie, temperature: float = 1.0) -> Tensor:
    rows = []
    for row, group in enumerate(tokens.tolist()):
        for path in group:
            for level in range(3):
                log_probs = plain_log_prob(model, prompts, row, path[:level], support, trie)
                rows.append((log_probs / temperature).log_softmax(-1)[path[level]] if temperature != 1 else log_probs[path[level]])
    return torch.stack(rows).view(tokens.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_group_log_probs_and_their_gradients_equal_full_sequences(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.randint(0, 40, (3, 4), generator=torch.Generator().manual_seed(1))]
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))

    def gradients(log_probs: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (log_probs * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    packed = group_log_probs(model, prompts, tokens, support=support, trie=trie)
    expected = full_sequences(model, prompts, tokens, support, trie)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)
    packed_gradients, expected_gradients = gradients(packed), gradients(expected)
    assert packed_gradients.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_count_nothing_and_pass_no_gradient(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.tensor([[0, 1], [2, 3], [4, 5]])]
    masked = tokens.clone()
    masked[0, 1] = -1
    masked[1, 0, 1] = -1  # what follows is masked too
    whole = group_log_probs(model, prompts, tokens, support=support, trie=trie)
    part = group_log_probs(model, prompts, masked, support=support, trie=trie)
    kept = torch.ones(3, 2, 3, dtype=torch.bool)
    kept[0, 1] = False
    kept[1, 0, 1:] = False
    torch.testing.assert_close(part, whole * kept)
    model.zero_grad()
    group_log_probs(model, prompts, torch.full((3, 2, 3), -1), support=support, trie=trie).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("kind", SAMPLED)
def test_level_distributions_sum_to_one_and_hold_the_log_probs(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.tensor([[0, 1], [2, 3], [4, 5]])]
    scored = group_log_probs(model, prompts, tokens, support=support, trie=trie, return_level_log_probs=True)
    assert [tuple(level.shape) for level in scored.levels] == [(3, 1, 5), (3, 2, 4), (3, 2, 9)]
    for level, log_probs in enumerate(scored.levels):
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))
        picked = log_probs.expand(3, 2, -1).gather(-1, tokens[..., level : level + 1])[..., 0]
        torch.testing.assert_close(picked, scored.log_probs[..., level])
    torch.testing.assert_close(scored.log_probs, group_log_probs(model, prompts, tokens, support=support, trie=trie))


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_carry_the_log_probs_that_the_update_computes(kind: str, temperature: float) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    drawn = sample_group(model, prompts, trie, group_size=16, support=support, generator=torch.Generator().manual_seed(0), temperature=temperature)
    again = group_log_probs(model, prompts, drawn.tokens, support=support, trie=trie, temperature=temperature)
    torch.testing.assert_close(drawn.log_probs, again, atol=1e-5, rtol=1e-5)
    assert torch.equal(drawn.sid_rows.long(), trie.find(drawn.tokens))
    assert (drawn.sid_rows >= 0).all() == (support == "trie")


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_temperature_divides_the_logits(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.tensor([[0, 1], [2, 3], [4, 5]])]
    expected = full_sequences(model, prompts, tokens, support, trie, temperature=0.5)
    torch.testing.assert_close(group_log_probs(model, prompts, tokens, support=support, trie=trie, temperature=0.5), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BY_ENCODER)
def test_a_search_scores_as_group_log_probs_do_position_by_position(kind: str) -> None:
    model, trie, prompts = decoder(kind), some_trie(), some_prompts()
    tokens = paths_of(trie).expand(3, -1, -1)
    with torch.no_grad():
        by_group = group_log_probs(model, prompts, tokens, support="trie", trie=trie).sum(-1)
    torch.testing.assert_close(by_group.exp().sum(-1), torch.ones(3))  # all SIDs there are
    found = beam_search(model, prompts, trie, beam_size=40, support="trie")
    torch.testing.assert_close(found.scores, by_group.sort(descending=True).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, by_group.gather(1, found.sid_rows.long()), atol=1e-4, rtol=0)
    leaves = torch.arange(40) % 3 == torch.arange(3)[:, None]
    filtered = beam_search(model, prompts, trie, beam_size=20, support="trie", allowed=PrefixMasks.from_leaves(trie, leaves))
    for row in range(3):
        expected = by_group[row].masked_fill(~leaves[row], -math.inf).topk(int(leaves[row].sum()))
        assert filtered.sid_rows[row, : len(expected.indices)].tolist() == expected.indices.tolist()
        torch.testing.assert_close(filtered.scores[row, : len(expected.values)], expected.values, atol=1e-4, rtol=0)


def test_guidance_learns_its_weights_and_leaves_vectors_and_lexicon_alone() -> None:
    model, trie, prompts = decoder(WORDED), some_trie(), some_prompts()
    model.zero_grad()
    tokens = paths_of(trie)[torch.tensor([[0, 1], [2, 3], [4, 5]])]
    group_log_probs(model, prompts, tokens, support="trie", trie=trie).sum().backward()
    assert (model.guidance.level_weights.grad.abs() > 1e-3).all()
    assert model.soft_prompt.weight.grad.abs().sum() > 0  # the vector also reaches the prompt
    assert not trie.item_vectors.requires_grad
    assert not any(getattr(model.guidance, name).requires_grad for name in Lexicon._fields)


def test_training_scores_by_the_vectors_that_feedback_moves_in_search() -> None:
    model, trie, prompts = copy.deepcopy(decoder(WORDED)), some_trie(), some_prompts()
    plain = beam_search(model, prompts, trie, beam_size=20, support="trie")
    assert plain.query_vectors is None
    model.guidance.feedback = 0.4
    found = beam_search(model, prompts, trie, beam_size=20, support="trie")
    assert not torch.allclose(found.scores, plain.scores, atol=1e-2)
    torch.testing.assert_close(found.query_vectors.norm(dim=1), torch.ones(3))
    scored = group_log_probs(model, prompts, found.tokens, support="trie", trie=trie).sum(-1)
    torch.testing.assert_close(scored, found.scores, atol=1e-4, rtol=0)
    drawn = sample_group(model, prompts, trie, group_size=4, support="trie", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.log_probs, group_log_probs(model, prompts, drawn.tokens, support="trie", trie=trie), atol=1e-4, rtol=1e-4)


def test_the_words_change_the_answer_of_their_row_only() -> None:
    model, trie, prompts = decoder(WORDED), some_trie(), some_prompts()
    guide = model.guidance(prompts.soft, prompts.token_ids, prompts.lengths, trie)
    changed = prompts.token_ids.clone()
    changed[1, 0] = 20
    other = model.guidance(prompts.soft, changed, prompts.lengths, trie)
    for one, two in zip(guide, other, strict=True):
        torch.testing.assert_close(one[[0, 2]], two[[0, 2]])
    assert (other.leaves[1] - guide.leaves[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", SAMPLED)
def test_samples_follow_the_distribution(kind: str) -> None:
    model, support, trie, prompts = decoder(kind), support_of(kind), some_trie(), some_prompts().take(slice(0, 1))
    draws = 20_000
    drawn = sample_group(model, prompts, trie, group_size=draws, support=support, generator=torch.Generator().manual_seed(3))
    everything = beam_search(model, prompts, trie, beam_size=40, support=support)
    counts = torch.bincount(drawn.sid_rows[0][drawn.sid_rows[0] >= 0].long(), minlength=40)[everything.sid_rows[0].long()]
    expected = everything.scores[0].exp() * draws
    frequent = expected > 20
    assert frequent.sum() >= 5
    chi_square = float(((counts - expected)[frequent] ** 2 / expected[frequent]).sum())
    degrees = int(frequent.sum())
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_samples_are_a_function_of_the_uniforms_whatever_the_batch() -> None:
    model, trie, prompts = decoder(), some_trie(), some_prompts()
    uniforms = torch.rand(3, 8, 3, generator=torch.Generator().manual_seed(5))
    together = sample_group(model, prompts, trie, group_size=8, uniforms=uniforms)
    for row in range(3):
        alone = sample_group(model, Prompts.from_rows([ROWS[row]], prompts.soft[row : row + 1]), trie, group_size=8, uniforms=uniforms[row : row + 1])
        assert torch.equal(together.tokens[row], alone.tokens[0])
    lowest = sample_group(model, prompts, trie, group_size=1, support="trie", uniforms=torch.zeros(3, 1, 3))
    assert lowest.sid_rows.eq(0).all()  # the inverse of a cumulative distribution at 0 is its first possible value
    highest = sample_group(model, prompts, trie, group_size=1, support="trie", uniforms=torch.full((3, 1, 3), 1 - 2**-24))
    assert (highest.sid_rows >= 0).all()


@pytest.mark.parametrize("kind", SAMPLED)
def test_samples_that_share_prefixes_are_those_drawn_one_at_a_time(kind: str) -> None:
    # Thirty samples of five level-1 codes share prefixes, and many a level-2 node of this trie has one child, whose probability is 1.
    model, support, prompts = decoder(kind), support_of(kind), some_prompts()
    trie = some_trie()
    uniforms = torch.rand(3, 30, 3, generator=torch.Generator().manual_seed(8))
    state = model.prefill(prompts)
    together = sample_group(model, prompts, trie, group_size=30, support=support, uniforms=uniforms, state=state)
    for sample in range(30):
        alone = sample_group(model, prompts, trie, group_size=1, support=support, uniforms=uniforms[:, sample : sample + 1])
        assert torch.equal(together.tokens[:, sample], alone.tokens[:, 0])
        torch.testing.assert_close(together.log_probs[:, sample], alone.log_probs[:, 0], atol=1e-5, rtol=1e-5)
    node = trie.find_node(together.tokens[..., 0], together.tokens[..., 1])
    only = (node >= 0) & (trie.offsets3[node + 1] - trie.offsets3[node] == 1)
    assert bool(only.any())
    if support == "trie":
        assert bool((together.log_probs[..., 2][only] == 0).all())
    scored = group_log_probs(model, prompts, together.tokens, support=support, trie=trie)
    torch.testing.assert_close(group_log_probs(model, prompts, together.tokens, support=support, trie=trie, state=state), scored)


def test_what_cannot_be_decoded_is_refused() -> None:
    model, trie, prompts = decoder(), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.zeros(3, 1, dtype=torch.int64)]
    with pytest.raises(DecodingError, match="beam_size: expected at least 1, got 0"):
        beam_search(model, prompts, trie, beam_size=0)
    with pytest.raises(DecodingError, match="support: expected one of 'level', 'trie', 'full', got 'text'"):
        beam_search(model, prompts, trie, beam_size=1, support="text")
    with pytest.raises(DecodingError, match=r"alphabets \(5, 4, 8\) are not the decoder's \(5, 4, 9\)"):
        beam_search(model, prompts, Trie.from_tokens(ALL_PATHS[:1], (5, 4, 8)), beam_size=1)
    with pytest.raises(DecodingError, match="lies on meta, the decoder on cpu"):
        beam_search(model, prompts, trie.to("meta"), beam_size=1)
    ones = functools.partial(torch.ones, dtype=torch.bool)
    short = PrefixMasks(ones(1, 5), ones(1, len(trie.tokens2)), ones(2, 40))
    with pytest.raises(DecodingError, match=r"allowed.leaves: expected bool \[3 or 1, 40\], got torch.bool \[2, 40\]"):
        beam_search(model, prompts, trie, beam_size=1, allowed=short)
    with pytest.raises(DecodingError, match="samples are drawn from 'level' or 'trie'"):
        sample_group(model, prompts, trie, group_size=1, support="full", uniforms=torch.zeros(3, 1, 3))
    with pytest.raises(DecodingError, match="group_size: expected at least 1"):
        sample_group(model, prompts, trie, group_size=0, uniforms=torch.zeros(3, 0, 3))
    with pytest.raises(DecodingError, match="give either uniforms"):
        sample_group(model, prompts, trie, group_size=1)
    with pytest.raises(DecodingError, match=r"uniforms: expected shape \[3, 2, 3\], got \[3, 1, 3\]"):
        sample_group(model, prompts, trie, group_size=2, uniforms=torch.zeros(3, 1, 3))
    with pytest.raises(DecodingError, match="temperature: expected a positive number, got 0"):
        sample_group(model, prompts, trie, group_size=1, uniforms=torch.zeros(3, 1, 3), temperature=0)
    with pytest.raises(DecodingError, match=r"tokens: expected shape \[3, G, 3\]"):
        group_log_probs(model, prompts, tokens[:2])
    with pytest.raises(DecodingError, match=r"out of its alphabet; expected below \(5, 4, 9\)"):
        group_log_probs(model, prompts, torch.full((3, 1, 3), 5))
    with pytest.raises(DecodingError, match="support 'trie' needs a trie"):
        group_log_probs(model, prompts, tokens, support="trie")
    outside = next(path for path in ALL_PATHS.tolist() if path not in paths_of(trie).tolist() and path[:2] == paths_of(trie)[0, :2].tolist())
    with pytest.raises(DecodingError, match=r"tokens: \[2, 0\] = .* leaves the trie at level 3"):
        group_log_probs(model, prompts, torch.cat((tokens[:2], torch.tensor([[outside]]))), support="trie", trie=trie)


def test_what_cannot_be_guided_is_refused() -> None:
    model, trie, prompts = decoder(WORDED), some_trie(), some_prompts()
    tokens = paths_of(trie)[torch.zeros(3, 1, dtype=torch.int64)]
    uniforms = torch.zeros(3, 1, 3)

    def refused(message: str, *, support: str = "trie", trie: Trie | None = trie, prompts: Prompts = prompts) -> None:
        with pytest.raises(DecodingError, match=message):
            group_log_probs(model, prompts, tokens, support=support, trie=trie)
        if trie is not None:
            with pytest.raises(DecodingError, match=message):
                beam_search(model, prompts, trie, beam_size=1, support=support)
            with pytest.raises(DecodingError, match=message):
                sample_group(model, prompts, trie, group_size=1, support=support, uniforms=uniforms)

    refused(r"prompts: a guided decoder needs the query encoder's vectors; give soft \[B, soft_prompt_dim\]", prompts=some_prompts(soft=False))
    for support in ("level", "full"):
        refused(f"support: a guided decoder scores the children of a prefix only; expected 'trie', got '{support}'", support=support)
    bare = Trie.from_tokens(ALL_PATHS[:1], CONFIG.alphabet_sizes)
    refused("trie: a guided decoder needs the trie with its items' vectors; rerun jobs/build_sid_index.py", trie=bare)
    refused("trie: a guided decoder needs the trie with its items' vectors", trie=None)
    other = bare.with_items(np.zeros((1, 5)), np.array([0, 1]))
    refused("its vectors have 5 dimensions, the decoder's query vectors 8; rerun jobs/build_sid_index.py and jobs/train_generator.py", trie=other)
    fewer = bare.with_items(np.zeros((89, 8)), np.array([0, 89]))
    refused("trie: it holds 89 items, the decoder's lexicon 90; use the SID index that the generator was trained on", trie=fewer)
    beam_search(decoder(GUIDED), prompts, fewer, beam_size=1, support="trie")  # without a lexicon any number will do
