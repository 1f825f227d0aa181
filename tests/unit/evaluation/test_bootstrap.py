from __future__ import annotations

import numpy as np
import pytest

from genrecall.evaluation.bootstrap import Bootstrap, Interval


def test_mean_and_interval_of_a_known_case() -> None:
    values = np.repeat([0.0, 1.0], 500)[:, None]
    found = Bootstrap(1000, samples=2000, seed=1).intervals(values)[0]
    assert (found.value, found.n) == (0.5, 1000)
    half = 1.96 * 0.5 / np.sqrt(1000)  # normal approximation of a binomial share
    assert found.low == pytest.approx(0.5 - half, abs=0.005)
    assert found.high == pytest.approx(0.5 + half, abs=0.005)


def test_same_seed_same_interval_other_seed_another() -> None:
    values = np.random.default_rng(0).random((50, 3))
    assert Bootstrap(50, samples=200, seed=3).intervals(values) == Bootstrap(50, samples=200, seed=3).intervals(values)
    assert Bootstrap(50, samples=200, seed=3).intervals(values) != Bootstrap(50, samples=200, seed=4).intervals(values)


def test_requests_without_a_target_take_no_part() -> None:
    values = np.array([1.0, 0.0, np.nan, np.nan])[:, None]
    found = Bootstrap(4, samples=100).intervals(values)[0]
    assert (found.value, found.n) == (0.5, 2)
    assert Bootstrap(4, samples=100).intervals(np.full((4, 1), np.nan))[0] == Interval(None, None, None, 0)


def test_paired_gain_is_sharper_than_its_parts() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((400, 1))
    better = base * 1.1  # every request gains exactly 10 %
    gain = Bootstrap(400, samples=300).gains(better, base)[0]
    assert gain.value == pytest.approx(0.1)
    assert gain.low == pytest.approx(0.1)
    assert gain.high == pytest.approx(0.1)


def test_gain_counts_only_requests_that_both_have() -> None:
    candidate = np.array([1.0, 1.0, np.nan])[:, None]
    baseline = np.array([0.5, np.nan, 0.1])[:, None]
    gain = Bootstrap(3, samples=50).gains(candidate, baseline)[0]
    assert (gain.value, gain.n) == (1.0, 1)


def test_gain_over_nothing_has_no_value() -> None:
    assert Bootstrap(2, samples=10).gains(np.ones((2, 1)), np.zeros((2, 1)))[0].value is None


def test_weights_count_a_query_once() -> None:
    # Query a was asked three times and always hit, query b once and missed: by traffic .75, by distinct query .5.
    values = np.array([1.0, 1.0, 1.0, 0.0])[:, None]
    assert Bootstrap(4, samples=10).intervals(values)[0].value == 0.75
    assert Bootstrap(4, samples=10).intervals(values, np.array([1 / 3, 1 / 3, 1 / 3, 1.0]))[0].value == pytest.approx(0.5)


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    one = (rng.random((300, 1)) < 0.5).astype(float)
    agreeing = np.stack([one, one, one])
    differing = np.stack([one * 0.6, one, one * 1.4])
    first, second = (Bootstrap(300, samples=500).intervals(cube)[0] for cube in (agreeing, differing))
    assert first.value == pytest.approx(second.value)
    assert second.high - second.low > 1.5 * (first.high - first.low)  # type: ignore[operator]


def test_chunks_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genrecall.evaluation.bootstrap._CHUNK_ELEMENTS", 40)  # four draws of ten requests at a time
    values = np.random.default_rng(5).random((10, 2))
    values[3, 0] = np.nan
    got = Bootstrap(10, samples=11, seed=2).means(values)
    generator = np.random.default_rng(2)
    for begin in (0, 4, 8):
        picks = generator.integers(0, 10, size=(min(4, 11 - begin), 10))
        for number, pick in enumerate(picks):
            np.testing.assert_allclose(got[begin + number], np.nanmean(values[pick], axis=0))


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="both must cover the same requests"):
        Bootstrap(3).gains(np.zeros((3, 1)), np.zeros((3, 2)))
