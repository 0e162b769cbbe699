"""``python -m benchmarks.speed.memory ours|peer FIT_ROWS ROWS WIDTH CLASSES``: the peak memory of a mixture, in MiB.

``python -m benchmarks.speed.memory fits ROWS WIDTH CLASSES``: the peak memory of six joint fits from a cache on disk,
which is written to a temporary folder and removed (training set of ImageNet: 1281167 2048 1000, 15.6 GB).
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ood_scores
from benchmarks.speed.peers import PEERS
from benchmarks.speed.scorers import problem
from ood_scores.features.storage import cache
from ood_scores.scorers.one_pass import fit_all

FITS = ("mahalanobis", "relative_mahalanobis", "vim", "react", "she", "kl_matching")


def peak() -> float:
    """Return the peak memory of this program; ``ru_maxrss`` would include that of the process that started it."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def write_cache(path: Path, rows: int, width: int, classes: int) -> None:
    """Yield rectified features around class means and their logits, a few rows at a time."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(classes, width, generator=generator)
    head = ood_scores.Head(means - means.mean(dim=0))

    def runs() -> Iterator[dict[str, Tensor]]:
        for start in range(0, rows, 1024):
            labels = torch.arange(start, min(start + 1024, rows)) * classes // rows
            features = (means[labels] + torch.randn(len(labels), width, generator=generator)).relu_()
            yield {"features": features, "logits": head(features), "labels": labels}

    single, whole = np.dtype(np.float32), np.dtype(np.int64)
    shapes: cache.Shapes = {"features": ((width,), single), "logits": ((classes,), single), "labels": ((), whole)}
    cache.write(path, shapes, rows, head, None, runs(), compress=False)


def peak_of_fits(rows: int, width: int, classes: int) -> float:
    """Measure the peak memory of ``fit_all`` with all of ``FITS``, in MiB above that after the imports."""
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "train.h5", rows, width, classes)
        fit_all([ood_scores.create_scorer(name) for name in FITS], ood_scores.load(Path(folder) / "train.h5"))
    return peak() - before


def main(whose: str, *sizes: str) -> None:
    if whose == "fits":
        print(peak_of_fits(*map(int, sizes)))
        return
    data = problem(*map(int, sizes))
    before = peak()
    if whose == "ours":
        ood_scores.create_scorer("gmm").fit(data.train).score(data.test)
    else:
        PEERS["gmm"].scored(PEERS["gmm"].fitted(data), data)
    print(peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
