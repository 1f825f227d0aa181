"""Samples without replacement: no answer twice, the law of successive draws by enumeration, and a function of request and stream alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from genrecall.generator import distinct_samples
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.distinct_samples import conditioned, sample_distinct
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import DecodingError
from genrecall.sid.trie import Trie

SIDS = np.array([[0, 0, 1], [0, 2, 0], [0, 2, 2], [1, 1, 1], [2, 0, 0], [2, 0, 2], [2, 1, 1]], dtype=np.int32)
TRIE = Trie.from_tokens(SIDS, (3, 3, 3))


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A decoder with clear preferences, so that likely answers and unlikely ones differ."""
    torch.set_num_threads(1)
    config = DecoderConfig(
        text_vocab_size=10, level_sizes=(3, 3, 3), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, max_positions=8
    )
    model = Decoder(config, seed=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def prompts_of(count: int) -> Prompts:
    return Prompts.from_rows([[1, 2]] * count)


def streams_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, size=count, dtype=np.int64))


def probabilities(model: Decoder, support: str) -> dict[tuple[int, ...], float]:
    """Of every answer of the support, from the decoder's own scores."""
    answers = SIDS if support == "trie" else np.array(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        scores = group_log_probs(model, prompts_of(1), torch.from_numpy(answers).long()[None], support=support, trie=TRIE)
    return dict(zip(map(tuple, answers.tolist()), scores[0].double().sum(-1).exp().tolist(), strict=True))


def draws(model: Decoder, support: str, group: int, count: int = 6000) -> np.ndarray:
    return sample_distinct(model, prompts_of(count), TRIE, group_size=group, streams=streams_of(count), support=support).tokens.numpy()


def shares_by_enumeration(chances: dict[tuple[int, ...], float], group: int) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """Of each answer: the chance to be drawn second, and to be drawn at all, when answers are drawn one after another without replacement."""
    second, inclusion = dict.fromkeys(chances, 0.0), dict.fromkeys(chances, 0.0)
    for order in itertools.permutations(chances, group):
        left, chance = 1.0, 1.0
        for answer in order:
            chance *= chances[answer] / left
            left -= chances[answer]
        second[order[1]] += chance
        for answer in order:
            inclusion[answer] += chance
    return second, inclusion


@pytest.mark.parametrize(("support", "group"), [("trie", 3), ("level", 2)])
def test_answers_follow_the_law_of_successive_draws(model: Decoder, support: str, group: int) -> None:
    chances = probabilities(model, support)
    assert sum(chances.values()) == pytest.approx(1.0, abs=1e-5)
    assert max(chances.values()) > 5 * min(chances.values())
    second, inclusion = shares_by_enumeration(chances, group)
    drawn = draws(model, support, group)
    for answer, chance in chances.items():
        at = (drawn == np.array(answer)).all(-1)
        assert at[:, 0].mean() == pytest.approx(chance, abs=0.025), answer
        assert at[:, 1].mean() == pytest.approx(second[answer], abs=0.025), answer
        assert at.any(1).mean() == pytest.approx(inclusion[answer], abs=0.025), answer


@pytest.mark.parametrize("support", ["trie", "level"])
def test_no_answer_comes_twice_and_log_probabilities_are_the_decoders(model: Decoder, support: str) -> None:
    found = sample_distinct(model, prompts_of(200), TRIE, group_size=5, streams=streams_of(200), support=support)
    numbers = (found.tokens * torch.tensor([9, 3, 1])).sum(-1)
    assert all(len(set(row)) == 5 for row in numbers.tolist())
    with torch.no_grad():
        scores = group_log_probs(model, prompts_of(200), found.tokens, support=support, trie=TRIE)
    torch.testing.assert_close(found.log_probs, scores, rtol=0, atol=1e-5)
    assert torch.equal(found.sid_rows, TRIE.find(found.tokens).int())
    assert (found.sid_rows >= 0).all() == (support == "trie")


def test_a_group_as_large_as_the_trie_holds_every_sid_and_a_larger_one_has_places_missing(model: Decoder) -> None:
    whole = sample_distinct(model, prompts_of(20), TRIE, group_size=7, streams=streams_of(20))
    assert (whole.sid_rows.sort(dim=1).values == torch.arange(7)).all()
    larger = sample_distinct(model, prompts_of(20), TRIE, group_size=30, streams=streams_of(20))
    assert torch.equal(larger.tokens[:, :7], whole.tokens)
    assert (larger.tokens[:, 7:] == -1).all()
    assert (larger.sid_rows[:, 7:] == -1).all()
    assert (larger.log_probs[:, 7:] == 0).all()
    everything = sample_distinct(model, prompts_of(3), TRIE, group_size=30, streams=streams_of(3), support="level")
    assert (everything.tokens[:, :27] >= 0).all()
    assert (everything.tokens[:, 27:] == -1).all()


def test_a_sample_depends_on_its_prompt_and_stream_alone_and_a_smaller_one_is_its_beginning(model: Decoder) -> None:
    prompts, streams = Prompts.from_rows([[1], [2, 3, 4], [5, 6]]), streams_of(3)
    together = sample_distinct(model, prompts, TRIE, group_size=5, streams=streams)
    for row, tokens in enumerate([[1], [2, 3, 4], [5, 6]]):
        alone = sample_distinct(model, Prompts.from_rows([tokens]), TRIE, group_size=3, streams=streams[row : row + 1])
        assert torch.equal(together.tokens[row, :3], alone.tokens[0])
    assert not torch.equal(sample_distinct(model, prompts, TRIE, group_size=5, streams=streams + 1).tokens, together.tokens)


def test_temperature_flattens(model: Decoder) -> None:
    cold, hot = (sample_distinct(model, prompts_of(1500), TRIE, group_size=1, streams=streams_of(1500), temperature=t).sid_rows for t in (0.25, 1e6))
    likeliest = max(range(7), key=lambda row: probabilities(model, "trie")[tuple(SIDS[row].tolist())])
    assert (cold == likeliest).float().mean() > 1.5 * (hot == likeliest).float().mean()


def test_conditioned_sums_have_the_given_maximum_and_keep_their_order() -> None:
    sums, most = torch.tensor([[[0.3, -1.0, 2.0, -torch.inf], [-torch.inf] * 4, [0.0, 1.0, 2.0, 3.0]]]).double(), torch.tensor([[-0.5, 1.0, -torch.inf]])
    moved = conditioned(sums, most.double())
    # -log(e^0.5 - e^-2 + e^-g) for g = 0.3 and g = -1.0: all moved by one monotone map that takes 2 to -0.5
    expected = [-np.log(np.exp(0.5) - np.exp(-2.0) + np.exp(-g)) for g in (0.3, -1.0)]
    assert moved[0, 0].tolist() == pytest.approx([*expected, -0.5, -np.inf])
    assert torch.isneginf(moved[0, 1:]).all()


def test_random_numbers_are_those_of_splitmix_on_unsigned_integers() -> None:
    from genrecall.rl.experts import _mix

    values = np.array([0, 1, 2**40 + 17, 2**64 - 1, 0x9E3779B97F4A7C15], dtype=np.uint64)
    ours = distinct_samples._mixed(torch.from_numpy(values.view(np.int64)))
    assert np.array_equal(ours.numpy().view(np.uint64), _mix(values))
    gumbels = distinct_samples._gumbels(streams_of(200_000), 2, torch.zeros(200_000, 1, dtype=torch.int64))
    assert gumbels.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert gumbels.var().item() == pytest.approx(np.pi**2 / 6, abs=0.03)


def test_what_cannot_be_sampled_is_refused(model: Decoder) -> None:
    with pytest.raises(DecodingError, match=r"streams: expected int64 \[2\], one per prompt, got torch.float64 \[2, 1\]"):
        sample_distinct(model, prompts_of(2), TRIE, group_size=2, streams=torch.zeros(2, 1).double())
    with pytest.raises(DecodingError, match="samples are drawn from 'level' or 'trie', got 'full'"):
        sample_distinct(model, prompts_of(1), TRIE, group_size=2, streams=streams_of(1), support="full")
    with pytest.raises(DecodingError, match="group_size: expected at least 1, got 0"):
        sample_distinct(model, prompts_of(1), TRIE, group_size=0, streams=streams_of(1))
