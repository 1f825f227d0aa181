"""Configs: strict overrides, JSON both ways, hashes, places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from genrecall.config import ConfigError, apply_overrides, config_hash, from_dict, places, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"

    def problems(self) -> list[str]:
        return ["steps: must be even"] if self.steps % 2 else []


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    note: str | None = None
    sizes: tuple[int, int] = (1, 2)
    on: bool = False
    inner: Inner = Inner()
    maybe: Inner | None = Inner()


@dataclass(frozen=True, kw_only=True)
class Bounds:
    bound: float | None = None
    pairs: tuple[tuple[str, float], ...] = ()


def test_overrides_are_parsed_by_the_fields_type() -> None:
    config = apply_overrides(Outer(), ["name=12", "note=none", "sizes=[3,4]", "on=true", "inner.steps=4", "inner.rate=1", "inner.kind=b"])
    assert config == Outer(name="12", note=None, sizes=(3, 4), on=True, inner=Inner(steps=4, rate=1.0, kind="b"))


def test_all_problems_are_reported_at_once() -> None:
    overrides = ["nmae=y", "inner.stepz=3", "inner.rate=fast", "sizes=[1]", "inner=3", "on=1", "inner.kind=c", "lonely"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Outer(), overrides)
    text = str(caught.value)
    for expected in (
        "nmae: unknown key; did you mean 'name'?",
        "inner.stepz: unknown key; did you mean 'inner.steps'?",
        "inner.rate: expected float, got 'fast'",
        "sizes: expected 2 values, got 1",
        "inner: is a group of settings; set one of inner.steps",
        "on: expected bool, got 1",
        "inner.kind: expected one of 'a', 'b', got 'c'",
        "'lonely': expected key=value",
    ):
        assert expected in text


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"inner\.rate: expected a finite number, got (nan|inf|-inf)"):
        apply_overrides(Outer(), [f"inner.rate={text}"])
    with pytest.raises(ConfigError, match="bound: expected a finite number"):
        apply_overrides(Bounds(), [f"bound={text}"])
    with pytest.raises(ConfigError, match="pairs: expected a finite number"):
        apply_overrides(Bounds(), [f'pairs=[["a", {text}]]'])
    with pytest.raises(ValueError, match="not JSON compliant"):
        config_hash(Bounds(bound=float(text)))


def test_numbers_too_large_for_a_float_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inner\.rate: expected float, got 1000"):
        apply_overrides(Outer(), ["inner.rate=1" + "0" * 400])
    with pytest.raises(ConfigError, match=r"inner\.steps: expected int"):
        apply_overrides(Outer(), ["inner.steps=" + "1" * 5000])


def test_impossible_combinations_are_named_with_their_path() -> None:
    with pytest.raises(ConfigError, match=r"inner\.steps: must be even"):
        apply_overrides(Outer(), ["inner.steps=3"])


def test_an_optional_group_can_be_switched_off_and_then_has_no_settings() -> None:
    config = apply_overrides(Outer(), ["maybe=none"])
    assert config.maybe is None
    with pytest.raises(ConfigError, match=r"maybe\.steps: maybe is switched off in this recipe"):
        apply_overrides(config, ["maybe.steps=2"])


def test_json_and_back_is_the_same_config() -> None:
    config = Outer(sizes=(7, 8), inner=Inner(steps=2), maybe=None)
    assert from_dict(Outer, to_dict(config)) == config


def test_from_dict_names_unknown_missing_and_mistyped_keys() -> None:
    with pytest.raises(ConfigError, match=r"inner\.steps: expected int, got 'many'"):
        from_dict(Outer, {"inner": {"steps": "many"}, "extra": 1})


def test_hash_changes_with_any_value_and_only_then() -> None:
    assert config_hash(Outer()) == config_hash(Outer())
    assert config_hash(Outer()) != config_hash(Outer(inner=Inner(steps=12)))


def test_relative_places_are_errors_inside_a_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("GENRECALL_HOME", "artifacts")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="GENRECALL_HOME: inside a Ray job an absolute path or URI is needed"):
        places()


def test_raw_data_have_no_default_inside_a_ray_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("GENRECALL_HOME", str(tmp_path))
    monkeypatch.delenv("GENRECALL_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert places().data == ""
    monkeypatch.setenv("GENRECALL_DATA", "data")
    with pytest.raises(ConfigError, match="GENRECALL_DATA: inside a Ray job an absolute path or URI is needed"):
        places()
    monkeypatch.setenv("GENRECALL_DATA", str(tmp_path))
    assert places().data == str(tmp_path)


def test_relative_places_are_made_absolute_outside_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENRECALL_HOME", "here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    where = places()
    assert where.home == str(tmp_path / "here")
    assert where.tracking_uri == f"sqlite:///{tmp_path}/here/mlflow.db"
