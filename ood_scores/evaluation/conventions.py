"""Signs of scores in other packages, and their conversion to higher = more in-distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.registry import unknown

HIGHER_IS_ID: Mapping[str, bool] = {
    "alibi-detect": False,
    "anomalib": False,
    "oodeel": False,
    "openood": True,
    "pyod": False,
    "pytorch-ood": False,
    "scikit-learn": True,
    "torch-uncertainty": False,
}
"""Whether a higher score means more in-distribution, by package."""


def from_package(package: str, scores: Any) -> NDArray[np.float64]:
    """Convert the scores of another package to those of this one: float64 ``[N]``, higher = more in-distribution.

    The sign is all that changes, so the same call also converts scores of this package to those of the other.

    Args:
        package: a key of ``HIGHER_IS_ID``, in any case, with ``-`` or ``_``.
        scores: a tensor on any device, an array, or a sequence.

    Raises:
        UnknownName: if the convention of the package is not known.
    """
    name = package.lower().replace("_", "-")
    if name not in HIGHER_IS_ID:
        raise unknown("there is no convention of the package", package, list(HIGHER_IS_ID))
    values = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64)
    return values if HIGHER_IS_ID[name] else -values
