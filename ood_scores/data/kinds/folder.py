"""Folders of images, with one subfolder per class or without labels."""

from __future__ import annotations

from pathlib import Path

from ood_scores.data.dataset_spec import existing
from ood_scores.data.images import ImageFiles
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import remedy_for_path
from ood_scores.errors import BadInput, EmptyInput


@register_dataset_kind("folder", remedy_for_path)
def open_folder(target: str, base: Path) -> ImageFiles:
    """Open ``folder:PATH``: images in one subfolder per class, or images without labels.

    Classes are numbered in alphabetical order, as in torchvision's ``ImageFolder``; hidden subfolders are skipped. If
    there are no subfolders, the images are in alphabetical order and have no labels.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    path = existing("folder", target, base)
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder: write folder:PATH with the path of one.")
    classes = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    paths: list[str]
    labels: list[int] | None
    if classes:
        numbers = {name: number for number, name in enumerate(classes)}
        samples = make_dataset(str(path), numbers, IMG_EXTENSIONS, allow_empty=True)
        paths, labels = [file for file, _ in samples], [label for _, label in samples]
    else:
        paths, labels = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS), None
    if not paths:
        raise EmptyInput(f"there are no images in {path}: files must end in {', '.join(IMG_EXTENSIONS)}.")
    return ImageFiles(paths, labels, None, path.resolve().name)
