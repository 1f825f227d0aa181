"""The trie of all published SIDs, as compressed rows on a device: which tokens may follow a prefix, and which SID a path names.

The leaf number is the SID row, because the table is sorted lexicographically. The compressed-row layout for constrained
decoding follows STATIC (arXiv:2602.22647) in idea; three fixed levels make it two offset arrays and two token arrays.

Shapes: A1..A3 alphabet sizes, N2 distinct (token1, token2) prefixes ("level-2 nodes"), S SIDs.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FILES = ("offsets2", "tokens2", "offsets3", "tokens3")
_ITEM_FILES = ("item_vectors", "item_offsets")


class TrieError(ValueError):
    """Tokens that do not make a trie, or files that are not one."""


class Children(NamedTuple):
    """The children of prefixes [...], padded to C: ids int64 [..., C] (in range also where padded), valid bool [..., C]."""

    ids: Tensor
    valid: Tensor


class Trie:
    """Children of every prefix of the published SIDs.

    The level-2 nodes under level-1 token t are `offsets2[t]:offsets2[t + 1]`, with tokens `tokens2[...]`, ascending. The
    leaves under level-2 node n are `offsets3[n]:offsets3[n + 1]`, with tokens `tokens3[...]`, ascending; a leaf's number is
    its SID row.

    Attributes:
        alphabet_sizes: (A1, A2, A3).
        offsets2: int32 [A1 + 1]. tokens2: int32 [N2]. offsets3: int32 [N2 + 1]. tokens3: int32 [S].
        level1_valid: bool [A1], the level-1 tokens with any SID.
        max_children2, max_children3: the most children of any level-1 token and of any level-2 node.
        item_vectors: float16 [N, d], the encoder's vectors of the items, SID after SID in the index's order; None for a trie without items.
        item_offsets: int64 [S + 1]; the items of SID row s are `item_vectors[item_offsets[s]:item_offsets[s + 1]]`; None likewise.
    """

    def __init__(
        self,
        alphabet_sizes: tuple[int, int, int],
        offsets2: Tensor,
        tokens2: Tensor,
        offsets3: Tensor,
        tokens3: Tensor,
        *,
        max_children: tuple[int, int] | None = None,
        items: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.alphabet_sizes = alphabet_sizes
        self.offsets2, self.tokens2, self.offsets3, self.tokens3 = offsets2, tokens2, offsets3, tokens3
        self.level1_valid = offsets2[1:] > offsets2[:-1]
        if max_children is None:
            max_children = _longest(offsets2), _longest(offsets3)
        self.max_children2, self.max_children3 = max_children
        self.item_vectors: Tensor | None = None if items is None else items[0]
        self.item_offsets: Tensor | None = None if items is None else items[1]

    @cached_property
    def guide_vectors(self) -> Tensor:
        """float32 [N, d], `item_vectors` as they are multiplied with queries."""
        assert self.item_vectors is not None
        with torch.inference_mode(False):  # kept, and used in training later, whoever asks first
            vectors: Tensor = self.item_vectors.float()
        return vectors

    @cached_property
    def sid_of_item(self) -> Tensor:
        """int64 [N], the SID row of each of `item_vectors`."""
        assert self.item_vectors is not None
        assert self.item_offsets is not None
        return _owners(self.item_offsets, len(self.item_vectors))

    @cached_property
    def node_of_leaf(self) -> Tensor:
        """int64 [S], the level-2 node of each SID."""
        return _owners(self.offsets3, len(self))

    @cached_property
    def level1_of_node(self) -> Tensor:
        """int64 [N2], the level-1 token of each level-2 node."""
        return _owners(self.offsets2, len(self.tokens2))

    def __len__(self) -> int:
        """S, the number of SIDs."""
        return len(self.tokens3)

    @property
    def device(self) -> torch.device:
        return self.tokens3.device

    @classmethod
    def from_tokens(cls, tokens: NDArray[np.int32] | Tensor, alphabet_sizes: tuple[int, int, int]) -> Trie:
        """Build from SID tokens [S, 3], sorted lexicographically and unique.

        Raises:
            TrieError: no rows, a token out of its alphabet, or rows out of order.
        """
        rows = np.asarray(tokens, dtype=np.int64)
        if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
            raise TrieError(f"tokens: expected shape [S, 3] with S >= 1, got {list(rows.shape)}")
        if (rows < 0).any() or (rows >= np.asarray(alphabet_sizes)).any():
            row = int(np.argwhere(((rows < 0) | (rows >= np.asarray(alphabet_sizes))).any(axis=1))[0, 0])
            raise TrieError(f"tokens: row {row}: {rows[row].tolist()} does not fit the alphabets {alphabet_sizes}")
        prefixes = rows[:, 0] * alphabet_sizes[1] + rows[:, 1]
        steps = np.diff(prefixes * alphabet_sizes[2] + rows[:, 2])
        if (steps <= 0).any():
            raise TrieError(f"tokens: expected rows sorted and unique, row {int(np.argmax(steps <= 0)) + 1} does not follow the one before it")
        first_leaf = np.flatnonzero(np.concatenate([[True], np.diff(prefixes) > 0]))
        offsets3 = np.append(first_leaf, len(rows))
        offsets2 = np.searchsorted(rows[first_leaf, 0], np.arange(alphabet_sizes[0] + 1))
        arrays = (offsets2, rows[first_leaf, 1], offsets3, rows[:, 2])
        return cls(alphabet_sizes, *(torch.from_numpy(array.astype(np.int32)) for array in arrays))

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device (itself when it is there already)."""
        if torch.device(device) == self.device:
            return self
        arrays = (getattr(self, name).to(device) for name in _FILES)
        items = None if self.item_vectors is None or self.item_offsets is None else (self.item_vectors.to(device), self.item_offsets.to(device))
        return Trie(self.alphabet_sizes, *arrays, max_children=(self.max_children2, self.max_children3), items=items)

    def with_items(self, item_vectors: NDArray[np.floating], item_offsets: NDArray[np.int64]) -> Trie:
        """The same trie with the vectors of its items, for guidance.

        Args:
            item_vectors: float [N, d], SID after SID in the index's order. item_offsets: int64 [S + 1], the index's.

        Raises:
            TrieError: offsets that do not belong to the trie and the vectors.
        """
        if len(item_offsets) != len(self) + 1 or int(item_offsets[-1]) != len(item_vectors):
            raise TrieError(
                f"items: expected {len(self) + 1} offsets that end at the number of vectors ({len(item_vectors)}), got {len(item_offsets)} that end at {int(item_offsets[-1])}"
            )
        items = (torch.from_numpy(np.asarray(item_vectors, dtype=np.float16)), torch.from_numpy(np.asarray(item_offsets, dtype=np.int64)))
        arrays = (getattr(self, name) for name in _FILES)
        return Trie(
            self.alphabet_sizes, *arrays, max_children=(self.max_children2, self.max_children3), items=(items[0].to(self.device), items[1].to(self.device))
        )

    def children2(self, tokens1: Tensor) -> Children:
        """The level-2 nodes under level-1 tokens int64 [...], without a host sync."""
        return _children(self.offsets2, tokens1, self.max_children2)

    def children3(self, nodes: Tensor) -> Children:
        """The leaves under level-2 nodes int64 [...], without a host sync."""
        return _children(self.offsets3, nodes, self.max_children3)

    def find(self, tokens: Tensor) -> Tensor:
        """The SID row of each token triple, without a host sync.

        Args:
            tokens: integer [..., 3]; any values, also out of range or negative.

        Returns:
            int64 [...]: the SID row, -1 where the triple names no published SID.
        """
        return self.find_leaf(self.find_node(tokens[..., 0], tokens[..., 1]), tokens[..., 2])

    def find_node(self, tokens1: Tensor, tokens2: Tensor) -> Tensor:
        """The level-2 node int64 [...] of each (token1, token2) prefix, -1 where no SID has it."""
        known = (tokens1 >= 0) & (tokens1 < self.alphabet_sizes[0])
        safe = torch.where(known, tokens1, 0).long()
        node = _search(self.tokens2, self.offsets2[safe].long(), self.offsets2[safe + 1].long(), tokens2, self.max_children2)
        return torch.where(known, node, -1)

    def find_leaf(self, nodes: Tensor, tokens3: Tensor) -> Tensor:
        """The SID row int64 [...] of each level-3 token under level-2 nodes [...] (-1 allowed), -1 where there is none."""
        known = nodes >= 0
        safe = torch.where(known, nodes, 0).long()
        leaf = _search(self.tokens3, self.offsets3[safe].long(), self.offsets3[safe + 1].long(), tokens3, self.max_children3)
        return torch.where(known, leaf, -1)

    def tokens_of(self, sid_rows: Tensor) -> Tensor:
        """Tokens int64 [..., 3] of SID rows [...] (each 0 to S - 1)."""
        rows = sid_rows.long()
        node = torch.searchsorted(self.offsets3, rows.to(self.offsets3.dtype), right=True) - 1
        first = torch.searchsorted(self.offsets2, node.to(self.offsets2.dtype), right=True) - 1
        return torch.stack([first, self.tokens2[node].long(), self.tokens3[rows].long()], dim=-1)

    def save(self, folder: Path) -> None:
        """Write `offsets2.npy`, `tokens2.npy`, `offsets3.npy`, `tokens3.npy`, `shape.npy` and, where there are any, the items'."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", getattr(self, name).cpu().numpy(), allow_pickle=False)
        for name in _ITEM_FILES if self.item_vectors is not None else ():
            np.save(folder / f"{name}.npy", getattr(self, name).cpu().numpy(), allow_pickle=False)
        np.save(folder / "shape.npy", np.array([*self.alphabet_sizes, self.max_children2, self.max_children3], dtype=np.int64), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = True) -> Trie:
        """Read a trie written by `save`; with `mmap` pages are read when first touched.

        Raises:
            TrieError: files whose lengths do not belong together.
        """
        # Mode "c" (copy on write) gives torch the writable buffer that it asks for; nothing writes to it.
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c" if mmap else None, allow_pickle=False) for name in _FILES}
        shape = [int(value) for value in np.load(folder / "shape.npy", allow_pickle=False)]
        lengths_fit = len(shape) == 5 and len(arrays["offsets2"]) == shape[0] + 1 and len(arrays["offsets3"]) == len(arrays["tokens2"]) + 1
        if not lengths_fit or int(arrays["offsets2"][-1]) != len(arrays["tokens2"]) or int(arrays["offsets3"][-1]) != len(arrays["tokens3"]):
            raise TrieError(f"{folder}: the trie's files do not belong together; rerun jobs/build_sid_index.py with --force")
        tensors = [torch.from_numpy(arrays[name]) for name in _FILES]
        trie = cls((shape[0], shape[1], shape[2]), *tensors, max_children=(shape[3], shape[4]))
        if not (folder / f"{_ITEM_FILES[0]}.npy").is_file():
            return trie
        vectors, offsets = (np.load(folder / f"{name}.npy", mmap_mode="c" if mmap else None, allow_pickle=False) for name in _ITEM_FILES)
        if vectors.ndim != 2 or len(offsets) != len(trie) + 1 or int(offsets[-1]) != len(vectors):
            raise TrieError(f"{folder}: its items do not belong to the trie; rerun jobs/build_sid_index.py with --force")
        trie.item_vectors, trie.item_offsets = torch.from_numpy(vectors), torch.from_numpy(offsets)
        return trie


@torch.inference_mode(False)  # kept, and used in training later, whoever asks first
def _owners(offsets: Tensor, count: int) -> Tensor:
    """int64 [count], the segment of `offsets` that each of its `count` entries lies in."""
    return torch.repeat_interleave(offsets[1:].long() - offsets[:-1].long(), output_size=count)


def _children(offsets: Tensor, parents: Tensor, most: int) -> Children:
    first, end = offsets[parents].long(), offsets[parents + 1].long()
    ids = first[..., None] + torch.arange(most, device=offsets.device)
    valid = ids < end[..., None]
    return Children(torch.where(valid, ids, 0), valid)


def _longest(offsets: Tensor) -> int:
    return int((offsets[1:] - offsets[:-1]).max())


def _search(values: Tensor, low: Tensor, high: Tensor, wanted: Tensor, longest: int) -> Tensor:
    """Position of `wanted` in the ascending slices `values[low:high]`, -1 where absent; the step count is fixed, so no sync."""
    end = high
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        right = open_ & (values[middle.clamp(max=len(values) - 1)] < wanted)
        low = torch.where(right, middle + 1, low)
        high = torch.where(open_ & ~right, middle, high)
    at = low.clamp(max=len(values) - 1)
    return torch.where((low < end) & (values[at] == wanted), low, -1)
