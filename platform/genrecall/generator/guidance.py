"""Dense guidance: the query encoder's own opinion of every prefix, which the decoder's logits correct.

Ours; not in CQ-SID (arXiv:2605.14434). With few logged queries a decoder cannot learn what each of 10^4 codes-in-context means, while the
frozen encoder knows where a query lies among the items. So the items' vectors v_i define a distribution over items and with it over
SIDs, g(s | q) ~ sum over items i of s of exp(t * q.v_i), and a level's logit becomes h.W[c] + a_l * log g(c | prefix, q): the decoder
and the encoder as a product of experts. With W at zero it is dense retrieval down the trie, exactly; training, which learns a_l
too, moves it to where the clicks are. (A prefix's mean vector in place of the sum over its items loses a fifth of the recall.)

Cost: one product [N, d] x [d, B] a batch. Only children of a prefix have a score, so the support is "trie".

Shapes: B prompts, N items, S SIDs, N2 level-2 nodes, A1 level-1 alphabet, d encoder dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genrecall.sid.trie import Trie

_LEAST = 1e-30
"""A sum of weights below this counts as this; reached by level-1 codes without a SID, which are masked wherever it would matter."""


class Guide(NamedTuple):
    """a_l * log g of each token given its prefix: level1 [B, A1], nodes2 [B, N2], leaves [B, S]."""

    level1: Tensor
    nodes2: Tensor
    leaves: Tensor


class Guidance(nn.Module):
    """Weights a_l of the three levels.

    Args:
        sharpness: t; an encoder trained at temperature T says 1 / T.
    """

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.level_weights = nn.Parameter(torch.ones(3))

    def forward(self, query_vectors: Tensor, trie: Trie) -> Guide:
        """The guide of float [B, d] query vectors; `trie` holds the items' vectors."""
        logs = log_guide(query_vectors, trie, self.sharpness)
        first, second, third = (weight * log for weight, log in zip(self.level_weights, logs, strict=True))
        return Guide(first, second, third)


@torch.no_grad()
def log_guide(query_vectors: Tensor, trie: Trie, sharpness: float) -> Guide:
    """log g of each token given its prefix, for float [B, d] query vectors."""
    vectors = trie.guide_vectors
    cosines = vectors @ query_vectors.to(vectors.dtype).T  # [N, B]: twice as fast as [B, N], and sums run over rows
    weights = (sharpness * (cosines - cosines.amax(dim=0))).exp()
    leaves = _sums(weights, trie.sid_of_item, len(trie))
    nodes2 = _sums(leaves, trie.node_of_leaf, len(trie.tokens2))
    level1 = _sums(nodes2, trie.level1_of_node, trie.alphabet_sizes[0])
    return Guide(
        (level1 / level1.sum(dim=0)).clamp(min=_LEAST).log().T,
        (nodes2 / level1[trie.level1_of_node]).log().T,
        (leaves / nodes2[trie.node_of_leaf]).log().T,
    )


def _sums(rows: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums [count, B] of the rows [n, B] that each owner int64 [n] has."""
    return torch.zeros(count, rows.shape[1], device=rows.device, dtype=rows.dtype).index_add_(0, owner, rows).clamp(min=_LEAST)
