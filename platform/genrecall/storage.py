"""Artifact folders: written whole or not at all, described by a manifest, checked by hash when opened.

A local artifact is written under a temporary name, fsynced and renamed; one already there is first moved aside, and moved back by the next run of its
job should the process die in between. On an object store, which has no rename, the files
go up first and the manifest last: a folder without a manifest is not an artifact. The hash of an artifact is the sha256 of
its manifest without the creation time, so it covers every file, the config, the algorithm version and the parents.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from genrecall.config import config_hash, to_dict

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

FORMAT_VERSION = 1
_ABANDONED_S = 24 * 3600
MANIFEST = "manifest.json"
_JOB_OF_KIND = {
    "dataset": "prepare_data",
    "encoder": "train_encoder",
    "quantizer": "train_quantizer",
    "sid_index": "build_sid_index",
    "generator": "train_generator",
    "ranker": "train_ranker",
    "aligned": "align_generator",
    "evaluation": "evaluate",
    "bundle": "register_model",
}
_RECORDED_LIBRARIES = ("genrecall", "torch", "ray", "deepspeed", "mlflow", "faiss-cpu", "transformers", "lightgbm", "numpy", "pyarrow")


class ArtifactError(ValueError):
    """An artifact that is missing, incomplete, changed or of the wrong kind; the message says which job to rerun."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its files lie under `path` on this machine."""

    uri: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """sha256 (hex) of what the artifact is; parents are recorded by it."""
        return manifest_hash(self.manifest)

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    def file(self, name: str) -> Path:
        """The path of one file (or folder) of the artifact.

        Raises:
            ArtifactError: the name leaves the artifact's folder or does not exist.
        """
        path = (self.path / name).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise ArtifactError(f"{self.uri}: {name!r} points outside the artifact")
        if not path.exists():
            raise ArtifactError(f"{self.uri}: has no {name!r}; it holds {', '.join(sorted(p.name for p in self.path.iterdir()))}")
        return path

    def json(self, name: str) -> Any:
        """One JSON file of the artifact, parsed."""
        return json.loads(self.file(name).read_text())


@dataclass
class Draft:
    """An artifact being written: put files under `path`, and counts worth keeping into `row_counts`."""

    path: Path
    row_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One artifact to be made: what it is, where it goes and what it is made from.

    Usage in a stage function::

        stage = Stage(kind="encoder", uri=uri, config=config, algorithm_version=1, parents={"dataset": dataset}, seed=config.seed, job="train_encoder")
        if (done := stage.current(force=force)):
            return done
        with stage.write() as draft:
            ...
        return stage.open()
    """

    kind: str
    uri: str
    config: Any
    algorithm_version: int
    parents: Mapping[str, Artifact]
    seed: int
    job: str

    @property
    def work_uri(self) -> str:
        """Where the stage keeps its checkpoints until it is done; named by config and parents so that others never resume from it."""
        return f"{self.uri}.work/{self._identity()[:16]}"

    def current(self, *, force: bool = False) -> Artifact | None:
        """The artifact at `uri` if it was made from the same config, algorithm and parents; with `force`, clears checkpoints and returns None."""
        if force:
            remove_tree(f"{self.uri}.work")
            return None
        if "://" not in self.uri:
            _recover(Path(self.uri))
        manifest = read_manifest(self.uri)
        if manifest is None or manifest.get("identity") != self._identity():
            return None
        return open_artifact(self.uri, kind=self.kind)

    @contextlib.contextmanager
    def write(self, *, num_workers: int | None = None) -> Iterator[Draft]:
        """Yield a draft folder; on success it becomes the artifact at `uri`, on any error nothing is left.

        What killed writers of this artifact left is cleared first: drafts untouched for a day, and an artifact moved aside.

        Args:
            num_workers: of the training behind it, for the manifest: batches depend on it, though the identity does not.
        """
        remote = "://" in self.uri
        parent = Path(tempfile.gettempdir()) if remote else Path(self.uri).parent
        parent.mkdir(parents=True, exist_ok=True)
        if not remote:
            _recover(Path(self.uri))
        for abandoned in _left_behind(parent, Path(self.uri).name, "tmp"):
            if _last_touched(abandoned) < time.time() - _ABANDONED_S:
                shutil.rmtree(abandoned, ignore_errors=True)
        path = parent / f".{Path(self.uri).name}.{uuid.uuid4().hex}.tmp"
        path.mkdir()
        try:
            draft = Draft(path)
            yield draft
            manifest = self._manifest(draft) | ({} if num_workers is None else {"num_workers": num_workers})
            _write_synced(path / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))
            if remote:
                _upload(path, self.uri)
            else:
                _replace(path, Path(self.uri))
        finally:
            shutil.rmtree(path, ignore_errors=True)
        remove_tree(f"{self.uri}.work")

    def open(self) -> Artifact:
        """Open the finished artifact."""
        return open_artifact(self.uri, kind=self.kind)

    def _identity(self) -> str:
        parts = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "config": config_hash(self.config),
            "algorithm_version": self.algorithm_version,
            "parents": {name: parent.hash for name, parent in sorted(self.parents.items())},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _manifest(self, draft: Draft) -> dict[str, Any]:
        files = {
            path.relative_to(draft.path).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            for path in sorted(draft.path.rglob("*"))
            if path.is_file()
        }
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "job": self.job,
            "identity": self._identity(),
            "algorithm_version": self.algorithm_version,
            "config": to_dict(self.config),
            "config_hash": config_hash(self.config),
            "parents": {name: {"uri": parent.uri, "kind": parent.kind, "hash": parent.hash} for name, parent in self.parents.items()},
            "seed": self.seed,
            "row_counts": draft.row_counts,
            "files": files,
            "libraries": library_versions(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def open_artifact(uri: str, *, kind: str | None = None) -> Artifact:
    """Open an artifact folder, local or remote (`s3://...`), and check every file against the manifest.

    Args:
        uri: folder path or object-store prefix. A remote one is copied to `cache_folder` first; a copy that is damaged is fetched once more.
        kind: what it must be, e.g. `"encoder"`.

    Raises:
        ArtifactError: no artifact there, wrong kind, a file missing or changed; or a cache folder that cannot be trusted.
    """
    manifest = read_manifest(uri)
    if manifest is None:
        raise ArtifactError(f"{uri}: no {kind or 'artifact'} here (no {MANIFEST}); run jobs/{_JOB_OF_KIND.get(kind or '', 'run_pipeline')}.py first")
    if kind is not None and manifest.get("kind") != kind:
        raise ArtifactError(f"{uri}: expected an artifact of kind {kind!r}, found {manifest.get('kind')!r}")
    if "://" in uri:
        return Artifact(uri=uri, path=_download(uri, manifest), manifest=manifest)
    check_files(Path(uri), manifest, uri)
    return Artifact(uri=uri, path=Path(uri), manifest=manifest)


def read_manifest(uri: str) -> dict[str, Any] | None:
    """The manifest at `uri`, or None where there is no artifact."""
    filesystem, root = fsspec.core.url_to_fs(uri)
    name = f"{root}/{MANIFEST}"
    if not filesystem.exists(name):
        return None
    try:
        manifest = json.loads(filesystem.cat_file(name))
    except ValueError as error:  # no UTF-8 either
        raise ArtifactError(f"{uri}/{MANIFEST}: not JSON ({error}); rerun the job that made it with --force") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{uri}: artifact format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}; rerun jobs/{manifest.get('job')}.py"
        )
    return dict(manifest)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) over the parts of a manifest that make the artifact what it is (not the creation time or library versions)."""
    parts = {name: manifest.get(name) for name in ("format_version", "kind", "identity", "files")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, manifest: Mapping[str, Any], uri: str) -> None:
    """Check that the files under `path` are those of the manifest, by sha256.

    Raises:
        ArtifactError: naming every missing, changed or unlisted file and the job to rerun.
    """
    wrong = []
    for name, entry in manifest["files"].items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            wrong.append(f"{name} (a name that leaves the folder)")
        elif not file.is_file():
            wrong.append(f"{name} (missing)")
        elif file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            wrong.append(f"{name} (changed)")
    unlisted = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - set(manifest["files"]) - {MANIFEST}
    wrong += [f"{name} (not in the manifest)" for name in sorted(unlisted)]
    if wrong:
        raise ArtifactError(f"{uri}: does not match its manifest: {', '.join(wrong)}; rerun jobs/{manifest.get('job')}.py with --force")


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where copies of what lies in remote stores are kept: `GENRECALL_CACHE`, else a folder that is this user's alone under the temporary one.

    Raises:
        ArtifactError: that folder is another user's or open to others, who could change what is in it after it was checked.
    """
    if given := os.environ.get("GENRECALL_CACHE"):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"genrecall-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ArtifactError(f"{folder}: expected a folder of this user's alone (mode 0700); remove it, or name another one in GENRECALL_CACHE")
    return folder


def cached(target: Path, fetch: Callable[[Path], Path], check: Callable[[Path], object]) -> Path:
    """The folder `target` of a cache, which `check` found to be whole; fetched where it is not there, and once more where it is damaged.

    Args:
        fetch: (an empty folder) -> the folder in it, or itself, that is to be kept.
        check: raises ValueError where a folder is not what it should be; what was just fetched and is not is not kept.
    """
    if target.is_dir():
        try:
            check(target)
            return target
        except ValueError as error:
            logger.warning("%s: the copy is damaged and is fetched again: %s", target, error)
            aside = target.parent / f".{uuid.uuid4().hex}.old"
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    partial = target.parent / f".{uuid.uuid4().hex}.tmp"
    partial.mkdir(parents=True)
    try:
        folder = fetch(partial)
        check(folder)
        _sync_tree(folder)
        try:
            folder.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def remove_tree(uri: str) -> None:
    """Delete a folder and all in it, local or remote; nothing happens where there is none."""
    filesystem, root = fsspec.core.url_to_fs(uri)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape results."""
    found = {}
    for name in _RECORDED_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an artifact already there is moved aside first and deleted after."""
    _sync_tree(source)
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
    if target.exists():
        target.rename(aside)
    source.rename(target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _recover(target: Path) -> None:
    """Finish what a process killed inside `_replace` left: the artifact moved aside goes back where no other took its place, else it goes."""
    aside = _left_behind(target.parent, target.name, "old")
    if aside and not target.exists():
        aside.pop().rename(target)
    for older in aside:
        shutil.rmtree(older, ignore_errors=True)


def _left_behind(parent: Path, name: str, suffix: str) -> list[Path]:
    """The folders `.NAME.<uuid>.SUFFIX` in `parent`, oldest first."""
    own = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}\.{suffix}")
    found = [path for path in parent.glob(f".*.{suffix}") if own.fullmatch(path.name)]
    return sorted(found, key=_last_touched)


def _last_touched(folder: Path) -> float:
    """When something in `folder` last changed, in seconds since 1970; 0 where it is gone."""
    touched = [0.0]
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            touched.append(path.stat().st_mtime)
    return max(touched)


def _upload(source: Path, uri: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(uri)
    if filesystem.exists(f"{root}/{MANIFEST}"):
        filesystem.rm(f"{root}/{MANIFEST}")
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != MANIFEST)
    for file in [*files, source / MANIFEST]:
        filesystem.put_file(str(file), f"{root}/{file.relative_to(source).as_posix()}")


def _download(uri: str, manifest: Mapping[str, Any]) -> Path:
    """A remote artifact's copy in the cache, whole and checked."""
    filesystem, root = fsspec.core.url_to_fs(uri)

    def fetch(folder: Path) -> Path:
        for name in [*manifest["files"], MANIFEST]:
            destination = (folder / name).resolve()
            if not destination.is_relative_to(folder.resolve()):
                raise ArtifactError(f"{uri}: file name {name!r} leaves the artifact's folder")
            destination.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(destination))
        return folder

    def check(folder: Path) -> None:
        found = read_manifest(str(folder))
        if found is None or manifest_hash(found) != manifest_hash(manifest):
            raise ArtifactError(f"{uri}: its {MANIFEST} changed while it was copied; try again")
        check_files(folder, manifest, uri)

    return cached(cache_folder() / manifest_hash(manifest), fetch, check)
