"""Measured exponents of the time in the numbers of rows, features, classes and queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import ood_scores
from benchmarks.speed.measure import Figure, exponent, scaled
from benchmarks.speed.scorers import problem

READS_FEATURES = ("feature_norm", "gradnorm", "mahalanobis")
READS_LOGITS = ("energy", "gradnorm", "mahalanobis")
LINEAR = (None, 1.1)
"""Bounds of an exponent; the constant cost of a call makes it less than 1."""


def exponents(scale: float) -> Iterator[Figure]:
    """Measure exponents: in rows, which must be linear, and in features and classes, without bounds."""
    yield from _in_rows(scale)
    rows = scaled(scale, 20_000, least=500)
    for name in READS_FEATURES:
        yield _figure(name, "D", {width: (rows, width, 100) for width in (128, 256, 512, 1024, 2048)})
    for name in READS_LOGITS:
        yield _figure(name, "C", {classes: (rows, 256, classes) for classes in (100, 200, 500, 1000, 2000)})


def _in_rows(scale: float) -> Iterator[Figure]:
    data = problem(10_000, scaled(scale, 1_000_000, least=2000), 256, 100)
    sizes = [len(data.test) // share for share in (100, 30, 10, 3, 1)]
    for name in ("feature_norm", *READS_LOGITS):
        scorer = ood_scores.create_scorer(name).fit(data.train)
        yield _linear(f"{name}, in N", scorer, data.test, sizes, "D=256, C=100")
    scorer = ood_scores.create_scorer("knn").fit(data.train)
    yield _linear("knn, in N queries", scorer, data.test, [size // 10 for size in sizes], "a bank of 10,000 x 256")


def _linear(
    name: str, scorer: ood_scores.Scorer, feats: ood_scores.FeatureSet, sizes: Sequence[int], given: str
) -> Figure:
    found = exponent([(size, partial(scorer.score, feats[:size])) for size in sizes])
    how = f"slope of log time, {sizes[0]:,} to {sizes[-1]:,} rows; {given}"
    return Figure(f"Exponent of {name}", how, found, "", *LINEAR)


def _figure(name: str, size: str, shapes: dict[int, tuple[int, int, int]]) -> Figure:
    runs = []
    for at, (rows, width, classes) in shapes.items():
        data = problem(2 * max(width, classes), rows, width, classes)
        runs.append((at, partial(ood_scores.create_scorer(name).fit(data.train).score, data.test)))
    rows, width, classes = list(shapes.values())[-1]
    given = f"N={rows:,}, " + (f"C={classes:,}" if size == "D" else f"D={width:,}")
    how = f"slope of log time, {min(shapes):,} to {max(shapes):,}; {given}"
    return Figure(f"Exponent of {name}, in {size}", how, exponent(runs), "")
