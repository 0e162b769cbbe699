"""Folders of images, with one subfolder per class or without labels."""

from __future__ import annotations

from pathlib import Path

from ood_scores.data.dataset_spec import existing
from ood_scores.data.image_files import IMAGE_SUFFIXES, SHOWN, Search, is_hidden
from ood_scores.data.images import ImageFiles
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import remedy_for_path
from ood_scores.errors import BadInput, EmptyInput
from ood_scores.user_warnings import warn_user

BY_NUMBER = "folders by number, not as text like in earlier versions"
"""The order of labels in a folder where it differs from the alphabetical one."""


@register_dataset_kind("folder", remedy_for_path, suggested_for=Path.is_dir)
def open_folder(target: str, base: Path) -> ImageFiles:
    """Open ``folder:PATH``: images in one subfolder per class, or images without labels.

    Classes are numbered in alphabetical order, as in torchvision's ``ImageFolder``, or in numerical order if all names
    are numbers. Hidden files and folders are skipped. If no subfolder has images, the images in the folder itself are
    in alphabetical order and have no labels. Links to folders are followed; each folder is read once per class. A
    warning counts what is left out: hidden and other files, and the images in the folder itself if there are classes.
    Another one names subfolders without images, which are numbered as classes, too.
    """
    path = existing("folder", target, base)
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder: write folder:PATH with the path of one.")
    search = Search()
    names = sorted(child.name for child in path.iterdir() if child.is_dir() and not is_hidden(child.name))
    classes = sorted(names, key=int) if all(name.isdecimal() for name in names) else names
    files = [search.below(path / name, read=[path]) for name in classes]
    on_top = search.directly_in(path)
    paths = [file for each in files for file in each]
    labels = [number for number, each in enumerate(files) for _ in each] if paths else None
    if not paths:
        paths = on_top
    elif on_top:
        search.left_out["images outside the class folders"] += len(on_top)
    search.warn(f"folder:{path}")
    empty = [name for name, each in zip(classes, files, strict=True) if not each]
    if labels and empty:
        more = ", …" if len(empty) > SHOWN else ""
        warn_user(
            f"folder:{path} has no images of {', '.join(empty[:SHOWN])}{more}, but counts these subfolders as classes: "
            "remove those that are not classes."
        )
    if not paths:
        raise EmptyInput(f"there are no images in {path}: files must end in {', '.join(IMAGE_SUFFIXES)}.")
    dataset = ImageFiles(paths, labels, None, path.resolve().name, path)
    if labels is not None:
        dataset.class_names = classes
        dataset.label_order = None if classes == names else BY_NUMBER
    return dataset
