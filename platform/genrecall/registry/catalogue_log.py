"""The durable log of what happened to the catalogue since the bundles were built: item records, tombstones
and stock flags, numbered, never SIDs.

Every bundle replays the log through its own encoder, so that no version loses an item or resurrects one, whatever SIDs it would give. Records are
the site's own words and outlive all bundles.

    changes-SEQUENCE.jsonl     appended to; SEQUENCE is that of its first change
    compacted-SEQUENCE.jsonl   stands for all changes up to SEQUENCE: the newest of each item, after a head line
    writer.lock                held (flock) by whoever appends or compacts, with its process id

A line is one request, written with one call and fsynced before `append` returns: it counts whole, or, torn by a crash, not at all. Each ends with
the CRC-32 of what stands before it. Readers need no lock: they take whole lines, and where a compaction moves files under them they look again.
The folder lies on a file system with flock, fsync and atomic rename: a local one, or one shared by all nodes that serve.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from genrecall.registry.catalogue_records import SEAL, SEAL_BYTES, Change, ItemRecord, change_of, id_problem, line_of, newest, opened, sealed

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

LOCK_FILE = "writer.lock"
SEGMENT_BYTES = 64 * 2**20
"""A segment that has grown to this size is followed by another."""

T = TypeVar("T")
_NAME = re.compile(r"(changes|compacted)-(\d{20})\.jsonl")
_CHANGES_A_LINE = 1000
_LOOKS = 20
_BETWEEN_LOOKS_S = 0.02


class CatalogueLogError(ValueError):
    """A log that cannot be read or written; the message names the file and what to do."""


class CatalogueBusyError(CatalogueLogError):
    """Another process holds the writer's lock."""


class _Unsettled(Exception):
    """The files do not fit together as listed: a compaction is under way, or one is lost."""


def log_folder(catalogues: Path | str, model: str) -> Path:
    """Where the log of a model lies in a folder of logs.

    Raises:
        CatalogueLogError: a name that leaves the folder.
    """
    if model in ("", ".", "..") or "/" in model:
        raise CatalogueLogError(f"{catalogues}: a model named {model!r} cannot have a catalogue log; give it another name")
    return Path(catalogues) / model


@dataclass(frozen=True)
class LogTail:
    """What came after a sequence number.

    Attributes:
        changes: ascending; of an item changed more than once perhaps only the newest of a kind (`Change.of`).
        sequence: the last number read; `read` goes on from here.
        torn_bytes: of a last line that is not whole: being written now, or left by a crash. The next `append` removes the latter.
    """

    changes: list[Change]
    sequence: int
    torn_bytes: int = 0


@dataclass(frozen=True)
class Compaction:
    """What `compact` did: changes kept of those that the log held, and its size in bytes before and after."""

    kept: int
    dropped: int
    bytes_before: int
    bytes_after: int


class _Position(NamedTuple):
    """The end of a whole line: file, byte offset, and the number of the last change up to it; of a compacted file also `covered`, without which its name
    does not say what is in it."""

    name: str
    offset: int
    sequence: int
    covered: int = 0


class _Line(NamedTuple):
    changes: list[Change]
    end: _Position


class CatalogueLog:
    """One log. Any number of processes may read it; any may append, one at a time. One thread may read while another appends.

    Args:
        folder: made by the first `append`; an absent one is an empty log.
        segment_bytes: see `SEGMENT_BYTES`.

    Raises:
        CatalogueLogError: the folder is an object store's, which can neither append nor lock.
    """

    def __init__(self, folder: Path | str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        if ":/" in str(folder):  # a Path makes one slash of two
            raise CatalogueLogError(f"{folder}: the catalogue log needs a file system that all nodes share, not an object store; set catalogue_folder")
        self.folder = Path(folder)
        self._segment_bytes = segment_bytes
        self._read_to: _Position | None = None
        self._written_to: _Position | None = None

    def read(self, after: int, at_most: int | None = None) -> LogTail:
        """The changes with numbers above `after`; whole requests, at least one where there is any, and no further one once there are `at_most` changes.

        Raises:
            CatalogueLogError: a damaged or missing file, or changes after `after` that compaction dropped.
        """
        return self._settled(lambda: self._read(after, at_most))

    def _settled(self, look_once: Callable[[], T]) -> T:
        """What a look at the files finds; again where a compaction moves them under it."""
        for look in range(_LOOKS):
            try:
                return look_once()
            except (FileNotFoundError, _Unsettled) as error:  # a compaction moved the files
                if look == _LOOKS - 1:
                    raise CatalogueLogError(f"{self.folder}: {error}; bring what is missing back from a backup") from error
                time.sleep(_BETWEEN_LOOKS_S)
        raise AssertionError("the last look returns or raises")

    def _all(self) -> LogTail:
        scan = _Scan(self.folder, None, None)
        changes = [change for line in scan for change in line.changes]
        return LogTail(changes, scan.sequence, scan.torn_bytes)

    def _read(self, after: int, at_most: int | None) -> LogTail:
        scan = _Scan(self.folder, after, self._read_to)
        changes: list[Change] = []
        for line in scan:
            changes += (change for change in line.changes if change.sequence > after)
            self._read_to = line.end
            if at_most is not None and len(changes) >= at_most:
                return LogTail(changes, line.end.sequence)
        if scan.sequence < after:
            raise _Unsettled(f"the log ends at change {scan.sequence}, before {after}, which is served already: it is another log, or has lost its end")
        return LogTail(changes, scan.sequence, scan.torn_bytes)

    def in_stock(self, through: int) -> dict[str, bool]:
        """The newest stock flags up to the change `through`, by id: what a bundle whose items hold those changes does not say itself.

        Raises:
            CatalogueLogError: as for `read`.
        """
        found = [change for change in self._settled(self._all).changes if change.sequence <= through and change.in_stock is not None]
        return {change.item_id: bool(change.in_stock) for change in newest(found)}

    def held(self) -> LogTail:
        """All that the log holds still: the newest record or tombstone and the newest stock flag of each item, and its last number.

        Raises:
            CatalogueLogError: as for `read`.
        """
        found = self._settled(self._all)
        return LogTail(newest(found.changes), found.sequence, found.torn_bytes)

    def append(self, upsert: Sequence[ItemRecord], delist: Sequence[str] = (), *, in_stock: Mapping[str, bool] | None = None, wait_s: float = 2.0) -> int:
        """Write the records, then the tombstones, then the stock flags, as one line; returns their last number once they are on disk.

        Args:
            upsert: items that are new, changed, or listed again. delist: ids of items that no answer shall hold; unknown ones do no harm.
            in_stock: by id; a flag stays with an id until there is another, whether or not the item is listed. Without one an item is in stock.
            wait_s: for another process that writes.

        Raises:
            CatalogueLogError: a record or an id that cannot be, all of them named, or none at all; nothing is written then. Or a disk that fails:
                append the same again, which does no harm where the first did arrive.
            CatalogueBusyError: another process holds the lock for longer than `wait_s`.
        """
        problems = [f"upsert.{place}.{problem}" for place, record in enumerate(upsert) for problem in record.problems()]
        flags = dict(in_stock or {})
        problems += [f"delist.{place}: {problem}" for place, item_id in enumerate(delist) if (problem := id_problem(item_id))]
        problems += [f"in_stock.{item_id!r}: {problem}" for item_id in flags if (problem := id_problem(item_id))]
        problems += [f"in_stock.{item_id!r}: expected True or False, got {flag!r}" for item_id, flag in flags.items() if not isinstance(flag, bool)]
        if problems:
            raise CatalogueLogError("; ".join(problems))
        if not upsert and not delist and not flags:
            raise CatalogueLogError("expected at least one record, id or stock flag")
        with self._writing(wait_s):
            end = self._end()
            number = itertools.count(end.sequence + 1)
            changes = [Change(next(number), record.item_id, record) for record in upsert]
            changes += [Change(next(number), item_id) for item_id in delist]
            changes += [Change(next(number), item_id, in_stock=flag) for item_id, flag in flags.items()]
            name = end.name if end.name.startswith("changes") and end.offset < self._segment_bytes else _name("changes", end.sequence + 1)
            self._written_to = self._write(name, end.offset if name == end.name else 0, line_of(changes), changes[-1].sequence)
            return self._written_to.sequence

    def compact(self, covered: int = 0, *, wait_s: float = 2.0) -> Compaction:
        """Keep of each item the newest record or tombstone and the newest stock flag alone, and nothing up to `covered`.

        Args:
            covered: what every bundle that may ever be served again holds itself (its `catalog_seq`): one that covers less is refused from then on,
                because a dropped tombstone would let it bring an item back. 0 keeps all tombstones. Stock flags are in no bundle and stay.

        Raises:
            CatalogueLogError: no log, a damaged one, or `covered` beyond its end.
            CatalogueBusyError: as for `append`.
        """
        if not self.folder.is_dir():
            raise CatalogueLogError(f"{self.folder}: no catalogue log here; set GENRECALL_HOME, or give the folder of the logs, as the servers have it")
        with self._writing(wait_s):
            end = self._end()
            if covered > end.sequence:
                raise CatalogueLogError(f"covered: expected at most {end.sequence}, the log's last change, got {covered}")
            files = _files(self.folder)
            before = sum(file.stat().st_size for file in files)
            scan = _Scan(self.folder, None, None)
            found = [change for line in scan for change in line.changes]
            covered = max(covered, scan.covered)
            kept = newest([change for change in found if change.sequence > covered or change.in_stock is not None])
            name = _name("compacted", end.sequence)
            if end.sequence:
                partial = self.folder / f".{uuid.uuid4().hex}.tmp"
                try:
                    with partial.open("wb") as file:
                        file.write(sealed({"through": end.sequence, "covered": covered}))
                        for start in range(0, len(kept), _CHANGES_A_LINE):
                            file.write(line_of(kept[start : start + _CHANGES_A_LINE]))
                        file.flush()
                        os.fsync(file.fileno())
                    partial.rename(self.folder / name)
                    _sync_folder(self.folder)
                finally:
                    partial.unlink(missing_ok=True)
                for old in files:
                    if old.name != name:
                        old.unlink()
                _sync_folder(self.folder)
            self._written_to = None
            return Compaction(len(kept), len(found) - len(kept), before, sum(file.stat().st_size for file in _files(self.folder)))

    @contextlib.contextmanager
    def _writing(self, wait_s: float) -> Iterator[None]:
        """Hold the writer's lock, which ends with the process that holds it."""
        deadline = time.monotonic() + wait_s
        with self._lock_file() as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        lock.seek(0)
                        holder = lock.read().strip() or "unknown"
                        raise CatalogueBusyError(f"{self.folder}: process {holder} writes to it, for more than {wait_s:g} s; try again") from error
                    time.sleep(0.01)
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _lock_file(self) -> IO[str]:
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                _sync_folder(self.folder.parent)
            return (self.folder / LOCK_FILE).open("a+")
        except OSError as error:
            raise CatalogueLogError(f"{self.folder}: cannot be written ({error}); let this process write there, or set another catalogue_folder") from error

    def _end(self) -> _Position:
        """The end of the log, with the lock held; what a crash left after it is removed."""
        written = self._written_to
        if written is not None and not (self.folder / written.name).exists():  # another process compacted
            written = None
        scan = _Scan(self.folder, written.sequence if written else None, written)
        try:
            for _ in scan:
                pass
        except (FileNotFoundError, _Unsettled) as error:
            raise CatalogueLogError(f"{self.folder}: {error}; bring what is missing back from a backup") from error
        if scan.torn_bytes:
            logger.warning("%s: dropping %d bytes of a change that was never acknowledged", self.folder / scan.position.name, scan.torn_bytes)
            with (self.folder / scan.position.name).open("rb+") as file:
                file.truncate(scan.position.offset)
                os.fsync(file.fileno())
        return scan.position

    def _write(self, name: str, offset: int, line: bytes, sequence: int) -> _Position:
        path = self.folder / name
        try:
            new = not path.exists()
            with path.open("ab", buffering=0) as file:
                try:
                    written = file.write(line)
                    if written != len(line):
                        raise OSError(f"{written} of {len(line)} bytes were written")
                except OSError:
                    file.truncate(offset)  # no reader took half a line; a whole one stays, its number is used
                    raise
                os.fsync(file.fileno())
            if new:
                _sync_folder(self.folder)
        except OSError as error:
            self._written_to = None
            raise CatalogueLogError(f"{path}: cannot be written ({error}); free the disk or repair it, then send the same changes again") from error
        return _Position(name, offset + len(line), sequence)


class _Scan:
    """Reads the whole lines that hold changes after `after`, from `start` where that is their place still, each when it is asked for.

    Attributes:
        position: the end of what was read. sequence: its number. covered: that of the compacted file. torn_bytes: after `position`.

    Raises (while iterating):
        CatalogueLogError: damage. FileNotFoundError, _Unsettled: the files moved, or one is missing.
    """

    def __init__(self, folder: Path, after: int | None, start: _Position | None) -> None:
        self._folder, self._after, self._start = folder, after, start
        self.position = _Position("", 0, 0)
        self.covered = self.torn_bytes = 0

    @property
    def sequence(self) -> int:
        return self.position.sequence

    def __iter__(self) -> Iterator[_Line]:
        files = _files(self._folder)
        compacted = max((file for file in files if _kind(file) == "compacted"), key=_number, default=None)
        through = 0 if compacted is None else _number(compacted)
        segments = sorted((file for file in files if _kind(file) == "changes"), key=_number)
        segments = [file for place, file in enumerate(segments) if place == len(segments) - 1 or _number(segments[place + 1]) > through + 1]
        start = self._start if self._start is not None and self._start.sequence == self._after else None
        if start is not None and any(file.name == start.name for file in segments) and start.sequence >= through:
            self.position = start
            segments = [file for file in segments if _number(file) >= _number(Path(start.name))]
        else:
            if compacted is not None:
                yield from self._compacted(compacted, start if start is not None and start.name == compacted.name else None)
            skipped = [place for place, file in enumerate(segments) if self._after is not None and through < _number(file) <= self._after + 1]
            if skipped:  # what lies before the segment that holds the first wanted change
                segments = segments[skipped[-1] :]
                self.position = self.position._replace(sequence=_number(segments[0]) - 1)
        for file in segments:
            yield from self._segment(file, through, is_last=file is segments[-1])

    def _compacted(self, file: Path, start: _Position | None) -> Iterator[_Line]:
        with file.open("rb") as stream:
            first = stream.readline()
            head = opened(first[:-1])
            if head is None or "covered" not in head:
                raise _damaged(file, 0)
            self.covered = int(head["covered"])
            if self._after is not None and self._after < self.covered:
                raise CatalogueLogError(
                    f"{file}: holds nothing up to change {self.covered}, wanted were those after {self._after}; serve a bundle that covers {self.covered} or more"
                )
            offset = start.offset if start is not None and start.covered == self.covered else len(first)
            size = os.fstat(stream.fileno()).st_size
            if self._after is None or self._after < _number(file):
                for changes, end in _lines(file, stream, offset, size, torn_allowed=False):
                    self.position = _Position(file.name, end, changes[-1].sequence, self.covered)
                    yield _Line(changes, self.position)
        self.position = _Position(file.name, size, _number(file), self.covered)

    def _segment(self, file: Path, through: int, *, is_last: bool) -> Iterator[_Line]:
        offset = self.position.offset if self.position.name == file.name else 0
        if offset == 0 and _number(file) > self.position.sequence + 1:
            raise _Unsettled(f"changes {self.position.sequence + 1} to {_number(file) - 1} are missing before {file.name}")
        read = offset
        self.position = _Position(file.name, offset, self.position.sequence)
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < offset:
                raise _Unsettled(f"{file.name}: ends at byte {size} and was whole up to byte {offset}: it has lost its end")
            for changes, end in _lines(file, stream, offset, size, torn_allowed=is_last):
                read = end
                if changes[-1].sequence > through:
                    if changes[0].sequence != max(self.position.sequence, through) + 1:
                        raise _Unsettled(f"{file.name}: change {changes[0].sequence} follows {self.position.sequence}")
                    self.position = _Position(file.name, end, changes[-1].sequence)
                    yield _Line(changes, self.position)
                else:  # a compaction that could not delete this file
                    self.position = self.position._replace(offset=end)
        self.torn_bytes = size - read


def _lines(file: Path, stream: IO[bytes], offset: int, size: int, *, torn_allowed: bool) -> Iterator[tuple[list[Change], int]]:
    """The changes of each line of a file from `offset` on, and where it ends, read one by one; stops at a torn last line where that may be.

    Args:
        stream: of the file. size: of what is looked at; what is appended while this reads comes with the next look.
    """
    stream.seek(offset)
    while offset < size and (line := stream.readline(size - offset)):
        values = opened(line[:-1]) if line.endswith(b"\n") else None
        if values is None:
            rest = line + stream.read(size - offset - len(line))
            seal = rest.find(SEAL)
            if torn_allowed and len(line) == len(rest) and (seal < 0 or seal + SEAL_BYTES >= len(rest)):  # else a whole line, or more, is in it
                return
            raise _damaged(file, offset)
        try:
            changes = [change_of(one) for one in values["changes"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, offset) from error
        offset += len(line)
        yield changes, offset


def _damaged(file: Path, offset: int) -> CatalogueLogError:
    return CatalogueLogError(f"{file}: the line at byte {offset} is damaged; bring the file back from a backup")


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if _NAME.fullmatch(file.name)] if folder.is_dir() else []


def _name(kind: str, sequence: int) -> str:
    return f"{kind}-{sequence:020d}.jsonl"


def _kind(file: Path) -> str:
    return file.name.partition("-")[0]


def _number(file: Path) -> int:
    return int(file.stem.partition("-")[2])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
