"""What a replica counts of its answers, by the names under which dashboards ask for it."""

from __future__ import annotations

from collections import Counter

import pytest

from genrecall.serving import request_metrics
from genrecall.serving.messages import RecallResponse, Timings, Versions
from genrecall.serving.request_metrics import RequestMetrics


@pytest.fixture
def seen(monkeypatch):
    """How often each (metric, tags) was counted, and the values that were observed or set."""
    counted, values = Counter(), {}

    class Metric:
        def __init__(self, name, description, boundaries=None, tag_keys=()):
            assert description
            assert boundaries is None or boundaries == sorted(set(boundaries))
            self.name, self.tag_keys = name.removeprefix("genrecall_"), tag_keys

        def key(self, tags):
            assert set(tags or {}) == set(self.tag_keys)
            return (self.name, *(tags or {}).values())

        def inc(self, value=1, tags=None):
            counted[self.key(tags)] += value

        def observe(self, value, tags=None):
            values.setdefault(self.key(tags), []).append(value)

        def set(self, value, tags=None):
            assert isinstance(value, float)
            values[self.key(tags)] = value

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(request_metrics, name, Metric)
    return counted, values


def answer(**fields):
    versions = Versions(model="shop/3", bundle="abc", role=fields.pop("role", "champion"))
    return RecallResponse(items=[], sids=[], versions=versions, timings=Timings(generate_ms=4.0, expand_ms=1.0, batch_size=2), **fields)


def test_an_answer_counts_by_phase_beam_version_and_what_it_lacks(seen):
    counted, values = seen
    metrics = RequestMetrics()
    metrics.answered(answer(beam_size=50, degraded=True, degraded_by=["load", "history"]), 7.0)
    metrics.answered(answer(beam_size=20, role="challenger"), 9.0)
    assert {key[1:]: found for key, found in values.items() if key[0] == "latency_ms"} == {
        ("whole", "champion"): [7.0],
        ("generate", "champion"): [4.0],
        ("expand", "champion"): [1.0],
        ("whole", "challenger"): [9.0],
        ("generate", "challenger"): [4.0],
        ("expand", "challenger"): [1.0],
    }
    assert (values["beam_size", "champion"], values["beam_size", "challenger"]) == ([50], [20])
    assert counted == {("degraded", "load"): 1, ("degraded", "history"): 1, ("empty_answers", "champion"): 1, ("empty_answers", "challenger"): 1}


def test_requests_batches_look_ups_and_versions_are_counted(seen):
    counted, values = seen
    metrics = RequestMetrics()
    metrics.count("ok", "champion")
    metrics.count("overloaded", "champion", 8)
    metrics.looked_up(hit=True)
    metrics.looked_up(hit=False)
    metrics.decoded_together(16)
    metrics.serves(3)
    metrics.serves(4, swapped=True)
    metrics.refuses(True)
    assert counted == {("requests", "ok", "champion"): 1, ("requests", "overloaded", "champion"): 8, ("cache", "hit"): 1, ("cache", "miss"): 1, ("swaps",): 1}
    assert values == {("batch_size",): [16], ("model_version",): 4.0, ("refused",): 1.0}
