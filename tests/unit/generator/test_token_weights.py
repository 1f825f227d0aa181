"""Weights of tokens from clicks: what is learnt on a small shop, against the loss worked out plainly, and what leaves idf as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrecall.generator import token_weights
from genrecall.generator.examples import PromptBank
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.token_weights import PAIRS_A_STEP, learn_token_weights

VOCAB = 8
BRAND, NOUN, OTHER_NOUN, FILLER, RARE = 1, 2, 3, 4, 5
ITEMS = [[BRAND, NOUN], [BRAND, OTHER_NOUN], [NOUN, FILLER], [OTHER_NOUN, FILLER], [NOUN, RARE], [OTHER_NOUN]]


def lexicon() -> Lexicon:
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in ITEMS])])
    return Lexicon.build(np.concatenate(ITEMS), offsets, VOCAB, np.ones(len(ITEMS), dtype=bool))


def bank(queries: list[list[int]]) -> PromptBank:
    return PromptBank(np.concatenate(queries).astype(np.int32), np.concatenate([[0], np.cumsum([len(query) for query in queries])]))


def learnt(queries: list[list[int]], clicked: list[int], steps: int = 60, seed: int = 0) -> Lexicon:
    pairs = np.arange(len(queries)), np.array(clicked), np.ones(len(queries))
    return learn_token_weights(lexicon(), bank(queries), *pairs, steps=steps, seed=seed)


def test_what_clicks_follow_is_worth_more_and_what_they_do_not_less() -> None:
    before, after = lexicon().token_idf, learnt([[NOUN, FILLER], [OTHER_NOUN, FILLER]] * 3, [0, 1, 4, 5, 0, 1]).token_idf
    assert (after[[NOUN, OTHER_NOUN]] > before[[NOUN, OTHER_NOUN]] * 1.1).all()
    assert after[FILLER] < before[FILLER] * 0.9
    untouched = [0, BRAND, RARE, 6, 7]
    assert torch.equal(after[untouched], before[untouched])


def test_a_step_goes_down_the_plain_loss() -> None:
    queries, clicked = [[NOUN, FILLER], [BRAND, RARE]], [0, 4]

    def loss(one: Lexicon) -> float:
        idf, scale, total = one.token_idf.double(), 12.0, 0.0
        for query, item in zip(queries, clicked, strict=True):
            mass = {token: float(idf[token]) for token in query}
            share = [sum(mass[token] for token in set(query) & set(held)) / sum(mass.values()) for held in ITEMS]
            total -= scale * share[item] - np.log(np.sum(np.exp(scale * np.array(share))))
        return total / len(queries)

    first = learnt(queries, clicked, steps=1)
    assert loss(first) < loss(lexicon())
    assert loss(learnt(queries, clicked, steps=20)) < loss(first)


def test_the_penalty_draws_back_what_few_clicks_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, clicked = [[NOUN, FILLER]] * 2000 + [[BRAND, RARE]], [0] * 2000 + [4]

    def moved() -> torch.Tensor:
        return (learnt(queries, clicked, steps=100).token_idf / lexicon().token_idf)[[RARE, FILLER]].log().abs()

    held = moved()
    monkeypatch.setattr(token_weights, "PENALTY", 0.0)
    free = moved()
    assert held[0] < 0.95 * free[0]
    assert held[1] > 0.99 * free[1]


def test_the_scale_is_learnt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, clicked = [[NOUN, FILLER], [OTHER_NOUN, FILLER]], [2, 3]  # who holds all of a query is clicked
    monkeypatch.setattr(token_weights, "_FIRST_SCALE", 0.5)
    adam, parameters = torch.optim.Adam, []

    def watched(given: list[torch.Tensor], **settings: float) -> torch.optim.Adam:
        parameters.extend(given)
        return adam(given, **settings)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    learnt(queries, clicked, steps=200)
    assert float(parameters[1].detach().exp()) > 1.0


def test_each_prompt_counts_alike_and_its_items_by_their_weights() -> None:
    queries = bank([[NOUN, FILLER], [OTHER_NOUN, FILLER]])
    for weights in ([1.0, 1.0, 50.0], [50.0, 50.0, 1.0]):  # only the ratio inside a prompt matters: 1 to 1
        owners, items = np.array([0, 0, 1]), np.array([0, 2, 1])
        found = learn_token_weights(lexicon(), queries, owners, items, np.array(weights), steps=5, seed=0).token_idf
        assert torch.equal(found, learn_token_weights(lexicon(), queries, owners, items, np.array([2.0, 2.0, 3.0]), steps=5, seed=0).token_idf)
    lopsided = learn_token_weights(lexicon(), queries, owners, items, np.array([1.0, 99.0, 1.0]), steps=40, seed=0).token_idf
    other = learn_token_weights(lexicon(), queries, owners, items, np.array([99.0, 1.0, 1.0]), steps=40, seed=0).token_idf
    assert lopsided[FILLER] > other[FILLER]  # the item that holds the filler was clicked more


def test_the_same_seed_gives_the_same_weights_and_nothing_clicked_leaves_idf() -> None:
    queries, clicked = [[NOUN, FILLER], [BRAND, RARE]], [0, 4]
    assert torch.equal(learnt(queries, clicked).token_idf, learnt(queries, clicked).token_idf)
    assert not torch.equal(learnt(queries, clicked).token_idf, learnt(queries, clicked, seed=1).token_idf)
    none = np.zeros(0, dtype=np.int64)
    assert torch.equal(learn_token_weights(lexicon(), bank([[NOUN]]), none, none, none, steps=5, seed=0).token_idf, lexicon().token_idf)


def test_queries_without_a_known_token_teach_nothing() -> None:
    after = learnt([[6], [7]], [0, 1])
    assert torch.equal(after.token_idf, lexicon().token_idf)
    assert torch.isfinite(after.token_idf).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_longer_prompts_are_padded_without_effect(steps: int) -> None:
    assert PAIRS_A_STEP > 2
    short = learnt([[NOUN, FILLER]], [0], steps)
    long = learn_token_weights(lexicon(), bank([[NOUN, FILLER], [BRAND] * 9]), np.array([0]), np.array([0]), np.ones(1), steps=steps, seed=0)
    assert torch.equal(short.token_idf, long.token_idf)
