"""Searches padded to few shapes: the answers of searches that are not. With a GPU, recorded and replayed ones too."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from genrecall.generator import search_graphs
from genrecall.generator.beam_search import BeamResult, beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.model import Decoder
from genrecall.generator.prefix_masks import PrefixMasks
from genrecall.generator.prompts import Prompts
from genrecall.generator.search_graphs import SearchGraphs
from genrecall.sid.trie import Trie

CONFIG = DecoderConfig(
    text_vocab_size=30, level_sizes=(5, 4, 6), hidden_size=32, num_layers=2, intermediate_size=48, soft_prompt_dim=8, soft_prompt_tokens=2, max_positions=40
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def model_and_trie(*, guided: bool, device: str) -> tuple[Decoder, Trie]:
    model = Decoder(dataclasses.replace(CONFIG, guide_sharpness=3.0 if guided else 0.0), seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("tokens."):  # spread the logits, so that the order is not within rounding
                parameter.mul_(6)
    rng = np.random.default_rng(1)
    rows = np.unique(np.stack([rng.integers(0, size, 50) for size in CONFIG.alphabet_sizes], axis=1), axis=0).astype(np.int32)
    trie = Trie.from_tokens(rows, CONFIG.alphabet_sizes).with_items(rng.standard_normal((len(rows), 8)), np.arange(len(rows) + 1))
    return model.to(device).eval(), trie.to(device)


def some_prompts(count: int, seed: int, device: str, longest: int = 20) -> Prompts:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 30, rng.integers(1, longest)).tolist() for _ in range(count)]
    return Prompts.from_rows(rows, torch.from_numpy(rng.standard_normal((count, 8)).astype(np.float32))).to(device)


def require_equal(found: BeamResult, expected: BeamResult) -> None:
    assert torch.equal(found.sid_rows, expected.sid_rows)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
def test_padded_searches_answer_as_plain_ones_call_after_call(guided: bool, device: str) -> None:
    model, trie = model_and_trie(guided=guided, device=device)
    support = "trie" if guided else "level"
    graphs = SearchGraphs(model, trie, beam_size=6, support=support)
    for seed, count in enumerate((3, 1, 3, 4, 7, 3)):
        prompts = some_prompts(count, seed, device)
        require_equal(graphs.search(prompts), beam_search(model, prompts, trie, beam_size=6, support=support))


@pytest.mark.parametrize("one_for_all", [False, True])
def test_filters_are_padded_with_their_prompts(one_for_all: bool) -> None:
    model, trie = model_and_trie(guided=False, device="cpu")
    prompts = some_prompts(3, 5, "cpu")
    leaves = torch.rand(1 if one_for_all else 3, len(trie), generator=torch.Generator().manual_seed(3)) < 0.3
    masks = PrefixMasks.from_leaves(trie, leaves)
    found = SearchGraphs(model, trie, beam_size=6, support="level").search(prompts, masks)
    require_equal(found, beam_search(model, prompts, trie, beam_size=6, allowed=masks))


def test_what_is_too_large_to_pad_is_searched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trie = model_and_trie(guided=False, device="cpu")
    monkeypatch.setattr(search_graphs, "BATCHES", (1, 2))
    graphs = SearchGraphs(model, trie, beam_size=6, support="level", max_width=8)
    for prompts in (some_prompts(5, 1, "cpu", longest=6), some_prompts(1, 2, "cpu", longest=36)):
        require_equal(graphs.search(prompts), beam_search(model, prompts, trie, beam_size=6))


def test_prompts_of_every_width_that_the_decoder_takes_are_answered() -> None:
    model, trie = model_and_trie(guided=False, device="cpu")
    graphs = SearchGraphs(model, trie, beam_size=3, support="level")
    widest = CONFIG.max_positions - 2 - CONFIG.soft_prompt_tokens
    for width in (1, 15, 16, 17, widest):
        prompts = Prompts(torch.full((1, width), 4), torch.tensor([width]), torch.ones(1, 8))
        require_equal(graphs.search(prompts), beam_search(model, prompts, trie, beam_size=3))


def test_a_search_that_cannot_be_recorded_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, trie = model_and_trie(guided=False, device="cpu")
    graphs = SearchGraphs(model, trie, beam_size=6, support="level")
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    prompts = some_prompts(2, 3, "cpu")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            require_equal(graphs._replay(prompts, 2), beam_search(model, prompts, trie, beam_size=6))
    assert [record.message for record in caplog.records if "cannot be recorded" in record.message] == [caplog.messages[0]]
    assert len(caplog.records) == 1
