"""NumPy archives of images."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ood_scores.data.dataset_spec import existing
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import remedy_for_path
from ood_scores.errors import BadInput


@register_dataset_kind("npz", remedy_for_path, suggested_for=lambda path: path.suffix == ".npz")
def open_npz(target: str, base: Path) -> ImageArrays:
    """Open ``npz:PATH``: a NumPy archive of uint8 ``images`` and optionally ``labels`` and ``names``.

    The arrays are those of ``ImageArrays``; ``names`` are strings or integers ``[N]``, the ids of the rows. Pickled
    objects are refused.
    """
    path = existing("npz", target, base)
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is not a NumPy archive: save the images and labels with np.savez.")
    with np.load(path, allow_pickle=False) as archive:
        if "images" not in archive:
            raise BadInput(f"{path} has no array 'images'; it has: {', '.join(archive) or 'none'}.")
        try:
            images, labels, names = archive["images"], archive.get("labels"), archive.get("names")
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"cannot read the arrays of {path} ({error}): save them again.") from error
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "Uiu"):
        raise BadInput(
            f"the names in {path} are not texts [N], but {names.dtype} {list(names.shape)}: save them again."
        )
    return ImageArrays(images, labels, None, path.stem, None if names is None else names.tolist())
