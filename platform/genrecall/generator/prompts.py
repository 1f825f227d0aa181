"""Prompts of unequal length as one batch.

Shapes: B prompts, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class PromptError(ValueError):
    """Prompts that the decoder cannot read."""


@dataclass
class Prompts:
    """A batch of prompts of unequal length.

    Args:
        token_ids: int64 [B, L], padded on the right (with any valid id).
        lengths: int64 [B], tokens of each prompt before padding; at least 1.
        soft: float32 [B, soft_prompt_dim], the query encoder's vectors; None for prompts without soft tokens.

    Raises:
        PromptError: shapes that do not belong together.
    """

    token_ids: Tensor
    lengths: Tensor
    soft: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 2 or self.lengths.shape != self.token_ids.shape[:1]:
            raise PromptError(f"prompts: expected token_ids [B, L] and lengths [B], got {list(self.token_ids.shape)} and {list(self.lengths.shape)}")
        if self.soft is not None and (self.soft.ndim != 2 or len(self.soft) != len(self.token_ids)):
            raise PromptError(f"prompts: expected soft [{len(self.token_ids)}, soft_prompt_dim], got {list(self.soft.shape)}")

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], soft: Tensor | None = None, *, pad_id: int = 0) -> Prompts:
        """Pad lists of token ids to a batch.

        Raises:
            PromptError: no rows, or an empty one.
        """
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        if not len(rows) or lengths.min() < 1:
            raise PromptError(
                "prompts: expected at least one row, and at least one token in each" + (f"; row {int(lengths.argmin())} is empty" if len(rows) else "")
            )
        token_ids = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
        token_ids[np.arange(token_ids.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        return cls(torch.from_numpy(token_ids), torch.from_numpy(lengths), soft)

    def __len__(self) -> int:
        """B."""
        return len(self.token_ids)

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        return Prompts(self.token_ids.to(device), self.lengths.to(device), None if self.soft is None else self.soft.to(device))

    def take(self, index: Tensor | slice) -> Prompts:
        """The chosen rows."""
        return Prompts(self.token_ids[index], self.lengths[index], None if self.soft is None else self.soft[index])
