"""Turning columns as found into the canonical schema, row by row: what fits goes on, what does not is rejected with a reason.

A column that can never be right (a number where a list belongs, epoch numbers where a time belongs) or is missing stops the
run with a `DataError`; a value that is wrong in some rows rejects those rows. Every kept row carries `_portion` and `_row`, its
origin, so that "first" is well defined for duplicates and later rejections can still name the file's row.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from genrecall.data.schema import ACTIONS, EVENTS, ITEMS, MAX_ID_BYTES, REJECTED, USERS, DataError
from genrecall.data.table_readers import BadRow, Chunk, Portion

SCHEMAS = {"items": ITEMS, "events": EVENTS, "users": USERS}
ORIGIN = [pa.field("_portion", pa.int32(), nullable=False), pa.field("_row", pa.int64(), nullable=False)]
_REQUIRED = {"items": ("item_id", "title"), "events": ("query", "item_id", "action"), "users": ("user_id",)}
_SHOWN_CHARACTERS = 200
_DIGITS = re.compile(r"[+-]?[0-9]{1,20}")
_HINTS = {
    "timestamp": "give a Parquet timestamp or ISO 8601 text such as 2026-03-01T12:00:00Z",
    "category_path": "give a list of strings, root first, or text with the levels joined by category_separator",
}


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What a row may hold beyond its types."""

    max_query_characters: int
    latest_time: int  # microseconds since 1970 UTC; later rows are in the future
    category_separator: str


@dataclass
class Checked:
    """A chunk after checking: rows that fit, rows that do not, and what was changed in passing (`noted`)."""

    table: pa.Table
    rejected: pa.Table
    noted: dict[str, int] = field(default_factory=dict)


def text_columns(table: str) -> list[str]:
    """The columns of a canonical table that hold plain text."""
    return [one.name for one in SCHEMAS[table] if pa.types.is_string(one.type)]


def check_chunk(portion: Portion, chunk: Chunk, rules: RowRules) -> Checked:
    """Check one chunk of `portion.table` against the canonical schema and the row rules.

    Raises:
        DataError: a required column is missing, or a column's type can never be right.
    """
    schema = SCHEMAS[portion.table]
    check = _Check(portion, chunk)
    if not len(chunk.table):  # a file of nothing but unreadable rows, or a header alone
        if not chunk.bad_rows:
            _require_columns(portion, chunk.table.column_names)
        return Checked(_empty(schema), check.rejected())
    _require_columns(portion, chunk.table.column_names)
    columns = {one.name: check.column(one, rules.category_separator) for one in schema}
    noted = {"items": _item_rules, "events": _event_rules, "users": _user_rules}[portion.table](columns, check, rules)
    origin = [pa.array(np.full(len(chunk.rows), portion.number, dtype=np.int32)), pa.array(chunk.rows)]
    table = pa.table([*columns.values(), *origin], schema=pa.schema([*(one.with_nullable(True) for one in schema), *ORIGIN]))
    return Checked(table.filter(pa.array(~check.bad)), check.rejected(), noted)


def without_shoppers(portion: Portion, chunk: Chunk, erased: Collection[str]) -> tuple[Chunk, int]:
    """`chunk` without the rows of the shoppers `erased`, and how many rows that are; unreadable rows that name one of them keep their place but lose their text.

    Raises:
        DataError: the column of user ids has a type that can never be right.
    """
    bad_rows = [replace(row, value="") if any(user in row.value for user in erased) else row for row in chunk.bad_rows]
    if "user_id" not in chunk.table.column_names or not len(chunk.table):
        return replace(chunk, bad_rows=bad_rows), 0
    users, _, _ = _coerce(_one_array(chunk.table["user_id"]), SCHEMAS[portion.table].field("user_id"), portion, "")
    stays = ~_mask(pc.is_in(pc.utf8_trim_whitespace(users), value_set=pa.array(sorted(erased), pa.string())))
    return Chunk(chunk.table.filter(pa.array(stays)), chunk.rows[stays], bad_rows), int((~stays).sum())


def rejections(table: str, file: str, rows: np.ndarray, column: str | None, reason: str, values: Sequence[Any] | pa.Array | pa.ChunkedArray) -> pa.Table:
    """Rows of the `rejected/` table."""
    texts = pc.utf8_slice_codeunits(values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, pa.string()), 0, _SHOWN_CHARACTERS)
    count = len(rows)
    place = pa.array(rows, pa.int64())
    return pa.table(
        {
            "table": [table] * count,
            "file": [file] * count,
            "row": pc.if_else(pc.less(place, 0), None, place),
            "column": pa.array([column] * count, pa.string()),
            "reason": [reason] * count,
            "value": texts,
        },
        schema=REJECTED,
    )


def _empty(schema: pa.Schema) -> pa.Table:
    return pa.schema([*(one.with_nullable(True) for one in schema), *ORIGIN]).empty_table()


def _require_columns(portion: Portion, names: Sequence[str]) -> None:
    missing = [name for name in _REQUIRED[portion.table] if name not in names]
    if portion.table == "events":
        if not {"timestamp", "sequence"} & set(names):
            missing.append("timestamp (or sequence)")
        if not {"request_id", "user_id"} & set(names):
            missing.append("request_id (or user_id, from which sessions are derived)")
    if missing:
        known = [one.name for one in SCHEMAS[portion.table]]
        found = ", ".join(name for name in names if name) or "none of them"
        raise DataError(
            f"{portion.label}: {portion.table} lack column {', '.join(missing)}; of the known columns ({', '.join(known)}) found {found}; rename or add it"
        )


class _Check:
    """Collects which rows of a chunk are bad and why; the first reason found for a row counts."""

    def __init__(self, portion: Portion, chunk: Chunk) -> None:
        self.portion, self.chunk = portion, chunk
        self.bad = np.zeros(len(chunk.table), dtype=bool)
        self._tables = [_of_bad_row(portion, one) for one in chunk.bad_rows]

    def column(self, wanted: pa.Field, separator: str) -> pa.Array:
        """The column as the wanted type; rows whose value does not fit are marked bad."""
        if wanted.name not in self.chunk.table.column_names:
            return pa.nulls(len(self.chunk.table), wanted.type)
        found = _one_array(self.chunk.table[wanted.name])
        values, misfit, reason = _coerce(found, wanted, self.portion, separator)
        self.reject(misfit, wanted.name, reason, found)
        return values

    def reject(self, which: np.ndarray | None, column: str, reason: str, shown: pa.Array) -> None:
        """Mark the rows `which` (bool [n]) as bad, unless they already are."""
        if which is None or not (places := np.flatnonzero(which & ~self.bad)).size:
            return
        self.bad[places] = True
        values = [None if value is None else _shown(value) for value in shown.take(pa.array(places)).to_pylist()]
        self._tables.append(rejections(self.portion.table, self.portion.label, self.chunk.rows[places], column, reason, values))

    def rejected(self) -> pa.Table:
        return pa.concat_tables([REJECTED.empty_table(), *self._tables])


def _of_bad_row(portion: Portion, bad: BadRow) -> pa.Table:
    return rejections(portion.table, portion.label, np.array([bad.row]), bad.column, bad.reason, [bad.value])


def _shown(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)[:_SHOWN_CHARACTERS]


def _item_rules(columns: dict[str, pa.Array], check: _Check, rules: RowRules) -> dict[str, int]:
    _require_value(columns, "item_id", check)
    # What `build_sid_index` could not keep is refused here, before anything is trained.
    check.reject(_mask(pc.greater(pc.binary_length(columns["item_id"]), MAX_ID_BYTES)), "item_id", "id_too_long", columns["item_id"])
    check.reject(_mask(pc.ends_with(columns["item_id"], "\0")), "item_id", "id_ends_in_zero_byte", columns["item_id"])
    columns["title"] = pc.fill_null(columns["title"], "")  # an item without text is kept: it may still be found by its category
    columns["brand"] = _empty_as_null(columns["brand"])
    columns["text"] = _empty_as_null(columns["text"])
    columns["price"] = pc.if_else(pc.is_finite(columns["price"]), columns["price"], None)
    columns["prior_score"] = pc.if_else(pc.is_finite(columns["prior_score"]), columns["prior_score"], None)
    columns["category_path"], dropped = _without_empty_levels(columns["category_path"])
    return {"empty_category_levels_dropped": dropped, "items_without_title": pc.sum(pc.equal(columns["title"], "")).as_py() or 0}


def _event_rules(columns: dict[str, pa.Array], check: _Check, rules: RowRules) -> dict[str, int]:
    for name in ("item_id", "action"):
        _require_value(columns, name, check)
    check.reject(_mask(pc.is_null(columns["query"])), "query", "missing_value", columns["query"])
    check.reject(_mask(pc.invert(pc.is_in(columns["action"], value_set=pa.array(ACTIONS)))), "action", "unknown_action", columns["action"])
    columns["request_id"], columns["user_id"] = _empty_as_null(columns["request_id"]), _empty_as_null(columns["user_id"])
    nobody = pc.and_(pc.is_null(columns["request_id"]), pc.is_null(columns["user_id"]))
    check.reject(_mask(nobody), "request_id", "missing_value", columns["request_id"])
    timeless = pc.and_(pc.is_null(columns["timestamp"]), pc.is_null(columns["sequence"]))
    check.reject(_mask(timeless), "timestamp", "missing_value", columns["timestamp"])
    future = pc.greater(columns["timestamp"].cast(pa.int64()), rules.latest_time)
    check.reject(_mask(future), "timestamp", "future_timestamp", columns["timestamp"])
    columns["grade"] = pc.if_else(pc.is_nan(columns["grade"]), None, columns["grade"])
    query = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.fill_null(columns["query"], ""), r"[\s\x00-\x1f\x7f]+", " "))
    cut = pc.sum(pc.greater(pc.utf8_length(query), rules.max_query_characters)).as_py() or 0
    columns["query"] = pc.utf8_rtrim_whitespace(pc.utf8_slice_codeunits(query, 0, rules.max_query_characters)) if cut else query
    return {"queries_cut": cut}


def _user_rules(columns: dict[str, pa.Array], check: _Check, rules: RowRules) -> dict[str, int]:
    _require_value(columns, "user_id", check)
    columns["gender"], columns["age_band"] = _empty_as_null(columns["gender"]), _empty_as_null(columns["age_band"])
    return {}


def _require_value(columns: dict[str, pa.Array], name: str, check: _Check) -> None:
    check.reject(_mask(pc.or_kleene(pc.is_null(columns[name]), pc.equal(columns[name], ""))), name, "missing_value", columns[name])


def _mask(values: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _empty_as_null(column: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(column, ""), None, column)


def _without_empty_levels(paths: pa.Array) -> tuple[pa.Array, int]:
    """Category paths with levels trimmed and empty ones left out, and how many were left out."""
    paths = pc.if_else(pc.is_null(paths), pa.scalar([], pa.list_(pa.string())), paths)
    levels = pc.fill_null(pc.utf8_trim_whitespace(pc.list_flatten(paths)), "")
    keep = _mask(pc.not_equal(levels, ""))
    lengths = np.asarray(pc.list_value_length(paths).to_numpy(zero_copy_only=False), dtype=np.int64)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    offsets = kept_before[np.concatenate([[0], np.cumsum(lengths)])]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), levels.filter(pa.array(keep))), int((~keep).sum())


def _coerce(found: pa.Array, wanted: pa.Field, portion: Portion, separator: str) -> tuple[pa.Array, np.ndarray | None, str]:
    """`found` as the wanted type, which rows do not fit (None: all do), and the reason for those."""
    kind, target = found.type, wanted.type
    if kind == target:
        return found, None, ""
    if pa.types.is_null(kind):
        return pa.nulls(len(found), target), None, ""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        text, bad = _decode(found)
        if pa.types.is_string(target):
            return text, bad, "invalid_utf8"
        values, misfit, reason = _coerce(pc.if_else(pc.equal(text, ""), None, text), wanted, portion, separator)
        return (values, misfit, reason) if bad is None else (values, bad if misfit is None else bad | misfit, "invalid_utf8" if misfit is None else reason)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _coerce(found.cast(pa.string()), wanted, portion, separator)
    if pa.types.is_string(target) and pa.types.is_integer(kind):
        return found.cast(target), None, ""
    if pa.types.is_string(kind):
        return _from_text(found, target, separator)
    if pa.types.is_timestamp(target) and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return found.cast(target, safe=False), None, ""
    if pa.types.is_list(target) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_texts(kind.value_type):
        return found.cast(target), None, ""
    if pa.types.is_list(target) and pa.types.is_list(kind) and pa.types.is_binary(kind.value_type):
        return _decode_lists(found, target)
    if (pa.types.is_integer(target) or pa.types.is_floating(target)) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return _from_number(found, target)
    hint = _HINTS.get(
        wanted.name,
        f"convert the column to {target}" + (" (a float id has probably lost digits)" if pa.types.is_floating(kind) and pa.types.is_string(target) else ""),
    )
    raise DataError(f"{portion.label}: column {wanted.name!r} of {portion.table}: expected {target}, got {kind}; {hint}")


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece; as bytes where what calls itself text is not UTF-8, which Parquet does not check."""
    found = column.combine_chunks()
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    if isinstance(found, pa.DictionaryArray):
        found = found.cast(found.type.value_type)
    try:
        found.validate(full=True)
    except pa.ArrowInvalid:
        is_list = pa.types.is_list(found.type) or pa.types.is_large_list(found.type)
        if _is_texts(found.type.value_type if is_list else found.type):
            return found.cast(pa.list_(pa.binary()) if is_list else pa.binary())
    return found


def _is_texts(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or pa.types.is_dictionary(kind))


def _decode(found: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    """Bytes as text; rows that are not UTF-8 become null and are marked."""
    try:
        return found.cast(pa.string()), None
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        bad = np.zeros(len(found), dtype=bool)
        for place, value in enumerate(found.to_pylist()):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                texts.append(None)
                bad[place] = True
        return pa.array(texts, pa.string()), bad


def _decode_lists(found: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray, str]:
    """Lists of bytes as lists of text; those with a value that is not UTF-8 become null and are marked."""
    texts: list[list[str | None] | None] = []
    bad = np.zeros(len(found), dtype=bool)
    for place, values in enumerate(found.to_pylist()):
        try:
            texts.append(None if values is None else [None if one is None else one.decode() for one in values])
        except UnicodeDecodeError:
            texts.append(None)
            bad[place] = True
    return pa.array(texts, target), bad, "invalid_utf8"


def _from_text(found: pa.Array, target: pa.DataType, separator: str) -> tuple[pa.Array, np.ndarray | None, str]:
    if pa.types.is_list(target):
        return _paths_from_text(found, target, separator)
    trimmed = _empty_as_null(pc.utf8_trim_whitespace(found))
    if pa.types.is_integer(target):
        return _whole_numbers(trimmed, target)
    text = pd.Series(trimmed.to_numpy(zero_copy_only=False), dtype=object)
    if pa.types.is_timestamp(target):
        times = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True)
        misfit = (times.isna() & text.notna()).to_numpy()
        return pa.array(times.astype("datetime64[us, UTC]")).cast(target), misfit, "wrong_type"
    numbers = pd.to_numeric(text, errors="coerce")
    misfit = (numbers.isna() & text.notna() & (text.str.lower() != "nan")).to_numpy(dtype=bool)
    return pa.array(numbers, from_pandas=True).cast(target, safe=False), misfit, "wrong_type"


def _whole_numbers(text: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None, str]:
    """Integers in text to the last digit, which a float would lose beyond 2^53; a fraction of nought, such as 3.0, passes."""
    with contextlib.suppress(pa.ArrowInvalid):
        return text.cast(target), None, ""
    limits = np.iinfo(target.to_pandas_dtype())
    values: list[int | None] = []
    for one in text.to_pylist():
        number = math.nan if one is None else int(one) if _DIGITS.fullmatch(one) else float(pd.to_numeric(one, errors="coerce"))
        values.append(int(number) if limits.min <= number <= limits.max and number == int(number) else None)
    found = pa.array(values, target)
    return found, _mask(pc.and_(pc.is_null(found), pc.is_valid(text))), "wrong_type"


def _paths_from_text(found: pa.Array, target: pa.DataType, separator: str) -> tuple[pa.Array, np.ndarray | None, str]:
    if not pc.any(pc.starts_with(found, "[")).as_py():
        return pc.split_pattern(found, separator).cast(target), None, ""
    paths: list[list[str] | None] = []
    bad = np.zeros(len(found), dtype=bool)
    for place, text in enumerate(found.to_pylist()):
        value: Any = None if text is None else text.split(separator)
        if text is not None and text.startswith("["):
            try:
                value = json.loads(text)
                "".join(filter(None, value)).encode()
            except (ValueError, TypeError, RecursionError):  # no JSON, no list of strings, or half a surrogate pair
                value = text
            bad[place] = not isinstance(value, list)
        paths.append(None if bad[place] else value)
    return pa.array(paths, target), bad, "wrong_type"


def _from_number(found: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None, str]:
    with contextlib.suppress(pa.ArrowInvalid):  # a fraction, or a number too big, where an integer belongs
        return found.cast(target, safe=not pa.types.is_floating(target)), None, ""
    limits = np.iinfo(target.to_pandas_dtype())
    if pa.types.is_integer(found.type):
        held = np.iinfo(found.type.to_pandas_dtype())
        fits = pc.and_(
            pc.greater_equal(found, pa.scalar(max(limits.min, held.min), found.type)), pc.less_equal(found, pa.scalar(min(limits.max, held.max), found.type))
        )
        return pc.if_else(fits, found, None).cast(target), _mask(pc.invert(fits)), "wrong_type"
    numbers = np.asarray(pc.fill_null(found.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False))
    absent = np.isnan(numbers)
    whole = ~absent & (np.floor(numbers) == numbers) & (numbers >= limits.min) & (numbers < float(limits.max))
    values = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=~whole).cast(target)
    return values, ~whole & ~absent, "wrong_type"
