"""RQ-KMeans, the control."""

import numpy as np

from genrecall.quantization.rq_kmeans import fit_rq_kmeans


def test_residuals_shrink_and_the_fit_repeats():
    x = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    quantizer = fit_rq_kmeans(x, (16, 8, 8), iterations=5, seed=3)
    codes, residuals = quantizer.place(x, [()] * 400)
    np.testing.assert_allclose(quantizer.code_sums(codes) + residuals, x, atol=1e-5)
    left = np.square(residuals).sum(axis=1).mean()
    after_one = np.square(x - quantizer.codebooks[0][codes[:, 0]]).sum(axis=1).mean()
    assert left < after_one < np.square(x).sum(axis=1).mean()
    again = fit_rq_kmeans(x, (16, 8, 8), iterations=5, seed=3)
    np.testing.assert_array_equal(again.place(x, [()] * 400)[0], codes)


def test_all_rows_are_fitted_on():
    x = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32) + np.repeat([[9.0], [-9.0]], [1500, 500], axis=0).astype(np.float32)
    first, _, _ = fit_rq_kmeans(x, (2, 2, 2)).codebooks
    # Two blobs far apart: k-means ends at their means, to which each of the 2,000 rows belongs (FAISS would draw 512).
    np.testing.assert_allclose(sorted(first.tolist()), sorted([x[:1500].mean(axis=0).tolist(), x[1500:].mean(axis=0).tolist()]), atol=1e-3)


def test_fewer_items_than_codes():
    x = np.eye(3, dtype=np.float32)
    codes, residuals = fit_rq_kmeans(x, (4, 4, 4)).place(x, [()] * 3)
    assert len(np.unique(codes[:, 0])) == 3
    assert np.abs(residuals).max() < 1e-6
