"""Whatever is wrong with a file is said with its name, line and remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from genrecall.data.adapters.source_files import SourceError, find_file, read_delimited, read_json_lines, read_json_object, read_lines, to_chunks
from genrecall.data.schema import USERS


def test_truncated_gzip_is_reported_with_the_last_good_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % n for n in range(20_000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"a.jsonl.gz: broken gzip after line \d+ .*fetch the file again"):
        list(read_json_lines(path))


def test_a_file_that_is_not_gzip_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_text("a,b\n")
    with pytest.raises(SourceError, match="broken gzip after line 0"):
        list(read_lines(tmp_path / "a.csv.gz"))


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(SourceError, match=r"a.txt: line 2: not UTF-8 .*convert the file"):
        list(read_lines(tmp_path / "a.txt"))


def test_a_byte_order_mark_is_dropped_and_control_characters_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\x18two\r\nthree\x0b\n".encode())
    assert [line for _, line in read_lines(tmp_path / "a.txt")] == ["one\x18two", "three\x0b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: is empty; expected one JSON object per line"),
        ('{"a": 1}\n{"a"', "a.jsonl: line 2: not JSON"),
        ('{"a": 1}\n[1]\n', "a.jsonl: line 2: expected a JSON object, got list"),
        ('{"a": 1}\n{"a": ' + "1" * 5_000 + "}", "a.jsonl: line 2: not JSON .*digits"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "a.jsonl: line 2: not JSON .*recursion"),
    ],
)
def test_broken_json_lines(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SourceError, match=message):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"user_id": "smile \ud83d"}' + "\n" + r'{"user_id": "\ud83d\ude00"}' + "\n")
    (chunk,) = to_chunks((record for _, record in read_json_lines(tmp_path / "a.jsonl")), USERS)
    assert chunk["user_id"].to_pylist() == ["smile \ufffd", "\U0001f600"]
    (tmp_path / "a.json").write_text(r'{"u": "\udc00"}')
    assert read_json_object(tmp_path / "a.json") == {"u": "\ufffd"}


@pytest.mark.parametrize(
    ("text", "message"), [("", "not JSON"), ("{", "not JSON"), ("[]", "expected one JSON object, got list"), ("1" * 5_000, "not JSON .*digits")]
)
def test_broken_json_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_json_object(tmp_path / "a.json")


def test_a_delimited_row_of_another_length_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n"1\n1",2\n3\n')
    with pytest.raises(SourceError, match=r"a.csv: line 4: expected 2 fields, got 1"):
        list(read_delimited(tmp_path / "a.csv", ["a"]))


def test_a_carriage_return_in_a_delimited_field_needs_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,"x\ry"\n2,x\ry\n')
    rows = read_delimited(tmp_path / "a.csv", ["b"])
    assert next(rows)[1] == {"b": "x\ry"}
    with pytest.raises(SourceError, match=r"a.csv: line 3: new-line character .*put the field into quotes"):
        next(rows)


def test_an_empty_delimited_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(SourceError, match=r"a.csv: is empty; expected a header line with a, b"):
        list(read_delimited(tmp_path / "a.csv", ["a", "b"]))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: no such folder; items needs a folder with items.jsonl"):
        find_file(tmp_path / "nowhere", ["items.jsonl"], what="items")


def test_chunks_are_bounded_and_an_empty_source_keeps_its_columns() -> None:
    chunks = list(to_chunks(({"user_id": str(n)} for n in range(7)), USERS, chunk_rows=3))
    assert [chunk.num_rows for chunk in chunks] == [3, 3, 1]
    (empty,) = to_chunks(iter(()), USERS)
    assert empty.schema == USERS
    assert empty.num_rows == 0
