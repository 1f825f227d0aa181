from __future__ import annotations

from typing import Any

import pytest

from genrecall.config import ConfigError, apply_overrides
from genrecall.evaluation.gates import GateConfig, check_gates


def metrics(dataset: str = "shop", **values: tuple[float, float | None, float | None]) -> dict[str, Any]:
    """Metrics from `table__row__metric=(value, low, high)`; "at" stands for "@"."""
    records = []
    for name, (value, low, high) in values.items():
        table, row, metric = name.split("__")
        records.append(
            {
                "table": table,
                "dataset": dataset,
                "row": row,
                "metric": metric.replace("_at_", "@"),
                "slice": "",
                "value": value,
                "low": low,
                "high": high,
                "n": 9,
            }
        )
    return {"dataset": dataset, "dataset_hash": "h", "records": records}


GOOD = {
    "channels__generative__recall_at_100": (0.50, 0.48, 0.52),
    "channels__popularity__recall_at_100": (0.10, 0.09, 0.11),
    "personalised__cqsid__invalid_at_100": (0.0, 0.0, 0.0),
}


def test_first_version_passes_when_the_floors_hold() -> None:
    report = check_gates(metrics(**GOOD), None, GateConfig())
    assert report.passed
    assert any("no champion yet" in reason for reason in report.reasons)


def test_first_version_that_does_not_beat_popularity_fails() -> None:
    report = check_gates(metrics(**(GOOD | {"channels__generative__recall_at_100": (0.10, 0.09, 0.11)})), None, GateConfig())
    assert not report.passed
    assert report.reasons == ["recall@100 of the channel is 0.100, no better than popularity's 0.100: the generator has not learnt to read queries"]
    assert check_gates(metrics(**(GOOD | {"channels__generative__recall_at_100": (0.10, 0.09, 0.11)})), None, GateConfig(beat_popularity=False)).passed


def test_invalid_sids_fail() -> None:
    report = check_gates(metrics(**(GOOD | {"personalised__cqsid__invalid_at_100": (0.02, 0.01, 0.03)})), None, GateConfig())
    assert not report.passed
    assert "2.00% of the SIDs are invalid" in report.reasons[0]


def test_a_fall_beyond_the_limit_fails_and_one_within_it_passes() -> None:
    champion = metrics(**GOOD)
    small = metrics(**(GOOD | {"channels__generative__recall_at_100": (0.49, 0.47, 0.51)}))  # 2 %
    large = metrics(**(GOOD | {"channels__generative__recall_at_100": (0.45, 0.43, 0.49)}))  # 10 %
    assert check_gates(small, champion, GateConfig()).passed
    report = check_gates(large, champion, GateConfig())
    assert not report.passed
    assert "falls by 10.0%, at most 5.0% is allowed" in report.reasons[0]


def test_a_small_fall_beyond_doubt_fails() -> None:
    champion = metrics(**(GOOD | {"channels__generative__recall_at_100": (0.500, 0.499, 0.501)}))
    candidate = metrics(**(GOOD | {"channels__generative__recall_at_100": (0.490, 0.489, 0.491)}))
    report = check_gates(candidate, champion, GateConfig())
    assert not report.passed
    assert "worse beyond doubt" in report.reasons[0]


def test_a_metric_that_vanished_fails() -> None:
    champion = metrics(**(GOOD | {"personalised__cqsid__clk_at_10": (0.3, 0.2, 0.4)}))
    report = check_gates(metrics(**GOOD), champion, GateConfig())
    assert not report.passed
    assert "the candidate was not measured" in report.reasons[0]


def test_required_lower_bound() -> None:
    name = "channels/rrf_all/recall@100_gain_vs_rrf_bm25_dense"
    config = GateConfig(required_lower_bounds=((name, 0.0),))
    ahead = metrics(**GOOD, channels__rrf_all__recall_at_100_gain_vs_rrf_bm25_dense=(0.05, 0.01, 0.09))
    level = metrics(**GOOD, channels__rrf_all__recall_at_100_gain_vs_rrf_bm25_dense=(0.01, -0.02, 0.04))
    assert check_gates(ahead, None, config).passed
    assert "lower bound of -2.0%" in check_gates(level, None, config).reasons[0]


def test_a_required_record_that_was_not_measured_fails_and_what_there_is_is_named() -> None:
    def reason(name: str, **more: tuple[float, float | None, float | None]) -> str:
        report = check_gates(metrics(**GOOD, **more), None, GateConfig(required_lower_bounds=((name, 0.0),)))
        assert not report.passed
        return report.reasons[0]

    assert "was not measured; channels/generative has recall@100" in reason("channels/generative/recal@100")
    assert "was not measured; channels has the rows generative, popularity" in reason("channels/rrf_all/recall@100")
    assert "was not measured; there are the tables channels, personalised" in reason("chanels/rrf_all/recall@100")
    assert "has no interval" in reason("channels/generative/hit@10", channels__generative__hit_at_10=(0.5, None, None))


def test_a_guarded_name_that_neither_version_has_is_noted() -> None:
    config = GateConfig(guarded=("channels/generative/recal@100", "channels/generative/recall@100"))
    for champion in (None, metrics(**GOOD)):
        report = check_gates(metrics(**GOOD), champion, config)
        assert report.passed
        assert [reason for reason in report.reasons if reason.startswith("note:")] == [
            "note: channels/generative/recal@100 guards nothing, it was not measured; channels/generative has recall@100"
        ]


def test_versions_of_different_datasets_are_not_compared() -> None:
    report = check_gates(metrics(**GOOD), metrics("other", **GOOD), GateConfig())
    assert not report.passed
    assert "cannot be compared" in report.reasons[0]


def test_bad_config_is_named() -> None:
    with pytest.raises(ConfigError, match="expected table/row/metric"):
        apply_overrides(GateConfig(), ['guarded=["recall@100"]'])
    with pytest.raises(ConfigError, match="max_relative_fall"):
        apply_overrides(GateConfig(), ["max_relative_fall=1.5"])
