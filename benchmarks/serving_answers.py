"""What benchmarks/serving.py judges answers by: percentiles, and that no answer mixes versions or holds what was delisted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_COMMON = 0.8
"""The share of an answer's SIDs that its version's engine must give for the same query: later items move scores, and with them the beam's last few."""


@dataclass(frozen=True, kw_only=True)
class KnownVersion:
    """A version as the benchmark's own engine has it.

    Attributes:
        model, bundle: as its answers name them.
        sids: all it has, in words. sid_of: each published item's SID.
        reference: the SIDs of its answer to each query of the load.
    """

    model: str
    bundle: str
    sids: frozenset[str]
    sid_of: Mapping[str, str]
    reference: Mapping[str, frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class ItemChange:
    """An item that was listed or delisted, by the number that the server gave it."""

    sequence: int
    item_id: str
    listed: bool


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("expected at least one value")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def problem_of(query: str, answer: Mapping[str, Any], versions: Sequence[KnownVersion], changes: Sequence[ItemChange]) -> str | None:
    """What is wrong with an answer, in short form (see serving_load.py); None: it is wholly one version's.

    Args:
        changes: of the catalogue, by their numbers.
    """
    named = answer["versions"]
    version = next((one for one in versions if (one.model, one.bundle) == (named["model"], named["bundle"])), None)
    if version is None:
        return f"names {named['model']} with bundle {named['bundle']}, which is no version that was served"
    foreign = [sid for sid in answer["sids"] if sid not in version.sids]
    if foreign:
        return f"names {version.model}, which has no SID {foreign[0]}"
    expected = version.reference.get(query)
    if expected is not None and len(expected & set(answer["sids"])) < MIN_COMMON * len(expected):
        return f"names {version.model}, whose answer to {query!r} has other SIDs"
    listed = {change.item_id: change.listed for change in changes if change.sequence <= named.get("catalog_seq", 0)}
    own = set(answer["sids"])
    for item_id, sid in answer["items"]:
        if sid not in own:
            return f"item {item_id} comes from SID {sid}, which was not generated"
        if listed.get(item_id) is False:
            return f"item {item_id} was delisted before change {named['catalog_seq']}, which the answer knows"
        if version.sid_of.get(item_id, sid) != sid:
            return f"names {version.model}, where item {item_id} has SID {version.sid_of[item_id]}, not {sid}"
        if item_id not in version.sid_of and item_id not in listed:
            return f"item {item_id} is not {version.model}'s, and no change up to {named.get('catalog_seq', 0)} added it"
    return None
