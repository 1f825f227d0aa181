"""Whether a new version may replace the champion: no guarded metric falls too far, and a few floors hold whatever the champion did.

Rules, each a sentence in the report. Against the champion: a guarded metric may fall by at most `max_relative_fall`, and not at all where the
intervals say that it is worse (its upper bound lies below the champion's lower bound); one that neither version has is noted. Always: required
records are measured and keep their lower bound at or above the given value, no invalid SID is served, and the channel beats popularity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from genrecall.evaluation.records import Record, find

_SHOWN_NAMES = 10


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a version must pass.

    Attributes:
        guarded: records compared with the champion's, as `table/row/metric`; one that neither version has is a note, for it may be misspelt.
        max_relative_fall: largest fall of a guarded metric, relative to the champion's value.
        required_lower_bounds: (`table/row/metric`, least lower bound) pairs, for example
            `channels/rrf_all/recall@100_gain_vs_rrf_bm25_dense` and 0.0: no version ships that is not proven to add recall.
            A record that was not measured fails too.
        max_invalid_rate: of SIDs that do not exist or repeat.
        beat_popularity: the channel's recall@100 must be above popularity's.
    """

    guarded: tuple[str, ...] = (
        "personalised/cqsid/clk@10",
        "personalised/cqsid/hit@items100",
        "channels/generative/recall@100",
        "channels/generative/marginal@100",
        "channels/rrf_all/recall@100",
    )
    max_relative_fall: float = 0.05
    required_lower_bounds: tuple[tuple[str, float], ...] = ()
    max_invalid_rate: float = 0.0
    beat_popularity: bool = True

    def problems(self) -> list[str]:
        names = [*self.guarded, *(name for name, _ in self.required_lower_bounds)]
        found = [f"gates: {name!r}: expected table/row/metric" for name in names if name.count("/") != 2]
        if not 0 <= self.max_relative_fall < 1:
            found.append(f"max_relative_fall: expected 0 or more and below 1, got {self.max_relative_fall}")
        if self.max_invalid_rate < 0:
            found.append(f"max_invalid_rate: expected 0 or more, got {self.max_invalid_rate}")
        return found


@dataclass(frozen=True)
class GateReport:
    """The verdict: `reasons` are sentences, why it failed or what it passed."""

    passed: bool
    reasons: list[str] = field(default_factory=list)


def check_gates(candidate: Mapping[str, Any], champion: Mapping[str, Any] | None, config: GateConfig) -> GateReport:
    """Judge a candidate's metrics (the content of its `metrics.json`) against the champion's, or alone where there is none."""
    failures, passes = _floors(candidate, config)
    for name in config.guarded:
        if _lookup(candidate, name) is None and (champion is None or _lookup(champion, name) is None):
            passes.append(f"note: {name} guards nothing, it was not measured; {_measured_beside(candidate, name)}")
    if champion is None:
        passes.append("there is no champion yet, so there is nothing to fall behind")
    elif candidate["dataset"] != champion["dataset"]:
        failures.append(
            f"the candidate was evaluated on {candidate['dataset']!r}, the champion on {champion['dataset']!r}: they cannot be compared; "
            "evaluate both on one dataset or register under another name"
        )
    else:
        for name in config.guarded:
            failure, passed = _compare(name, _lookup(candidate, name), _lookup(champion, name), config.max_relative_fall)
            failures += failure
            passes += passed
        if candidate.get("dataset_hash") != champion.get("dataset_hash"):
            passes.append("note: the two versions were evaluated on different test requests (the dataset was prepared again in between)")
    return GateReport(passed=not failures, reasons=failures or passes)


def _lookup(metrics: Mapping[str, Any], name: str) -> Record | None:
    table, row, metric = name.split("/")
    return find(metrics, table, row, metric)


def _floors(candidate: Mapping[str, Any], config: GateConfig) -> tuple[list[str], list[str]]:
    failures, passes = [], []
    for record in candidate["records"]:
        if record["metric"].startswith("invalid@") and not record.get("slice") and (record["value"] or 0.0) > config.max_invalid_rate:
            where = f"{record['table']}/{record['row']}"
            failures.append(
                f"{where}: {record['value']:.2%} of the SIDs are invalid, at most {config.max_invalid_rate:.2%} may be; check that trie and generator belong together"
            )
    if config.beat_popularity:
        ours, popular = _value(candidate, "generative"), _value(candidate, "popularity")
        if ours is not None and popular is not None and ours <= popular:
            failures.append(f"recall@100 of the channel is {ours:.3f}, no better than popularity's {popular:.3f}: the generator has not learnt to read queries")
        elif ours is not None and popular is not None:
            passes.append(f"recall@100 of the channel is {ours:.3f}, popularity's {popular:.3f}")
    for name, least in config.required_lower_bounds:
        record = _lookup(candidate, name)
        if record is None:
            failures.append(f"{name} must have a lower bound of at least {least:+.1%} and was not measured; {_measured_beside(candidate, name)}")
            continue
        if record["low"] is None:
            failures.append(
                f"{name} must have a lower bound of at least {least:+.1%} and has no interval on this data set; remove it from required_lower_bounds"
            )
            continue
        sentence = f"{name} is {record['value']:+.1%} with a lower bound of {record['low']:+.1%}; at least {least:+.1%} is required"
        (passes if record["low"] >= least else failures).append(sentence)
    return failures, passes


def _measured_beside(metrics: Mapping[str, Any], name: str) -> str:
    """What there is where `name` was looked for: the metrics of its row (the ten that read most like it), else the rows of its table, else all tables."""
    table, row, metric = name.split("/")
    records = [record for record in metrics["records"] if not record.get("slice")]
    for what, wanted, found in (
        (f"{table}/{row} has", metric, [record["metric"] for record in records if (record["table"], record["row"]) == (table, row)]),
        (f"{table} has the rows", row, [record["row"] for record in records if record["table"] == table]),
        ("there are the tables", table, [record["table"] for record in records]),
    ):
        if found:
            names = list(dict.fromkeys(found))
            nearest = get_close_matches(wanted, names, n=_SHOWN_NAMES, cutoff=0.0)
            return f"{what} {', '.join(one for one in names if one in nearest)}" + (" and others" if len(names) > _SHOWN_NAMES else "")
    return "nothing was measured"


def _value(metrics: Mapping[str, Any], row: str) -> float | None:
    record = find(metrics, "channels", row, "recall@100")
    return None if record is None else record["value"]


def _compare(name: str, ours: Record | None, theirs: Record | None, max_fall: float) -> tuple[list[str], list[str]]:
    if theirs is None or theirs["value"] is None:
        return [], []
    if ours is None or ours["value"] is None:
        return [f"{name}: the champion has {theirs['value']:.4f}, the candidate was not measured; run jobs/evaluate.py with the same settings"], []
    new, old = ours["value"], theirs["value"]
    fall = (old - new) / old if old > 0 else 0.0
    sentence = f"{name}: {new:.4f}{_interval(ours)}, the champion has {old:.4f}{_interval(theirs)}"
    if fall > max_fall:
        return [f"{sentence}: it falls by {fall:.1%}, at most {max_fall:.1%} is allowed"], []
    if ours["high"] is not None and theirs["low"] is not None and ours["high"] < theirs["low"]:
        return [f"{sentence}: it is worse beyond doubt, the intervals do not meet"], []
    return [], [sentence]


def _interval(record: Record) -> str:
    return "" if record["low"] is None else f" ({record['low']:.4f} to {record['high']:.4f})"
