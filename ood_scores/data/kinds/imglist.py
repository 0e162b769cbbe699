"""Lists of image files, as OpenOOD and SC-OOD publish them."""

from __future__ import annotations

import ast
import operator
from pathlib import Path

from ood_scores.atomic import read_text
from ood_scores.data.dataset_spec import existing, located
from ood_scores.data.images import ImageFiles
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import remedy_for_path
from ood_scores.errors import BadInput, EmptyInput, MissingData

FORM = "write one image per line, such as 'cats/1.jpg 3', with the number of its class, or -1 if it has none"


@register_dataset_kind("imglist", remedy_for_path, suggested_for=lambda path: path.suffix == ".txt")
def open_imglist(target: str, base: Path, *, root: str | None = None) -> ImageFiles:
    """Open ``imglist:PATH?root=DIR``: a text file of lines ``relative/path label``, such as those of OpenOOD.

    The label is the last word, -1 for no class. Paths are relative to ``root``, by default the folder of the list. In
    the lists of SC-OOD (Yang et al. 2021) the label is a dictionary; its ``sc_label`` is used, which is the ID class
    that the image shows, or -1.
    """
    path = existing("imglist", target, base)
    folder = path.parent if root is None else located(root, base)
    paths, labels = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            file, label = _file_and_label(line.strip())
        except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError) as error:
            raise BadInput(f"line {number} of {path} is {line[:200]!r}: {FORM}.") from error
        paths.append(str(folder / file))
        labels.append(label)
    if not paths:
        raise EmptyInput(f"{path} lists no images: {FORM}.")
    if not Path(paths[0]).exists():
        raise MissingData(f"the first image of {path} is not at {paths[0]}: name their folder with ?root=DIR")
    return ImageFiles(paths, labels, None, path.stem, folder)


def _file_and_label(line: str) -> tuple[str, int]:
    file, brace, rest = line.partition(" {")
    if brace:
        labels = ast.literal_eval("{" + rest)
        return file.strip(), operator.index(labels.get("sc_label", labels.get("label")))
    file, label = line.rsplit(maxsplit=1)
    return file, int(label)
