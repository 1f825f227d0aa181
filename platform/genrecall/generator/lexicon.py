"""The lexicon of guidance: which tokens each item's text holds, by their stems where a language is named, and what a token is worth.

Shapes: N items, E (item, token) pairs, V text tokens.
"""

from __future__ import annotations

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

    item_offsets: int32 [N + 1]. item_tokens: int32 [E], distinct within an item, ascending. token_idf: float32 [V], 0 for a token that no item holds.
    token_stems: int32 [V], the token that each one counts as; the rest is in terms of those.
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
        """From the token ids of N items' texts, one after the other, `offsets` [N + 1]; frequencies are those of the items `counted` [N]; `stems` as `token_stems`, None: each token counts as itself."""
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


def build_lexicon(catalog: Catalog, item_rows: np.ndarray, tokenizer: QueryTokenizer, counted: np.ndarray, stemmer: str = "") -> Lexicon:
    """The lexicon of the items int [N] in the index's order; token frequencies are those of the catalogue rows marked in `counted` [N]; `stemmer`: see `GeneratorConfig`."""
    texts = item_text(catalog)
    ids, offsets = tokenizer.encode_batch([texts[row] for row in item_rows], LEXICON_TOKENS)
    return Lexicon.build(ids, offsets, tokenizer.vocab_size, counted[item_rows], token_stems(tokenizer, stemmer) if stemmer else None)
