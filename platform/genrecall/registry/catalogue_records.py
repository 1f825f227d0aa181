"""What the catalogue log holds: item records, tombstones and stock flags, and the sealed lines of JSON that they are written in."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from genrecall.data.schema import MAX_ID_BYTES

SEAL = b',"crc32":"'
"""What the check of a line begins with; nowhere else in it, because quotes inside a text are escaped."""
SEAL_BYTES = len(SEAL) + len('01234567"}\n')


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemRecord:
    """One item as the site describes it; the fields are those of the canonical `items` table.

    Attributes:
        category_path: root first; empty when unknown.
        prior_score: what the site orders by when it must cut; None counts as 0.
    """

    item_id: str
    title: str
    category_path: tuple[str, ...] = ()
    brand: str = ""
    text: str = ""
    price: float | None = None
    prior_score: float | None = None

    def problems(self) -> list[str]:
        """What is wrong, `field: what was expected` each."""
        found = [f"item_id: {problem}"] if (problem := id_problem(self.item_id)) else []
        for name in ("title", "brand", "text"):
            if not _is_text(getattr(self, name)):
                found.append(f"{name}: expected text, got {type(getattr(self, name)).__name__} or half a surrogate pair")
        if isinstance(self.category_path, str) or not all(_is_text(name) and name for name in self.category_path):
            found.append(f"category_path: expected names, root first, got {self.category_path!r}")
        for name in ("price", "prior_score"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number)):
                found.append(f"{name}: expected a finite number or None, got {number!r}")
        return found


def id_problem(item_id: Any) -> str | None:
    """Why a bundle could never hold this id, or None."""
    if not _is_text(item_id) or not item_id:
        return "expected text of at least one character"
    if len(item_id.encode()) > MAX_ID_BYTES:
        return f"expected at most {MAX_ID_BYTES} bytes in UTF-8, got {len(item_id.encode())}"
    return "expected an id that does not end in a zero byte" if item_id.endswith("\0") else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


class Change(NamedTuple):
    """One numbered change of an item.

    Attributes:
        record: what the item is from then on; None where it is delisted, and in a change of its stock.
        in_stock: whether it is in stock from then on, listed or not; None: the change is not about that.
    """

    sequence: int
    item_id: str
    record: ItemRecord | None = None
    in_stock: bool | None = None

    @property
    def of(self) -> tuple[str, bool]:
        """What a later change replaces: the item's record or tombstone (False), or its stock flag (True)."""
        return self.item_id, self.in_stock is not None


def newest(changes: Sequence[Change]) -> list[Change]:
    """Of ascending changes the last of each item's record and of its stock flag, ascending."""
    return sorted({change.of: change for change in changes}.values())


def sealed(values: Mapping[str, Any]) -> bytes:
    """A line of JSON that ends with the CRC-32 of what stands before it."""
    body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()[:-1]
    return body + SEAL + b'%08x"}\n' % zlib.crc32(body)


def opened(line: bytes) -> dict[str, Any] | None:
    """The values of a line without its newline; None where it is not whole."""
    body, _, seal = line.rpartition(SEAL)
    if seal != b'%08x"}' % zlib.crc32(body):
        return None
    values = json.loads(body + b"}")
    return values if isinstance(values, dict) else None


def line_of(changes: Sequence[Change]) -> bytes:
    """The line of a request's changes."""
    return sealed({"changes": [_values_of(one) for one in changes]})


def _values_of(change: Change) -> dict[str, Any]:
    if change.in_stock is not None:
        return {"sequence": change.sequence, "stock_of": change.item_id, "in_stock": change.in_stock}
    if change.record is None:
        return {"sequence": change.sequence, "delisted": change.item_id}
    return {"sequence": change.sequence, "item": dataclasses.asdict(change.record)}


def change_of(values: Mapping[str, Any]) -> Change:
    """A change as a line holds it.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    if "delisted" in values:
        return Change(int(values["sequence"]), str(values["delisted"]))
    if "stock_of" in values:
        return Change(int(values["sequence"]), str(values["stock_of"]), in_stock=bool(values["in_stock"]))
    item = values["item"]
    record = ItemRecord(**{**item, "category_path": tuple(item["category_path"])})
    return Change(int(values["sequence"]), record.item_id, record)
