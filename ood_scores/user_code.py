"""Code of users: modules and files with scorers, probes, datasets, and models that a user asked to import.

Code runs only because a user named it: on the command line, or in a call of ``import_code``. ``MODULE:ATTRIBUTE`` or
``FILE.py:ATTRIBUTE`` in a file, which may be a stranger's (a benchmark, a detector), refers to code that has been
imported, and imports nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ood_scores.errors import BadInput
from ood_scores.registry import unknown

_REFERENCE = re.compile(r"(?P<module>.+?\.py|[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_]\w*)")

_imported: dict[str, ModuleType] = {}
"""The modules that were imported, by what the user named, with absolute paths of files."""


def import_code(name: str) -> ModuleType:
    """Import a module, or a file that ends in ``.py``, because the user named it.

    The folder of the file, or the current folder for a module, is added at the end of the path on which Python looks
    for modules, so that processes that are started later find it, too.

    Raises:
        BadInput: if there is no such module or file, its name belongs to another module, or importing it fails.
    """
    name = os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else name
    if name not in _imported:
        _imported[name] = _module_of_file(Path(name)) if name.endswith(".py") else _module(name, os.getcwd())
    return _imported[name]


def import_referenced(text: str, known: Container[str] = ()) -> None:
    """Import the code that a text names, because the user wrote it: ``FILE.py:NAME…`` or ``MODULE:NAME…``.

    Args:
        text: The text. One that names no code is left alone.
        known: Words before the colon that do not stand for modules.
    """
    parts = split_reference(text)
    if parts and parts[0] not in known and _exists(parts[0]):
        import_code(parts[0])


def imported_code() -> tuple[str, ...]:
    """Return what has been imported, to import it again in another process."""
    return tuple(_imported)


def split_reference(text: str) -> tuple[str, str, str] | None:
    """Return the module or file, the attribute, and the rest of a text; None for other texts."""
    found = _REFERENCE.match(str(text))
    return (found["module"], found["attribute"], text[found.end() :]) if found else None


def is_reference(text: str) -> bool:
    """Return whether a text starts with ``FILE.py:NAME``, or with ``MODULE:NAME`` of a module that was imported."""
    parts = split_reference(text)
    return parts is not None and (
        parts[0].endswith(".py") or parts[0] in {each.__name__ for each in _imported.values()}
    )


def referenced(text: str) -> Any:
    """Return the object that ``MODULE:ATTRIBUTE`` or ``FILE.py:ATTRIBUTE`` names in code that has been imported.

    Raises:
        BadInput: if the code has not been imported, or another module defines the attribute.
        UnknownName: if it has no such attribute; the message lists those that it has.
    """
    parts = split_reference(text)
    if parts is None or parts[2]:
        raise BadInput(f"cannot read {text!r}: write MODULE:NAME or FILE.py:NAME.")
    module, attribute, _ = parts
    known = _imported_as(module)
    if known is None:
        raise code_to_import([text])
    return _own_attribute(known, attribute)


def not_imported(texts: Iterable[str]) -> list[str]:
    """Return the texts that start with ``FILE.py:NAME`` of files that have not been imported, one for each file."""
    found: dict[str, str] = {}
    for text in texts:
        parts = split_reference(text)
        if parts and parts[0].endswith(".py") and _imported_as(parts[0]) is None:
            found.setdefault(parts[0], f"{parts[0]}:{parts[1]}")
    return list(found.values())


def code_to_import(texts: Iterable[str]) -> BadInput:
    """Create the error for texts that name code that has not been imported; it says how to import all of it."""
    modules = {text: (split_reference(text) or [text])[0] for text in texts}
    names = dict.fromkeys(modules.values())
    calls = [f"ood_scores.user_code.import_code({name!r})" for name in names]
    return BadInput(
        f"{_enumerated(map(repr, modules))} {'names' if len(modules) == 1 else 'name'} code, which runs only if you "
        f"ask for it: if you trust {_enumerated(names)}, add {' '.join(f'--import {name}' for name in names)} to the "
        f"command, or call {_enumerated(calls)} in Python."
    )


def defined(name: str) -> Any:
    """Return the object of this name that imported code defines; None if there is none."""
    return next((vars(known)[name] for known in _imported.values() if name in vars(known)), None)


def source_digests(objects: Iterable[Any]) -> dict[str, str]:
    """Return the SHA-256 of the files that define those of the objects that are imported code of users, by module."""
    names = sorted({str(getattr(each, "__module__", None)) for each in objects})
    own = [name for name in names if any(_is_in(name, known) for known in _imported.values())]
    files = {name: getattr(sys.modules[name], "__file__", None) for name in own}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def traceback_of_imported(error: BaseException) -> TracebackType | None:
    """Return the traceback of an error from its first line in imported code on; the whole one if there is none."""
    files = {getattr(each, "__file__", None) for each in _imported.values()}
    below = error.__traceback__
    while below and below.tb_frame.f_code.co_filename not in files:
        below = below.tb_next
    return below or error.__traceback__


def _imported_as(name: str) -> ModuleType | None:
    """Return the imported module that a reference names."""
    stem = Path(name).stem if name.endswith(".py") else name
    return next((known for known in _imported.values() if known.__name__ == stem), None)


def _enumerated(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _own_attribute(module: ModuleType, attribute: str) -> Any:
    found = getattr(module, attribute, None)
    if found is None:
        own = [name for name, value in vars(module).items() if _is_in(getattr(value, "__module__", ""), module)]
        raise unknown(f"{module.__name__} has no", attribute, own)
    if not _is_in(getattr(found, "__module__", ""), module):
        raise BadInput(f"{attribute!r} is not defined in {module.__name__}: name the module that defines it.")
    return found


def _is_in(name: str, module: ModuleType) -> bool:
    """Return whether a module is the other one, or a part of it."""
    return f"{name}.".startswith(f"{module.__name__}.")


def _exists(module: str) -> bool:
    """Return whether a name is that of a file or of a module that exists; the packages around it are imported.

    A folder without ``__init__.py`` defines nothing, although Python can import it.
    """
    if module.endswith(".py"):
        return True
    _look_in(os.getcwd())
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(f"there is no file {path}: check the path.")
    if not path.stem.isidentifier():
        raise BadInput(f"{path} cannot be imported under the name {path.stem!r}: rename it, such as my_scorers.py.")
    module = _module(path.stem, str(path.parent))
    if not os.path.samefile(getattr(module, "__file__", None) or os.devnull, path):
        raise BadInput(f"another module is named {path.stem!r}: rename {path}.")
    return module


def _module(name: str, folder: str) -> ModuleType:
    _look_in(folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # of the user's code
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"cannot import {name} ({reason}): check the name, and run it on its own.") from error


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
