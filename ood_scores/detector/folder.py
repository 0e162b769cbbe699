"""The folder of a detector: after a kill at any instant it contains the old detector or the new one.

A new detector is written to files with names that are free. The description, which names the files, is then replaced in
one step, and the files that it does not name are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from ood_scores.atomic import LockedFile, disk_errors, is_marked, remove_abandoned, replacing
from ood_scores.errors import CacheBusy, DamagedCache, ForeignFile

FORMAT = "ood_scores detector"
VERSION = 2
"""Version 1 has no checksum of the description, and its files have their plain names."""

DESCRIPTION, LOCK, CHECKSUM = "detector.json", ".detector.lock", "sha256"
FILE = r"(scorer|calibration|head|model)(\.[0-9a-f]{8})?\.safetensors"
PART = rf"\.(?P<name>{re.escape(DESCRIPTION)}|{FILE})\.[0-9a-f]{{8}}\.part"


class NewFiles:
    """The files of a detector that is being saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def place(self, kind: str) -> Path:
        """Return a free path for the file of a kind: scorer, calibration, head, or model."""
        path = self.folder / f"{kind}.safetensors"
        if path.exists():
            path = self.folder / f"{kind}.{uuid4().hex[:8]}.safetensors"
        self.paths.append(path)
        return path

    def describe(self, described: Mapping[str, Any]) -> None:
        """Write the description, which makes the files the detector of the folder."""
        files = {path.name: _sha256(path) for path in self.paths if path.exists()}
        _write_description(self.folder, {**described, "files": files})


@contextmanager
def replacing_detector(folder: Path) -> Iterator[NewFiles]:
    """Replace the detector in a folder; on any error the old one stays as it was.

    Raises:
        ForeignFile: if the folder contains other files than a detector.
        CacheBusy: if another process is saving a detector to the folder.
        CacheWriteFailed: if the disk refuses a write.
    """
    _check_replaceable(folder)
    is_new = not folder.exists()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _alone_in(folder):
                _remove_unnamed(folder)
                if not (folder / DESCRIPTION).exists():
                    _write_description(folder, {})  # marks the folder in case of a kill
                try:
                    yield NewFiles(folder)
                finally:
                    _remove_unnamed(folder)
                    if not _named(folder):
                        (folder / DESCRIPTION).unlink(missing_ok=True)
        except BaseException:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise


def read_description(folder: Path) -> dict[str, Any]:
    """Read and verify the description of a detector.

    Raises:
        FileNotFoundError: if there is no such folder.
        ForeignFile: if it is not the folder of a detector, or if a newer version of this package wrote it.
        DamagedCache: if the description is truncated or altered.
    """
    file = folder / DESCRIPTION
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if not is_marked(file, FORMAT):
        raise ForeignFile(f"{folder} is not a detector that ood_scores saved.")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedCache(f"{file} is truncated or damaged ({error}): save it again.") from error
    if described["version"] > VERSION:
        raise ForeignFile(
            f"{folder} has detector format {described['version']}; this version of ood_scores reads up to {VERSION}: "
            "update ood_scores."
        )
    if (described["version"] > 1 or CHECKSUM in described) and described.get(CHECKSUM) != _checksum(described):
        raise DamagedCache(f"{file} was altered after it was written: save the detector again.")
    if not described["files"]:
        raise DamagedCache(f"{folder} contains an unfinished detector: save the detector again.")
    return described


def verified_files(folder: Path, described: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of a detector by kind, after a check of their names and checksums."""
    files = {}
    for name, digest in described["files"].items():
        match = re.fullmatch(FILE, name)
        if not match:
            raise DamagedCache(f"{folder / DESCRIPTION} names a file {name!r} that no detector has: save it again.")
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise DamagedCache(f"{folder / name} is missing, truncated, or altered: save the detector again.")
        files[match[1]] = folder / name
    return files


def sealed(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with its checksum."""
    return {**described, CHECKSUM: _checksum(described)}


def _checksum(described: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps({key: value for key, value in described.items() if key != CHECKSUM}))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _write_description(folder: Path, described: Mapping[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, "files": {}} | dict(described)
    with replacing(folder / DESCRIPTION) as file:
        file.write((json.dumps(sealed(content), indent=2) + "\n").encode())


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ForeignFile(f"{folder} is a file, but a detector is saved in a folder: choose another path.")
    if not folder.exists() or is_marked(folder / DESCRIPTION, FORMAT):
        return
    if not all(file.name == LOCK or re.fullmatch(PART, file.name) for file in folder.iterdir()):
        raise ForeignFile(f"{folder} contains other files than a detector and is not replaced: choose another folder.")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder for one process that saves a detector."""
    with LockedFile(folder / LOCK, "a") as lock:
        try:
            is_ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise CacheBusy(f"another process has just saved a detector to {folder}: run the same call again.")
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _named(folder: Path) -> set[str]:
    """Return the names of the files in the description, or none if it cannot be read."""
    try:
        return set(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove_unnamed(folder: Path) -> None:
    """Remove the files of an older detector and of processes that were killed."""
    named = _named(folder)
    for file in folder.iterdir():
        if re.fullmatch(FILE, file.name) and file.name not in named:
            file.unlink()
        elif part := re.fullmatch(PART, file.name):
            remove_abandoned(folder / part["name"])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(2**20):
            digest.update(part)
    return digest.hexdigest()
