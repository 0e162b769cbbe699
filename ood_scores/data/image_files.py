"""Find image files in folders, and count what is left out."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from ood_scores.data.decoding import SUFFIXES
from ood_scores.user_warnings import warn_user

IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

SHOWN = 6
"""How many kinds of what was left out a warning names."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


class Search:
    """A search for image files that reads every folder once and counts what it leaves out.

    Links to folders are followed. Hidden files and folders are skipped.

    Attributes:
        left_out: the number of files and folders that were skipped, by what they are.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def below(
        self,
        top: str | PathLike[str],
        read: Iterable[str | PathLike[str]] = (),
        suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    ) -> list[str]:
        """Return the files in a folder and all folders below it, sorted by folder and name.

        Args:
            top: the folder.
            read: folders that are not read again when a link leads to them.
            suffixes: suffixes of the files to return, in lower case; () returns all files.
        """
        found: list[tuple[str, str]] = []
        seen = {_identity(folder) for folder in read}
        folders, links = [os.fspath(top)], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)  # links last: a file keeps its own path
            identity = _identity(folder)
            if identity in seen:
                self.left_out["links to folders that are read anyway"] += 1
                continue
            seen.add(identity)
            for entry in self._entries(folder):
                if _is(entry, "dir"):
                    if not is_hidden(entry.name):
                        (links if entry.is_symlink() else folders).append(entry.path)
                elif self._is_taken(entry, suffixes):
                    found.append((folder, entry.name))
        return [os.path.join(*each) for each in sorted(found)]

    def directly_in(self, folder: str | PathLike[str]) -> list[str]:
        """Return the sorted image files in a folder, without those in its subfolders."""
        entries = (entry for entry in self._entries(folder) if not _is(entry, "dir"))
        return sorted(entry.path for entry in entries if self._is_taken(entry, IMAGE_SUFFIXES))

    def matching(self, pattern: str) -> list[str]:
        """Return the sorted files that a pattern stands for, in which ``**`` is any number of folders."""
        parts = Path(pattern).parts
        if "**" not in parts:
            return sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
        recursive = parts.index("**")
        tops = [Path(top) for top in glob.glob(str(Path(*parts[:recursive]))) if os.path.isdir(top)]
        files = [(top, Path(file)) for top in tops for file in self.below(top, suffixes=())]
        return sorted(str(file) for top, file in files if _fits(file.relative_to(top).parts, parts[recursive:]))

    def warn(self, place: str) -> None:
        """Warn of what was left out, if anything was."""
        shown = Counter(dict(self.left_out.most_common(SHOWN)))
        if rest := self.left_out.total() - shown.total():
            shown["others"] = rest
        if shown:
            counts = ", ".join(f"{what} ({count:,})" for what, count in shown.items())
            warn_user(f"left out in {place}: {counts}.")

    def _entries(self, folder: str | PathLike[str]) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except PermissionError:
            self.left_out["folders without permission to read them"] += 1
            return []

    def _is_taken(self, entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> bool:
        if suffixes and not entry.name.lower().endswith(suffixes):
            if not is_hidden(entry.name):
                self.left_out[f"{Path(entry.name).suffix or 'other'} files"] += 1
        elif is_hidden(entry.name):
            self.left_out["hidden files"] += 1
        elif _is(entry, "file"):
            return True
        else:
            self.left_out["broken links, pipes, or devices"] += 1
        return False


def _identity(folder: str | PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _fits(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether the parts of a path fit the parts of a pattern."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return not patterns[1:] or any(_fits(parts[start:], patterns[1:]) for start in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    """Whether an entry is, or links to, a "dir" or "file"; False for a link to itself."""
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:
        return False
