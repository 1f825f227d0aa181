"""Paired bootstrap intervals of means and of relative gains, over requests and seeds together.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals; for requests crossed with seeds the pigeonhole
bootstrap of Owen (2007): both are resampled and a cell's weight is the product. All metrics of a report share one set of resamples, so
any two of them are paired.

Shapes: R requests, T training seeds, D resamples, M metrics. A `nan` marks a request without a target; it takes no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval and the number of requests behind it; all None where no request has a target."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """Deterministic resamples of `num_requests` requests.

    Attributes:
        num_requests: R.
        samples: D, number of resamples.
        seed: fixes the resamples.
        level: coverage of the intervals.
    """

    num_requests: int
    samples: int = 1000
    seed: int = 0
    level: float = 0.95

    def means(self, values: FloatArray, weights: FloatArray | None = None) -> FloatArray:
        """Resampled means of each column.

        Args:
            values: [R, M], or [T, R, M] for T seeds.
            weights: [R] >= 0, for example to count each distinct query once; all ones when omitted.

        Returns:
            float64 [D, M]; `nan` in resamples that hold no request with a value.
        """
        cube = values[None] if values.ndim == 2 else values
        mask = ~np.isnan(cube)
        weight = np.ones(self.num_requests) if weights is None else weights
        filled, counted = np.where(mask, cube, 0.0) * weight[:, None], mask * weight[:, None]
        result = np.empty((self.samples, cube.shape[2]))
        seeds, begin = len(cube), 0
        for draws, seed_draws in self._resamples(seeds):
            total, count = np.zeros((len(draws), cube.shape[2])), np.zeros((len(draws), cube.shape[2]))
            for seed in range(seeds):
                total += seed_draws[:, seed, None] * (draws @ filled[seed])
                count += seed_draws[:, seed, None] * (draws @ counted[seed])
            result[begin : begin + len(draws)] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
            begin += len(draws)
        return result

    def intervals(self, values: FloatArray, weights: FloatArray | None = None) -> list[Interval]:
        """Mean and interval of each column of `values`, [R, M] or [T, R, M]."""
        cube = values[None] if values.ndim == 2 else values
        points = _weighted_means(cube, weights)
        resampled = self.means(cube, weights)
        counts = (~np.isnan(cube)).any(axis=0).sum(axis=0)
        return [self._interval(float(points[m]), resampled[:, m], int(counts[m])) for m in range(cube.shape[2])]

    def gains(self, candidate: FloatArray, baseline: FloatArray, weights: FloatArray | None = None) -> list[Interval]:
        """Relative gain `mean(candidate) / mean(baseline) - 1` of each column, paired: only requests that both have a value for count.

        Args:
            candidate, baseline: [R, M] or [T, R, M] each, same shape.
        """
        first = candidate[None] if candidate.ndim == 2 else candidate
        second = baseline[None] if baseline.ndim == 2 else baseline
        if first.shape != second.shape:
            raise ValueError(
                f"paired gain: candidate has shape {candidate.shape}, baseline {baseline.shape}; both must cover the same requests, seeds and metrics"
            )
        absent = np.isnan(first) | np.isnan(second)
        first, second = np.where(absent, np.nan, first), np.where(absent, np.nan, second)
        both = self.means(np.concatenate([first, second], axis=2), weights)
        columns = first.shape[2]
        points = _ratio(_weighted_means(first, weights), _weighted_means(second, weights))
        ratios = _ratio(both[:, :columns], both[:, columns:])
        counts = (~absent).any(axis=0).sum(axis=0)
        return [self._interval(float(points[m]), ratios[:, m], int(counts[m])) for m in range(columns)]

    def _interval(self, point: float, resampled: FloatArray, count: int) -> Interval:
        if count == 0 or np.isnan(point):
            return Interval(None, None, None, count)
        finite = resampled[np.isfinite(resampled)]
        if not len(finite):
            return Interval(point, None, None, count)
        low, high = np.quantile(finite, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(point, float(low), float(high), count)

    def _resamples(self, seeds: int) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Chunks of (request counts [d, R], seed counts [d, T])."""
        generator = np.random.default_rng(self.seed)
        step = max(1, _CHUNK_ELEMENTS // max(1, self.num_requests))
        for begin in range(0, self.samples, step):
            draws = min(step, self.samples - begin)
            yield _counts(generator, draws, self.num_requests), _counts(generator, draws, seeds) if seeds > 1 else np.ones((draws, 1))


def _counts(generator: np.random.Generator, draws: int, size: int) -> FloatArray:
    """How often each of `size` things appears in `draws` resamples with replacement: float64 [draws, size]."""
    picks = generator.integers(0, size, size=(draws, size)) + np.arange(draws)[:, None] * size
    return np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def _weighted_means(cube: FloatArray, weights: FloatArray | None) -> FloatArray:
    mask = ~np.isnan(cube)
    weight = (np.ones(cube.shape[1]) if weights is None else weights)[None, :, None]
    total, count = (np.where(mask, cube, 0.0) * weight).sum(axis=(0, 1)), (mask * weight).sum(axis=(0, 1))
    return np.asarray(np.divide(total, count, out=np.full(cube.shape[2], np.nan), where=count > 0), dtype=np.float64)


def _ratio(candidate: FloatArray, baseline: FloatArray) -> FloatArray:
    return np.asarray(np.divide(candidate, baseline, out=np.full(np.shape(candidate), np.nan), where=baseline > 0) - 1.0, dtype=np.float64)
