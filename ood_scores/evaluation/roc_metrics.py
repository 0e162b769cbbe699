"""Metrics of the ROC and precision-recall curves, as functions of the counts of accepted rows.

The docstrings of ``ood_scores.evaluation.metrics`` define them. Ratios are computed from integers, so ties are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ood_scores.errors import BadInput
from ood_scores.evaluation.threshold_counts import RocCounts
from ood_scores.registry import Registry


def auroc_of(counts: RocCounts) -> float:
    """``auroc`` from counts."""
    new_negatives = np.diff(counts.negatives, prepend=0)
    outranked_twice = counts.positives.copy()  # positives above a negative count twice, tied ones once
    outranked_twice[1:] += counts.positives[:-1]
    return int(new_negatives @ outranked_twice) / (2 * counts.n_positive * counts.n_negative)


def _step(recalled: NDArray[np.int64], precision: NDArray[np.float64]) -> float:
    return float(recalled @ precision)


def _trapezoid(recalled: NDArray[np.int64], precision: NDArray[np.float64]) -> float:
    return float(recalled @ (precision + np.append(1.0, precision[:-1]))) / 2


_INTERPOLATIONS: Registry[Callable[[NDArray[np.int64], NDArray[np.float64]], float]] = Registry(
    "interpolation", {"step": _step, "trapezoid": _trapezoid}
)


def aupr_of(counts: RocCounts, interpolation: str = "step") -> float:
    """``aupr_in`` from counts."""
    precision = counts.positives / (counts.positives + counts.negatives)
    recalled = np.diff(counts.positives, prepend=0)
    return _INTERPOLATIONS[interpolation](recalled, precision) / counts.n_positive


def _first(positives: NDArray[np.int64], wanted: Fraction) -> int:
    return int(np.searchsorted(positives, ceil(wanted)))


def _nearest(positives: NDArray[np.int64], wanted: Fraction) -> int:
    above = _first(positives, wanted)
    candidates = {int(positives[above]), int(positives[max(above - 1, 0)])}
    kept = min(candidates, key=lambda count: (abs(count - wanted), -count))
    if kept == positives[-1]:
        return int(np.searchsorted(positives, kept))
    return int(np.searchsorted(positives, kept, side="right")) - 1


_RULES: Registry[Callable[[NDArray[np.int64], Fraction], int]] = Registry(
    "rule", {"first": _first, "nearest": _nearest}
)


def fpr_of(counts: RocCounts, tpr: float, rule: str = "first") -> float:
    """``fpr_at_tpr_id`` from counts."""
    return int(counts.negatives[threshold_index(counts, tpr, rule)]) / counts.n_negative


def threshold_index(counts: RocCounts, tpr: float, rule: str = "first") -> int:
    """Return the index of the threshold that accepts the share ``tpr`` of positive rows; see ``fpr_at_tpr_id``."""
    if not 0 < tpr <= 1:
        raise BadInput(f"tpr must be in (0, 1], got {tpr}.")
    return _RULES[rule](counts.positives, Fraction(str(tpr)) * counts.n_positive)


def resampled_fpr(counts: RocCounts, replicates: int, rng: np.random.Generator, tpr: float) -> NDArray[np.float64]:
    """``fpr_of`` with the rule ``"first"`` on ``replicates`` resamples of the rows, computed without drawing rows.

    The position of the k-th highest of n resampled rows, as a share of n, is the k-th of n uniform variables, so it has
    the distribution Beta(k, n - k + 1). The number of accepted rows of the other class is binomial.
    """
    n, m = counts.n_positive, counts.n_negative
    kept = ceil(Fraction(str(tpr)) * n)
    row = np.minimum((n * rng.beta(kept, n - kept + 1, replicates)).astype(np.int64), n - 1)
    accepted = counts.negatives[np.searchsorted(counts.positives, row, side="right")]
    return rng.binomial(m, accepted / m) / m
