"""Artifacts: whole or not at all, checked by hash, alike on a disk and on S3."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from genrecall import storage
from genrecall.storage import MANIFEST, Artifact, ArtifactError, Stage, cache_folder, open_artifact


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 1


def stage(uri: str, *, config: Config | None = None, parents: dict[str, Artifact] | None = None, version: int = 1) -> Stage:
    return Stage(kind="toy", uri=uri, config=config or Config(), algorithm_version=version, parents=parents or {}, seed=0, job="make_toy")


def make(one: Stage, text: str = "hello") -> Artifact:
    with one.write() as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "a.txt").write_text(text)
        (draft.path / "sub" / "b.txt").write_text("b")
        draft.row_counts["rows"] = 3
    return one.open()


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GENRECALL_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_an_artifact_opens_with_its_files_and_counts(root: str) -> None:
    artifact = make(stage(f"{root}/toy"))
    assert artifact.file("a.txt").read_text() == "hello"
    assert artifact.file("sub/b.txt").read_text() == "b"
    assert artifact.manifest["row_counts"] == {"rows": 3}
    assert artifact.manifest["libraries"]["torch"]


def test_the_manifest_notes_the_workers_of_a_training_and_nothing_hangs_on_it(tmp_path: Path) -> None:
    one = stage(str(tmp_path / "toy"))
    made = make(one)
    with one.write(num_workers=4) as draft:
        shutil.copytree(made.path / "sub", draft.path / "sub")
        shutil.copy(made.path / "a.txt", draft.path)
    assert one.open().manifest["num_workers"] == 4
    assert one.open().hash == made.hash


def test_a_matching_artifact_is_found_and_another_config_version_or_parent_is_not(root: str) -> None:
    parent = make(stage(f"{root}/parent"))
    other_parent = make(stage(f"{root}/parent2"), text="other")
    uri = f"{root}/toy"
    make(stage(uri, parents={"p": parent}))
    assert stage(uri, parents={"p": parent}).current() is not None
    assert stage(uri, parents={"p": parent}).current(force=True) is None
    assert stage(uri, parents={"p": parent}, config=Config(size=2)).current() is None
    assert stage(uri, parents={"p": parent}, version=2).current() is None
    assert stage(uri, parents={"p": other_parent}).current() is None


def test_writing_again_replaces_all_files(root: str) -> None:
    one = stage(f"{root}/toy")
    make(one)
    with one.write() as draft:
        (draft.path / "c.txt").write_text("c")
    assert set(one.open().manifest["files"]) == {"c.txt"}


def test_an_interrupted_write_leaves_what_was_there_and_nothing_else(root: str) -> None:
    one = stage(f"{root}/toy")
    make(one)

    def interrupted() -> None:
        with one.write() as draft:
            (draft.path / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert one.open().file("a.txt").read_text() == "hello"
    if "://" not in root:
        assert sorted(os.listdir(root)) == ["toy"]


def test_drafts_of_killed_writers_go_after_a_day_and_others_stay(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where drafts of remote artifacts lie
    names = {
        "old": f".toy.{'a' * 32}.tmp",
        "fresh": f".toy.{'b' * 32}.tmp",
        "another's": f".toy.big.{'c' * 32}.tmp",
        "busy": f".toy.{'d' * 32}.tmp",  # old, but a file in it was written now
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    (tmp_path / names["busy"] / "part").touch()
    for which in ("old", "another's", "busy"):
        os.utime(tmp_path / names[which], (0, time.time() - 25 * 3600))
    make(stage(f"{root}/toy"))
    assert {which for which, name in names.items() if (tmp_path / name).exists()} == {"fresh", "another's", "busy"}


@pytest.mark.parametrize("how", ["current", "write"])
def test_an_artifact_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path, how: str) -> None:
    one = stage(str(tmp_path / "toy"))
    artifact = make(one)
    artifact.path.rename(tmp_path / f".toy.{'a' * 32}.old")  # killed between the two renames
    if how == "current":
        assert one.current() is not None
    else:
        with pytest.raises(KeyboardInterrupt), one.write():
            raise KeyboardInterrupt
    assert one.open().file("a.txt").read_text() == "hello"
    assert os.listdir(tmp_path) == ["toy"]


def test_an_artifact_moved_aside_goes_where_another_took_its_place(tmp_path: Path) -> None:
    one = stage(str(tmp_path / "toy"))
    make(one, "before").path.rename(tmp_path / f".toy.{'a' * 32}.old")
    make(dataclasses.replace(one, uri=str(tmp_path / "other")), "after").path.rename(tmp_path / "toy")  # killed before the old one was deleted
    current = one.current()
    assert current is not None
    assert current.file("a.txt").read_text() == "after"
    assert os.listdir(tmp_path) == ["toy"]


def test_a_changed_file_is_refused_and_the_job_named(tmp_path: Path) -> None:
    artifact = make(stage(str(tmp_path / "toy")))
    (artifact.path / "a.txt").write_text("jello")
    with pytest.raises(ArtifactError, match=r"does not match its manifest: a\.txt \(changed\); rerun jobs/make_toy\.py"):
        open_artifact(artifact.uri)


@pytest.fixture
def remote(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """An artifact on S3 whose copy is in the cache."""
    monkeypatch.setenv("GENRECALL_CACHE", str(tmp_path / "cache"))
    return make(stage(f"{bucket}/{tmp_path.name}/toy"))


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt", MANIFEST])
@pytest.mark.parametrize("damage", ["lost", "cut off"])
def test_a_damaged_copy_of_a_remote_artifact_is_fetched_once_more(remote: Artifact, name: str, damage: str) -> None:
    file = remote.path / name
    file.write_text("") if damage == "cut off" else file.unlink()
    again = open_artifact(remote.uri)
    assert again.path == remote.path
    assert (again.file("a.txt").read_text(), again.file("sub/b.txt").read_text(), again.file(MANIFEST).exists()) == ("hello", "b", True)
    assert [path.name for path in remote.path.parent.iterdir()] == [remote.path.name]


def test_what_is_damaged_in_the_store_itself_is_refused_and_not_kept(remote: Artifact) -> None:
    filesystem, root = fsspec.core.url_to_fs(remote.uri)
    filesystem.pipe_file(f"{root}/a.txt", b"jello")
    (remote.path / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt \(changed\); rerun jobs/make_toy\.py"):
        open_artifact(remote.uri)
    assert not list(remote.path.parent.iterdir())


def test_a_copy_is_on_disk_before_it_gets_its_name(remote: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    (remote.path / "a.txt").unlink()
    synced, sync = [], storage._sync

    def seen(path: Path) -> None:
        synced.append((path.name, remote.path.exists()))
        sync(path)

    monkeypatch.setattr(storage, "_sync", seen)
    open_artifact(remote.uri)
    assert {("a.txt", False), ("b.txt", False), ("sub", False), (MANIFEST, False), ("cache", True)} <= set(synced)


def test_the_cache_is_a_folder_of_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENRECALL_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert cache_folder() == folder
    folder.chmod(0o755)
    with pytest.raises(ArtifactError, match=r"expected a folder of this user's alone .*GENRECALL_CACHE"):
        cache_folder()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="expected a folder of this user's alone"):
        cache_folder()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(ArtifactError, match="expected a folder of this user's alone"):
        cache_folder()


def test_missing_and_unlisted_files_are_refused(tmp_path: Path) -> None:
    artifact = make(stage(str(tmp_path / "toy")))
    (artifact.path / "a.txt").unlink()
    (artifact.path / "new.pkl").write_text("?")
    with pytest.raises(ArtifactError, match=r"a\.txt \(missing\), new\.pkl \(not in the manifest\)"):
        open_artifact(artifact.uri)


def test_no_artifact_and_the_wrong_kind_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no encoder here"):
        open_artifact(str(tmp_path / "none"), kind="encoder")
    artifact = make(stage(str(tmp_path / "toy")))
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'encoder', found 'toy'"):
        open_artifact(artifact.uri, kind="encoder")


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd"])
def test_file_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    artifact = make(stage(str(tmp_path / "toy")))
    with pytest.raises(ArtifactError, match="points outside the artifact"):
        artifact.file(name)
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": "0", "bytes": 0}
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="a name that leaves the folder"):
        open_artifact(artifact.uri)


@pytest.mark.parametrize("content", [b"", b"{", b'{"kind": "\xff"}'])
def test_a_manifest_that_cannot_be_read_names_what_to_rerun(tmp_path: Path, content: bytes) -> None:
    artifact = make(stage(str(tmp_path / "toy")))
    (artifact.path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"toy/manifest\.json: not JSON \(.*\); rerun the job that made it with --force"):
        open_artifact(artifact.uri)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    artifact = make(stage(str(tmp_path / "toy")))
    manifest = json.loads((artifact.path / MANIFEST).read_text()) | {"format_version": 99}
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="artifact format 99, this version reads 1"):
        open_artifact(artifact.uri)
