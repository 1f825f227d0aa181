"""The load benchmark's quick mode on a real Serve: tables run, record their figures, and leave the registry and other tables alone."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from genrecall.config import Places
from genrecall.registry.promotion import register
from genrecall.registry.versions import Version, open_registry
from genrecall.serving.hot_swap import REGISTRY_AWAY, BundleFollower
from genrecall.serving.messages import RecallRequest
from genrecall.serving.recall_service import answer_batch
from genrecall.tracking import use_tracking

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in ("GENRECALL_API_KEYS", "GENRECALL_ADMIN_KEYS"):
            patch.delenv(name, raising=False)
        yield importlib.import_module("serving")


@pytest.fixture(scope="module")
def registry(untrained_line: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    home = tmp_path_factory.mktemp("benchmarked")
    uri = f"sqlite:///{home}/mlflow.db"
    before = mlflow.get_tracking_uri()
    use_tracking(Places(home=str(home), data=str(home), tracking_uri=uri))
    for seed in range(2):
        register(untrained_line(seed=seed), "shop", metrics={})
    client = MlflowClient(uri, registry_uri=uri)
    client.set_registered_model_alias("shop", "champion", "1")
    yield client
    mlflow.set_tracking_uri(before)


def test_quick_mode_measures_the_tables_of_one_replica(benchmark, ray_cluster, registry, tmp_path):
    output = tmp_path / "serving.json"
    other = {"table": "fuzz", "row": "all", "metric": "fuzz_requests", "value": 1.0}
    output.write_text(json.dumps([other, {"table": "swap", "row": "old", "metric": "requests", "value": 1.0}]))
    arguments = ["--quick", "--paths", "default", "grpc", "--model", "shop", "--tracking-uri", registry.tracking_uri, "--beam", "5", "--output", str(output)]
    records = benchmark.main([*arguments, "--tables", "latency", "throughput", "swap", "upsert", "soak"])
    assert json.loads(output.read_text()) == [other, *records]
    figures = {(one["table"], one["row"], one["metric"]): one["value"] for one in records}
    assert figures["latency", "default", "http_added_p50_ms"] > 0
    assert figures["latency", "gRPC", "http_p50_ms"] > 0
    assert ("throughput", "default", "throughput_32_over_engine") in figures  # 0 where a slow machine answers none in so short a time
    assert 0 < figures["throughput", "default", "engine_cpu_share"] <= 1
    for table in ("swap", "upsert"):
        assert figures[table, "default", "requests"] > 0
        assert figures[table, "default", f"{table}_failed_requests"] == figures[table, "default", "mixed_version_answers"] == 0
    assert {row for table, row, metric in figures if metric == "swap_p99_ratio"} >= {"hot swap", "canary change", "rollback"}
    assert 0 < figures["swap", "canary change", "answered_by_challenger"] < 1
    assert 0 < figures["upsert", "default", "upsert_visible_s"] < 10
    assert (
        figures["soak", "default", "failed_requests"]
        == figures["soak", "default", "mixed_version_answers"]
        == figures["soak", "default", "replica_restarts"]
        == 0
    )
    assert figures["soak", "default", "swaps"] >= 2
    assert {"soak_rss_growth", "soak_handles_growth"} <= {metric for table, _, metric in figures if table == "soak"}
    assert str(registry.get_model_version_by_alias("shop", "champion").version) == "1"
    assert len(registry.search_model_versions("name='shop'")) == 2
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}


@pytest.fixture
def of_one_version(benchmark, ray_cluster, registry, untrained_line):
    """`of_one_version(table)` are the figures of a quick run on a model with one version."""
    register(untrained_line(), "lonely", metrics={})
    registry.set_registered_model_alias("lonely", "champion", "1")

    def run(table: str) -> dict[tuple[str, str, str], float]:
        arguments = ["--quick", "--paths", "default", "--model", "lonely", "--tracking-uri", registry.tracking_uri, "--beam", "5"]
        return {(one["table"], one["row"], one["metric"]): one["value"] for one in benchmark.main([*arguments, "--tables", table])}

    return run


def test_replicas_outlive_what_fails_and_notice_that_the_registry_is_away(of_one_version):
    figures = of_one_version("failures")
    assert figures["failures", "registry away", "replicas_that_noticed"] == 2
    assert figures["failures", "registry away", "errors_seen"] == 0
    assert figures["failures", "registry back", "swap_live_s"] < 120
    assert figures["failures", "replica killed, client retries", "errors_sent_later"] == 0
    assert figures["failures", "replica killed, client retries", "errors_seen"] == 0


def test_a_model_with_one_version_is_soaked_by_swaps_to_the_same_bundle(of_one_version):
    figures = of_one_version("soak")
    assert figures["soak", "default", "failed_requests"] == figures["soak", "default", "mixed_version_answers"] == 0
    assert figures["soak", "default", "swaps"] >= 2
    assert figures["soak", "with further fields", "requests"] > 0


def test_versions_that_answer_alike_are_not_compared(benchmark):
    known = sys.modules["serving_answers"].KnownVersion(
        model="m/1", bundle="b", sids=frozenset("ab"), sid_of={}, reference={"x": frozenset("ab"), "y": frozenset("b")}
    )
    with pytest.raises(SystemExit, match=r"answer 2 of 2 queries alike"):
        sys.modules["serving_changes"].require_distinct(known, known, ["x", "y"])


def test_a_registry_that_cannot_be_copied_and_swaps_without_a_second_version_are_refused(benchmark, registry, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="sqlite"):
        benchmark.copy_registry("http://127.0.0.1:1", tmp_path)
    lonely = Version(name="nobody", number=1, manifest_sha256="0" * 64)
    assert benchmark.another_version(registry.tracking_uri, lonely) is None
    monkeypatch.setattr(benchmark, "another_version", lambda *_: None)
    arguments = ["--quick", "--paths", "default", "--model", "shop", "--tracking-uri", registry.tracking_uri, "--tables", "upsert", "swap"]
    with pytest.raises(SystemExit, match="shop has one version: swap and upsert need one more"):
        benchmark.main(arguments)


def test_the_mixed_load_asks_for_what_the_catalogue_holds(benchmark, registry):
    served = benchmark.fetched(registry.tracking_uri, "shop", 1)
    variants = sys.modules["serving_soak"].variants_of(served)
    assert {name for one in variants for name in one} == {"filters", "history", "shopper", "explain", "deadline_ms", "beam_size", "limit"}
    assert sum(not one for one in variants) == len(variants) / 2
    for one in variants:
        request = RecallRequest.model_validate({"query": "angle bracket", **one})
        (answer,) = answer_batch(served, [request], (20, 10, 5))
        assert answer.items
        assert not answer.degraded_by


def test_a_registry_behind_a_server_goes_away_and_comes_back(benchmark, registry, tmp_path, caplog):
    """What `failures` does to the registry of the replicas, without them."""
    with sys.modules["serving_server"].RegistryServer(benchmark.copy_registry(registry.tracking_uri, tmp_path), tmp_path / "server") as server:
        follower = BundleFollower("models:/shop@champion", server.uri)
        served = follower.load()
        client = open_registry(server.uri)
        client.set_registered_model_alias("shop", "champion", "2")
        server.stop()
        assert follower.newer(served) is None
        assert REGISTRY_AWAY in caplog.text
        assert follower.refused is None
        server.start()
        assert follower.newer(served).version.number == 2
