"""Capping: clusters with too many items are split into groups, so that no SID expands to more than a page or two.

Source: CQ-SID (arXiv:2605.14434): c items give G = min(ceil(c / T_max), G_max) groups. The paper splits at random; "residual"
keeps neighbours together by halving along the principal axis of what the codes left over, in exact proportion.

Shapes: N items, Z latent dimension.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray


class CappingError(ValueError):
    """Limits or arrays that cannot be capped."""


def split_clusters(
    codes: NDArray[np.int32],
    residuals: NDArray[np.floating],
    *,
    max_items: int = 50,
    max_groups: int = 100,
    method: Literal["residual", "random"] = "residual",
    seed: int = 0,
) -> NDArray[np.int32]:
    """The group of every item inside its cluster.

    Args:
        codes: int32 [N, 3]; equal rows are one cluster.
        residuals: float [N, Z], latent minus codes; read by "residual" only.
        max_items: T_max. No group is larger while its cluster has at most max_items * max_groups items; beyond that all
            groups of the cluster grow alike.
        max_groups: G_max.
        method: how items are dealt to groups.
        seed: of "random".

    Returns:
        int32 [N], 0 to G - 1 in a cluster of G groups; every group has an item, sizes differ by at most one.

    Raises:
        CappingError: limits below 1, or lengths that differ.
    """
    if max_items < 1 or max_groups < 1:
        raise CappingError(f"expected max_items and max_groups of at least 1, got {max_items} and {max_groups}")
    if len(residuals) != len(codes):
        raise CappingError(f"expected one residual per item ({len(codes)}), got {len(residuals)}")
    group = np.zeros(len(codes), dtype=np.int32)
    rng = np.random.default_rng(seed)
    order = np.lexsort((codes[:, 2], codes[:, 1], codes[:, 0]))
    starts = np.flatnonzero(np.any(np.diff(codes[order], axis=0, prepend=-1), axis=1))
    ends = np.append(starts[1:], len(codes))
    for cluster in np.flatnonzero(ends - starts > max_items):
        rows = order[starts[cluster] : ends[cluster]]
        groups = min(-(-len(rows) // max_items), max_groups)
        if method == "random":
            group[rng.permutation(rows)] = np.arange(len(rows)) % groups
        else:
            group[rows] = balanced_split(np.asarray(residuals[rows], dtype=np.float64), groups)
    return group


def balanced_split(vectors: NDArray[np.float64], groups: int) -> NDArray[np.int32]:
    """Deal vectors [n, Z] to `groups` neighbourhoods of n // groups or one more: int32 [n], 0 to groups - 1; n >= groups.

    Halves again and again along the principal axis, cutting in proportion to the groups that go to each side.
    """
    group = np.zeros(len(vectors), dtype=np.int32)
    # Rows still to be cut, the first group they get, and the sizes of their groups; fixing sizes first keeps them within one.
    sizes = np.full(groups, len(vectors) // groups)
    sizes[: len(vectors) % groups] += 1
    waiting = [(np.arange(len(vectors)), 0, groups)]
    while waiting:
        rows, first, count = waiting.pop()
        if count == 1:
            group[rows] = first
            continue
        left = count // 2
        order = rows[np.argsort(_along_principal_axis(vectors[rows]), kind="stable")]
        cut = int(sizes[first : first + left].sum())
        waiting.append((order[:cut], first, left))
        waiting.append((order[cut:], first + left, count - left))
    return group


def _along_principal_axis(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = vectors - vectors.mean(axis=0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    # An eigenvector's sign is arbitrary; fixing it keeps group numbers equal on every machine.
    axis = axis * np.sign(axis[np.argmax(np.abs(axis))])
    return np.asarray(centred @ axis, dtype=np.float64)
