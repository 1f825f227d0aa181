"""What is said of the live catalogue: gauges, the alarm and its end, each once."""

from __future__ import annotations

import logging

import pytest

from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.drift import DriftLimits
from genrecall.serving import catalogue_gauges
from genrecall.serving.catalogue_gauges import CatalogueGauges
from genrecall.serving.live_catalogue import LiveBundle


@pytest.fixture
def values(monkeypatch):
    """The gauges' values by name."""
    values = {}

    class Gauge:
        def __init__(self, name, description):
            assert description
            self.name = name

        def set(self, value):
            assert isinstance(value, float)
            values[self.name.removeprefix("genrecall_")] = value

    monkeypatch.setattr(catalogue_gauges, "Gauge", Gauge)
    return values


@pytest.fixture
def said(caplog):
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: [one.getMessage() for one in caplog.records if one.name == "ray.serve"]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_the_alarm_is_raised_said_once_and_ends(untrained_line, tmp_path, values, said):
    bundle = load_bundle(untrained_line().path, verify=False)
    log = CatalogueLog(tmp_path / "log")
    gauges = CatalogueGauges(DriftLimits(min_items=2, unknown_categories=0.5, error_ratio=1e9, oversize_share=1.0))
    live = LiveBundle.over(bundle)
    gauges.show(bundle)
    assert values == {}
    assert gauges.info(bundle) is None
    gauges.show(live)
    assert (values["drift_alarm"], values["later_items"], values["catalog_seq"]) == (0.0, 0.0, 0.0)
    log.append([ItemRecord(item_id=one, title="hose", category_path=("Attic",)) for one in "ab"], ["i00"])
    live = live.caught_up(log)
    gauges.show(live)
    gauges.show(live)
    assert (values["drift_alarm"], values["later_items"], values["delisted_items"], values["catalog_seq"]) == (1.0, 2.0, 1.0, 3.0)
    assert values["unknown_category_share"] == 1.0
    assert values["later_error_ratio"] == pytest.approx(live.drift.error_ratio)
    (line,) = said()
    assert line.startswith("the catalogue has drifted, train a new version: 100% of 2 later items have categories that the bundle does not know")
    assert gauges.info(live).alarms == ["100% of 2 later items have categories that the bundle does not know, above 50%"]
    log.append([], ["a", "b"])
    gauges.show(live.caught_up(log))
    assert values["drift_alarm"] == 0.0
    assert said()[1:] == ["the catalogue is within the drift limits again"]


def test_a_log_that_cannot_be_followed_is_said_once_and_shown_until_it_can(untrained_line, values, said):
    live = LiveBundle.over(load_bundle(untrained_line().path, verify=False))
    gauges = CatalogueGauges(DriftLimits())
    for _ in range(3):
        gauges.failed(OSError("gone"))
    assert values["catalogue_stalled"] == 1.0
    assert gauges.info(live).problem == "OSError: gone"
    for _ in range(2):
        gauges.followed()
    assert values["catalogue_stalled"] == 0.0
    assert gauges.info(live).problem is None
    assert said() == ["the catalogue log is not followed, answers stay as they are: OSError: gone", "the catalogue log is followed again"]
