"""The catalogue log: nothing acknowledged is lost, nothing half-written is read, whatever byte a crash stops at."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.registry import catalogue_log
from genrecall.registry.catalogue_log import CatalogueBusyError, CatalogueLog, CatalogueLogError, log_folder
from genrecall.registry.catalogue_records import ItemRecord


def record(item_id, title="a hose", **fields):
    return ItemRecord(item_id=item_id, title=title, **fields)


def states(tail):
    """What each item is after the changes: its title, or None where delisted."""
    return {change.item_id: change.record and change.record.title for change in tail.changes}


@pytest.fixture
def log(tmp_path):
    return CatalogueLog(tmp_path / "log")


def test_records_and_tombstones_are_numbered_and_come_back_as_they_were(log):
    full = ItemRecord(item_id="灯", title='a "lamp"\n\u2028', category_path=("Home", "灯"), brand="Acme\x00", text="x" * 3000, price=1.1, prior_score=-3.5)
    assert CatalogueLog(log.folder).read(0) == catalogue_log.LogTail([], 0)
    assert log.append([full, record("b")], ["c"]) == 3
    assert log.append([], ["灯"]) == 4
    tail = CatalogueLog(log.folder).read(0)
    assert [(change.sequence, change.item_id, change.record) for change in tail.changes] == [
        (1, "灯", full),
        (2, "b", record("b")),
        (3, "c", None),
        (4, "灯", None),
    ]
    assert tail.sequence == 4
    assert [change.sequence for change in log.read(2).changes] == [3, 4]
    assert log.read(4) == catalogue_log.LogTail([], 4)


def test_a_reader_takes_the_tail_alone_and_whole_requests(log):
    reader = CatalogueLog(log.folder)
    for number in range(5):
        log.append([record(f"{number}a"), record(f"{number}b")])
    first = reader.read(0, at_most=3)
    assert (len(first.changes), first.sequence) == (4, 4)  # two requests, the second one whole
    second = reader.read(first.sequence, at_most=1)
    assert [change.item_id for change in second.changes] == ["2a", "2b"]
    log.append([], ["0a"])
    rest = reader.read(second.sequence)
    assert [change.item_id for change in rest.changes] == ["3a", "3b", "4a", "4b", "0a"]
    assert [change.sequence for change in rest.changes] == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("segment_bytes", [1, 10**6])
def test_a_last_line_torn_at_any_byte_is_dropped_counted_and_replaced_by_the_next(tmp_path, segment_bytes):
    whole = CatalogueLog(tmp_path / "whole", segment_bytes=segment_bytes)
    whole.append([record("a"), record("b")])
    whole.append([record("c")], ["a"])
    before = {path.name: path.stat().st_size for path in whole.folder.glob("changes-*")}
    whole.append([record("灯"), record("e")], ["b"])
    last = max(whole.folder.glob("changes-*"))
    start = before.get(last.name, 0)
    for length in range(start, last.stat().st_size):
        folder = tmp_path / "torn"
        shutil.copytree(whole.folder, folder)
        os.truncate(folder / last.name, length)
        log = CatalogueLog(folder, segment_bytes=segment_bytes)
        tail = log.read(0)
        assert (states(tail), tail.sequence, tail.torn_bytes) == ({"a": None, "b": "a hose", "c": "a hose"}, 4, length - start)
        assert log.append([record("f")]) == 5
        assert [change.item_id for change in CatalogueLog(folder).read(4).changes] == ["f"]
        assert log.read(4).torn_bytes == 0
        shutil.rmtree(folder)


def test_any_changed_byte_is_noticed_and_never_read_as_another_change(log):
    log.append([record("a", "first")])
    middle = max(log.folder.glob("changes-*")).stat().st_size
    log.append([record("b", "second")])
    (path,) = log.folder.glob("changes-*")
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if place < middle:
            with pytest.raises(CatalogueLogError, match=rf"{path.name}: the line at byte \d+ is damaged; bring the file back from a backup"):
                CatalogueLog(log.folder).read(0)
        else:  # what a crash of the machine may leave of the last append
            assert states(CatalogueLog(log.folder).read(0)) == {"a": "first"}


def test_a_missing_segment_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_log, "_BETWEEN_LOOKS_S", 0.0)
    log = CatalogueLog(tmp_path, segment_bytes=1)
    for item_id in "abc":
        log.append([record(item_id)])
    files = sorted(tmp_path.glob("changes-*"))
    for gone in files:
        content = gone.read_bytes()
        gone.unlink()
        with pytest.raises(CatalogueLogError, match=r"bring what is missing back from a backup"):
            CatalogueLog(tmp_path).read(3 if gone == files[2] else 0)
        gone.write_bytes(content)
    assert CatalogueLog(tmp_path).read(0).sequence == 3


def test_a_log_that_lost_its_end_is_noticed_by_who_read_it_and_not_written_over_by_who_wrote_it(log, monkeypatch):
    monkeypatch.setattr(catalogue_log, "_BETWEEN_LOOKS_S", 0.0)
    log.append([record("a")])
    (path,) = log.folder.glob("changes-*")
    older = path.read_bytes()
    log.append([record("b")])
    reader = CatalogueLog(log.folder)
    at = reader.read(0).sequence
    newest = path.read_bytes()
    path.write_bytes(older)  # a backup of yesterday
    for use in (lambda: reader.read(at), lambda: log.append([record("c")])):
        with pytest.raises(CatalogueLogError, match=rf"ends at byte {len(older)} and was whole up to byte {len(newest)}: .*; bring what is missing back"):
            use()
    assert path.read_bytes() == older
    path.write_bytes(newest)
    assert log.append([record("c")]) == 3
    assert states(reader.read(at)) == {"c": "a hose"}


CHANGES = st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.text(min_size=1, max_size=3).filter(str.isprintable)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(CHANGES, max_size=10), compact_after=st.sets(st.integers(0, 9)), covered=st.integers(0, 8), segment_bytes=st.sampled_from([1, 300, 10**6])
)
def test_compaction_changes_no_state_after_what_is_covered(tmp_path_factory, requests, compact_after, covered, segment_bytes):
    folder = tmp_path_factory.mktemp("log")
    log, follower = CatalogueLog(folder, segment_bytes=segment_bytes), CatalogueLog(folder)
    expected, history, seen, at = {}, [], {}, 0
    for number, changes in enumerate(requests):
        upsert = [record(item_id, title) for item_id, delisted, title in changes if not delisted]
        delist = [item_id for item_id, delisted, _ in changes if delisted]
        last = log.append(upsert, delist)
        for one in upsert:
            expected[one.item_id] = one.title
            history.append(one.item_id)
        for one in delist:
            expected[one] = None
            history.append(one)
        assert last == len(history)
        if number in compact_after:
            limit = min(covered, last)
            before = follower.read(at)  # who covers that much has read it
            seen |= states(before)
            at = before.sequence
            done = log.compact(limit)
            assert done.kept == len({one for place, one in enumerate(history) if place >= limit and one not in history[place + 1 :]})
            with_coverage = CatalogueLog(folder).read(limit)
            newest = {one: place for place, one in enumerate(history)}
            assert states(with_coverage) == {one: expected[one] for one, place in newest.items() if place >= limit}
            assert with_coverage.sequence == last
            assert len(list(folder.glob("*.jsonl"))) == 1
    seen |= states(follower.read(at))
    assert seen == expected


@settings(max_examples=60, deadline=None)
@given(
    flags=st.lists(st.dictionaries(st.sampled_from("abcd"), st.booleans(), min_size=1), min_size=1, max_size=8),
    compact_after=st.sets(st.integers(0, 7)),
    through=st.integers(0, 20),
)
def test_the_newest_stock_flags_survive_any_compaction(tmp_path_factory, flags, compact_after, through):
    log = CatalogueLog(tmp_path_factory.mktemp("log"))
    expected, early = {}, {}
    for number, one in enumerate(flags):
        last = log.append([record("a")] if number % 2 else [], ["b"] if number % 3 == 0 else [], in_stock=one)
        expected |= one
        if last <= through:
            early |= one
        if number in compact_after:
            log.compact(last)
    assert {change.item_id: change.in_stock for change in log.read(last).changes} == {}
    assert log.in_stock(last) == expected
    if not compact_after:
        numbers = [change for change in log.read(0).changes if change.in_stock is not None and change.sequence <= through]
        assert log.in_stock(through) == {change.item_id: change.in_stock for change in numbers}
        assert log.in_stock(through).items() >= {one: flag for one, flag in early.items() if sum(one in other for other in flags) == 1}.items()


def test_records_tombstones_and_stock_flags_of_a_request_are_numbered_in_that_order(log):
    assert log.append([record("a")], ["b"], in_stock={"a": False, "c": True}) == 4
    changes = log.read(0).changes
    assert [(one.item_id, one.record is not None, one.in_stock) for one in changes] == [
        ("a", True, None),
        ("b", False, None),
        ("a", False, False),
        ("c", False, True),
    ]
    with pytest.raises(CatalogueLogError, match=r"in_stock\.'': expected text.*in_stock\.'d': expected True or False, got 1"):
        log.append([], in_stock={"": True, "d": 1})
    assert log.read(0).sequence == 4


@pytest.fixture
def parsed(monkeypatch):
    """The lines that were parsed, one entry each."""
    lines = []
    real = catalogue_log.opened

    def counted(line):
        lines.append(line)
        return real(line)

    monkeypatch.setattr(catalogue_log, "opened", counted)
    return lines


@pytest.mark.parametrize("compacted", [False, True])
def test_following_in_steps_parses_each_line_once_whichever_file_it_is_in(log, parsed, monkeypatch, compacted):
    monkeypatch.setattr(catalogue_log, "_CHANGES_A_LINE", 2)
    for number in range(10):
        log.append([record(f"{number}a"), record(f"{number}b")])
    if compacted:
        log.compact()
    log.append([record("last")])
    reader, at, steps = CatalogueLog(log.folder), 0, 0
    parsed.clear()
    while (tail := reader.read(at, at_most=2)).sequence != at:
        at, steps = tail.sequence, steps + 1
    assert (at, steps) == (21, 11)
    # Eleven lines; and the head of a compacted file at each of the twelve looks, but for the last, which begins in the segment after it.
    assert len(parsed) == 11 + 11 * compacted


def test_a_place_in_a_compacted_file_does_not_hold_in_one_of_the_same_name_that_covers_more(log, monkeypatch):
    monkeypatch.setattr(catalogue_log, "_CHANGES_A_LINE", 1)
    for item_id in "abcde":
        log.append([record(item_id)])
    log.compact()
    reader = CatalogueLog(log.folder)
    assert states(reader.read(0, at_most=2)) == {"a": "a hose", "b": "a hose"}
    log.compact(covered=1)
    assert states(reader.read(2)) == {"c": "a hose", "d": "a hose", "e": "a hose"}


def test_a_tombstone_survives_compaction_until_a_bundle_covers_it(log):
    log.append([record("a"), record("b")], ["old"])
    log.compact()
    assert states(log.read(0)) == {"a": "a hose", "b": "a hose", "old": None}
    log.append([], ["a"])
    log.compact(covered=3)
    assert states(log.read(3)) == {"a": None}
    with pytest.raises(CatalogueLogError, match="holds nothing up to change 3, wanted were those after 0; serve a bundle that covers 3 or more"):
        log.read(0)
    with pytest.raises(CatalogueLogError, match="covered: expected at most 4, the log's last change, got 5"):
        log.compact(covered=5)
    assert log.append([record("c")]) == 5
    assert CatalogueLog(log.folder).read(4).changes[0].item_id == "c"


@pytest.mark.parametrize("stop", ["rename", "unlink"])
def test_a_compaction_cut_short_leaves_the_log_as_it_was(tmp_path, monkeypatch, stop):
    log = CatalogueLog(tmp_path, segment_bytes=1)
    for item_id in "abca":
        log.append([record(item_id)])
    log.append([], ["b"])
    with monkeypatch.context() as crashing:

        def crash(path, *_, **__):
            if stop == "rename" or path.suffix == ".jsonl":
                raise KeyboardInterrupt

        crashing.setattr(catalogue_log.Path, stop, crash)
        with pytest.raises(KeyboardInterrupt):
            log.compact()
    again = CatalogueLog(tmp_path)
    assert states(again.read(0)) == {"a": "a hose", "b": None, "c": "a hose"}
    assert again.append([record("d")]) == 6
    assert states(CatalogueLog(tmp_path).read(0)) == {"a": "a hose", "b": None, "c": "a hose", "d": "a hose"}
    again.compact()
    assert states(CatalogueLog(tmp_path).read(0)) == {"a": "a hose", "b": None, "c": "a hose", "d": "a hose"}


def _append_many(folder, name, count):
    log = CatalogueLog(folder, segment_bytes=2000)
    for number in range(count):
        log.append([record(f"{name}{number}")], wait_s=60)


def test_several_processes_append_while_one_reads_and_compacts(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, name, 60)) for name in "xy"]
    for writer in writers:
        writer.start()
    reader, seen, at = CatalogueLog(tmp_path), [], 0
    while any(writer.is_alive() for writer in writers) or at < 120:
        tail = reader.read(at, at_most=7)
        seen += [change.item_id for change in tail.changes]
        assert [change.sequence for change in tail.changes] == list(range(at + 1, tail.sequence + 1))
        at = tail.sequence
        CatalogueLog(tmp_path).compact(wait_s=60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(seen) == sorted(f"{name}{number}" for name in "xy" for number in range(60))


def test_a_second_writer_waits_and_then_names_the_first(log):
    with log._writing(0):
        with pytest.raises(CatalogueBusyError, match=rf"process {os.getpid()} writes to it, for more than 0\.05 s; try again"):
            CatalogueLog(log.folder).append([record("a")], wait_s=0.05)
        waiting = threading.Thread(target=CatalogueLog(log.folder).append, args=([record("b")],), kwargs={"wait_s": 30})
        waiting.start()
    waiting.join()
    assert states(log.read(0)) == {"b": "a hose"}


def test_a_disk_that_is_full_leaves_nothing_half_written(log, monkeypatch):
    log.append([record("a")])
    real = os.fsync

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:20])

    opened = catalogue_log.Path.open
    monkeypatch.setattr(
        catalogue_log.Path, "open", lambda path, mode="r", **rest: Full(opened(path, mode, **rest)) if mode == "ab" else opened(path, mode, **rest)
    )
    with pytest.raises(CatalogueLogError, match=r"cannot be written \(20 of \d+ bytes were written\); free the disk"):
        log.append([record("b")])
    monkeypatch.undo()
    assert log.read(0).torn_bytes == 0

    def broken(descriptor):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(catalogue_log.os, "fsync", broken)
    with pytest.raises(CatalogueLogError, match="input/output error"):
        log.append([record("c")])
    monkeypatch.setattr(catalogue_log.os, "fsync", real)
    # Its number is used: who read the line has applied it.
    assert log.append([record("d")]) == 3
    assert states(CatalogueLog(log.folder).read(0)) == {"a": "a hose", "c": "a hose", "d": "a hose"}


def test_all_that_cannot_be_is_named_and_nothing_written(log):
    bad = [
        record("a"),
        record(""),
        record("灯" * 22),
        record("z\0"),
        record("b", title="\ud800"),
        record("c", category_path="Home"),
        record("d", price=float("nan")),
    ]
    with pytest.raises(CatalogueLogError) as caught:
        log.append(bad, ["ok", "x" * 65])
    assert str(caught.value).split("; ") == [
        "upsert.1.item_id: expected text of at least one character",
        "upsert.2.item_id: expected at most 64 bytes in UTF-8, got 66",
        "upsert.3.item_id: expected an id that does not end in a zero byte",
        "upsert.4.title: expected text, got str or half a surrogate pair",
        "upsert.5.category_path: expected names, root first, got 'Home'",
        "upsert.6.price: expected a finite number or None, got nan",
        "delist.1: expected at most 64 bytes in UTF-8, got 65",
    ]
    with pytest.raises(CatalogueLogError, match="expected at least one record, id or stock flag"):
        log.append([])
    assert not log.folder.exists()
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(CatalogueLogError, match="cannot have a catalogue log; give it another name"):
            log_folder("logs", name)
    for folder in ("s3://bucket/log", log_folder("s3://bucket", "shop")):
        with pytest.raises(CatalogueLogError, match="not an object store; set catalogue_folder"):
            CatalogueLog(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogueLogError, match=r"cannot be written .* set another catalogue_folder"):
        CatalogueLog(tmp_path / "file" / "log").append([record("a")])
