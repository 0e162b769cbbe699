"""Datasets named by a short text, `kind:target?option=value&option=value`, for command lines and benchmark files.

- `folder:PATH`: one subfolder per class, or images without labels
- `npz:PATH`: arrays `images` and, optionally, `labels`
- `imglist:PATH?root=DIR`: lines `relative/path label`, as OpenOOD has them
- `sheets:DIR/NAME`: images packed on sheets, `NAME.json` beside `NAME.00.webp`, …
- `torchvision:CIFAR10?split=test`: torchvision's classification datasets
- `hf:OWNER/NAME?split=test`: image datasets of the Hugging Face hub
- `noise:gaussian?n=10000&size=32&seed=0`: images of noise, also `noise:uniform`
- `digits?classes=0-6`: scikit-learn's handwritten digits

Each takes the options `rows=0:5000`, `take=500`, `long_tail=100` and `scramble=SEED`.
"""

from __future__ import annotations

import ast
import inspect
import operator
import zipfile
import zlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from ood_scores.data.dataset_spec import existing, expanded, located, parse
from ood_scores.data.images import ImageArrays, ImageDataset, ImageFiles, Transform
from ood_scores.data.kinds.digits import digits
from ood_scores.data.kinds.hub import open_hub
from ood_scores.data.kinds.noise import open_noise
from ood_scores.data.kinds.sheets import open_sheets
from ood_scores.data.kinds.torchvision_sets import open_torchvision
from ood_scores.data.remedies import remedy
from ood_scores.data.subsets import VIEWS, seen_through
from ood_scores.errors import BadInput, EmptyInput, MissingData, UnknownName


def open_dataset(
    spec: str, transform: Transform | None = None, root: str | PathLike[str] | None = None
) -> ImageDataset:
    """The dataset that `spec` names.

    - `folder:PATH`: with subfolders, each is a class, numbered in alphabetical order as in torchvision's ImageFolder,
      but hidden ones are skipped. Without, the images in alphabetical order and no labels.
    - `npz:PATH`: arrays as in `ImageArrays`, in a NumPy archive without pickles.
    - `imglist:PATH?root=DIR`: a text file of lines `relative/path label`; the label is the last word, -1 for no class.
      Paths are relative to `root`, by default the folder of the list. In the lists of SC-OOD (Yang et al. 2021) the
      label is a dictionary: its `sc_label` is taken, the ID class that the image shows or -1.
    - `sheets:DIR/NAME`: images packed on sheets, as `ood_scores.data.kinds.sheets` has them; all are held in memory.
    - `torchvision:NAME?split=test&root=DIR&download=true`: `split` becomes the dataset's argument `train` or `split`,
      whichever it has, and defaults to test; `root` defaults to `ood_scores/data` in the user's cache
      (`$XDG_CACHE_HOME`, else `~/.cache`); nothing is downloaded unless told so.
    - `hf:OWNER/NAME?split=test&config=NAME&image=COLUMN&label=COLUMN`: fetched, or found in its cache, by the library
      `datasets`. The columns are found where there is one of images, and one or none of classes.
    - `noise:gaussian?n=10000&size=32&seed=0`, `noise:uniform`: as in `ood_scores.data.kinds.noise`.
    - `digits?classes=0-6`: also `classes=0,1,8`; the label is the position in that list.

    Options of every kind, applied in this order whatever the order in which they are written:

    - `scramble=SEED`: each image's pixels in a random order of its own, by the seed and its row in the whole set.
    - `rows=0:5000`: a slice as in Python.
    - `long_tail=100`: as in `ood_scores.data.long_tail`; the number is the ratio.
    - `take=500`: evenly spaced rows, the first 500 of every (N // 500)-th; all where there are less.

    The name of the dataset tells these options. In paths and other values, `$NAME` and `${NAME}` are variables of the
    environment and `$$` is a dollar sign.

    Args:
        spec: as above.
        transform: applied to the PIL image of every item; may be set later, too.
        root: where relative paths start, by default the current folder.

    Raises:
        UnknownName: a kind, option, column or torchvision dataset that does not exist.
        MissingData: files that are not there, or a variable that is not set; the message says how to get them, where
            `ood_scores.data.remedies.remedy` knows.
        BadInput: contents or options that cannot be read.
        BadLabels: `long_tail` of a dataset without labels.
        EmptyInput: no images.
    """
    kind, target, options = parse(spec)
    if kind not in _KINDS:
        raise UnknownName(f"no kind of dataset {kind!r} in {spec!r}; there are: {', '.join(_KINDS)}")
    opener = _KINDS[kind]
    own = inspect.getfullargspec(opener).kwonlyargs
    for name in options:
        if name not in own and name not in VIEWS:
            raise UnknownName(f"{kind} has no option {name!r}; it has: {', '.join([*own, *VIEWS])}")
    base = Path("" if root is None else root).expanduser()
    try:
        values = {name: expanded(value) for name, value in options.items()}
        dataset = opener(expanded(target), base, **{name: values[name] for name in values if name in own})
    except MissingData as error:
        raise MissingData(error.reason, remedy(spec, root)) from error
    dataset = seen_through(dataset, values)
    dataset.transform = transform
    return dataset


def _folder(target: str, base: Path) -> ImageDataset:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    path = existing("folder", target, base)
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder")
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
        raise EmptyInput(f"there are no images in {path}; known are {', '.join(IMG_EXTENSIONS)}")
    return ImageFiles(paths, labels, None, path.resolve().name)


def _npz(target: str, base: Path) -> ImageDataset:
    path = existing("npz", target, base)
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is not a NumPy archive; save the images and labels with np.savez")
    with np.load(path, allow_pickle=False) as archive:
        if "images" not in archive:
            raise BadInput(f"{path} has no array 'images'; it has: {', '.join(archive) or 'none'}")
        try:
            images, labels = archive["images"], archive.get("labels")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"cannot read the arrays of {path}: {error}") from error
    return ImageArrays(images, labels, None, path.stem)


def _imglist(target: str, base: Path, *, root: str | None = None) -> ImageDataset:
    path = existing("imglist", target, base)
    folder = path.parent if root is None else located(root, base)
    paths, labels = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            file, label = _file_and_label(line.strip())
        except (ValueError, SyntaxError, TypeError, AttributeError) as error:
            raise BadInput(f"line {number} of {path} is {line!r}; write: relative/path integer-label") from error
        paths.append(str(folder / file))
        labels.append(label)
    if not paths:
        raise EmptyInput(f"{path} lists no images")
    if not Path(paths[0]).exists():
        raise MissingData(f"the first image of {path} is not at {paths[0]}; name the images' folder with ?root=DIR")
    return ImageFiles(paths, labels, None, path.stem)


def _file_and_label(line: str) -> tuple[str, int]:
    file, brace, rest = line.partition(" {")
    if brace:
        said = ast.literal_eval("{" + rest)
        return file.strip(), operator.index(said.get("sc_label", said.get("label")))
    file, label = line.rsplit(maxsplit=1)
    return file, int(label)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as a text file: {error}") from error


def _digits(target: str, base: Path, *, classes: str | None = None) -> ImageDataset:
    if target:
        raise BadInput(f"digits takes no path, but got {target!r}; write digits or digits?classes=0-6")
    if classes is None:
        return ImageArrays(*digits(), None, "digits")
    return ImageArrays(*digits(_class_list(classes)), None, f"digits[{classes}]")


def _class_list(classes: str) -> list[int]:
    numbers: list[int] = []
    try:
        for part in classes.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError as error:
        raise BadInput(f"cannot read classes={classes}; write, for example, classes=0-6 or classes=0,1,8") from error
    return numbers


_KINDS: dict[str, Callable[..., ImageDataset]] = {
    "folder": _folder,
    "npz": _npz,
    "imglist": _imglist,
    "sheets": open_sheets,
    "torchvision": open_torchvision,
    "hf": open_hub,
    "noise": open_noise,
    "digits": _digits,
}
