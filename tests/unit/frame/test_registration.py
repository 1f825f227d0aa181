"""What a version is registered with."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.evaluation.gates import GateConfig
from genrecall.pipeline import churn_since_champion, register_bundle
from genrecall.registry.promotion import promote

GATES = GateConfig(guarded=("channels/generative/recall@100",), required_lower_bounds=())


def registered(untrained_line, seed):
    """Register a bundle as the pipeline does, and what it says in MLflow."""
    made = {"bundle": untrained_line(seed=seed), "evaluation": untrained_line.parts(seed)["evaluation"]}
    return register_bundle(SimpleNamespace(existing=made.__getitem__, recipe=SimpleNamespace(registered_name="shop")))


def metrics_of(registry, version):
    logged = registry.get_logged_model(registry.get_model_version("shop", str(version.number)).source.removeprefix("models:/"))
    return {metric.key: metric.value for metric in logged.metrics}


def test_a_version_says_how_far_its_sids_are_from_the_champions(registry, untrained_line, tmp_path, caplog):
    first = registered(untrained_line, 0)
    assert "sids/churn_since_champion" not in metrics_of(registry, first)  # no champion yet
    assert promote(first, GATES).passed
    with caplog.at_level(logging.INFO, "genrecall"):
        second = registered(untrained_line, 1)
    assert metrics_of(registry, second)["sids/churn_since_champion"] == 0.0  # another generator over the same SIDs
    assert "0.0 % of the pairs of items that share a SID in the champion, shop/1, do not in this bundle" in caplog.text

    (tmp_path / "sid_index").mkdir()
    table = pq.read_table(untrained_line(seed=0).path / "sid_index" / "sid_table.parquet")
    alone = table.set_column(table.column_names.index("sid"), "sid", pa.array([f"<{row},0,0>" for row in range(len(table))]))
    pq.write_table(alone, tmp_path / "sid_index" / "sid_table.parquet")
    assert churn_since_champion(SimpleNamespace(path=tmp_path), "shop") == {"sids/churn_since_champion": pytest.approx(1.0)}


def test_a_champion_that_cannot_be_read_is_no_reason_not_to_register(registry, untrained_line, caplog):
    first = registered(untrained_line, 0)
    assert promote(first, GATES).passed
    registry.set_model_version_tag("shop", "1", "genrecall.manifest_sha256", "0" * 64)
    assert registered(untrained_line, 1).number == 2
    assert "churn of the SIDs is not known: shop/1: manifest hashes to" in caplog.text
