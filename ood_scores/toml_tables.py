"""Tables from TOML files, with inheritance, overrides, and errors that name the line of a mistake."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ood_scores.atomic import read_text, user_path
from ood_scores.errors import BadInput
from ood_scores.registry import unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Raw = dict[str, Any]
KeyPath = tuple[str | int, ...]
"""The names of tables and of a key; the name of a list of tables is followed by the index of one of them, from 0."""
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """The schema of a table.

    Attributes:
        keys: The type of the value of each key; a ``Table`` for a nested table, ``[Table]`` for a list of tables.
        rest: The type of the value of every other key; None if no other key is allowed.
        instead: The type of a value that may replace the whole table.
        meant: The keys to suggest for a wrong key that is not spelled like them.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    rest: Any = None
    instead: Any = None
    meant: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The source of tables, for error messages.

    Attributes:
        name: The name of the file.
        what: The kind of the file, such as ``a recipe``.
        text: The text of the file.
    """

    name: str
    what: str
    text: str = ""

    def place(self, path: KeyPath) -> str:
        """The name of the file and, if it can be found, the line of a key or of the innermost table around it."""
        whole = [path[:length] for length in range(len(path), 0, -1)]
        line = next((self.lines[part] for part in whole if part in self.lines), None)
        return self.name if line is None else f"{self.name}, line {line}"

    @cached_property
    def lines(self) -> dict[KeyPath, int]:
        """The line number of each key and table."""
        return dict(reversed(list(_keys_of_lines(self.text))))


def hints_of(cls: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The types of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.name not in leave_out}


def read(path: Path, table: Table, what: str) -> tuple[Raw, list[Source]]:
    """Read the tables of a file.

    A file that starts with ``extends = "base.toml"`` inherits all values that it does not set from that file, whose
    path is relative to its own folder.

    Args:
        path: The file.
        table: The schema of the file.
        what: The kind of the file, in one word.

    Returns:
        The tables, and the files that they come from, starting with ``path``.

    Raises:
        BadInput: if the file does not exist, is not TOML, or has a value of the wrong type.
        UnknownName: if a key is not in the schema; the message names its line and the known keys.
    """
    return _read(path, table, what, ())


def _read(path: Path, table: Table, what: str, seen: tuple[Path, ...]) -> tuple[Raw, list[Source]]:
    if path.resolve() in seen:
        raise BadInput(f"{path} extends itself, through {' and '.join(str(other) for other in seen)}.")
    try:
        source = Source(str(path), f"a {what}", read_text(path))
        raw = tomllib.loads(source.text)
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"there is no {what} {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read the {what} {path}: {error}.") from error
    check(raw, table, source)
    extended = raw.pop("extends", None)
    if not extended:
        return raw, [source]
    base, sources = _read(path.parent / user_path(extended), table, what, (*seen, path.resolve()))
    return merged(base, raw), [source, *sources]


def merged(base: Raw, changes: Mapping[str, Any]) -> Raw:
    """Merge tables key by key; a table with another ``name`` and a list replace the old value as a whole."""
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("name") in (None, old.get("name"))
        result[key] = merged(old, value) if same and isinstance(old, dict) else value
    return result


def with_overrides(raw: Raw, overrides: Iterable[str], table: Table, what: str, example: str) -> Raw:
    """Override values of tables by ``key=value`` texts, such as ``optimizer.lr=0.05`` or ``stage.1.epochs=3``.

    A value that is not valid TOML is a string. Tables of a list are counted from 1.

    Raises:
        BadInput, UnknownName: as in ``read``.
    """
    given: Raw = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (equals and key.strip()):
            raise BadInput(f"cannot read --set {text}: write --set key=value, such as --set {example}.")
        *tables, last = key.strip().split(".")
        place = given
        for name in tables:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise BadInput(f"--set {text}: {name} is set to a value already.")
        place[last] = _toml_value(value.strip())
    result = merged(raw, _numbered(given, raw, table, what))
    check(result, table, Source("--set", f"a {what}"))
    return result


def _numbered(given: Raw, raw: Raw, table: Table, what: str) -> Raw:
    """Turn ``{"stage": {"1": changes}}`` into the list of stages with these changes."""
    result = dict(given)
    for key, hint in table.keys.items():
        if isinstance(hint, list) and isinstance(given.get(key), dict):
            entries = list(raw.get(key, []))
            for number, changes in given[key].items():
                if number not in map(str, range(1, len(entries) + 1)) or not isinstance(changes, dict):
                    have = f"the {what} has {len(entries)} [[{key}]] tables, counted from 1"
                    raise BadInput(f"--set {key}.{number}: {have}.")
                old = entries[int(number) - 1]
                entries[int(number) - 1] = merged(old, _numbered(changes, old, hint[0], what))
            result[key] = entries
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def check(raw: Mapping[str, Any], table: Table, source: Source, path: KeyPath = ()) -> None:
    """Check tables against their schema.

    Raises:
        UnknownName: if a key is not in the schema.
        BadInput: if a value has the wrong type.
    """
    for key, value in raw.items():
        hint = table.keys.get(key, table.rest)
        if hint is None:
            owner = f"[{_title(path)}]" if path else source.what
            raise unknown(f"{source.place((*path, key))}: {owner} has no", key, table.keys, table.meant.get(key, ()))
        _check_value(value, hint, source, (*path, key))


def _check_value(value: Any, hint: Any, source: Source, path: KeyPath) -> None:
    name = _title(path)
    if isinstance(hint, list):
        if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            raise BadInput(f"{source.place(path)}: {name} is not a list of tables: write [[{name}]].")
        for number, entry in enumerate(value):
            check(entry, hint[0], source, (*path, number))
    elif isinstance(hint, Table):
        if isinstance(value, dict):
            check(value, hint, source, path)
        elif hint.instead is None:
            raise BadInput(f"{source.place(path)}: {name} is {value!r}, not a table: write [{name}].")
        elif not _fits(value, hint.instead):
            raise BadInput(f"{source.place(path)}: {name} is {value!r}: give {_wanted(hint.instead)}, or a table.")
    elif _is_out_of_range(value):
        raise BadInput(
            f"{source.place(path)}: {name} contains a whole number of more than 64 bits, or a null character: correct "
            "it."
        )
    elif not _fits(value, hint):
        raise BadInput(f"{source.place(path)}: {name} is {value!r}: give {_wanted(hint)}.")


def filled(cls: type[T], given: Mapping[str, Any], title: str, rest: str | None = None) -> T:
    """Create a dataclass from a table that has been checked.

    ``rest`` is the field that receives all keys that are not fields.

    Raises:
        BadInput: if a required key is missing.
    """
    fields = {known.name: known for known in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = hints_of(cls, () if rest is None else (rest,))
    values = {key: converted(given[key], hint) for key, hint in hints.items() if key in given}
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise BadInput(f"[{title}] has no {name}: write {name} = … in it.")
    others = {} if rest is None else {rest: {key: value for key, value in given.items() if key not in hints}}
    return cls(**values, **others)


def converted(value: Any, hint: Any) -> Any:
    """Convert a TOML list to a tuple, and an integer to a float if the type is a float."""
    if isinstance(value, list):
        return tuple(value)
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return float(value) if float in options and not isinstance(value, bool) else value


def _is_out_of_range(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return any(map(_is_out_of_range, value.values() if isinstance(value, dict) else value))
    return "\0" in value if isinstance(value, str) else isinstance(value, int) and not -(2**63) <= value < 2**63


def _title(path: Sequence[str | int]) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _wanted(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_wanted(option) for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "a list" if inner is Any else f"a list, each {_wanted(inner)}"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return {str: "a string in quotes", int: "a whole number", float: "a number", bool: "true or false"}[hint]


_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEYS = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_KEYS})\s*\]\]?\s*(?:#.*)?$")
_ENTRY = re.compile(rf"\s*({_KEYS})\s*=")


def _keys_of_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    """Yield the path of every key and table, and the number of the line that it starts in."""
    table: KeyPath = ()
    last: dict[KeyPath, int] = {}
    in_text = False
    for number, line in enumerate(text.splitlines(), start=1):
        found: KeyPath = ()
        if not in_text and (header := _HEADER.match(line)):
            table = found = _numbered_path(_parts(header[2]), last, starts=header[1] == "[[")
        elif not in_text and (entry := _ENTRY.match(line)):
            found = (*table, *_parts(entry[1]))
        yield from ((found[:length], number) for length in range(1, len(found) + 1))
        in_text ^= (line.count('"""') + line.count("'''")) % 2 == 1


def _numbered_path(parts: Sequence[str], last: dict[KeyPath, int], starts: bool) -> KeyPath:
    """The path of a header, with the index of the current table of each list in it; ``[[…]]`` starts the next table."""
    path: KeyPath = ()
    for position, part in enumerate(parts, start=1):
        path = (*path, part)
        if starts and position == len(parts):
            last[path] = last.get(path, -1) + 1
        if path in last:
            path = (*path, last[path])
    return path


def _parts(keys: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_KEY, keys)]
