"""Health of semantic IDs, as numbers and as pictures: usage, perplexity, cluster sizes, purity, neighbours, churn.

Source: the quantities are those usually reported for discrete codes (perplexity = exp of the entropy of use); churn counts, of
the pairs of items that shared a SID before, those that no longer do, so that renumbering a codebook is no churn.

Shapes: N items, codes [N, 3], D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from numpy.typing import NDArray

_NEIGHBOUR_SAMPLE = 1000
_NEIGHBOUR_POOL = 50_000
_PICTURE_POINTS = 5000


def perplexity(counts: NDArray[np.integer]) -> float:
    """exp(entropy) of how often each code is used: 1 for a collapsed book, K for a book used evenly; 0 when nothing is counted."""
    used = counts[counts > 0]
    if not len(used):
        return 0.0
    share = used / used.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def gini(sizes: NDArray[np.integer]) -> float:
    """Gini coefficient of cluster sizes: 0 when all are equal, towards 1 when one holds nearly everything."""
    ordered = np.sort(np.asarray(sizes, dtype=np.float64))
    n = len(ordered)
    if n == 0 or ordered.sum() == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def cluster_numbers(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number per distinct row, 0 to S - 1 in lexicographic order: int64 [N] of rows [N, L] (L = 1 to 3)."""
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        numbers = np.unique(numbers * (int(codes[:, level].max(initial=0)) + 1) + codes[:, level], return_inverse=True)[1]
    return numbers


def level_usage(codes: NDArray[np.int32], level_sizes: Sequence[int]) -> list[dict[str, float]]:
    """Per level: share of codes in use, perplexity, and the share of items on the most used code."""
    found = []
    for level, size in enumerate(level_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        found.append(
            {
                "codes": float(size),
                "usage": float((counts > 0).mean()),
                "perplexity": perplexity(counts),
                "top_share": float(counts.max() / max(1, counts.sum())),
            }
        )
    return found


def cluster_sizes(clusters: NDArray[np.integer]) -> dict[str, float]:
    """Numbers about the sizes of clusters, given the cluster number of every item [N]."""
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return {"sids": 0.0}
    return {
        "sids": float(len(sizes)),
        "items_per_sid": float(sizes.mean()),
        # what a random item sees; beam metrics grow with it
        "items_per_sid_of_an_item": float((sizes.astype(np.float64) ** 2).sum() / sizes.sum()),
        "median": float(np.median(sizes)),
        "p95": float(np.percentile(sizes, 95)),
        "max": float(sizes.max()),
        "singletons": float((sizes == 1).mean()),
        "gini": gini(sizes),
    }


def prefix_purity(codes: NDArray[np.int32], labels: NDArray[np.integer]) -> list[float]:
    """Per prefix length 1 to 3: the share of labelled items whose label is the commonest under their prefix.

    Args:
        labels: integer [N], a category number, -1 for none (those items are left out).
    """
    known = labels >= 0
    purities = []
    for length in (1, 2, 3):
        prefix = cluster_numbers(codes[known, :length])
        pairs, counts = np.unique(np.stack([prefix, labels[known]], axis=1), axis=0, return_counts=True)
        best = np.zeros(int(prefix.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(best, pairs[:, 0], counts)
        purities.append(float(best.sum() / max(1, known.sum())))
    return purities


def neighbour_hit_rate(codes: NDArray[np.int32], embeddings: NDArray[np.float32], *, neighbours: int = 10, seed: int = 0) -> list[float]:
    """Per prefix length 1 to 3: the share of an item's nearest neighbours (cosine) that share its prefix.

    Taken over up to 1,000 random items, whose neighbours are sought among up to 50,000 random items.
    """
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.choice(len(codes), min(len(codes), _NEIGHBOUR_POOL), replace=False))
    asked = np.sort(rng.choice(len(pool), min(len(pool), _NEIGHBOUR_SAMPLE), replace=False))
    neighbours = min(neighbours, len(pool) - 1)
    if neighbours < 1:
        return [0.0, 0.0, 0.0]
    vectors = np.asarray(embeddings[pool], dtype=np.float32)
    hits = np.zeros(3)
    for part in np.array_split(asked, -(-len(asked) // 200)):
        scores = vectors[part] @ vectors.T
        scores[np.arange(len(part)), part] = -np.inf
        nearest = np.argpartition(-scores, neighbours - 1, axis=1)[:, :neighbours]
        same = codes[pool[nearest]] == codes[pool[part]][:, None, :]
        hits += np.logical_and.accumulate(same, axis=2).sum(axis=(0, 1))
    return [float(hit) for hit in hits / (len(asked) * neighbours)]


def churn(before: NDArray[np.integer], after: NDArray[np.integer]) -> float:
    """Of the pairs of items that shared a SID before, the share that no longer do; 0 when no two items shared one.

    Args:
        before, after: the SID row of the same items [N] in two versions.
    """

    def pairs(numbers: NDArray[np.int64]) -> int:
        sizes = np.bincount(numbers).astype(np.int64)
        return int((sizes * (sizes - 1) // 2).sum())

    together = pairs(cluster_numbers(np.stack([before, after], axis=1)))
    shared_before = pairs(cluster_numbers(before[:, None]))
    return 1.0 - together / shared_before if shared_before else 0.0


def quantizer_diagnostics(
    codes: NDArray[np.int32],
    embeddings: NDArray[np.float32],
    residuals: NDArray[np.floating],
    category_paths: Sequence[Sequence[str]],
    level_sizes: Sequence[int],
) -> dict[str, Any]:
    """All numbers about a fitted quantiser, as written to `diagnostics.json`.

    Args:
        codes: int32 [N, 3]. embeddings: float32 [N, D]. residuals: [N, Z]. category_paths: one per item.
    """
    roots = label_numbers([path[0] if path else None for path in category_paths])
    leaves = label_numbers([tuple(path) if path else None for path in category_paths])
    return {
        "levels": level_usage(codes, level_sizes),
        "clusters": cluster_sizes(cluster_numbers(codes)),
        "purity_root_category": prefix_purity(codes, roots),
        "purity_leaf_category": prefix_purity(codes, leaves),
        "neighbour_hit_rate": neighbour_hit_rate(codes, embeddings),
        "residual_norm_squared": float(np.square(residuals, dtype=np.float64).sum(axis=1).mean()) if len(residuals) else 0.0,
    }


def label_numbers(labels: Sequence[Any]) -> NDArray[np.int32]:
    """A number int32 [N] per distinct label, -1 for None."""
    numbers: dict[Any, int] = {}
    return np.array([-1 if label is None else numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int32)


def draw_pictures(folder: Path, codes: NDArray[np.int32], embeddings: NDArray[np.float32], level_sizes: Sequence[int]) -> None:
    """Write `level_usage.png`, `cluster_sizes.png` and `level1_map.png` into `folder`."""
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    for level, (axes, size) in enumerate(zip(figure.subplots(1, 3), level_sizes, strict=True)):
        counts = np.sort(np.bincount(codes[:, level], minlength=size))[::-1]
        axes.bar(np.arange(size), counts, width=1.0)
        axes.set_title(f"level {level + 1}: {int((counts > 0).sum())} of {size} used, perplexity {perplexity(counts):.0f}")
        axes.set_xlabel("code, most used first")
        axes.set_ylabel("items")
    figure.savefig(folder / "level_usage.png", dpi=100)

    draw_cluster_sizes(folder / "cluster_sizes.png", cluster_numbers(codes))

    shown = np.sort(np.random.default_rng(0).choice(len(codes), min(len(codes), _PICTURE_POINTS), replace=False))
    centred = np.asarray(embeddings[shown], dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    axes_2d = np.linalg.eigh(centred.T @ centred)[1][:, -2:]
    figure = matplotlib.figure.Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    flat = centred @ axes_2d
    axes.scatter(flat[:, -1], flat[:, 0], c=codes[shown, 0] % 20, cmap="tab20", s=4)
    axes.set_title("items by principal components, coloured by level-1 code")
    figure.savefig(folder / "level1_map.png", dpi=100)


def draw_cluster_sizes(path: Path, clusters: NDArray[np.integer], *, max_items: int | None = None) -> None:
    """Write a histogram of cluster sizes, given the cluster number of every item [N]; `max_items` draws the cap."""
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 0]
    figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(sizes, bins=np.unique(np.geomspace(1, max(2, sizes.max(initial=1)) + 1, 40).astype(int)).tolist(), log=True)
    axes.set_xscale("log")
    if max_items is not None:
        axes.axvline(max_items, linestyle="--", color="black", linewidth=1)
    axes.set_title(f"{len(sizes)} SIDs, {sizes.mean():.1f} items each on average, at most {sizes.max(initial=0)}")
    axes.set_xlabel("items in the SID")
    axes.set_ylabel("SIDs")
    figure.savefig(path, dpi=100)
