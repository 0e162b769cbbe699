"""The texts of a zero-shot classifier: names of classes in templates, and lists of words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ood_scores.atomic import read_text, user_path
from ood_scores.data.class_names import ordered, read_classes
from ood_scores.errors import BadInput

PLACEHOLDER = "{}"
"""What the name of a class replaces in a template."""

TEMPLATES = ("a photo of a {}.",)
"""The template of CLIP's authors for photos of objects, and the default."""

SHOWN = 5
"""How many names an error message lists."""


def checked_classes(classes: Any) -> tuple[str, ...]:
    """Return the names of classes in the order of their numbers.

    Args:
        classes: names, a mapping as for ``ordered``, or the path of a file with one name per line.

    Raises:
        BadInput: if there are fewer than two names, or if some are empty or duplicates.
    """
    names = read_classes(user_path(classes)) if isinstance(classes, (str, os.PathLike)) else ordered(classes)
    names = tuple(" ".join(name.split()) for name in names)
    if len(names) < 2:
        raise BadInput(f"a zero-shot classifier needs at least two classes, got {len(names)}: list their names.")
    if "" in names:
        raise BadInput(f"the name of class {names.index('')} is empty: give each class a name.")
    twice = duplicates(names)
    if twice:
        raise BadInput(
            f"classes have the same name ({', '.join(map(repr, twice[:SHOWN]))}), so that they cannot be told apart: "
            "make the names different, such as 'crane bird' and 'crane machine'."
        )
    return names


def checked_templates(templates: Any) -> tuple[str, ...]:
    """Return templates such as ``a photo of a {}.``

    Args:
        templates: a template, several, or the path of a file with one per line.

    Raises:
        BadInput: if there are none, or if one has no placeholder.
    """
    if isinstance(templates, os.PathLike) or (isinstance(templates, str) and PLACEHOLDER not in templates):
        templates = read_lines(templates, "templates")
    found = (templates,) if isinstance(templates, str) else tuple(templates)
    for template in found:
        if not isinstance(template, str) or PLACEHOLDER not in template:
            raise BadInput(
                f"the template {template!r} has no placeholder {PLACEHOLDER} for the name of a class: write it like "
                f"{TEMPLATES[0]!r}."
            )
    if not found:
        raise BadInput(f"there are no templates: pass some, such as {TEMPLATES[0]!r}.")
    return found


def read_words(words: Iterable[str] | str | os.PathLike[str]) -> tuple[str, ...]:
    """Return words without repetition, from a list or from the path of a file with one per line.

    Underscores become spaces, as in WordNet's lists.

    Raises:
        BadInput: if the file cannot be read, or if there are no words.
    """
    lines = read_lines(words, "words") if isinstance(words, (str, os.PathLike)) else words
    plain = (" ".join(str(line).replace("_", " ").split()) for line in lines)
    found = tuple(dict.fromkeys(word for word in plain if word))
    if not found:
        raise BadInput("the list of words is empty: give one word per line.")
    return found


def read_lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        BadInput: if the file cannot be read.
    """
    try:
        return [line.strip() for line in read_text(user_path(path)).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot read the {what} in {os.fspath(path)!r} ({error}): pass a UTF-8 file with one per line"
            + (f", or a template with the placeholder {PLACEHOLDER}." if what == "templates" else ".")
        ) from error


def with_files_read(arguments: Mapping[str, Any], locate: Callable[[str], os.PathLike[str]]) -> dict[str, Any]:
    """Return the arguments of a model with the content of files of texts in place of their paths.

    Args:
        arguments: ``classes``, ``templates``, and ``negatives`` as for ``load_model``, and others, which do not change.
        locate: a function that returns the file that a path stands for.

    Raises:
        BadInput: if a file cannot be read, or its content is not valid.
    """
    read = dict(arguments)
    if isinstance(read.get("classes"), str):
        read["classes"] = list(checked_classes(locate(read["classes"])))
    templates = read.get("templates")
    if isinstance(templates, str):
        read["templates"] = list(checked_templates(templates if PLACEHOLDER in templates else locate(templates)))
    negatives = read.get("negatives")
    if isinstance(negatives, str):
        negatives = {"nouns": negatives}
    if isinstance(negatives, Mapping):
        words = {kind: negatives[kind] for kind in ("nouns", "adjectives") if isinstance(negatives.get(kind), str)}
        read["negatives"] = {**negatives, **{kind: list(read_words(locate(path))) for kind, path in words.items()}}
    return read


def filled(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return every name in every template, ``[len(names) * len(templates)]``; those of a name follow each other."""
    return [template.replace(PLACEHOLDER, name) for name in names for template in templates]


def duplicates(names: Sequence[str]) -> list[str]:
    """Return the names that occur again, whatever their case."""
    count: Mapping[str, int] = Counter(name.casefold() for name in names)
    return list(dict.fromkeys(name for name in names if count[name.casefold()] > 1))
