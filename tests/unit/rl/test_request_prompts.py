"""Prompts of training requests: what the encoder reads of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrecall.data.interactions import Requests
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.rl.learner import RequestPrompts
from genrecall.sid.semantic_id import SidSpace, SidTable

QUERIES = ["red steel lamp for the garden", "drill", "blue carpet with a long red border"]


class SeenTexts:
    """An encoder whose vector tells the words it was given."""

    dim = 2

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    def encode_queries(self, texts):
        self.texts.append(list(texts))
        return np.array([[len(text.split()), len(text)] for text in texts], dtype=np.float32)


@pytest.fixture
def encoder() -> SeenTexts:
    return SeenTexts()


def prompts(encoder: SeenTexts, **settings) -> RequestPrompts:
    nothing = [np.zeros(0, np.int32)] * 3
    requests = Requests(
        request_ids=list("abc"),
        user_ids=[None] * 3,
        queries=QUERIES,
        genders=[None] * 3,
        age_bands=[None] * 3,
        times=np.arange(3, dtype=np.int64),
        exposed=nothing,
        clicked=nothing,
        purchased=nothing,
        history=nothing,
        grades=[np.zeros(0, np.float32)] * 3,
    )
    table = SidTable.from_item_tokens(SidSpace((2, 2, 2)), np.zeros((1, 3), np.int32))
    builder = PromptBuilder(QueryTokenizer.train(QUERIES, 300), (300, 302, 304))
    return RequestPrompts(builder, table, encoder, requests, **settings)


def test_without_a_drop_the_encoder_reads_the_queries(encoder):
    made = prompts(encoder).of(np.array([2, 0]))
    assert encoder.texts == [[QUERIES[2], QUERIES[0]]]
    assert made.soft.tolist() == [[7, 34], [6, 29]]


def test_with_a_drop_it_reads_copies_with_words_missing_and_tokens_stay_whole(encoder):
    whole, half = prompts(encoder).of(np.arange(3)), prompts(encoder, vector_drop=0.5, seed=4).of(np.arange(3))
    assert torch.equal(whole.token_ids, half.token_ids)
    assert torch.equal(whole.lengths, half.lengths)
    words = np.array([[len(text.split()) for text in texts] for texts in encoder.texts])
    assert (words[1] <= words[0]).all()
    assert words[1].sum() < words[0].sum()
    assert words[1].min() >= 1


def test_a_requests_copy_is_the_same_in_every_batch_and_another_under_another_seed(encoder):
    made = prompts(encoder, vector_drop=0.5, seed=4)
    made.of(np.array([0, 1, 2]))
    made.of(np.array([2, 0]))
    prompts(encoder, vector_drop=0.5, seed=5).of(np.array([0, 1, 2]))
    first, again, other = encoder.texts
    assert again == [first[2], first[0]]
    assert other != first
