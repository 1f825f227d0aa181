"""The weight of a guided decoder beside the encoder: what it multiplies, that it leaves no trace, and that the best one is chosen."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from genrecall.data.interactions import Requests
from genrecall.generator.calibration import DECODER_WEIGHTS, choose_decoder_weight, weighted_decoder
from genrecall.generator.guidance import Guide
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.generator.retriever import Retriever

SPACE = (5, 10, 2)


@pytest.fixture
def guided(table, untrained_retriever) -> Retriever:
    """A guided generator over fifty SIDs of one item each, whose untrained decoder is as sure of its noise as the encoder of its cosines."""
    made: Retriever = untrained_retriever(table, np.zeros(50), sharpness=4.0, lexical=1.0)
    with torch.no_grad():
        made.model.norm.weight.copy_(torch.linspace(20.0, 40.0, 16))
    return made


def prompts_of(retriever: Retriever, queries: Sequence[str]) -> Prompts:
    builder = retriever.prompt_builder
    return builder.prompts(builder.query_bank(queries), np.arange(len(queries)), retriever.encoder.encode_queries(queries))


def guide_of(retriever: Retriever, prompts: Prompts) -> Guide:
    with torch.no_grad():
        guide: Guide = retriever.model.guidance(prompts.soft, prompts.token_ids, prompts.lengths, retriever.trie)
    return guide


def level_logits(model: Decoder, prompts: Prompts, tokens: tuple[int, int]) -> list[torch.Tensor]:
    """The decoder's own logits of each level after <token1, token2>."""
    with torch.no_grad():
        state = model.prefill(prompts)
        past, logits = None, [model.level_logits(state.last_hidden, 0)]
        for level, token in enumerate(tokens):
            embedded = model.embed_level_tokens(torch.full((len(prompts), 1), token), level)
            hidden, past = model.extend(embedded[:, :, None], state, past)
            logits.append(model.level_logits(hidden[:, 0, 0], level + 1))
    return logits


@pytest.mark.parametrize("weight", [1.0, 0.75, 0.25])
def test_weight_multiplies_every_logit_of_the_decoder_and_leaves_guidance_alone(guided, weight):
    model, prompts = guided.model, prompts_of(guided, ["red lamp", "drill"])
    own, guide = level_logits(model, prompts, (3, 7)), guide_of(guided, prompts)
    with weighted_decoder(model, weight):
        weighted, same = level_logits(model, prompts, (3, 7)), guide_of(guided, prompts)
    assert max(float(one.abs().max()) for one in own) > 1
    for one, other in zip(own, weighted, strict=True):
        torch.testing.assert_close(other, weight * one)
    for one, other in zip(guide, same, strict=True):
        assert torch.equal(one, other)


def test_weighted_search_is_over_the_weighted_logits_plus_guidance(guided):
    # Every level-2 prefix has one SID here, <k, c, 0>, so level 3 decides nothing.
    prompts = prompts_of(guided, ["red lamp"])
    targets = torch.tensor([[[3, 7, 0]]])
    first, second, _ = level_logits(guided.model, prompts, (3, 7))
    guide = guide_of(guided, prompts)
    level1 = (0.5 * first[0] + guide.level1[0]).log_softmax(-1)[3].item()
    level2 = (0.5 * second[0] + guide.nodes2[0, 30:40]).log_softmax(-1)[7].item()
    with torch.no_grad(), weighted_decoder(guided.model, 0.5):
        found = group_log_probs(guided.model, prompts, targets, support="trie", trie=guided.trie)[0, 0]
    assert found.tolist() == pytest.approx([level1, level2, 0.0], abs=1e-5)


def test_trained_scale_comes_back_exactly_also_after_an_exception(guided):
    trained = {name: tensor.clone() for name, tensor in guided.model.state_dict().items()}
    assert not torch.equal((trained["norm.weight"] * 0.3) / 0.3, trained["norm.weight"])  # dividing again would not do

    def unchanged() -> bool:
        return all(torch.equal(tensor, trained[name]) for name, tensor in guided.model.state_dict().items())

    with weighted_decoder(guided.model, 0.3):
        assert not unchanged()
    assert unchanged()
    with pytest.raises(RuntimeError, match="trouble"), weighted_decoder(guided.model, 0.3):
        raise RuntimeError("trouble")
    assert unchanged()
    assert guided.model.norm.weight.requires_grad


def plain_recall(retriever: Retriever, requests: Requests, weight: float, *, personalised: bool) -> float:
    """One request after the other, on a copy of the decoder with another scale."""
    model = copy.deepcopy(retriever.model)
    model.norm.weight.data *= weight
    weighted = Retriever(model, retriever.prompt_builder, retriever.trie, retriever.index, retriever.table, retriever.encoder, support="trie")
    shares = []
    for row in range(len(requests)):
        shopper = [requests.genders[row]], [requests.age_bands[row]], [requests.history[row]]
        items = weighted.recall([requests.queries[row]], *shopper, beam_size=100, limit=100, personalised=personalised)[0].item_rows.tolist()
        for cut in (10, 100):
            clicked = requests.clicked[row].tolist()
            shares.append(sum(item in items[:cut] for item in clicked) / len(clicked))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("personalised", [False, True])
def test_recalls_are_those_of_a_plain_search_and_the_best_weight_is_chosen(guided, requests, personalised):
    asked = requests.take(range(20, 60))
    weight, recalls = choose_decoder_weight(guided, asked, personalised=personalised)
    expected = {f"{one:g}": plain_recall(guided, asked, one, personalised=personalised) for one in DECODER_WEIGHTS}
    assert recalls == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    assert expected[f"{weight:g}"] == max(expected.values())
    assert weight < 1  # an untrained decoder is noise


def test_a_decoder_that_knows_better_keeps_its_full_weight(guided, make_requests):
    # It knows by heart what was clicked: the answers at its own weight, which the guidance alone would not find.
    queries = ["red lamp", "drill", "oak carpet", "steel faucet"]
    answers = guided.recall(queries, [None] * 4, [None] * 4, [np.zeros(0, np.int32)] * 4, beam_size=100, limit=10, personalised=False)
    weight, recalls = choose_decoder_weight(guided, make_requests(queries, [one.item_rows for one in answers]), personalised=False)
    assert (weight, recalls["1"]) == (1.0, 1.0)
    assert recalls["0.25"] < 1.0


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25), (0.25, 1.0), (0.5, 0.75, 1.0)])
def test_first_weight_wins_among_equals(guided, requests, weights):
    with torch.no_grad():
        guided.model.norm.weight.zero_()  # a decoder that says nothing, at any weight
    weight, recalls = choose_decoder_weight(guided, requests.take(range(5)), personalised=False, weights=weights)
    assert weight == weights[0]
    assert list(recalls) == [f"{one:g}" for one in weights]
    assert len(set(recalls.values())) == 1
