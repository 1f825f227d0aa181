"""Placing new items between retrainings: every newcomer goes to a published SID; no SID moves and no group opens.

Source: DESIGN of this project for CQ-SID (arXiv:2605.14434), which does not say how items arriving later are placed. The frozen
encoder and codebooks give a newcomer its codes; it goes to the published SID whose centre is nearest to it, among those that
share the longest prefix of its codes:

1. its three codes are published: among the groups of that cluster (usually one);
2. only its first two codes, or its first, are: among all SIDs under that prefix;
3. its level-1 code has no SID (an unused spare code): under the nearest level-1 code that has one.

Shapes: n newcomers, S SIDs, Z latent dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.quantization.residual_quantizer import FrozenQuantizer, load_quantizer
from genrecall.sid.index import load_trie
from genrecall.sid.semantic_id import SidSpace
from genrecall.sid.trie import Trie


class AssignError(ValueError):
    """A quantiser and a SID index that do not belong together."""


class SidAssigner:
    """Gives new items their SIDs.

    Args:
        quantizer: the one that the index was built with.
        space, trie: the published SIDs.
        centers: float16 or float32 [S, Z], the mean latent of each SID's items.

    Raises:
        AssignError: level sizes or shapes that differ.
    """

    def __init__(self, quantizer: FrozenQuantizer, space: SidSpace, trie: Trie, centers: NDArray[np.floating]) -> None:
        if quantizer.level_sizes != space.level_sizes:
            raise AssignError(f"the quantiser has level sizes {quantizer.level_sizes}, the SID index {space.level_sizes}; use the parts of one bundle")
        if centers.shape != (len(trie), quantizer.latent_dim):
            raise AssignError(f"centers: expected shape {[len(trie), quantizer.latent_dim]}, got {list(centers.shape)}; rerun jobs/build_sid_index.py")
        self._quantizer = quantizer
        self._trie = trie
        self._centers = centers
        # Level-3 tokens beyond the codes stand for (code, group) pairs; neighbours of one code are its groups.
        self._code_of_token = np.concatenate([np.arange(space.level_sizes[2], dtype=np.int32), space.group_pairs[:, 0]])

    def assign(self, embeddings: NDArray[np.float32], category_paths: Sequence[Sequence[str]]) -> NDArray[np.int32]:
        """The SID row int32 [n] of each newcomer.

        Args:
            embeddings: float32 [n, D], from the encoder of the same bundle.
            category_paths: one per newcomer, root first; empty when unknown.

        Raises:
            QuantizerError: embeddings that the quantiser cannot place.
        """
        codes, residuals = self._quantizer.place(embeddings, category_paths)
        return self.assign_placed(codes, residuals)

    def assign_placed(self, codes: NDArray[np.int32], residuals: NDArray[np.floating]) -> NDArray[np.int32]:
        """The SID row int32 [n] of items already placed: codes int32 [n, 3] and residuals [n, Z]."""
        latents = self._quantizer.code_sums(codes) + np.asarray(residuals, dtype=np.float32)
        first = self._published_level1(codes[:, 0], latents)
        node = self._trie.find_node(torch.from_numpy(first), torch.from_numpy(np.ascontiguousarray(codes[:, 1]))).numpy()
        node[first != codes[:, 0]] = -1  # under another level-1 code the level-2 code means nothing
        rows = np.empty(len(codes), dtype=np.int32)
        offsets2, offsets3 = self._trie.offsets2.numpy(), self._trie.offsets3.numpy()
        # Newcomers under the same prefix share their candidates; -1 - token stands for a whole level-1 token.
        prefix = np.where(node >= 0, node, -1 - first)
        order = np.argsort(prefix, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(prefix[order])) + 1):
            if not len(members):
                continue
            key = int(prefix[members[0]])
            nodes = (key, key + 1) if key >= 0 else (int(offsets2[-1 - key]), int(offsets2[-key]))
            begin, end = int(offsets3[nodes[0]]), int(offsets3[nodes[1]])
            rows[members] = begin + self._nearest(latents[members], codes[members, 2], begin, end, own_codes=key >= 0)
        return rows

    def _published_level1(self, wanted: NDArray[np.int32], latents: NDArray[np.float32]) -> NDArray[np.int32]:
        valid = self._trie.level1_valid.numpy()
        first = wanted.astype(np.int32)
        lost = np.flatnonzero(~valid[first])
        if len(lost):
            published = np.flatnonzero(valid).astype(np.int32)
            first[lost] = published[_nearest_rows(latents[lost], self._quantizer.codebooks[0][published])]
        return first

    def _nearest(self, latents: NDArray[np.float32], codes3: NDArray[np.int32], begin: int, end: int, *, own_codes: bool) -> NDArray[np.int64]:
        """The nearest of the SIDs begin to end - 1, counted from begin; with `own_codes`, of those with the item's level-3 code if there is one."""
        centers = np.asarray(self._centers[begin:end], dtype=np.float32)
        distances = -2.0 * latents @ centers.T + np.square(centers).sum(axis=1)
        if own_codes:
            same = self._code_of_token[self._trie.tokens3[begin:end].numpy()][None, :] == codes3[:, None]
            distances[~same & same.any(axis=1, keepdims=True)] = np.inf
        return np.asarray(distances.argmin(axis=1))


def _nearest_rows(rows: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.asarray((-2.0 * rows @ candidates.T + np.square(candidates).sum(axis=1)).argmin(axis=1))


def oversize_sids(sizes: NDArray[np.integer], max_items_per_sid: int) -> NDArray[np.int64]:
    """SID rows with more than twice the cap after newcomers came in: time to rebuild the index.

    Args:
        sizes: integer [S], items per SID, newcomers included.
    """
    return np.flatnonzero(sizes > 2 * max_items_per_sid)


def load_assigner(*, quantizer: Path, sid_index: Path) -> SidAssigner:
    """The assigner of a `quantizer` and a `sid_index` artifact folder."""
    centers = np.load(sid_index / "centers.npy", mmap_mode="r", allow_pickle=False)
    space = SidSpace.from_json((sid_index / "sid_space.json").read_text())
    return SidAssigner(load_quantizer(quantizer), space, load_trie(sid_index), centers)
