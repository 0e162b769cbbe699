"""Files that are replaced in one step."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ood_scores.atomic import LockedFile, is_marked, make_folder, replacing, require_unlocked, require_writable
from ood_scores.errors import BadInput, CacheBusy, CacheWriteFailed


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_file_is_replaced_when_the_context_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    for content in (b"first", b"2"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert file.closed
        assert files(path.parent) == {"a.bin": content}


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"old")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match=f"{folder} cannot be a folder, since a file is in its way"):
            make_folder(folder)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_error_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(TypeError), replacing(tmp_path / "a.bin") as file:
        file.write("text is no bytes")
    assert file.closed
    assert files(tmp_path) == {"a.bin": b"old"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_refused_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, refuse)
    message = r"could not write .*a\.bin \(.*No space left on device\): buy a disk\.$"
    with pytest.raises(CacheWriteFailed, match=message), replacing(tmp_path / "a.bin", "buy a disk") as file:
        file.write(b"new")
    assert files(tmp_path) == {"a.bin": b"old"}


def test_exclusive_file_replaces_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replacing(path, exclusive=True) as file:
        file.write(b"first")
    assert files(tmp_path) == {"a.bin": b"first"}
    with pytest.raises(CacheBusy, match="another process"), replacing(path, exclusive=True) as file:
        file.write(b"second")
    assert files(tmp_path) == {"a.bin": b"first"}


def test_open_file_stays_locked(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replacing(path, keep_open=True) as file:
        file.write(b"first")
    with pytest.raises(CacheBusy, match="being written by another process"):
        LockedFile(path, "r+")
    file.write(b" and more")
    file.close()
    assert files(tmp_path) == {"a.bin": b"first and more"}


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".a.bin.01234567.part", ".a.bin.89abcdef.part", ".b.bin.01234567.part"):
        (tmp_path / name).write_bytes(b"")
    with LockedFile(tmp_path / ".a.bin.89abcdef.part", "r+"), replacing(tmp_path / "a.bin"):
        pass
    assert sorted(files(tmp_path)) == [".a.bin.89abcdef.part", ".b.bin.01234567.part", "a.bin"]


def test_file_systems_without_locks_are_named_and_their_hidden_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    (tmp_path / ".a.bin.01234567.part").write_bytes(b"")  # of another process, which may still write it
    monkeypatch.setattr("ood_scores.atomic.fcntl.flock", refuse)
    message = r"has no locks \(No locks available\): make sure that no two"
    with pytest.warns(UserWarning, match=message), replacing(tmp_path / "a.bin") as file:
        file.write(b"first")
    require_unlocked(tmp_path / "a.bin")
    assert files(tmp_path) == {".a.bin.01234567.part": b"", "a.bin": b"first"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_folders_that_may_not_be_written_are_told_from_full_disks(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(CacheWriteFailed, match=r"the folder may not be written, so choose another\.$"),
        replacing(tmp_path / "a.bin"),
    ):
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(CacheWriteFailed, match=r"make room on the disk, or choose another path\.$"),
        replacing(tmp_path / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folders_are_checked_without_creating_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    require_writable(tmp_path / "new" / "folder")
    assert files(tmp_path) == {"file": b""}
    with pytest.raises(BadInput, match="a file is in its way: choose another"):
        require_writable(tmp_path / "file" / "folder")
    asked = []
    monkeypatch.setattr(os, "access", lambda *given: asked.append(given))
    with pytest.raises(CacheWriteFailed, match="new/folder: the folder may not be written, so choose another"):
        require_writable(tmp_path / "new" / "folder")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_only_writers_lock(tmp_path: Path) -> None:
    with LockedFile(tmp_path / "a", "x"), pytest.raises(CacheBusy, match="being written by another process"):
        require_unlocked(tmp_path / "a")
    require_unlocked(tmp_path / "a")


def test_marks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\x01 ood_scores features \x02")
    assert is_marked(tmp_path / "a", "ood_scores features")
    assert not is_marked(tmp_path / "a", "ood_scores scorer")
    assert not is_marked(tmp_path, "ood_scores features")
    assert not is_marked(tmp_path / "b", "ood_scores features")
