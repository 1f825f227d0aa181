"""Which SIDs and prefixes a request admits, as masks over the trie. They bar SIDs and never change scores.

Shapes: B prompts, S SIDs, N2 level-2 nodes, A1 level-1 alphabet size, C entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genrecall.generator.support import DecodingError
from genrecall.sid.trie import Trie


class PrefixMasks(NamedTuple):
    """What a request allows, as bool masks with one row per prompt or one for all.

    level1: [B or 1, A1]. nodes2: [B or 1, N2]. leaves: [B or 1, S].
    """

    level1: Tensor
    nodes2: Tensor
    leaves: Tensor

    @classmethod
    def from_leaves(cls, trie: Trie, leaves: Tensor) -> PrefixMasks:
        """The masks that allow exactly the prefixes of the allowed SIDs, bool [B or 1, S]."""
        if leaves.device.type == "cpu":
            nodes2 = _any_of_owner(leaves, trie.node_of_leaf, len(trie.tokens2))
            return cls(_any_of_owner(nodes2, trie.level1_of_node, trie.alphabet_sizes[0]), nodes2, leaves)
        nodes2 = _any_in_segment(leaves, trie.offsets3)
        return cls(_any_in_segment(nodes2, trie.offsets2), nodes2, leaves)

    def without(self, trie: Trie, sid_rows: Tensor) -> PrefixMasks:
        """These masks of one row less a few SIDs int64 [n], in the time of a copy: only the prefixes of those are looked at again."""
        left, nodes2, level1 = self.leaves.clone(), self.nodes2.clone(), self.level1.clone()
        left[:, sid_rows] = False
        nodes = trie.node_of_leaf[sid_rows]  # some twice, which does no harm
        children = trie.children3(nodes)
        nodes2[0, nodes] = (left[0][children.ids] & children.valid).any(-1)
        tokens = trie.level1_of_node[nodes]
        children = trie.children2(tokens)
        level1[0, tokens] = (nodes2[0][children.ids] & children.valid).any(-1)
        return PrefixMasks(level1, nodes2, left)


def check_masks(allowed: PrefixMasks, trie: Trie, batch: int) -> None:
    widths = (trie.alphabet_sizes[0], len(trie.tokens2), len(trie))
    for name, mask, width in zip(PrefixMasks._fields, allowed, widths, strict=True):
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != width:
            raise DecodingError(f"allowed.{name}: expected bool [{batch} or 1, {width}], got {mask.dtype} {list(mask.shape)}")


def _any_in_segment(values: Tensor, offsets: Tensor) -> Tensor:
    """Whether any of bool [B, C] is set in each slice `offsets[i]:offsets[i + 1]`: bool [B, len(offsets) - 1]."""
    counts = torch.nn.functional.pad(values.cumsum(-1, dtype=torch.int32), (1, 0)).index_select(1, offsets)
    return counts[:, 1:] > counts[:, :-1]


def _any_of_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """As `_any_in_segment`, given the segment int64 [C] of each entry; on a CPU, where looking for the set ones costs no sync and a quarter of the sums."""
    found = torch.zeros(len(values), count, dtype=torch.bool)
    for row, flags in zip(found.numpy(), values.numpy(), strict=True):
        row[owner.numpy()[flags.nonzero()[0]]] = True
    return found
