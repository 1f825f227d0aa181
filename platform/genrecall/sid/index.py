"""The index from SIDs to the items of their clusters, memory-mapped, and the readers of the `sid_index` artifact.

Inside a cluster items are ordered by prior score (what the site orders by when it must cut), then by item row. A *place* is a position
among the postings, the clusters one after the other; the trie of a guided decoder holds the items' vectors in the order of places.

What shoppers did with an item in training is kept as a logit, log(feedback + 0.5): a SID's probability is shared out among its items by the softmax of
theirs, so that answers can be ordered item by item. An item without feedback, as every later one, has log 0.5.

Shapes: S SIDs, N items, P postings (N unless items are delisted).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

_FILES = ("offsets", "item_rows", "item_sid", "prior", "item_logits")
_SIDS_AT_ONCE = 1 << 16
_FEEDBACK_PRIOR = 0.5
"""Added to every item's feedback, which leaves unseen items half the chance of those clicked once."""

NO_FEEDBACK = np.float16(np.log(_FEEDBACK_PRIOR))
"""The logit of an item without feedback."""


class SidIndexError(ValueError):
    """An index that does not fit its table, or files that are not an index."""


@dataclass(frozen=True)
class SidIndex:
    """Items of each SID and the SID of each item.

    Attributes:
        offsets: int64 [S + 1]; the items of SID row s are `item_rows[offsets[s]:offsets[s + 1]]`.
        item_rows: int32 [P], grouped by SID; inside a SID by prior score descending, then item row.
        item_sid: int32 [N], the SID row of each item row (the way back); delisted items keep theirs, for shoppers' histories.
        prior: float32 [N], the prior score of each item row; equal values inside a cluster are ties.
        item_logits: float16 [P], by place; their softmax inside a SID is p(item | SID).
    """

    offsets: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    item_sid: NDArray[np.int32]
    prior: NDArray[np.float32]
    item_logits: NDArray[np.float16]

    def __len__(self) -> int:
        """S, the number of SIDs."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """N, the number of item rows."""
        return len(self.item_sid)

    @property
    def num_published(self) -> int:
        """P, the number of postings: the places that a trie's item vectors stand for."""
        return len(self.item_rows)

    @classmethod
    def build(
        cls,
        item_sid: NDArray[np.int32],
        num_sids: int,
        prior: NDArray[np.float64] | NDArray[np.float32],
        listed: NDArray[np.bool_] | None = None,
        *,
        feedback: NDArray[np.floating] | None = None,
    ) -> SidIndex:
        """Build from the SID row of every item [N] and prior scores [N] (nan counts as 0).

        Args:
            listed: bool [N], False for items that no SID shall expand to; all are listed by default.
            feedback: float [N], how often each item was clicked and bought in training; none by default.

        Raises:
            SidIndexError: lengths differ, a SID row outside 0 to num_sids - 1, or feedback that is negative or no number.
        """
        scores = checked_scores(item_sid, num_sids, prior)
        order = served_order(item_sid, scores)
        if listed is not None:
            order = order[listed[order]]
        offsets = np.zeros(num_sids + 1, dtype=np.int64)
        np.cumsum(np.bincount(item_sid if listed is None else item_sid[listed], minlength=num_sids), out=offsets[1:])
        return cls(offsets, order.astype(np.int32), np.asarray(item_sid, dtype=np.int32), scores, _logits(feedback, len(item_sid), order))

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
        places, rank = self.places(sid_rows, limit)
        return self.rows_at(places), rank

    def places(self, sid_rows: NDArray[np.int32], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """As `expand`, with places int64 [m] instead of item rows."""
        return slices(self.offsets[np.maximum(sid_rows, 0)], self.sizes(sid_rows), limit)

    def rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        """The item rows int32 [m] at places [m]."""
        return np.asarray(self.item_rows[places], dtype=np.int32)

    def item_logits_at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits float32 [m] of the items at places [m]."""
        return np.asarray(self.item_logits[places], dtype=np.float32)

    def sids_of(self, item_rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """The SID rows int32 [m] of item rows [m], each 0 to N - 1."""
        return np.asarray(self.item_sid[item_rows], dtype=np.int32)

    def save(self, folder: Path) -> None:
        """Write an `.npy` file of each array into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", np.asarray(getattr(self, name)), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = True) -> SidIndex:
        """Read an index written by `save`; with `mmap` pages are read when first touched.

        Raises:
            SidIndexError: a file that is missing, or files whose lengths do not belong together.
        """
        if missing := [f"{name}.npy" for name in _FILES if not (folder / f"{name}.npy").exists()]:
            raise SidIndexError(f"{folder}: lacks {', '.join(missing)}; rerun jobs/build_sid_index.py")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None, allow_pickle=False) for name in _FILES}
        items, postings = len(arrays["item_sid"]), len(arrays["item_rows"])
        whole = len(arrays["prior"]) == items and int(arrays["offsets"][-1]) == postings == len(arrays["item_logits"])
        if not whole or postings > items:
            raise SidIndexError(f"{folder}: the index's files do not belong together; rerun jobs/build_sid_index.py with --force")
        return cls(**arrays)


def checked_scores(item_sid: NDArray[np.int32], num_sids: int, prior: NDArray[np.floating]) -> NDArray[np.float32]:
    """Prior scores as an index keeps them: float32, 0 for nan.

    Raises:
        SidIndexError: lengths differ, or a SID row outside 0 to num_sids - 1.
    """
    if len(item_sid) != len(prior):
        raise SidIndexError(f"expected one prior score per item ({len(item_sid)}), got {len(prior)}")
    if len(item_sid) and (item_sid.min() < 0 or item_sid.max() >= num_sids):
        raise SidIndexError(f"item_sid: expected SID rows 0 to {num_sids - 1}, got {int(item_sid.min())} to {int(item_sid.max())}")
    return np.nan_to_num(np.asarray(prior, dtype=np.float32))


def _logits(feedback: NDArray[np.floating] | None, items: int, order: NDArray[np.integer]) -> NDArray[np.float16]:
    if feedback is None:
        return np.full(len(order), NO_FEEDBACK)
    if len(feedback) != items:
        raise SidIndexError(f"feedback: expected one number per item ({items}), got {len(feedback)}")
    if not (np.asarray(feedback) >= 0).all():
        raise SidIndexError("feedback: expected numbers of at least 0, got a negative one or nan")
    return np.asarray(np.log(np.asarray(feedback)[order] + _FEEDBACK_PRIOR), dtype=np.float16)


def served_order(clusters: NDArray[np.integer], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The order [n] that sorts items by cluster (0 to 2^31 - 1), then score descending (no nan), then position."""
    # A float's bits, made monotone, under the cluster: one sort of integers takes half the time of a sort by two columns.
    bits = (0.0 - scores).view(np.int32)  # 0.0 - x has no -0.0, whose bits differ from those of 0.0
    keys = np.asarray(clusters, dtype=np.int64) << 32
    keys += (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    return np.argsort(keys, kind="stable")


def slices(begins: NDArray[np.int64], sizes: NDArray[np.int64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions int64 [m] of the slices begins[i]:begins[i] + sizes[i], one after the other, and the slice int32 [m] that each is of; m <= limit."""
    ends = np.cumsum(sizes)
    total = min(int(ends[-1]), max(limit, 0)) if len(ends) else 0
    if total == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    last = int(np.searchsorted(ends, total)) + 1  # slices that reach into the answer
    rank = np.repeat(np.arange(last, dtype=np.int32), sizes[:last])[:total]
    return (begins[:last] - (ends[:last] - sizes[:last]))[rank] + np.arange(total), rank


def load_sid_table(artifact_path: Path) -> SidTable:
    """The SID table of a `sid_index` artifact; the items' SID rows are memory-mapped."""
    space = SidSpace.from_json((artifact_path / "sid_space.json").read_text())
    trie = load_trie(artifact_path)
    tokens = np.empty((len(trie), 3), dtype=np.int32)
    for start in range(0, len(trie), _SIDS_AT_ONCE):
        part = tokens[start : start + _SIDS_AT_ONCE]
        part[:] = trie.tokens_of(torch.arange(start, start + len(part))).numpy()
    return SidTable(space, tokens, load_index(artifact_path).item_sid)


def load_trie(artifact_path: Path, device: torch.device | str = "cpu") -> Trie:
    """The trie of a `sid_index` artifact, on `device`; memory-mapped when that is the CPU."""
    return Trie.load(artifact_path / "trie").to(device)


def load_index(artifact_path: Path) -> SidIndex:
    """The SID -> items index of a `sid_index` artifact, memory-mapped."""
    return SidIndex.load(artifact_path / "index")
