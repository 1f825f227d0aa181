"""Packed weights: the same answers as the decoder that they came from, which stays as it was."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from genrecall.generator.beam_search import beam_search
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.group_sampling import sample_group
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import can_pack, has_bfloat16, pack
from genrecall.generator.prompts import Prompts
from genrecall.sid.trie import Trie

CONFIG = DecoderConfig(
    text_vocab_size=30,
    level_sizes=(5, 4, 6),
    groups=((0, 1), (3, 1), (3, 2)),
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    soft_prompt_dim=8,
    max_positions=64,
)
SHAPES = {
    "grouped": CONFIG,
    "plain": dataclasses.replace(CONFIG, groups=(), soft_prompt_dim=0),
    "untied": dataclasses.replace(CONFIG, tie_word_embeddings=False),
    "guided": dataclasses.replace(CONFIG, guide_sharpness=3.0),
}


def decoder(shape: str) -> Decoder:
    model = Decoder(SHAPES[shape], seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("tokens."):  # spread the logits, so that the order is not within rounding
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(9))
    return model


def trie(shape: str) -> Trie:
    rng = np.random.default_rng(1)
    sizes = SHAPES[shape].alphabet_sizes
    rows = np.unique(np.stack([rng.integers(0, size, 60) for size in sizes], axis=1), axis=0).astype(np.int32)
    return Trie.from_tokens(rows, sizes).with_items(rng.standard_normal((len(rows), 8)), np.arange(len(rows) + 1))


def prompts(shape: str) -> Prompts:
    soft = torch.randn(3, 8, generator=torch.Generator().manual_seed(7)) if SHAPES[shape].soft_prompt_dim else None
    return Prompts.from_rows([[1, 2, 3], [4, 5, 6, 7, 5, 31], [9]], soft)


def support(shape: str) -> str:
    return "trie" if shape == "guided" else "level"


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_search_samples_and_scores_are_those_of_the_decoder(shape: str) -> None:
    model, some_trie, some_prompts, over = decoder(shape), trie(shape), prompts(shape), support(shape)
    packed = pack(model)
    assert packed is not model
    found, expected = (beam_search(one, some_prompts, some_trie, beam_size=7, support=over) for one in (packed, model))
    assert torch.equal(found.sid_rows, expected.sid_rows)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    uniforms = torch.rand(3, 6, 3, generator=torch.Generator().manual_seed(5))
    drawn, as_drawn = (sample_group(one, some_prompts, some_trie, group_size=6, support=over, uniforms=uniforms) for one in (packed, model))
    assert torch.equal(drawn.tokens, as_drawn.tokens)
    scored = group_log_probs(packed, some_prompts, drawn.tokens, support=over, trie=some_trie)
    assert torch.allclose(scored, as_drawn.log_probs, atol=1e-5)


def test_the_decoder_stays_trainable_and_the_copy_keeps_its_answers() -> None:
    model = decoder("grouped")
    packed = pack(model)
    before = beam_search(packed, prompts("grouped"), trie("grouped"), beam_size=5)
    group_log_probs(model, prompts("grouped"), torch.tensor([[[0, 1, 2]]] * 3)).sum().backward()
    assert all(layer.qkv_weight.grad is not None and layer.down_weight.grad is not None for layer in model.layers)
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv_weight.add_(1.0)
    after = beam_search(packed, prompts("grouped"), trie("grouped"), beam_size=5)
    assert torch.equal(before.scores, after.scores)
    assert not torch.allclose(beam_search(model, prompts("grouped"), trie("grouped"), beam_size=5).scores, after.scores)


@pytest.mark.skipif(has_bfloat16(), reason="the CPU has bfloat16 products")
def test_bfloat16_on_a_cpu_without_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no bfloat16 products; use float32"):
        pack(decoder("grouped"), torch.bfloat16)


@pytest.mark.skipif(not has_bfloat16(), reason="the CPU has no bfloat16 products")
def test_bfloat16_products_give_nearly_the_same_scores() -> None:
    model = decoder("grouped")
    exact = group_log_probs(model, prompts("grouped"), torch.tensor([[[0, 1, 2]]] * 3)).detach()
    with torch.no_grad():
        rough = group_log_probs(pack(model, torch.bfloat16), prompts("grouped"), torch.tensor([[[0, 1, 2]]] * 3))
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.3)
    assert not torch.equal(rough, exact)


def test_a_decoder_that_cannot_be_packed_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("plain")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(model)
    assert pack(model) is model
    with pytest.raises(ValueError, match="float16"):
        pack(copy.copy(model), torch.float16)
