"""Configuration: frozen dataclasses, strict `key=value` overrides, JSON both ways, and the places a run reads and writes.

Every stage owns a frozen keyword-only dataclass beside its code; `recipes.py` nests them. A config may define
`problems(self) -> list[str]` for combinations that its types cannot rule out. All problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """Return `config` with dotted `key=value` overrides applied, e.g. `generator.layers=2` or `variants=["cqsid"]`.

    Values are parsed by the field's type: numbers, `true`/`false`, `none`, JSON for tuples; strings are taken as they are.

    Raises:
        ConfigError: listing every unknown key, wrong type and impossible combination together.
    """
    tree = to_dict(config)
    problems: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"{override!r}: expected key=value")
            continue
        problem = _set_by_path(config, tree, key.strip(), text.strip())
        if problem:
            problems.append(problem)
    if problems:
        problems += _problems_of(config)
        raise ConfigError(list(dict.fromkeys(problems)))
    return from_dict(type(config), tree)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a config of type `cls` from plain JSON values, checking keys and types.

    Raises:
        ConfigError: listing every problem.
    """
    problems: list[str] = []
    config = _build(cls, values, "", problems)
    if not problems:
        problems += _problems_of(config)
    if problems:
        raise ConfigError(problems)
    return typing.cast(T, config)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists).

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)))


def config_hash(config: Any) -> str:
    """A sha256 (hex) over the config's canonical JSON: equal exactly when all values are equal."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _set_by_path(config: Any, tree: dict[str, Any], key: str, text: str) -> str | None:
    """Write `text`, parsed by the addressed field's type, into `tree`; return what is wrong, or None."""
    cls: Any = type(config)
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = _fields(cls)
        if part not in known:
            close = get_close_matches(part, known, n=1)
            hint = f"; did you mean {'.'.join([*parts[:depth], close[0]])!r}?" if close else f"; known: {', '.join(sorted(known))}"
            return f"{key}: unknown key{hint}"
        hint_type = known[part]
        last = depth == len(parts) - 1
        group = _group_of(hint_type)
        if group is not None:
            if last and _is_union(hint_type) and text.lower() in ("none", "null"):
                tree[part] = None
                return None
            if last:
                return f"{key}: is a group of settings; set one of {', '.join(f'{key}.{name}' for name in _fields(group))}"
            if tree[part] is None:
                return f"{key}: {'.'.join(parts[: depth + 1])} is switched off in this recipe"
            cls, tree = group, tree[part]
        elif not last:
            return f"{key}: {'.'.join(parts[: depth + 1])} has no settings below it"
        else:
            value, problem = _parse(hint_type, text)
            if problem:
                return f"{key}: {problem}"
            tree[part] = value
    return None


def _parse(hint: Any, text: str) -> tuple[Any, str | None]:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None, None
    if str in options:
        return text, None
    if typing.get_origin(hint) is typing.Literal:
        return text, _check(hint, text)
    try:
        value = json.loads(text)
    except ValueError:  # not JSON, or an integer of thousands of digits
        return None, f"expected {_name(hint)}, got {text!r}"
    return value, _check(hint, value)


def _group_of(hint: Any) -> type | None:
    """The config class in `Config` or `Config | None`."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")  # type: ignore[return-value]


def _check(hint: Any, value: Any) -> str | None:
    """What is wrong with `value` as a `hint`, or None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value!r}"
    if _is_union(hint):
        return None if any(_check(option, value) is None for option in args) else f"expected {_name(hint)}, got {value!r}"
    if origin is typing.Literal:
        return None if value in args else f"expected one of {', '.join(map(repr, args))}, got {value!r}"
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return f"expected a list for {_name(hint)}, got {value!r}"
        if len(args) == 2 and args[1] is Ellipsis:
            element_types: Sequence[Any] = [args[0]] * len(value)
        elif len(args) != len(value):
            return f"expected {len(args)} values, got {len(value)}: {value!r}"
        else:
            element_types = args
        return next((problem for element, one in zip(element_types, value, strict=True) if (problem := _check(element, one))), None)
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif hint is type(None):
        ok = value is None
    else:
        ok = isinstance(value, hint)
    return None if ok else f"expected {_name(hint)}, got {value!r}"


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    known = _fields(cls)
    problems += [f"{prefix}{name}: unknown key; known: {', '.join(sorted(known))}" for name in values if name not in known]
    arguments: dict[str, Any] = {}
    before = len(problems)
    for name, hint in known.items():
        if name not in values:
            continue
        value = values[name]
        group = _group_of(hint)
        if group is not None and isinstance(value, (Mapping, group)):
            arguments[name] = _build(group, value, f"{prefix}{name}.", problems) if isinstance(value, Mapping) else value
            continue
        problem = _check(hint, value)
        if problem:
            problems.append(f"{prefix}{name}: {problem}")
        else:
            arguments[name] = _as_tuples(value) if isinstance(value, list) else float(value) if hint is float else value
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    problems += [f"{prefix}{name}: missing" for name in missing]
    return cls(**arguments) if len(problems) == before else None


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, list) else value


def _problems_of(config: Any, prefix: str = "") -> list[str]:
    found = [f"{prefix}{problem}" for problem in config.problems()] if hasattr(config, "problems") else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _problems_of(value, f"{prefix}{field.name}.")
    return found


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run reads and writes: absolute paths or URIs; `data` is "" where nothing says where raw data lie."""

    home: str
    data: str
    tracking_uri: str


def places() -> Places:
    """The places named by `GENRECALL_HOME`, `GENRECALL_DATA` and `MLFLOW_TRACKING_URI`.

    Outside a Ray job, unset places default to `./artifacts`, `../shared/data` and a sqlite file in the home, and relative
    ones are taken from the working folder. Inside a Ray job the working folder is a temporary copy, so a relative place or a
    missing home is an error, and `data` has no default: only sources that read files need it, and they say so.

    Raises:
        ConfigError: a relative or missing place inside a Ray job.
    """
    inside_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    problems: list[str] = []

    def absolute(variable: str, default: str | None) -> str:
        value = os.environ.get(variable) or default
        if value is None or (inside_job and "://" not in value and not os.path.isabs(value)):
            problems.append(
                f"{variable}: inside a Ray job an absolute path or URI is needed (the job runs in a temporary copy of the folder), "
                f"got {value!r}; set it in the job's runtime environment (env_vars)"
            )
            return ""
        return value if "://" in value else str(Path(value).expanduser().resolve())

    home = absolute("GENRECALL_HOME", None if inside_job else "artifacts")
    data = "" if inside_job and not os.environ.get("GENRECALL_DATA") else absolute("GENRECALL_DATA", "../shared/data")
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking:
        if "://" in home:
            problems.append("MLFLOW_TRACKING_URI: must be set when GENRECALL_HOME is remote")
        tracking = f"sqlite:///{home}/mlflow.db"
    elif tracking.startswith("sqlite:///") and not os.path.isabs(tracking.removeprefix("sqlite:///")):
        if inside_job:
            problems.append(f"MLFLOW_TRACKING_URI: inside a Ray job the sqlite path must be absolute, got {tracking!r}")
        tracking = "sqlite:///" + str(Path(tracking.removeprefix("sqlite:///")).resolve())
    if problems:
        raise ConfigError(problems)
    return Places(home=home, data=data, tracking_uri=tracking)
