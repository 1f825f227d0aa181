"""Dense guidance: its probabilities against a plain loop over items, and a decoder that has nothing to add to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genrecall.generator.decoding import beam_search
from genrecall.generator.guidance import Guidance, log_guide
from genrecall.generator.model import Decoder, DecoderConfig, Prompts
from genrecall.sid.trie import Trie

SIZES = (4, 3, 3)
DIM = 6


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


def dense_mass(trie: Trie, vector: Tensor, sharpness: float) -> list[float]:
    """p(SID | query): the softmax over items of sharpness times cosine, summed by SID."""
    weights = [math.exp(sharpness * sum(a * b for a, b in zip(item, vector.tolist(), strict=True))) for item in trie.item_vectors.tolist()]
    ends = trie.item_offsets.tolist()
    return [sum(weights[ends[sid] : ends[sid + 1]]) / sum(weights) for sid in range(len(trie))]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 36), sharpness=st.floats(0.1, 20.0))
def test_log_guide_equals_a_plain_loop(seed: int, size: int, sharpness: float) -> None:
    trie, queries = some_trie(seed, size), some_vectors(2, seed)
    guide = log_guide(queries, trie, sharpness)
    paths = trie.tokens_of(torch.arange(size)).tolist()
    for row in range(2):
        mass = dense_mass(trie, queries[row], sharpness)

        def below(prefix: list[int], mass: list[float] = mass) -> float:
            return sum(one for one, path in zip(mass, paths, strict=True) if path[: len(prefix)] == prefix)

        for sid, path in enumerate(paths):
            node = int(trie.node_of_leaf[sid])
            found = [guide.level1[row, path[0]], guide.nodes2[row, node], guide.leaves[row, sid]]
            expected = [math.log(below(path[:level]) / below(path[: level - 1])) for level in (1, 2, 3)]
            assert [float(one) for one in found] == pytest.approx(expected, abs=1e-5)
            assert float(sum(found)) == pytest.approx(math.log(mass[sid]), abs=1e-5)


@pytest.mark.parametrize("sharpness", [1.0, 20.0, 500.0])
def test_probabilities_of_the_children_of_every_prefix_add_to_one(sharpness: float) -> None:
    trie = some_trie()
    guide = log_guide(some_vectors(3), trie, sharpness)
    assert all(torch.isfinite(level).all() for level in guide)  # also where a weight is 0 in single precision, and at codes without a SID
    torch.testing.assert_close(guide.level1[:, trie.level1_valid].exp().sum(-1), torch.ones(3))
    for token in torch.nonzero(trie.level1_valid).flatten().tolist():
        torch.testing.assert_close(guide.nodes2[:, trie.level1_of_node == token].exp().sum(-1), torch.ones(3))
    for node in range(len(trie.tokens2)):
        torch.testing.assert_close(guide.leaves[:, trie.node_of_leaf == node].exp().sum(-1), torch.ones(3))


def test_a_query_is_guided_the_same_in_any_batch() -> None:
    trie = some_trie()
    item = trie.guide_vectors[:1]
    far = torch.linalg.svd(item).Vh[1:2]  # at a right angle to that item: beside it, its own weights must not vanish
    alone, together = (log_guide(queries, trie, 500.0) for queries in (far, torch.cat((far, item))))
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], both[0])


def test_a_sid_of_two_items_has_the_mass_of_both() -> None:
    # Weights e^(ln 4 * cosine): items at cosines 1, 0.5, 0, 0.5 weigh 4, 2, 1, 2. SIDs {0, 1}, {2}, {3} have 6, 1 and 2 of 9.
    cosines = np.array([1.0, 0.5, 0.0, 0.5])
    vectors = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    trie = Trie.from_tokens(np.array([[0, 0, 0], [0, 0, 2], [2, 1, 0]], dtype=np.int32), SIZES).with_items(vectors, np.array([0, 2, 3, 4]))
    guide = log_guide(torch.tensor([[1.0, 0.0]]), trie, math.log(4))
    assert guide.level1[0, [0, 2]].exp().tolist() == pytest.approx([7 / 9, 2 / 9])
    assert guide.level1[0, [1, 3]].exp().tolist() == pytest.approx([0.0, 0.0])
    assert guide.nodes2[0].exp().tolist() == pytest.approx([1.0, 1.0])
    assert guide.leaves[0].exp().tolist() == pytest.approx([6 / 7, 1 / 7, 1.0])


def test_level_weights_scale_the_levels() -> None:
    trie, queries = some_trie(), some_vectors(2)
    guidance = Guidance(5.0)
    assert guidance.level_weights.tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        guidance.level_weights.copy_(torch.tensor([0.5, 2.0, 0.0]))
    for scaled, weight, log in zip(guidance(queries, trie), (0.5, 2.0, 0.0), log_guide(queries, trie, 5.0), strict=True):
        torch.testing.assert_close(scaled, weight * log)


def test_a_decoder_without_an_opinion_ranks_by_dense_mass() -> None:
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}
    model = Decoder(DecoderConfig(text_vocab_size=10, level_sizes=SIZES, **small, soft_prompt_dim=DIM, guide_sharpness=20.0), seed=1)
    with torch.no_grad():
        model.tokens.codes.zero_()  # the head's rows too
    trie, queries = some_trie(), some_vectors(3)
    found = beam_search(model, Prompts.from_rows([[1], [2, 3], [4]], queries), trie, beam_size=len(trie), support="trie")
    for row in range(3):
        mass = dense_mass(trie, queries[row], 20.0)
        assert found.sid_rows[row].tolist() == sorted(range(len(trie)), key=lambda sid, mass=mass: -mass[sid])
        assert found.scores[row].tolist() == pytest.approx(sorted(map(math.log, mass), reverse=True), abs=1e-4)
        assert float(found.scores[row].exp().sum()) == pytest.approx(1.0, abs=1e-5)
