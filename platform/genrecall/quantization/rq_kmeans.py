"""RQ-KMeans through FAISS: k-means on the item embeddings, level by level on the residuals. The control without a learnt encoder.

Source: residual k-means as in OneRec (arXiv:2502.18965), here without its balancing; FAISS (arXiv:2401.08281).

Shapes: N items, D embedding dimension, K_l codes at level l.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.quantization.residual_quantizer import FrozenQuantizer, LevelSizes, nearest_codes


def fit_rq_kmeans(embeddings: NDArray[np.float32], level_sizes: LevelSizes, *, iterations: int = 25, seed: int = 0) -> FrozenQuantizer:
    """Fit three levels of k-means on all rows of the embeddings float32 [N, D]; codes lie in the embedding space itself.

    With fewer distinct rows than codes the extra codes lie at the origin of their level's residuals and stay unused.
    """
    residual = np.ascontiguousarray(embeddings, dtype=np.float32)
    codebooks = []
    for size in level_sizes:
        used = min(size, len(residual))
        # By itself FAISS would fit on a sample of 256 rows a code.
        kmeans = faiss.Kmeans(residual.shape[1], used, niter=iterations, seed=seed + 1, min_points_per_centroid=1, max_points_per_centroid=len(residual))
        kmeans.train(residual)
        vectors = np.zeros((size, residual.shape[1]), dtype=np.float32)
        vectors[:used] = kmeans.centroids
        codebook = torch.from_numpy(vectors)
        chosen = torch.cat([nearest_codes(part, codebook) for part in torch.split(torch.from_numpy(residual), 8192)])
        residual = np.ascontiguousarray(residual - vectors[chosen.numpy()])
        codebooks.append(codebook)
    return FrozenQuantizer(None, codebooks, None, input_dim=embeddings.shape[1])
