"""The index from SIDs to the items of their clusters, memory-mapped, and the readers of the `sid_index` artifact.

Inside a cluster items are ordered by prior score (what the site orders by when it must cut), then by item row.

Shapes: S SIDs, N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

_FILES = ("offsets", "item_rows", "item_sid", "prior")


class SidIndexError(ValueError):
    """An index that does not fit its table, or files that are not an index."""


@dataclass(frozen=True)
class SidIndex:
    """Items of each SID and the SID of each item.

    Attributes:
        offsets: int64 [S + 1]; the items of SID row s are `item_rows[offsets[s]:offsets[s + 1]]`.
        item_rows: int32 [N], grouped by SID; inside a SID by prior score descending, then item row.
        item_sid: int32 [N], the SID row of each item row (the way back).
        prior: float32 [N], the prior score of each item row; equal values inside a cluster are ties.
    """

    offsets: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    item_sid: NDArray[np.int32]
    prior: NDArray[np.float32]

    def __len__(self) -> int:
        """S, the number of SIDs."""
        return len(self.offsets) - 1

    @classmethod
    def build(cls, item_sid: NDArray[np.int32], num_sids: int, prior: NDArray[np.float64] | NDArray[np.float32]) -> SidIndex:
        """Build from the SID row of every item [N] and prior scores [N] (nan counts as 0).

        Raises:
            SidIndexError: lengths differ, or a SID row outside 0 to num_sids - 1.
        """
        if len(item_sid) != len(prior):
            raise SidIndexError(f"expected one prior score per item ({len(item_sid)}), got {len(prior)}")
        if len(item_sid) and (item_sid.min() < 0 or item_sid.max() >= num_sids):
            raise SidIndexError(f"item_sid: expected SID rows 0 to {num_sids - 1}, got {int(item_sid.min())} to {int(item_sid.max())}")
        scores = np.nan_to_num(np.asarray(prior, dtype=np.float32))
        order = np.lexsort((-scores, item_sid))  # stable: ties stay in item row order
        offsets = np.concatenate([[0], np.cumsum(np.bincount(item_sid, minlength=num_sids))]).astype(np.int64)
        return cls(offsets, order.astype(np.int32), np.asarray(item_sid, dtype=np.int32), scores)

    def items(self, sid_row: int) -> NDArray[np.int32]:
        """Item rows of one SID, in served order."""
        return self.item_rows[self.offsets[sid_row] : self.offsets[sid_row + 1]]

    def sizes(self, sid_rows: NDArray[np.int32] | None = None) -> NDArray[np.int64]:
        """Cluster sizes int64 of the given SID rows (all by default; -1 has size 0)."""
        if sid_rows is None:
            return np.diff(self.offsets)
        rows = np.asarray(sid_rows)
        known = rows >= 0
        safe = np.where(known, rows, 0)
        return np.where(known, self.offsets[safe + 1] - self.offsets[safe], 0)

    def expand(self, sid_rows: NDArray[np.int32], limit: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The items of the given SIDs, in the SIDs' order.

        Args:
            sid_rows: int32 [n], best first, each SID once; -1 entries are skipped.
            limit: at most this many items.

        Returns:
            item rows int32 [m] and, beside each, the position in `sid_rows` that it came from int32 [m]; m <= limit.
        """
        sizes = self.sizes(sid_rows)
        ends = np.cumsum(sizes)
        total = min(int(ends[-1]), max(limit, 0)) if len(ends) else 0
        if total == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        last = int(np.searchsorted(ends, total)) + 1  # SIDs that reach into the answer
        sizes = sizes[:last]
        rank = np.repeat(np.arange(last, dtype=np.int32), sizes)[:total]
        begins = self.offsets[np.maximum(sid_rows[:last], 0)] - (ends[:last] - sizes)
        positions = np.repeat(begins, sizes)[:total] + np.arange(total)
        return np.asarray(self.item_rows[positions], dtype=np.int32), rank

    def save(self, folder: Path) -> None:
        """Write `offsets.npy`, `item_rows.npy`, `item_sid.npy` and `prior.npy` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", np.asarray(getattr(self, name)), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = True) -> SidIndex:
        """Read an index written by `save`; with `mmap` pages are read when first touched.

        Raises:
            SidIndexError: files whose lengths do not belong together.
        """
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None, allow_pickle=False) for name in _FILES}
        lengths = {len(arrays[name]) for name in ("item_rows", "item_sid", "prior")} | {int(arrays["offsets"][-1])}
        if len(lengths) != 1:
            raise SidIndexError(f"{folder}: the index's files do not belong together; rerun jobs/build_sid_index.py with --force")
        return cls(**arrays)


def load_sid_table(artifact_path: Path) -> SidTable:
    """The SID table of a `sid_index` artifact; the items' SID rows are memory-mapped."""
    space = SidSpace.from_json((artifact_path / "sid_space.json").read_text())
    trie = load_trie(artifact_path)
    tokens = trie.tokens_of(torch.arange(len(trie))).to(torch.int32).numpy()
    return SidTable(space, tokens, load_index(artifact_path).item_sid)


def load_trie(artifact_path: Path, device: torch.device | str = "cpu") -> Trie:
    """The trie of a `sid_index` artifact, on `device`; memory-mapped when that is the CPU."""
    return Trie.load(artifact_path / "trie").to(device)


def load_index(artifact_path: Path) -> SidIndex:
    """The SID -> items index of a `sid_index` artifact, memory-mapped."""
    return SidIndex.load(artifact_path / "index")
