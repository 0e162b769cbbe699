"""Crash-safe files: locked for one writer, replaced in one step, with an error if the disk refuses a write."""

from __future__ import annotations

import errno
import glob
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ood_scores.errors import BadInput, CacheBusy, CacheWriteFailed
from ood_scores.user_warnings import warn_user

try:
    import fcntl
except ImportError:  # Windows, where writers are not locked out
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EIO, 524}
"""Error numbers of file systems without locks, such as some of NFS, Lustre, and FUSE (524 is Linux's own ENOTSUPP)."""

FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Error numbers of folders that may not be written, or are on a read-only disk."""

COPY_BYTES = 2**24
MAKE_ROOM = "make room on the disk, or choose another path"
CHOOSE_ANOTHER = "the folder may not be written, so choose another"


class LockedFile(io.FileIO):
    """A file that is locked for one writer and hides errors from HDF5.

    HDF5 does not survive a refused write. Therefore ``write`` and ``truncate``, which HDF5 calls, store the first error
    and ignore everything after it; ``check`` raises it. On a file system without locks, ``is_locked`` is False and
    there is a warning.

    Raises:
        CacheBusy: if another process has locked the file.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.error: OSError | None = None
        self.is_locked = False
        try:
            if fcntl:
                fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_locked = True
        except BlockingIOError as error:
            super().close()
            raise CacheBusy(f"{path} is being written by another process: wait for it.") from error
        except OSError as error:
            warn_user(
                f"the file system of {path.parent} has no locks ({error.strerror}): make sure that no two processes "
                "write the same file there.",
            )

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and not self.error:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return size or 0 if self.error else super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self.error:
            raise self.error

    def write_at(self, offset: int, values: np.ndarray) -> None:
        """Write the bytes of an array at an offset. Raises OSError if the disk refuses."""
        self.error = None
        self.seek(offset)
        self.write(values.reshape(-1).view(np.uint8))
        self.check()

    def close(self) -> None:
        if fcntl and not self.closed:
            with suppress(OSError):
                fcntl.flock(self, fcntl.LOCK_UN)  # a forked process may still hold the file
        super().close()


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path whose leading ``~`` is replaced by the user's folder; other paths are unchanged.

    Raises:
        BadInput: if it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BadInput(f"expected a path, got {type(path).__name__}.")
    if "\0" in os.fspath(path):
        raise BadInput(f"no path contains a null character, got {os.fspath(path)!r}.")
    return Path(os.path.expanduser(path))


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark.

    Raises:
        FileNotFoundError: if there is no such file.
        BadInput: if it is not a file, or not UTF-8.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadInput(f"cannot read {path} as a text file, since it is not a regular file: choose another.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read {path} as a text file ({error}): save it as UTF-8.") from error


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, unless they exist.

    Raises:
        BadInput: if one of them is a file.
        CacheWriteFailed: if the disk refuses.
    """
    with disk_errors(folder, "choose another folder"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInput(f"{folder} cannot be a folder, since a file is in its way: choose another.") from error


def require_writable(folder: Path) -> None:
    """Check, before any work and without creating anything, that files can be written to a folder.

    A folder that does not exist is one that can be created.

    Raises:
        BadInput: if it or one above it is a file.
        CacheWriteFailed: if it may not be written.
    """
    existing = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not existing.is_dir():
        raise BadInput(f"{folder} cannot be a folder, since a file is in its way: choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CacheWriteFailed(f"could not write {folder}: {CHOOSE_ANOTHER}.")


def copy_bytes(source: io.FileIO, start: int, target: LockedFile, to: int, size: int) -> None:
    """Copy ``size`` bytes from one file to another, a few at a time."""
    for done in range(0, size, COPY_BYTES):
        source.seek(start + done)
        part = source.read(min(COPY_BYTES, size - done)) or b""
        target.write_at(to + done, np.frombuffer(part, np.uint8))


@contextmanager
def closed_on_error(path: Path, mode: str) -> Iterator[LockedFile]:
    """Open a file that stays open, and locked, after the context unless an error is raised in it."""
    file = LockedFile(path, mode)
    try:
        yield file
    except BaseException:
        file.close()
        raise


@contextmanager
def replacing(
    path: Path, remedy: str = MAKE_ROOM, *, exclusive: bool = False, keep_open: bool = False
) -> Iterator[LockedFile]:
    """Write a new file that replaces ``path`` in one step when the context ends without an error.

    The file is written under a hidden name in the same folder, which is created if needed, and flushed to the disk
    before it is renamed. On any error the old file stays as it was and the hidden one is removed; hidden files that
    killed processes left behind are removed by the next call.

    Args:
        path: File to create or replace.
        remedy: What the user can do if the disk refuses a write, for the error message.
        exclusive: Whether to refuse to replace a file that exists when the new one is complete.
        keep_open: Whether to leave the file open, and locked, for more writes.

    Raises:
        CacheBusy: if ``exclusive`` and another process created ``path`` in the meantime.
        CacheWriteFailed: if the disk refuses a write.
    """
    with disk_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with (closed_on_error if keep_open else LockedFile)(temporary, "x+") as file:
                yield file
                file.check()
                os.fsync(file.fileno())
                _put_in_place(temporary, path, exclusive)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def replace_text(path: Path, text: str, remedy: str = MAKE_ROOM) -> None:
    """Write a UTF-8 text file that replaces ``path`` in one step; see ``replacing``."""
    with replacing(path, remedy) as file:
        file.write(text.encode())


def require_unlocked(path: Path) -> None:
    """Raise CacheBusy if another process has locked a file for writing; those that read it do not matter."""
    if not fcntl:
        return
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheBusy(f"{path} is being written by another process: wait for it.") from error
        except OSError:  # a file system without locks
            pass


def remove_abandoned(path: Path) -> None:
    """Remove the unlocked temporary files of ``path``, whose writers were killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        with suppress(CacheBusy, OSError), LockedFile(part, "r+") as file:
            if file.is_locked:
                part.unlink()


def _put_in_place(temporary: Path, path: Path, exclusive: bool) -> None:
    try:
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    except (FileExistsError, FileNotFoundError) as error:
        raise CacheBusy(
            f"another process has just started to write {path}: wait for it, or choose another path."
        ) from error
    except OSError:  # a file system without hard links
        if not exclusive:
            raise
        os.rename(temporary, path)


@contextmanager
def disk_errors(path: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Turn an OSError into a CacheWriteFailed whose message ends with the remedy, or with that for permissions."""
    try:
        yield
    except OSError as error:
        remedy = CHOOSE_ANOTHER if error.errno in FORBIDDEN else remedy
        raise CacheWriteFailed(f"could not write {path} ({error}): {remedy}.") from error


def is_marked(path: Path, mark: str) -> bool:
    """Return whether a file contains a text near its start; the file may be damaged after that."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark.encode() in file.read(2**20)
