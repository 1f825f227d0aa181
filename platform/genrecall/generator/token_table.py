"""Input embeddings and output head over text tokens, level codes and (code, group) pairs.

Source: CQ-SID (arXiv:2605.14434) joins the group number of a split cluster to its level-3 code; sharing one term per group number
among all codes is ours: a pair that was seen once still has a trained code and a trained group.

Shapes: V vocabulary, d hidden, K1..K3 codebook sizes, A1..A3 alphabet sizes (A3 = K3 + P pairs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenTable(nn.Module):
    """Input embeddings and output head. Codes have their own matrix, so that the gradient of one level's slice is not padded to the whole text vocabulary."""

    pair_code: Tensor
    pair_group: Tensor

    def __init__(self, text_vocab_size: int, level_sizes: tuple[int, int, int], groups: tuple[tuple[int, int], ...], *, hidden_size: int, tied: bool) -> None:
        super().__init__()
        self.text_vocab_size, self.level_sizes = text_vocab_size, level_sizes
        self.level_starts = (0, level_sizes[0], level_sizes[0] + level_sizes[1])

        def matrix(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(rows, hidden_size)) if rows else None

        self.text = nn.Parameter(torch.empty(text_vocab_size, hidden_size))
        codes, terms = sum(level_sizes), max((group for _, group in groups), default=0)
        self.codes = matrix(codes)
        self.group_terms = matrix(terms)
        self.head_text = None if tied else matrix(text_vocab_size)
        self.head_codes = None if tied else matrix(codes)
        self.head_group_terms = None if tied else matrix(terms)
        pairs = torch.tensor(groups, dtype=torch.int64).view(-1, 2)
        self.register_buffer("pair_code", pairs[:, 0].contiguous(), persistent=False)
        self.register_buffer("pair_group", pairs[:, 1].contiguous(), persistent=False)

    def rows(self, *, head: bool = False) -> Tensor:
        """The whole matrix [V, d] of input embeddings (or of the head), with the pairs' rows worked out."""
        text, codes, terms = (self.head_text, self.head_codes, self.head_group_terms) if head else (self.text, self.codes, self.group_terms)
        assert text is not None
        return text if codes is None else torch.cat((text, self._rows(codes, terms)))

    def _rows(self, codes: Tensor, terms: Tensor | None) -> Tensor:
        if terms is None:
            return codes
        return torch.cat((codes, codes[self.level_starts[2] + self.pair_code] + terms[self.pair_group - 1]))

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Embeddings [..., d] of vocabulary ids int64 [...]."""
        first = self.text_vocab_size
        text = F.embedding(ids.clamp(max=first - 1), self.text)
        if self.codes is None:
            return text
        return torch.where((ids >= first).unsqueeze(-1), self.embed_codes((ids - first).clamp(min=0)), text)

    def embed_codes(self, ids: Tensor) -> Tensor:
        """Embeddings [..., d] of ids int64 [...] counted from the first code."""
        assert self.codes is not None
        if self.group_terms is None:
            return F.embedding(ids, self.codes)
        first_pair = len(self.codes)
        pair = (ids - first_pair).clamp(min=0)
        grouped = ids >= first_pair
        code = torch.where(grouped, self.level_starts[2] + self.pair_code[pair], ids)
        # Group 0, the bare code, has no term: a row of zeros stands for it.
        term = torch.where(grouped, self.pair_group[pair], 0)
        return F.embedding(code, self.codes) + F.embedding(term, F.pad(self.group_terms, (0, 0, 1, 0)))

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d] over the whole vocabulary."""
        return F.linear(hidden, self.rows(head=self.head_text is not None))

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits [..., A_level] of hidden states [..., d] over one level's alphabet, `level` 0 to 2."""
        codes, terms = (self.codes, self.group_terms) if self.head_text is None else (self.head_codes, self.head_group_terms)
        assert codes is not None, "a text model has no levels"
        first = self.level_starts[level]
        logits = F.linear(hidden, codes[first : first + self.level_sizes[level]])
        if level < 2 or terms is None:
            return logits
        return torch.cat((logits, logits[..., self.pair_code] + F.linear(hidden, terms)[..., self.pair_group - 1]), dim=-1)
