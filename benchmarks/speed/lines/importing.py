"""The cost of ``import ood_scores`` in a new process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.speed.measure import Line, paired

LATER = ("faiss", "timm", "pandas", "matplotlib", "sklearn", "torchvision")
"""Packages that are imported when they are needed, but not when this package is imported."""

SCORING = "import ood_scores; ood_scores.FeatureSet, ood_scores.load, ood_scores.score, ood_scores.list_scorers()"


def importing(scale: float) -> Iterator[Line]:
    """Measure complete processes, regardless of the scale."""
    for name, code in (("import ood_scores", "import ood_scores"), ("import ood_scores, and all scorers", SCORING)):
        _run(f"{code}\nimport sys\nfound = sys.modules.keys() & set({LATER!r})\nassert not found, found")
        yield paired(
            f"{name}; none of {', '.join(LATER)} is imported",
            partial(_run, code),
            "import torch",
            partial(_run, "import torch"),
            better="lower",
            asked=1.3,
        )


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
