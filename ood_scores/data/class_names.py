"""Names of classes: lists of them, and labels in the order of such a list."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_scores.atomic import read_text
from ood_scores.data.images import ImageDataset, SameRows
from ood_scores.data.long_tail import labels_of
from ood_scores.errors import BadInput, BadLabels

WORDNET_ID = re.compile(r"(n\d{8})\s+(.+)")
"""A line such as ``n01440764 tench, Tinca tinca``."""

SHOWN = 5
"""How many names an error message lists."""


class RenumberedImages(SameRows):
    """A dataset whose labels are numbered in the order of a list of classes.

    Attributes:
        dataset: the original dataset, whose transform is not applied.
        numbers: the number of each of its labels, int64 ``[C]``.
        transform: function that is applied to the images.
    """

    def __init__(self, dataset: ImageDataset, numbers: NDArray[np.int64], classes: Sequence[str]) -> None:
        super().__init__(dataset, dataset.name)
        self.numbers = numbers
        self.text, self.root = dataset.text, dataset.root
        self.class_names = tuple(classes)
        self.listed_classes = dataset.listed_classes
        self.label_order = f"renumbered, {hashlib.sha256(numbers.tobytes()).hexdigest()[:12]}"

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        image, label = self.dataset.load(index)
        return image, label if label is None or label < 0 else int(self.numbers[label])

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, int64 ``[N]``, without reading images."""
        own = labels_of(self.dataset)
        return np.where(own < 0, own, self.numbers[own])


def renumbered(dataset: ImageDataset, classes: Sequence[str], source: object = "the list") -> ImageDataset:
    """Return a dataset with labels in the order of a list of classes.

    Names are compared without regard to case, hyphens, and underscores. In an entry of the list such as
    ``n01440764 tench, Tinca tinca``, the WordNet id and each synonym are names, too, if no other class has them.

    Args:
        dataset: a dataset. If it does not know the names of its classes, as arrays of labels do not, its labels are
            numbers in the list already, which names them.
        classes: the names, in the order of the numbers.
        source: what error messages call the list.

    Returns:
        The dataset itself if its labels are in this order already.

    Raises:
        BadInput: if some of the dataset's classes that have images are not in the list, or it has no labels.
    """
    names = dataset.class_names
    if names is None:
        return _named(dataset, classes, source)
    found = numbers_of(names, classes)
    missing = without_number(dataset, found)
    if missing:
        more = ", …" if len(missing) > SHOWN else ""
        raise BadInput(
            f"{len(missing)} of the {len(names)} classes of {dataset.name} are not in {source}: "
            f"{', '.join(missing[:SHOWN])}{more}; it has {len(classes)} names, {', '.join(classes[:SHOWN])}, …: add "
            "the missing names, in the order of the model, or remove their images."
        )
    numbers = np.array([found.get(name, -1) for name in names], dtype=np.int64)
    return dataset if (numbers == np.arange(len(names))).all() else RenumberedImages(dataset, numbers, classes)


def _named(dataset: ImageDataset, classes: Sequence[str], source: object) -> ImageDataset:
    """Return a dataset whose labels are numbers in a list of classes, with these names."""
    try:
        largest = int(labels_of(dataset).max(initial=-1))
    except BadLabels as error:
        raise BadInput(f"the images of {dataset.name} have no labels: leave out classes=.") from error
    if largest >= len(classes):
        raise BadInput(
            f"{dataset.name} has the label {largest}, but {source} has {len(classes)} names: list a name for each "
            "number from 0, in the order of the model."
        )
    named = copy.copy(dataset)
    named.class_names = tuple(classes)
    return named


def without_number(dataset: ImageDataset, numbers: Mapping[str, int]) -> list[str]:
    """Return the classes of a dataset that have no number, except for those of which it has no images."""
    missing = [name for name in dataset.class_names or () if name not in numbers]
    if not missing:
        return []
    with suppress(BadLabels):  # of a dataset without a list of its labels
        present = set(labels_of(dataset).tolist())
        return [name for number, name in enumerate(dataset.class_names or ()) if name in missing and number in present]
    return missing


def numbers_of(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the numbers in a list of classes of those names that are in it; see ``renumbered``."""
    known: dict[str, int] = {}
    for spelled in (_synonyms, lambda entry: {_plain(entry)}):  # the whole entry takes precedence
        spellings = [spelled(entry) for entry in classes]
        count = Counter(name for each in spellings for name in each)
        known |= {name: number for number, each in enumerate(spellings) for name in each if count[name] == 1}
    return {name: known[_plain(name)] for name in names if _plain(name) in known}


def ordered(classes: Sequence[str] | Mapping[Any, Any], count: int | None = None) -> tuple[str, ...]:
    """Return names of classes in the order of their numbers.

    Args:
        classes: the names in order; or a mapping from numbers to names (``id2label``) or from names to numbers
            (``class_to_idx``).
        count: the number of classes; None to accept any.

    Raises:
        BadInput: if there is not one name for each class.
    """
    if isinstance(classes, Mapping):
        by_name = all(isinstance(value, Integral) for value in classes.values())
        pairs = [(number, name) for name, number in classes.items()] if by_name else list(classes.items())
        names = {str(number): str(name) for number, name in pairs}
        size = len(pairs) if count is None else count
        if len(pairs) != size or names.keys() != set(map(str, range(size))):
            raise BadInput(
                f"classes must number the model's {size} classes from 0 to {size - 1}, each once, got "
                f"{', '.join(str(number) for number, _ in pairs[:10])}: pass a mapping like {{0: 'cat', 1: 'dog'}}."
            )
        return tuple(names[str(number)] for number in range(size))
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise BadInput(f"classes must be a list of names or a mapping, got {classes!r}.")
    if count is not None and len(classes) != count:
        raise BadInput(
            f"the model has {count} classes, but there are {len(classes)} names: list all, in the order of the logits."
        )
    return tuple(map(str, classes))


def read_classes(path: str | PathLike[str]) -> tuple[str, ...]:
    """Read the names of classes from a file: one per line, or a JSON list or mapping that ``ordered`` accepts.

    Raises:
        BadInput: if the file cannot be read, or contains no names.
    """
    try:
        text = read_text(Path(path))
        is_json = Path(path).suffix.lower() == ".json"
        content = json.loads(text) if is_json else [line.strip() for line in text.split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {path} of names of classes: correct the path.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"cannot read the names of classes in {path} ({error}): save it as UTF-8, with one name per line, or as a "
            "JSON list."
        ) from error
    names = ordered(content)
    if not names:
        raise BadInput(f"{path} contains no names of classes: write one name per line.")
    return names


def _synonyms(entry: str) -> set[str]:
    """Return the WordNet id and the words of an entry."""
    match = WORDNET_ID.fullmatch(entry.strip())
    words = [*match.groups()] if match else [entry]
    return {_plain(word) for part in words for word in part.split(",")}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
