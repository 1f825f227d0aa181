"""Reading a site's own tables in chunks: Parquet, JSON Lines and CSV, plain or gzip, from a disk or an object store.

A file becomes one or more `Portion`s (row groups of a Parquet file are shared out, text files are read whole), each read as a
stream of `Chunk`s: an Arrow table with columns as found, the row number of each row, and the rows that could not even be read
(bad UTF-8, broken JSON, wrong number of fields). Whole-file trouble (empty, damaged, cut off) raises `DataError`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from genrecall.data.schema import DataError

CHUNK_ROWS = 32_768
_CHUNK_BYTES = 64 << 20  # of JSON Lines, whose rows may be long
_ROWS_PER_PORTION = 1_000_000
_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
_BYTES_PER_ROW = {"jsonl": 150, "csv": 80}  # for guessing how many rows a text file has
_GZIP_RATIO = 5
_DAMAGED = "the file is damaged or was cut off; copy or export it again"


@dataclass(frozen=True)
class Portion:
    """One unit of reading: a file, or some row groups of a Parquet file."""

    table: str  # items, events or users
    uri: str
    label: str  # what messages call the file
    format: str
    number: int  # order of the portions within the run; with the row it makes "first" well defined
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None
    estimated_rows: int = 0


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read at all; `value` says what is wrong and holds the whole line, or none of it."""

    row: int
    reason: str
    value: str
    column: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows as found: `rows` is int64 [n], the 0-based row (line, without a CSV header) of each in the file."""

    table: pa.Table
    rows: np.ndarray
    bad_rows: list[BadRow]


def find_portions(table: str, place: str, *, first_number: int = 0, label: str | None = None) -> list[Portion]:
    """The portions of all data files at `place`: a file, a folder (searched whole) or a glob, local or on an object store.

    Raises:
        DataError: nothing there, a file of unknown format, a Parquet file that is damaged or empty of bytes.
    """
    filesystem, root = fsspec.core.url_to_fs(place)
    if any(sign in root for sign in "*?["):
        names = sorted(name for name in filesystem.glob(root) if filesystem.isfile(name))
    elif filesystem.isdir(root):
        names = sorted(name for name in filesystem.find(root) if not _is_hidden(name[len(root) :]))
    else:
        names = [root] if filesystem.exists(root) else []
    if not names:
        raise DataError(f"{table}: no files at {place}; give a file, a folder or a glob of Parquet, JSONL or CSV files (or set GENRECALL_DATA)")
    portions: list[Portion] = []
    for name in names:
        uri = filesystem.unstrip_protocol(name) if "://" in place else name
        portions += _portions_of_file(table, filesystem, name, uri, first_number + len(portions), label)
    return portions


def format_of(name: str) -> str | None:
    """ "parquet", "jsonl" or "csv" by the file's name, with or without `.gz`; None for any other."""
    stem = name.removesuffix(".gz")
    return next((kind for suffix, kind in _FORMATS.items() if stem.lower().endswith(suffix)), None)


def read_portion(portion: Portion, columns: Sequence[str], text_columns: Sequence[str]) -> Iterator[Chunk]:
    """Stream a portion's rows.

    Args:
        columns: the columns wanted; others are not read, absent ones are simply missing from the chunks.
        text_columns: those of them that hold text. In JSON their values are never taken for dates or numbers.

    Raises:
        DataError: the file is empty, damaged, cut off, or has no header.
    """
    try:
        if portion.format == "parquet":
            yield from _read_parquet(portion, columns)
        elif portion.format == "csv":
            yield from _read_csv(portion, columns)
        else:
            yield from _read_jsonl(portion, columns, text_columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{portion.label}: truncated or damaged gzip ({error}); copy or export the file again") from error
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or portion.format != "parquet"):
            raise  # of the disk or the store; Arrow's own, for pages that cannot be unpacked, have no number
        raise DataError(f"{portion.label}: cannot be read as {portion.format} ({_first_line(error)}); {_DAMAGED}") from error


def _is_hidden(relative: str) -> bool:
    """Spark and friends leave `_SUCCESS`, `.crc` and the like beside the data."""
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def _portions_of_file(table: str, filesystem: Any, name: str, uri: str, number: int, label: str | None) -> list[Portion]:
    kind = format_of(name)
    if kind is None:
        raise DataError(f"{uri}: unknown format; expected a name ending in .parquet, .jsonl, .ndjson, .json or .csv, each also with .gz")
    size = filesystem.size(name) or 0
    if size == 0 and kind != "jsonl":
        raise DataError(f"{uri}: the file is empty (0 bytes); export it again or remove it")
    shown = label or uri
    if kind != "parquet":
        rows = size * (_GZIP_RATIO if name.endswith(".gz") else 1) // _BYTES_PER_ROW[kind] + 1
        return [Portion(table, uri, shown, kind, number, estimated_rows=rows)]
    if name.endswith(".gz"):  # must be unpacked to be read at all: one portion
        return [Portion(table, uri, shown, kind, number, estimated_rows=size // 20 + 1)]
    try:
        with filesystem.open(name, "rb") as file:
            metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: cannot be read as Parquet ({_first_line(error)}); {_DAMAGED}") from error
    portions: list[Portion] = []
    groups: list[int] = []
    rows, first_row = 0, 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= _ROWS_PER_PORTION or group == metadata.num_row_groups - 1:
            portions.append(Portion(table, uri, shown, kind, number + len(portions), first_row, tuple(groups), rows))
            first_row += rows
            groups, rows = [], 0
    return portions or [Portion(table, uri, shown, kind, number, 0, (), 0)]


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    with fsspec.open(uri, "rb") as file:
        if uri.endswith(".gz"):
            with gzip.open(file, "rb") as unpacked:
                yield unpacked
        else:
            yield file


def _read_parquet(portion: Portion, columns: Sequence[str]) -> Iterator[Chunk]:
    with _opened(portion.uri) as file:
        source: Any = io.BytesIO(file.read()) if portion.uri.endswith(".gz") else file
        parquet = pq.ParquetFile(source)
        wanted = [name for name in columns if name in parquet.schema_arrow.names]
        row = portion.first_row
        groups = list(range(parquet.num_row_groups)) if portion.row_groups is None else list(portion.row_groups)
        if not parquet.metadata.num_rows:
            yield Chunk(parquet.schema_arrow.empty_table().select(wanted), np.zeros(0, dtype=np.int64), [])
            return
        for batch in parquet.iter_batches(CHUNK_ROWS, row_groups=groups, columns=wanted, use_threads=False):
            yield Chunk(pa.Table.from_batches([batch]), np.arange(row, row + len(batch), dtype=np.int64), [])
            row += len(batch)


def _read_csv(portion: Portion, columns: Sequence[str]) -> Iterator[Chunk]:
    skipped: list[pyarrow.csv.InvalidRow] = []  # not handed on yet
    ahead: list[int] = []  # their rows, as far as no batch has passed them

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        skipped.append(row)
        return "skip"

    with _opened(portion.uri) as file:
        head = file.readline()
        names = next(iter(_csv_fields(head, portion.label)), [])
        if not names:
            raise DataError(f"{portion.label}: the file is empty, expected a header line with the column names")
        if len(set(names)) < len(names):
            raise DataError(f"{portion.label}: the header names a column twice: {', '.join(names)}")
        wanted = [name for name in columns if name in names]
        try:
            reader = pyarrow.csv.open_csv(
                _Joined(head, file),
                read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=4 << 20),
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                # Bytes first: text is decoded row by row later, so that one bad character costs one row.
                convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.binary() for name in names}, include_columns=wanted),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{portion.label}: cannot be read as CSV ({_first_line(error)})") from error
        row = 0
        for batch in reader:
            rows = np.empty(len(batch), dtype=np.int64)
            # The parser numbers a skipped line from 1 with the header as line 1; rows after it move down by one. It may have
            # read ahead of the batch it hands out, so a line further on waits for its batch.
            ahead = sorted([*ahead, *(one.number - 2 for one in skipped if one.number is not None)])
            position, passed = 0, 0
            for place in ahead:
                if place - row > len(batch) - position:
                    break
                count = place - row
                rows[position : position + count] = np.arange(row, place)
                position, row, passed = position + count, place + 1, passed + 1
            del ahead[:passed]
            rows[position:] = np.arange(row, row + len(batch) - position)
            row += len(batch) - position
            bad_rows = [_bad_csv_row(one) for one in skipped]
            skipped.clear()
            yield Chunk(pa.Table.from_batches([batch]), rows, bad_rows)
        if skipped or not row:
            empty = pa.table({name: pa.array([], pa.binary()) for name in wanted})
            yield Chunk(empty, np.zeros(0, dtype=np.int64), [_bad_csv_row(one) for one in skipped])


def _csv_fields(head: bytes, label: str) -> Iterator[list[str]]:
    if head.strip():
        try:
            text = head.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{label}: the header line is not UTF-8 ({error}); save the file as UTF-8") from error
        table = pyarrow.csv.read_csv(io.BytesIO(text.encode()))
        yield list(table.column_names)


class _Joined(io.RawIOBase):
    """A line already read, followed by the rest of its file."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head.removeprefix(b"\xef\xbb\xbf"), rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        head, self._head = self._head, b""
        return head or self._rest.read(size)


def _bad_csv_row(row: pyarrow.csv.InvalidRow) -> BadRow:
    value = f"{row.actual_columns} fields, expected {row.expected_columns}: {row.text}"
    return BadRow(-1 if row.number is None else row.number - 2, "malformed_row", value)


def _read_jsonl(portion: Portion, columns: Sequence[str], text_columns: Sequence[str]) -> Iterator[Chunk]:
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema([(name, pa.string()) for name in text_columns if name in columns]), unexpected_field_behavior="infer"
    )
    with _opened(portion.uri) as file:
        first = 0
        while lines := _next_lines(file):
            if not first:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            yield _json_chunk(lines, first, columns, options)
            first += len(lines)


def _next_lines(file: IO[bytes]) -> list[bytes]:
    """The next lines of a file, as many as fit into a chunk; none at its end."""
    lines: list[bytes] = []
    held = 0
    while held < _CHUNK_BYTES and len(lines) < CHUNK_ROWS and (line := file.readline()):
        lines.append(line)
        held += len(line)
    return lines


def _json_chunk(lines: list[bytes], first: int, columns: Sequence[str], options: pyarrow.json.ParseOptions) -> Chunk:
    """Arrow's parser reads a whole chunk; where it stumbles, Python's reads line by line and says which line is bad."""
    buffer = b"".join(lines)
    with contextlib.suppress(UnicodeDecodeError, pa.ArrowInvalid):
        buffer.decode()
        table = pyarrow.json.read_json(
            io.BytesIO(buffer), read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(buffer) + 1), parse_options=options
        )
        if len(table) == len(lines):
            found = set(json.loads(lines[0]))
            wanted = [name for name in columns if name in table.column_names and (name in found or table[name].null_count < len(table))]
            return Chunk(table.select(wanted), np.arange(first, first + len(lines), dtype=np.int64), [])
    records: list[dict[str, str | None]] = []
    rows: list[int] = []
    bad: list[BadRow] = []
    for row, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad.append(BadRow(row, "invalid_utf8", f"{error.reason} at byte {error.start}"))
            continue
        except (ValueError, RecursionError) as error:  # also a number of too many digits, brackets in too many others
            bad.append(BadRow(row, "malformed_row", f"{error}: {line.decode(errors='replace')}"))
            continue
        if not isinstance(record, dict):
            bad.append(BadRow(row, "malformed_row", f"expected a JSON object, got {line.decode(errors='replace').strip()}"))
            continue
        texts = {name: _as_text(record[name]) for name in columns if name in record}
        try:
            "".join(filter(None, texts.values())).encode()
        except UnicodeEncodeError:  # an escape such as \ud83d without its second half
            bad.append(BadRow(row, "invalid_utf8", f"half a surrogate pair: {line.decode()}"))
            continue
        records.append(texts)
        rows.append(row)
    found = {name for record in records for name in record}
    table = pa.table({name: pa.array([record.get(name) for record in records], pa.string()) for name in columns if name in found})
    return Chunk(table if table.num_columns else pa.table({"": pa.nulls(len(records))}), np.asarray(rows, dtype=np.int64), bad)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
