"""Guidance: what the query encoder and the query's words say of every prefix, which the decoder's logits correct.

Ours; not in CQ-SID (arXiv:2605.14434). With few logged queries a decoder cannot learn what each of 10^4 codes-in-context means, while the
frozen encoder knows where a query lies among the items, and its words which items hold them. Both score items,

    s(i) = t * cos(q, v_i) + w * (idf mass of the query's tokens that the item's text holds) / (idf mass of the query's tokens),

and with g(i | q) ~ exp s(i) they score SIDs and prefixes: the mass of the items below. A level's logit becomes
h.W[c] + a_l * log g(c | prefix, q): decoder, encoder and words as a product of experts (Hinton 2002). With W at zero it is retrieval by s down
the trie, exactly; training, which learns a_l too, moves it to where the clicks are. (A prefix's mean vector in place of the sum
over its items loses a fifth of the recall.) Words are the decoder's own text tokens, so a prompt says all that is needed; those of one stem may count as
one (`lexicon.py`, `token_stems.py`).

With feedback the vector is moved towards what it finds: m is the mean of the `FEEDBACK_ITEMS` best items' vectors, weighted by exp s(i), and s is taken again
with (q + f * m / |m|) scaled to length 1. Items that lie near the best ones, in words the query does not have, are found then. Source: pseudo-relevance feedback in
vector space (Rocchio 1971; for dense retrievers arXiv:2108.11044), weighted as in relevance models (Lavrenko & Croft 2001).

Cost: one product [N, d] x [d, B] and a sparse one a batch; with feedback a second product and a top-k over N. Only children of a prefix have a score, so the support is "trie".

Shapes: B prompts, L prompt tokens, N items (SID after SID, as in the trie), E (item, token) pairs, V text tokens, S SIDs, N2
level-2 nodes, A1 level-1 alphabet, d encoder dimensions, m chosen items.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from genrecall.generator.lexicon import Lexicon
from genrecall.sid.trie import Trie

_LEAST = 1e-30
"""A sum of weights below this counts as this. Level-1 codes without a SID do, which are masked wherever it would matter, and items whose score lies more than
`LARGEST_SPREAD` below the best item's: beside each other those would count alike."""

LARGEST_SPREAD = 69.0
"""What two items' scores may differ by, -log of `_LEAST`: 2 t + w at most, since cosines lie 2 apart at most. Settings beyond it are refused."""


FEEDBACK_ITEMS = 40
"""Best items whose vectors feedback reads, at most."""


class Guide(NamedTuple):
    """a_l * log g of each token given its prefix: level1 [B, A1], nodes2 [B, N2], leaves [B, S]."""

    level1: Tensor
    nodes2: Tensor
    leaves: Tensor


class Guidance(nn.Module):
    """Weights a_l of the three levels, and the lexicon, which is saved with the weights.

    Args:
        sharpness: t; an encoder trained at temperature T says 1 / T.
        lexical_weight: w; 0 leaves the words out.
        feedback: f; 0 leaves the query vectors as they are.
        vocab_size, items, entries: V, N and E of the lexicon; 0 without it.
    """

    item_offsets: Tensor
    item_tokens: Tensor
    token_idf: Tensor
    token_stems: Tensor

    def __init__(
        self,
        sharpness: float,
        *,
        lexical_weight: float = 0.0,
        feedback: float = 0.0,
        vocab_size: int = 0,
        items: int = 0,
        entries: int = 0,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.lexical_weight = lexical_weight
        self.feedback = feedback
        self.level_weights = nn.Parameter(torch.ones(3))
        if lexical_weight:
            self.register_buffer("item_offsets", torch.zeros(items + 1, dtype=torch.int32))
            self.register_buffer("item_tokens", torch.zeros(entries, dtype=torch.int32))
            self.register_buffer("token_idf", torch.zeros(vocab_size))
            self.register_buffer("token_stems", torch.arange(vocab_size, dtype=torch.int32))

    def set_lexicon(self, lexicon: Lexicon) -> None:
        """Take over a lexicon of the sizes that the module was made for; its vocabulary may be smaller than the decoder's."""
        self.item_offsets.copy_(lexicon.item_offsets)
        self.item_tokens.copy_(lexicon.item_tokens)
        self.token_idf[: len(lexicon.token_idf)].copy_(lexicon.token_idf)
        self.token_stems[: len(lexicon.token_stems)].copy_(lexicon.token_stems)

    @property
    def lexicon(self) -> Lexicon:
        """The lexicon that is set, in single precision; to be read only where words guide."""
        return Lexicon(self.item_offsets, self.item_tokens, self.token_idf.float(), self.token_stems)

    def lexicon_ids(self, token_ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """Text token ids int [T] as the lexicon counts them."""
        return self.token_stems.cpu().numpy()[token_ids] if self.lexical_weight else token_ids

    def forward(self, query_vectors: Tensor, token_ids: Tensor, lengths: Tensor, trie: Trie) -> Guide:
        """The guide of prompts: query vectors float [B, d], token ids int64 [B, L] and their lengths int64 [B]; `trie` holds the items' vectors."""
        return self.with_vectors(query_vectors, token_ids, lengths, trie)[0]

    def with_vectors(self, query_vectors: Tensor, token_ids: Tensor, lengths: Tensor, trie: Trie) -> tuple[Guide, Tensor | None]:
        """The guide, and with feedback the query vectors float [B, d] that it comes from."""
        logits, moved = self._item_logits(query_vectors, token_ids, lengths, trie)
        first, second, third = (weight * log for weight, log in zip(self.level_weights, log_guide(logits, trie), strict=True))
        return Guide(first, second, third), moved

    @torch.no_grad()
    def _item_logits(self, query_vectors: Tensor, token_ids: Tensor, lengths: Tensor, trie: Trie) -> tuple[Tensor, Tensor | None]:
        """s float32 [N, B], which takes half the time of [B, N] and whose sums run over rows; and the query vectors after feedback."""
        vectors = trie.guide_vectors
        words: Tensor | float = 0.0
        if self.lexical_weight:
            lexicon = self.lexicon
            words = self.lexical_weight * (lexicon.held() @ lexicon.shares(token_ids, lengths).T)
        logits = self.sharpness * (vectors @ query_vectors.to(vectors.dtype).T) + words
        if not self.feedback:
            return logits, None
        moved = self._moved(query_vectors, logits, vectors)
        return self.sharpness * (vectors @ moved.to(vectors.dtype).T) + words, moved

    def _moved(self, query_vectors: Tensor, logits: Tensor, vectors: Tensor) -> Tensor:
        """Query vectors [B, d] moved towards the mean of the best items' vectors [N, d], given the items' logits [N, B]."""
        best = logits.T.contiguous().topk(min(FEEDBACK_ITEMS, len(logits)), dim=1)
        weights = best.values.softmax(dim=1)
        mean = torch.bmm(weights[:, None].to(vectors.dtype), vectors[best.indices])[:, 0].to(query_vectors.dtype)
        return normalize(query_vectors + self.feedback * normalize(mean, dim=1), dim=1)

    @torch.no_grad()
    def logits_of_items(self, query_vector: Tensor, token_ids: Tensor, positions: Tensor, trie: Trie) -> Tensor:
        """a_3 * s float32 [m] of the items at int64 [m] `positions`, for one query: its vector float [d], after feedback, and its prompt's token ids int64 [L]."""
        assert trie.item_vectors is not None, "checked by check_support"
        words = (self.item_offsets, self.item_tokens) if self.lexical_weight else None
        return self._logits(query_vector, token_ids, positions, trie.item_vectors, words)

    @torch.no_grad()
    def logits_of_later_items(self, query_vector: Tensor, token_ids: Tensor, positions: Tensor, vectors: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
        """As `logits_of_items`, of items that came after the trie was built.

        Args:
            vectors: float [n, d], the encoder's. words: offsets int64 [n + 1] and text tokens int32 of their texts, as `lexicon_ids` has them, distinct within an item; read
                where words guide. A token that no published item holds counts nothing.
        """
        return self._logits(query_vector, token_ids, positions, vectors, words)

    def _logits(self, query_vector: Tensor, token_ids: Tensor, positions: Tensor, vectors: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
        logits = self.sharpness * (vectors[positions].float() @ query_vector.float())
        if self.lexical_weight:
            assert words is not None, "checked by the retriever"
            offsets, tokens = words
            shares = self.lexicon.shares(token_ids[None], torch.tensor([len(token_ids)], device=token_ids.device))[0]
            starts = offsets[positions].long()
            counts = offsets[positions + 1].long() - starts
            owner = torch.repeat_interleave(counts)
            entries = starts[owner] + torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
            held = torch.zeros(len(positions), device=owner.device).index_add_(0, owner, shares[tokens[entries].long()])
            logits = logits + self.lexical_weight * held
        return self.level_weights[-1].float() * logits


@torch.no_grad()
def log_guide(item_logits: Tensor, trie: Trie) -> Guide:
    """log g of each token given its prefix, for the items' logits s float32 [N, B]."""
    weights = (item_logits - item_logits.amax(dim=0)).exp()
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
