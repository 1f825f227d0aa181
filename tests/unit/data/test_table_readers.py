from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.data import table_readers
from genrecall.data.schema import EVENTS, DataError
from genrecall.data.table_readers import CHUNK_ROWS, Chunk, find_portions, format_of, read_portion
from genrecall.data.validation import text_columns


def read(place: Path) -> list[Chunk]:
    return [chunk for portion in find_portions("events", str(place)) for chunk in read_portion(portion, EVENTS.names, text_columns("events"))]


def test_all_formats_plain_or_gzip_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"request_id": f"r{number}", "query": "2020-01-01", "item_id": f"00{number}"} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = b"request_id,query,item_id\n" + b"".join(f"{row['request_id']},{row['query']},{row['item_id']}\n".encode() for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbf" + text)  # with the mark that spreadsheets put first
    for name in ("a.parquet", "b.jsonl", "c.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("a.parquet", "b.jsonl", "c.csv", "a.parquet.gz", "b.jsonl.gz", "c.csv.gz"):
        (chunk,) = read(tmp_path / name)
        table = chunk.table.select(["request_id", "query", "item_id"])
        found = [{key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()} for row in table.to_pylist()]
        assert found == rows, name
        assert chunk.rows.tolist() == [0, 1, 2], name


def test_a_folder_is_read_whole_without_its_bookkeeping_and_a_glob_takes_what_matches(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    for name in ("day=1/a.jsonl", "b.jsonl", "_SUCCESS", ".b.jsonl.crc"):
        (tmp_path / name).write_text('{"query": "q"}\n')
    assert len(find_portions("events", str(tmp_path))) == 2
    assert len(find_portions("events", str(tmp_path / "*.jsonl"))) == 1


def test_row_numbers_go_on_over_row_groups_and_chunks(tmp_path: Path) -> None:
    count = CHUNK_ROWS + 10
    pq.write_table(pa.table({"item_id": [str(number) for number in range(count)]}), tmp_path / "a.parquet", row_group_size=20_000)
    chunks = read(tmp_path / "a.parquet")
    assert np.concatenate([chunk.rows for chunk in chunks]).tolist() == list(range(count))
    assert chunks[-1].table["item_id"][-1].as_py() == str(count - 1)


def test_csv_rows_with_a_wrong_number_of_fields_are_set_aside_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,item_id\nq,0\nq\nq,2\nq,3,x\nq,4\n")
    (chunk,) = read(tmp_path / "a.csv")
    assert chunk.table["item_id"].to_pylist() == [b"0", b"2", b"4"]
    assert chunk.rows.tolist() == [0, 2, 4]
    assert [(bad.row, bad.reason) for bad in chunk.bad_rows] == [(1, "malformed_row"), (3, "malformed_row")]


def test_jsonl_lines_that_are_not_objects_or_not_utf8_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "q", "item_id": 7}\n[1]\n{"query": \n{"query": "\xff"}\n\n{"query": "x"}\n')
    (chunk,) = read(tmp_path / "a.jsonl")
    assert chunk.table.to_pylist() == [{"query": "q", "item_id": "7"}, {"query": "x", "item_id": None}]
    assert chunk.rows.tolist() == [0, 5]
    assert [(bad.row, bad.reason) for bad in chunk.bad_rows] == [(1, "malformed_row"), (2, "malformed_row"), (3, "invalid_utf8")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (rb'{"query": "half an emoji \ud83d", "item_id": "b"}', "invalid_utf8"),
        (b'{"query": ' + b"1" * 5_000 + b"}", "malformed_row"),  # more digits than Python reads
        (b'{"query": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", "malformed_row"),
    ],
    ids=["surrogate", "digits", "depth"],
)
def test_a_jsonl_line_that_no_text_or_parser_can_hold_costs_its_row_only(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "q", "item_id": "a"}\n' + line + b"\n")
    (chunk,) = read(tmp_path / "a.jsonl")
    assert chunk.table["item_id"].to_pylist() == ["a"]  # also behind the mark that spreadsheets put first
    assert [(bad.row, bad.reason) for bad in chunk.bad_rows] == [(1, reason)]


def test_long_jsonl_rows_make_short_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_readers, "_CHUNK_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"query": "q" * 400, "item_id": str(number)}) + "\n" for number in range(7)))
    chunks = read(tmp_path / "a.jsonl")
    assert [len(chunk.table) for chunk in chunks] == [3, 3, 1]
    assert np.concatenate([chunk.rows for chunk in chunks]).tolist() == list(range(7))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_truncated_gzip_names_the_file(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    content = b"query,item_id\n" + b"".join(f"{value},1\n".encode() for value in rng.integers(0, 1 << 60, 5_000))
    if "json" in name:
        content = b"".join(f'{{"query": "{value}"}}\n'.encode() for value in rng.integers(0, 1 << 60, 5_000))
    (tmp_path / name).write_bytes(gzip.compress(content)[:-1000])
    with pytest.raises(DataError, match=rf"{name}: truncated or damaged gzip"):
        read(tmp_path / name)


def test_damaged_parquet_names_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q"] * 1000}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet .*copy or export it again"):
        read(tmp_path / "a.parquet")


def test_a_parquet_page_that_cannot_be_unpacked_names_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": [str(number) for number in range(5_000)]}), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1_000:1_200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet .*copy or export it again"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        read(tmp_path / name)


def test_empty_jsonl_file_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(tmp_path / "a.jsonl") == []


def test_csv_without_header_or_with_a_repeated_column_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\n")
    with pytest.raises(DataError, match="expected a header line"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"query,query\na,b\n")
    with pytest.raises(DataError, match="names a column twice"):
        read(tmp_path / "a.csv")


def test_missing_place_and_unknown_format_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"events: no files at .*give a file, a folder or a glob"):
        read(tmp_path / "nowhere")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.xlsx: unknown format; expected a name ending in \.parquet"):
        read(tmp_path / "a.xlsx")
    assert format_of("x/EVENTS.CSV.gz") == "csv"
    assert format_of("x.txt") is None


def test_csv_row_numbers_stay_right_over_many_blocks(tmp_path: Path) -> None:
    lines = [f"q{'x' * 60},{number}\n" if number % 1000 != 17 else "broken\n" for number in range(200_000)]  # 14 MB, in blocks of 4
    (tmp_path / "a.csv").write_text("query,item_id\n" + "".join(lines))
    chunks = read(tmp_path / "a.csv")
    assert len(chunks) > 2
    assert np.concatenate([chunk.rows for chunk in chunks]).tolist() == [int(value) for chunk in chunks for value in chunk.table["item_id"].to_pylist()]
    assert sorted(bad.row for chunk in chunks for bad in chunk.bad_rows) == list(range(17, 200_000, 1000))
