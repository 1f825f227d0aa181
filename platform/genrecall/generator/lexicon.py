"""The lexicon of guidance: which tokens each item's text holds, by their stems where a language is named, and what a token is worth.

Shapes: N items, E (item, token) pairs, V text tokens, B prompts, L prompt tokens.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrecall.data.catalog import Catalog
from genrecall.encoders.embed import item_text
from genrecall.generator.token_stems import token_stems
from genrecall.generator.tokenizer import QueryTokenizer

LEXICON_TOKENS = 128
"""Tokens of an item's text that its lexicon entry is made of, at most."""


class Lexicon(NamedTuple):
    """Which text tokens each item holds, and what a token is worth.

    item_offsets: int32 [N + 1]. item_tokens: int32 [E], distinct within an item, ascending. token_idf: float32 [V], a token's idf or what
    `token_weights` made of it, 0 for one that no item holds. token_stems: int32 [V], the token that each one counts as; the rest is in terms of those.
    """

    item_offsets: Tensor
    item_tokens: Tensor
    token_idf: Tensor
    token_stems: Tensor

    @classmethod
    def build(
        cls,
        ids: NDArray[np.integer],
        offsets: NDArray[np.integer],
        vocab_size: int,
        counted: NDArray[np.bool_],
        stems: NDArray[np.int32] | None = None,
    ) -> Lexicon:
        """From the token ids of N items' texts.

        Args:
            ids: int, one text after the other; offsets: int [N + 1].
            counted: bool [N], items that frequencies are of.
            stems: as `token_stems`; None: each token counts as itself.
        """
        stems = np.arange(vocab_size, dtype=np.int32) if stems is None else stems
        ids = stems[ids]
        owner = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
        keys = np.unique(owner * vocab_size + ids)
        owner, tokens = keys // vocab_size, keys % vocab_size
        frequency = np.bincount(tokens[counted[owner]], minlength=vocab_size)
        idf = np.where(frequency > 0, np.log1p((counted.sum() - frequency + 0.5) / (frequency + 0.5)), 0.0)
        item_offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(offsets) - 1))])
        arrays = (item_offsets.astype(np.int32), tokens.astype(np.int32), idf.astype(np.float32), stems)
        return cls(*(torch.from_numpy(array) for array in arrays))

    def held(self) -> Tensor:
        """[N, V], 1 where an item holds a token, as a sparse matrix."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # what is used of it is tested
            ones = torch.ones(len(self.item_tokens), device=self.item_tokens.device)
            shape = (len(self.item_offsets) - 1, len(self.token_idf))
            return torch.sparse_csr_tensor(self.item_offsets, self.item_tokens, ones, shape, check_invariants=False)

    def shares(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """The share of each prompt's idf mass that each token has, float32 [B, V]; markers and SIDs have none, repeated tokens count once.

        Args:
            token_ids: int64 [B, L]. lengths: int64 [B].
        """
        vocab = len(self.token_idf)
        text = (token_ids < vocab) & (torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None])
        counted = self.token_stems[torch.where(text, token_ids, 0)].long()
        present = torch.zeros(len(token_ids), vocab + 1, device=token_ids.device).scatter_(1, torch.where(text, counted, vocab), 1.0)[:, :vocab]
        mass = present * self.token_idf
        return mass / mass.sum(dim=1, keepdim=True).clamp(min=1e-6)


def build_lexicon(catalog: Catalog, item_rows: np.ndarray, tokenizer: QueryTokenizer, counted: np.ndarray, stemmer: str = "") -> Lexicon:
    """The lexicon of a catalogue.

    Args:
        item_rows: int [N], the items in the index's order.
        counted: bool, catalogue rows whose texts the tokens' frequencies are of.
        stemmer: see `GeneratorConfig.guide_stemmer`.
    """
    texts = item_text(catalog)
    ids, offsets = tokenizer.encode_batch([texts[row] for row in item_rows], LEXICON_TOKENS)
    return Lexicon.build(ids, offsets, tokenizer.vocab_size, counted[item_rows], token_stems(tokenizer, stemmer) if stemmer else None)
