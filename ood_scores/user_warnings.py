"""Warnings that point at the line of the user's code that called this package, however deep they are raised."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

from ood_scores.terminal import safe

PACKAGE = f"{Path(__file__).parent}{os.sep}"
BETWEEN = (PACKAGE, contextlib.__file__)
"""Where frames between a warning and the user's code are: this package, and the decorators made of its contexts."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the innermost line that is not in this package, with control characters and stray bytes escaped.

    ``skip_file_prefixes`` of ``warnings.warn`` does the same from Python 3.12 on.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(safe(message), category, stacklevel=level)
