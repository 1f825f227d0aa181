"""Where raw tables come from: a site's own files, an adapter of an outside data set, or the built-in marketplace.

A site's own files are read where they lie. What an adapter or the marketplace streams is first written to Parquet in the job's
work folder, in files of bounded size, so that all sources take the same path afterwards and memory stays flat.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from genrecall.data.schema import EVENTS, ITEMS, USERS, DataError, RawTables
from genrecall.data.table_readers import Portion, find_portions
from genrecall.storage import Artifact

# Source name -> (adapter module, its usual folder under the data root).
ADAPTERS = {
    "home_depot": ("home_depot", "home_depot"),
    "amazon_scientific": ("amazon", "amazon_scientific"),
    "kuaisearch": ("kuaisearch", "kuaisearch_sample"),
    "jdsearch": ("jdsearch", "jdsearch_sample"),
    "ubi": ("ubi", "ubi_sample"),
}
_STAGED_ROWS = 250_000
_HASHED_BYTES = 256 << 20
_MARKS = ("ETag", "mtime", "LastModified", "etag", "last_modified", "updated", "created")  # as the stores of fsspec call them


@dataclass(frozen=True)
class Source:
    """A source before anything is read. `origin` stands in for a parent artifact: its hash changes when the input does."""

    name: str
    origin: Artifact
    query_kind: str
    split: str | None  # None: decided by what the events hold
    raw: RawTables | None = None
    portions: tuple[Portion, ...] = ()


def open_files(items: str, events: str, users: str | None, data_root: str) -> Source:
    """A site's own tables in canonical columns; places are relative to `data_root` unless absolute or a URI.

    Raises:
        DataError: nothing at a place, or a file of unknown format.
    """
    portions: list[Portion] = []
    for table, place in (("items", items), ("users", users), ("events", events)):
        if place:
            portions += find_portions(table, within(data_root, place), first_number=len(portions))
    uris = sorted({portion.uri for portion in portions})
    return Source("canonical", _origin("canonical", data_root, uris), "real", None, portions=tuple(portions))


def open_adapter(name: str, folder: str | None, data_root: str, *, seed: int) -> Source:
    """An outside data set, read by its adapter from `folder` (default: the usual one) under `data_root`."""
    module, usual = ADAPTERS[name]
    root = Path(within(data_root, folder or usual))
    if "://" in str(data_root) or not root.is_dir():
        raise DataError(f"{name}: no folder {root}; put the data set's files there, or set GENRECALL_DATA or folder= to where they lie (a local folder)")
    raw: RawTables = importlib.import_module(f"genrecall.data.adapters.{module}").read(root, seed=seed)
    files = sorted(str(path) for path in root.rglob("*") if path.is_file())
    return Source(name, _origin(name, str(root), files), raw.query_kind, raw.split, raw=raw)


def open_marketplace(size: str, *, seed: int) -> Source:
    """The built-in simulated shop."""
    marketplace = importlib.import_module("genrecall.data.marketplace")
    shop = marketplace.Marketplace(size, seed=seed)
    raw = RawTables(items=shop.items(), users=shop.users(), events=shop.events(), query_kind="simulated", split="time")
    manifest = {"kind": "source", "identity": f"marketplace {marketplace.MARKETPLACE_VERSION} {size} {seed}"}
    return Source("marketplace", Artifact("marketplace", Path(), manifest), raw.query_kind, raw.split, raw=raw)


def open_erased_users(place: str, data_root: str) -> tuple[frozenset[str], Artifact]:
    """The user ids of a text file, one a line, and what stands for them as a parent: its hash changes when the set of ids does, and holds no id.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    uri = within(data_root, place)
    try:
        with fsspec.open(uri, "rb") as file:
            ids = frozenset(line.strip() for line in file.read().decode("utf-8-sig").splitlines()) - {""}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"erased_users: no file {uri}; give a text file with one user id a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 (byte {error.start}); save it as UTF-8 text with one user id a line") from error
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    return ids, Artifact(uri, Path(), {"kind": "erased_users", "identity": digest})


def stage_tables(source: Source, folder_uri: str) -> list[Portion]:
    """Write what a source streams to Parquet files under `folder_uri` and return them as portions; a site's own files stay put."""
    if source.raw is None:
        return list(source.portions)
    filesystem, root = fsspec.core.url_to_fs(folder_uri)
    prefix = folder_uri.removesuffix(root) if "://" in folder_uri else ""
    portions: list[Portion] = []
    for table, schema, chunks in (("items", ITEMS, source.raw.items), ("users", USERS, source.raw.users), ("events", EVENTS, source.raw.events)):
        first_row = 0
        for number, piece in enumerate(_pieces(chunks, schema, f"{source.name}: {table}")):
            name = f"{root}/{table}/part-{number:05d}.parquet"
            filesystem.makedirs(f"{root}/{table}", exist_ok=True)
            with filesystem.open(name, "wb") as file:
                pq.write_table(piece, file, compression="zstd")
                groups = tuple(range(-(-len(piece) // (1 << 20))))
            portions.append(Portion(table, prefix + name, f"{source.name} ({table})", "parquet", len(portions), first_row, groups, len(piece)))
            first_row += len(piece)
    return portions


def _pieces(chunks: Iterable[pa.Table], schema: pa.Schema, where: str) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for chunk in chunks:
        if chunk.column_names != schema.names:
            raise DataError(f"{where}: expected the columns {', '.join(schema.names)}, got {', '.join(chunk.column_names)}; the reader of this source is wrong")
        waiting.append(chunk)
        if sum(map(len, waiting)) >= _STAGED_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def within(data_root: str, place: str) -> str:
    """`place` under the data root, unless it is absolute or a URI.

    Raises:
        DataError: there is no data root and `place` needs one.
    """
    if "://" in place or Path(place).is_absolute():
        return place
    if not data_root:
        raise DataError(
            f"{place}: is looked for under GENRECALL_DATA, which is not set in this Ray job; set it to an absolute path or URI in the job's runtime environment "
            "(env_vars) or where Ray is started, or give an absolute path"
        )
    return f"{data_root.rstrip('/')}/{place}"


def _origin(name: str, root: str, uris: list[str]) -> Artifact:
    """Stands for the input files: by content where they are small, else by size and the store's own mark (ETag or time of change)."""
    files: dict[str, Any] = {}
    for uri in uris:
        filesystem, path = fsspec.core.url_to_fs(uri)
        info = filesystem.info(path)
        entry = {"bytes": info["size"]}
        if info["size"] <= _HASHED_BYTES and "://" not in uri:
            with filesystem.open(path, "rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            entry["mark"] = str(next((info[name] for name in _MARKS if info.get(name)), None))
        files[uri.removeprefix(root).lstrip("/")] = entry
    return Artifact(root, Path(), {"kind": "source", "identity": name, "files": files})
