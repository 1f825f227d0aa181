"""Following an alias: what is taken, what is refused, what stays in service."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from genrecall.registry.bundle import BundleError
from genrecall.registry.promotion import register
from genrecall.registry.versions import RegistryError, fetch_bundle
from genrecall.serving import hot_swap
from genrecall.serving.hot_swap import BundleFollower


@pytest.fixture
def versions(registry, untrained_line):
    """Two registered versions; the first is champion."""
    both = [register(untrained_line(seed=seed), "shop", metrics={}) for seed in (0, 1)]
    registry.set_registered_model_alias("shop", "champion", "1")
    return both


@pytest.fixture
def follower(registry, versions):
    return BundleFollower("models:/shop@champion", registry.tracking_uri)


def move(registry, number):
    registry.set_registered_model_alias("shop", "champion", str(number))


def test_a_moved_alias_brings_the_other_version_and_moving_back_the_first(registry, versions, follower):
    first = follower.load()
    assert first.version == versions[0]
    assert follower.newer(first) is None
    move(registry, 2)
    second = follower.newer(first)
    assert second is not None
    assert second.version == versions[1]
    move(registry, 1)
    # The one served before stayed loaded.
    assert follower.newer(second) is first
    assert follower.refused is None


def test_latest_champion_settles_on_its_model(registry, versions):
    follower = BundleFollower("latest-champion", registry.tracking_uri)
    assert follower.load().version == versions[0]
    assert follower.address == "models:/shop@champion"


def corrupt(registry, version):
    weights = next(Path(fetch_bundle(version, registry)).rglob("model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x01\x02\x03")
    return lambda: weights.write_bytes(content)


def test_a_corrupted_version_is_refused_named_and_tried_again_later(registry, versions, follower, monkeypatch):
    first = follower.load()
    repair = corrupt(registry, versions[1])
    move(registry, 2)
    assert follower.newer(first) is None
    assert "shop/2: " in follower.refused
    assert "model.safetensors (changed)" in follower.refused
    repair()
    assert follower.newer(first) is None  # not again so soon: hashing a large bundle each time would cost
    monkeypatch.setattr(hot_swap, "RETRY_REFUSED_S", 0.0)
    assert follower.newer(first).version == versions[1]
    assert follower.refused is None


def test_moving_the_alias_back_clears_the_refusal(registry, versions, follower):
    first = follower.load()
    corrupt(registry, versions[1])
    move(registry, 2)
    assert follower.newer(first) is None
    move(registry, 1)
    assert follower.newer(first) is None
    assert follower.refused is None


def test_a_corrupted_version_does_not_start(registry, versions):
    corrupt(registry, versions[1])
    with pytest.raises(Exception, match=r"model\.safetensors \(changed\)"):
        BundleFollower("models:/shop/2", registry.tracking_uri).load()


def test_a_registry_that_is_down_leaves_the_version_in_service(registry, versions, follower, monkeypatch):
    first = follower.load()
    for error in (MlflowException("down"), OSError("gone"), RuntimeError("anything")):

        def down(*_, error=error):
            raise error

        monkeypatch.setattr(hot_swap, "resolve", down)
        assert follower.newer(first) is None
        assert follower.refused is None


def test_a_deleted_alias_leaves_the_version_in_service_and_says_so(registry, versions, follower):
    first = follower.load()
    registry.delete_registered_model_alias("shop", "champion")
    assert follower.newer(first) is None
    assert "not in the registry" in follower.refused


def test_whatever_goes_wrong_on_loading_is_a_refusal(registry, versions, follower, monkeypatch):
    first = follower.load()
    move(registry, 2)
    for error in (BundleError("warm-up differs"), OSError("disk full"), ZeroDivisionError("anything")):

        def broken(*_, error=error):
            raise error

        follower._refused_version = None
        monkeypatch.setattr(hot_swap, "load_bundle", broken)
        assert follower.newer(first) is None
        assert str(error) in follower.refused


def test_no_registry_is_an_error_at_the_start(tmp_path):
    with pytest.raises(RegistryError, match="no registry there"):
        BundleFollower("latest-champion", f"sqlite:///{tmp_path}/absent.db")


def test_looking_costs_little(registry, versions, follower):
    first = follower.load()
    follower.newer(first)
    started = time.monotonic()
    follower.newer(first)
    assert time.monotonic() - started < 1.0
