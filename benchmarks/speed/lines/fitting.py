"""The cost of fitting on a set of the size of ImageNet's training set, from a cache on disk."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import ood_scores
from benchmarks.speed import scorers
from benchmarks.speed.lines.data import CLASSES, WIDTH
from benchmarks.speed.measure import Figure, Line, Product, scaled, timed
from benchmarks.speed.memory import FITS, write_cache
from ood_scores.scorers.one_pass import fit_all

ROWS = 1_281_167
LEAST_ROWS = 3 * WIDTH
ROUNDS = 5


def fit(scale: float) -> Iterator[Line]:
    """Measure both fits in one call, once, against the operations of one product of the features with themselves."""
    rows = scaled(scale, ROWS, LEAST_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.h5"
        write_cache(path, rows, WIDTH, CLASSES)
        feats = ood_scores.load(path)
        made = [ood_scores.create_scorer(name) for name in ("mahalanobis", "vim")]
        ours_s = timed(lambda: fit_all(made, feats))
    for dtype, asked in ((torch.float64, 1.5), (torch.float32, None)):
        product = Product(scaled(scale, 4096, least=512), dtype)
        run = product.runner()
        product_s = statistics.median([timed(run) for _ in range(ROUNDS + 1)][1:])
        yield Line(
            f"Fit of Mahalanobis and ViM, {rows:,} x {WIDTH:,} float32, C={CLASSES:,}, from HDF5",
            f"2 N D^2 operations at the speed of a {product}",
            ours_s,
            product_s * 2 * rows * WIDTH**2 / product.flops,
            "lower",
            asked,
        )


def memory(scale: float) -> Iterator[Figure]:
    """Measure the peak memory of six joint fits."""
    rows = scaled(scale, ROWS, LEAST_ROWS)
    yield Figure(
        f"Peak memory of six fits together, {rows:,} x {WIDTH:,} float32, C={CLASSES:,}, from HDF5",
        f"above the import, a process of its own: {', '.join(FITS)}",
        scorers.memory("fits", rows, WIDTH, CLASSES),
        "MiB",
        most=1536,
    )
