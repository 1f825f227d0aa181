"""The trained half of an encoder: two towers that turn tokenised queries and items into unit vectors.

Source of the n-gram towers: Nigam et al., "Semantic Product Search" (KDD 2019): one table of n-gram vectors shared by both towers, summed, then a
small network. Deviations: every n-gram has a learned weight, started at its inverse document frequency in the catalogue, and the network is a
residual that starts at zero, so an untrained encoder is already a random projection of TF-IDF and training begins from lexical match. Both towers
share the network too: queries and items then meet in one space from few pairs, and text alone (title against title) trains both.

Shapes: n texts, M n-grams of all of them, d = `dim`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrecall.encoders.ngram_hash import NgramBatch, hash_ngrams

Side = Literal["query", "item"]
Tokens = tuple[Tensor, ...]


class Towers(nn.Module):
    """What training and serving need of an encoder model: text to tensors on the CPU, tensors to unit vectors on the device."""

    dim: int
    folds_text = False
    """Whether case, compatibility forms (NFKC) and white space of a text make no difference."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str], side: Side) -> Tokens:
        """The texts as CPU tensors, ready for `embed`."""

    @abstractmethod
    def embed(self, tokens: Tokens, side: Side) -> Tensor:
        """float32 [n, d] of unit length, on the device of the tokens."""

    def embed_both(self, query_tokens: Tokens, item_tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Queries and items, each as `embed` gives them."""
        return self.embed(query_tokens, "query"), self.embed(item_tokens, "item")


class NgramTowers(Towers):
    """Hashed n-grams -> weighted sum of their vectors -> residual network -> unit length.

    A text without any word gets a learned vector of its own.

    Args:
        dim: d.
        hidden: width of the network.
        num_buckets: rows of the n-gram table.
    """

    folds_text = True

    def __init__(self, *, dim: int, hidden: int, num_buckets: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_buckets = num_buckets
        self.table = nn.Parameter(torch.randn(num_buckets, dim) / dim**0.5)
        self.importance = nn.Parameter(torch.ones(num_buckets))
        self.wordless = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    @torch.no_grad()
    def start_importance(self, texts: Sequence[str]) -> None:
        """Set each n-gram's weight to its inverse document frequency over `texts`, divided by the mean over all buckets."""
        frequency = np.zeros(self.num_buckets, np.int64)
        for start in range(0, len(texts), 4096):
            frequency += document_frequency(hash_ngrams(texts[start : start + 4096], self.num_buckets), self.num_buckets)
        weight = np.log((len(texts) + 1) / (frequency + 1)) + 1e-3  # above 0 also for an n-gram of every text
        self.importance.copy_(torch.from_numpy((weight / weight.mean()).astype(np.float32)))

    def tokenize(self, texts: Sequence[str], side: Side) -> Tokens:
        ngrams = hash_ngrams(texts, self.num_buckets)
        return torch.from_numpy(ngrams.buckets), torch.from_numpy(ngrams.offsets)

    def embed(self, tokens: Tokens, side: Side) -> Tensor:
        buckets, offsets = tokens
        summed = F.embedding_bag(buckets, self.table, offsets, mode="sum", per_sample_weights=self.importance[buckets], include_last_offset=True)
        wordless = (offsets[1:] == offsets[:-1]).unsqueeze(1)
        lexical = F.normalize(torch.where(wordless, self.wordless, summed).float(), dim=-1)
        # Components of a unit vector are of order 1/sqrt(d); the network gets them at order 1.
        shift = self.narrow(F.gelu(self.widen((lexical * self.dim**0.5).to(self.table.dtype))))
        return F.normalize(lexical + shift.float(), dim=-1)

    def embed_both(self, query_tokens: Tokens, item_tokens: Tokens) -> tuple[Tensor, Tensor]:
        # One bag for both: the gradient of the table, which costs most of a step, is then written once instead of twice.
        (query_buckets, query_offsets), (item_buckets, item_offsets) = query_tokens, item_tokens
        offsets = torch.cat([query_offsets[:-1], item_offsets + query_offsets[-1]])
        vectors = self.embed((torch.cat([query_buckets, item_buckets]), offsets), "item")
        return vectors[: len(query_offsets) - 1], vectors[len(query_offsets) - 1 :]


def document_frequency(ngrams: NgramBatch, num_buckets: int) -> np.ndarray:
    """int64 [num_buckets]: how many of the texts hold each bucket."""
    text_of = np.repeat(np.arange(len(ngrams)), np.diff(ngrams.offsets))
    held = np.unique(text_of * num_buckets + ngrams.buckets)
    return np.bincount(held % num_buckets, minlength=num_buckets)
