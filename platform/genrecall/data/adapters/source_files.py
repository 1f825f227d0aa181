"""Reading the files of outside data sets: found by name, plain or gzip, decoded strictly, turned into canonical Arrow chunks.

Everything that can be wrong with a file (absent, empty, cut off, not UTF-8, not JSON, a field missing) becomes a `SourceError`
that names the file, the row and what to do. Rows that are well formed but break the canonical rules (unknown items,
duplicates) are passed on: `prepare_data` rejects those with a reason and a count.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from genrecall.data.schema import DataError

CHUNK_ROWS = 20_000
_LONGEST_FIELD = 2**27  # csv's own default of 128 kB is shorter than a long candidate list


class SourceError(DataError):
    """A source file that cannot be read as what it should be; the message says where, what was expected and what to do."""


@dataclass(frozen=True)
class Chunks:
    """Arrow chunks that can be read more than once: each iteration calls `make` anew."""

    make: Callable[[], Iterator[pa.Table]]

    def __iter__(self) -> Iterator[pa.Table]:
        return self.make()


def find_file(root: Path, names: Sequence[str], *, what: str) -> Path:
    """The first of `names` (with or without `.gz`) that lies in folder `root`.

    Raises:
        SourceError: no such folder, or none of the files in it.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder; {what} needs a folder with {' or '.join(names)} (plain or .gz)")
    for name in names:
        for candidate in (root / name, root / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise SourceError(
        f"{root}: expected {' or '.join(names)} (plain or .gz) for {what}, found {', '.join(sorted(p.name for p in root.iterdir())) or 'nothing'}"
    )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its newline) of a UTF-8 text file, plain or gzip.

    Lines end at `\\n` only: control characters inside a line are data (JDsearch joins terms by one of them).

    Raises:
        SourceError: not UTF-8 (names the line), not gzip, or cut off.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: line {number}: not UTF-8 (byte {error.start}: {error.reason}); convert the file to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: broken gzip after line {number} ({error}); fetch the file again") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a file with one JSON object per line; blank lines are skipped.

    Raises:
        SourceError: a line that is not a JSON object, or an empty file.
    """
    found = False
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = _json(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: line {number}: not JSON ({error}); the file may be cut off: fetch it again or remove the line") from error
        if not isinstance(value, dict):
            raise SourceError(f"{path}: line {number}: expected a JSON object, got {type(value).__name__}")
        found = True
        yield number, value
    if not found:
        raise SourceError(f"{path}: is empty; expected one JSON object per line")


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object, plain or gzip.

    Raises:
        SourceError: empty, cut off, or not a JSON object.
    """
    text = "\n".join(line for _, line in read_lines(path))
    try:
        value = _json(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}: line {error.lineno}: not JSON ({error.msg}); the file may be empty or cut off: fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON that can be read ({error}); correct the file") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected one JSON object, got {type(value).__name__}")
    return value


def _json(text: str) -> Any:
    """A JSON value; half a surrogate pair in it, as of an emoji cut in two, becomes U+FFFD, for it is no text that can be stored."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def read_delimited(path: Path, columns: Sequence[str], *, delimiter: str = ",", quoting: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number from 1, row by column name) of a delimited file whose first line names the columns.

    Raises:
        SourceError: no header, a missing column, or a row with another number of fields.
    """
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        for line_number, line in read_lines(path):  # noqa: B007  (the error messages below read it)
            yield line + "\n"

    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE)
    rows = _csv_rows(reader, path)
    header = next(rows, None)
    if header is None:
        raise SourceError(f"{path}: is empty; expected a header line with {', '.join(columns)}")
    absent = [name for name in columns if name not in header]
    if absent:
        raise SourceError(f"{path}: line 1: missing column {', '.join(map(repr, absent))}; found {', '.join(header)}; add it to the file's header")
    places = [header.index(name) for name in columns]
    for fields in rows:
        if not fields:
            continue
        if len(fields) != len(header):
            raise SourceError(f"{path}: line {line_number}: expected {len(header)} fields, got {len(fields)}; the file may be cut off or quoted differently")
        yield line_number, {name: fields[place] for name, place in zip(columns, places, strict=True)}


def _csv_rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # such as a carriage return in a field without quotes
        raise SourceError(f"{path}: line {reader.line_num}: {error}; correct the row or put the field into quotes") from error


def field_of(record: Mapping[str, Any], name: str, path: Path, line: int) -> Any:
    """`record[name]`, or a `SourceError` that names the file, the line and the field."""
    if name not in record:
        raise SourceError(f"{path}: line {line}: missing field {name!r}; found {', '.join(sorted(record)) or 'no fields'}")
    return record[name]


def to_chunks(rows: Iterator[Mapping[str, Any]], schema: pa.Schema, chunk_rows: int = CHUNK_ROWS) -> Iterator[pa.Table]:
    """Collect row mappings into Arrow tables of at most `chunk_rows` rows with exactly `schema`; absent columns are null.

    At least one table comes out, so that an empty source still has its columns.
    """
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    count = 0
    empty = True
    for row in rows:
        for name, values in columns.items():
            values.append(row.get(name))
        count += 1
        if count == chunk_rows:
            yield pa.table(columns, schema=schema)
            columns = {name: [] for name in schema.names}
            count, empty = 0, False
    if count or empty:
        yield pa.table(columns, schema=schema)
