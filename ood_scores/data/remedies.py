"""How to get missing datasets that consist of files: a command or an address from the catalog."""

from __future__ import annotations

import json
import re
import shlex
from os import PathLike, fspath
from pathlib import PurePosixPath

from ood_scores.data.catalog import CATALOG, OPENOOD
from ood_scores.data.dataset_spec import parse
from ood_scores.data.known_set import KnownSet
from ood_scores.data.open_set_catalog import OPENMIBOOD


def remedy_for_path(text: str, root: str | PathLike[str] | None = None) -> str:
    """Return how to get a dataset in files, or "" if it is not known.

    A known dataset is recognized by its path, or else by the name of a folder on the path.

    Args:
        text: the text that names the dataset; environment variables are not expanded.
        root: folder where relative paths start.
    """
    target = parse(text).target
    for known in CATALOG:
        if f"/{target}".endswith(f"/{_path(known)}"):
            return _instruction(known, _below(root, target.removesuffix(_path(known))))
    return _by_folder(target, root)


def _by_folder(target: str, root: str | PathLike[str] | None) -> str:
    """Look for the layout of OpenOOD or OpenMIBOOD in a path, else for the innermost name of a known dataset."""
    path = PurePosixPath(target)
    names = [part.lower().replace("-", "_") for part in (*path.parent.parts, path.stem)]
    for place, name in enumerate(names):
        layout = next((layout for layout in (OPENMIBOOD, OPENOOD) if name in layout.folders), None)
        if layout:
            return _instruction(layout, _below(root, str(PurePosixPath(*path.parts[:place]))))
    for name in reversed(names):
        for known in CATALOG:
            if name in known.folders:
                opened = f"; {known.spec} then opens it" if known.get else ""
                return _instruction(known, _below(root, "")) + opened
    return ""


def _path(known: KnownSet) -> str:
    return parse(known.spec).target


def _below(root: str | PathLike[str] | None, folder: str) -> str:
    """Return a folder as a word of a shell command, which expands variables and ``~`` and nothing else."""
    start = "" if root is None or folder.startswith(("~", "$")) else fspath(root)
    path = str(PurePosixPath(start, folder))
    parts = re.split(r"(^~(?=/|$)|\$\w+|\$\{\w+\})", f"./{path}" if path.startswith("-") else path)
    return "".join(part if number % 2 else shlex.quote(part) for number, part in enumerate(parts) if part)


def python_command(code: str) -> str:
    """Return the shell command that runs Python code."""
    return f"python -c {shlex.quote(code)}"


def literal(text: str) -> str:
    """Return a text as a literal of Python in double quotes, which are plain in a quoted word of the shell."""
    return json.dumps(text, ensure_ascii=False)


def _instruction(known: KnownSet, folder: str) -> str:
    if known.spec.endswith("download=true"):
        return f"write {known.spec}"
    return f"{known.get.replace('{data}', folder)} (see {known.page})" if known.get else f"see {known.page}"
