"""The names of a model's classes, and labels of datasets in their order."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from torch.utils.data import Subset

from ood_scores.data.class_names import numbers_of, renumbered, without_number
from ood_scores.data.images import ImageDataset
from ood_scores.errors import BadInput
from ood_scores.models.running import unwrapped
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier


def class_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes in the order of the logits, or None if they are unknown.

    They are those of ``own_class_names``. A model without names that has as many classes as a list of ImageNet has the
    WordNet ids of that list.
    """
    own = own_class_names(model)
    subset = None if own else infer_imagenet_subset({"num_classes": _count(unwrapped(model))})
    return _wordnet_ids(subset) if subset else own


def own_class_names(model: nn.Module) -> list[str] | None:
    """Return the names of classes that come with a model, in the order of the logits, or None if there are none.

    They are those of a zero-shot classifier, those of ``config.id2label`` in Hugging Face's transformers, or those that
    come with the weights in timm.
    """
    model = unwrapped(model)
    if isinstance(model, ZeroShotClassifier):
        return list(model.class_names)
    by_number = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(by_number, dict):
        names = [str(by_number.get(number)) for number in range(len(by_number))]
        if not all(re.fullmatch(r"LABEL_\d+|None", name) for name in names):
            return names
    config: Any = getattr(model, "pretrained_cfg", None)
    own = config.get("label_names") if isinstance(config, dict) else None
    return list(own) if own and len(own) == _count(model) else None


def in_models_order(dataset: ImageDataset, model: nn.Module) -> ImageDataset:
    """Return a dataset with labels in the order of the model's classes, if the names of both are known.

    Folders named by numbers from 0 are the classes of these numbers. If only some of the dataset's classes are among
    those of the model, the dataset is returned as it is, and ``extract`` warns (see ``other_order``).
    """
    names = dataset.class_names
    classes = (_numbers(names, model) or class_names(model)) if names else None
    if not names or not classes:
        return dataset
    if without_number(dataset, numbers_of(names, classes)):
        return dataset
    return renumbered(dataset, classes, "the model's list")


def other_order(dataset: Any, model: nn.Module) -> str | None:
    """Return a warning if a dataset's labels are known not to be in the order of the model's classes, or None.

    Args:
        dataset: a dataset with the names of its classes in ``class_names`` or, as in torchvision, ``classes``; or a
            ``Subset`` of one.
        model: the model.

    Raises:
        BadInput: if the model is a zero-shot classifier, whose list of classes has only some of the dataset's.
    """
    dataset = _whole(dataset)
    names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    classes = class_names(model)
    if not names or not classes or getattr(dataset, "target_transform", None):
        return None
    found = numbers_of(names, classes)
    others = [name for name in names if name not in found]
    shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
    if found and others and isinstance(unwrapped(model), ZeroShotClassifier):
        raise BadInput(
            f"the model has {len(classes)} classes, the dataset {len(names)}, of which {len(others)} are not among "
            f"them ({shown}): add these to the list of classes (--classes, classes=), or remove their images; for OoD "
            "images, leave out the labels (?labels=none)."
        )
    wrong = next((number for number, name in enumerate(names) if found.get(name, number) != number), None)
    if wrong is None:
        return None
    if others:
        return (
            f"{len(others)} of the {len(names)} classes of the dataset are not classes of the model ({shown}), so its "
            "labels are not in the model's order: remove these classes, or name all in the model's order with "
            "?classes=FILE or a target_transform. For an OoD set, this means nothing."
        )
    return (
        f"the labels of the dataset are not in the order of the model's classes: {names[wrong]!r} has the label "
        f"{wrong}, but is class {found[names[wrong]]} of the model. Renumber them, with "
        "ood_scores.models.class_names.in_models_order(dataset, model) or a target_transform."
    )


def require_as_many_classes(dataset: Any, classes: int) -> None:
    """Check that a dataset whose list of classes the user named (``?classes=FILE``) has all classes of the model.

    Raises:
        BadInput: if the list has another length.
    """
    dataset = _whole(dataset)
    listed = getattr(dataset, "listed_classes", None)
    if listed not in (None, classes):
        raise BadInput(
            f"the list of classes of {dataset.name} has {listed} names, but the model has {classes} classes: list the "
            "names of all of them in ?classes=FILE, in the order of the logits."
        )


def listed_class_names(dataset: Any) -> list[str] | None:
    """Return the names of classes that the user listed for a dataset (``?classes=FILE``), in the order of the logits.

    They are None without a list, or if the dataset does not know all names in it.
    """
    dataset = _whole(dataset)
    names, listed = getattr(dataset, "class_names", None), getattr(dataset, "listed_classes", None)
    return list(names) if names and len(names) == listed else None


def _whole(dataset: Any) -> Any:
    """Return the dataset that a ``Subset`` is taken from."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _count(model: nn.Module) -> int | None:
    """Return the number of a model's classes: as it says, or else as its last layer has outputs."""
    known = getattr(model, "num_classes", None)
    widths = [part.out_features for part in model.modules() if isinstance(part, nn.Linear)]
    return known if isinstance(known, int) else next(reversed(widths), None)


@functools.cache
def _wordnet_ids(subset: str) -> list[str]:
    return list(ImageNetInfo(subset).label_names())


def _numbers(names: Sequence[str] | None, model: nn.Module) -> list[str] | None:
    """Return the numbers of a model's classes as names, if a dataset's classes are named by numbers from 0."""
    count = _count(unwrapped(model))
    if not names or count is None or not all(name.isdecimal() for name in names):
        return None
    numbers = set(map(int, names))
    return [str(number) for number in range(count)] if 0 in numbers and max(numbers) < count else None
