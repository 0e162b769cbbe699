"""Metrics of a whole system: a classifier with a reject option, on rows of known and of unknown classes.

Each function takes the counts of ``threshold_counts.roc_counts``, whose thresholds accept rows by their score. A system
fails on an accepted ID row that is misclassified and, where OoD rows count ("SCOD", selective classification with OoD
detection), on every accepted OoD row. Rows with equal scores are accepted in random order, and the values are the means
over all orders, in closed form.

Sources: Geifman & El-Yaniv 2017, Selective classification for deep neural networks (AURC); Geifman et al. 2019,
Bias-reduced uncertainty estimation (E-AURC); Traub et al. 2024, Overcoming common flaws in the evaluation of selective
classification systems (AUGRC); Jaeger et al. 2023, A call to reflect on evaluation practices for failure detection
(OoD rows as failures); Dhamija et al. 2018, Reducing network agnostophobia (OSCR, CCR); Humblot-Renaux et al. 2023,
Beyond AUROC & co. (AUTC); Lee et al. 2018, A simple unified framework (detection error).
"""

from __future__ import annotations

from fractions import Fraction
from math import floor, isfinite, nan

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from ood_scores.evaluation.threshold_counts import RocCounts

Counts = NDArray[np.int64]


def aurc_of(counts: RocCounts, ood: bool = False) -> float:
    """Area under the risk-coverage curve: the mean over n = 1 … N of the share of failures among the n best rows.

    Args:
        counts: Counts with ID as the positive class and ``correct``.
        ood: Whether OoD rows are there too, as failures.
    """
    accepted, failed = _accepted_and_failed(counts, ood)
    before, failed_before = accepted - np.diff(accepted, prepend=0), failed - np.diff(failed, prepend=0)
    tied = accepted - before
    rate = (failed - failed_before) / tied
    sums = rate * tied + (failed_before - rate * before) * (digamma(accepted + 1) - digamma(before + 1))
    return float(np.where(tied == 1, failed / accepted, sums).sum() / accepted[-1])


def e_aurc_of(counts: RocCounts, ood: bool = False) -> float:
    """AURC minus that of the best ranking of the same rows, which accepts all failures last; see ``aurc_of``.

    Departure: the best AURC is the sum itself; Geifman et al. 2019, Eq. 2, approximate it by an integral.
    """
    accepted, failed = _accepted_and_failed(counts, ood)
    rows, failures = int(accepted[-1]), int(failed[-1])
    right = rows - failures
    best = (failures - right * (digamma(rows + 1) - digamma(right + 1))) / rows
    return aurc_of(counts, ood) - float(best)


def augrc_of(counts: RocCounts, ood: bool = False) -> float:
    """Area under the generalized risk-coverage curve: the share of all rows that are accepted failures, by coverage.

    It is ``e (1 - e) (1 - A) + e^2 / 2`` with the share of failures e and the AUROC A of successes against failures, so
    it lies between 0 and 0.5. See ``aurc_of`` for the arguments.
    """
    accepted, failed = _accepted_and_failed(counts, ood)
    doubled = 2 * failed - np.diff(failed, prepend=0)
    return int(np.diff(accepted, prepend=0) @ doubled) / (2 * int(accepted[-1]) ** 2)


def oscr_of(counts: RocCounts) -> float:
    """Area under the open-set classification rate curve: correctly classified, accepted ID rows by accepted OoD rows.

    It is the probability that an ID row is classified correctly and has a higher score than an OoD row.
    """
    correct = _correct(counts)
    doubled = 2 * correct - np.diff(correct, prepend=0)
    return int(np.diff(counts.negatives, prepend=0) @ doubled) / (2 * counts.n_positive * counts.n_negative)


def ccr_of(counts: RocCounts, fpr: str) -> float:
    """Share of ID rows accepted and classified correctly if at most the share ``fpr`` of OoD rows is accepted."""
    allowed = floor(Fraction(fpr) * counts.n_negative)
    thresholds = int(np.searchsorted(counts.negatives, allowed, side="right"))
    return int(_correct(counts)[thresholds - 1]) / counts.n_positive if thresholds else 0.0


def detection_error_of(counts: RocCounts) -> float:
    """Smallest mean of the share of rejected ID rows and the share of accepted OoD rows, over all thresholds."""
    rejected, accepted = 1 - counts.positives / counts.n_positive, counts.negatives / counts.n_negative
    return min(0.5, float((rejected + accepted).min()) / 2)


def autc_of(counts: RocCounts) -> float:
    """Area under the threshold curve: mean error over thresholds that are uniform between the extreme scores.

    With scores scaled to [0, 1] over both sides, it is ``(mean of OoD scores + 1 - mean of ID scores) / 2``, the exact
    integral of the mean of both error rates. 0.5 if all scores are equal, NaN if a score is infinite. Departure: the
    authors' code integrates between the thresholds of the ROC curve by trapezoids.
    """
    low, high = float(counts.thresholds[-1]), float(counts.thresholds[0])
    if not (isfinite(low) and isfinite(high)):
        return nan
    if low == high:
        return 0.5
    scaled = (counts.thresholds - low) / (high - low)
    known, unknown = (
        float(np.diff(accepted, prepend=0) @ scaled) / int(accepted[-1])
        for accepted in (counts.positives, counts.negatives)
    )
    return (unknown + 1 - known) / 2


def _accepted_and_failed(counts: RocCounts, ood: bool) -> tuple[Counts, Counts]:
    """Numbers of accepted rows and of failures among them, at thresholds that accept another row."""
    accepted, failed = counts.positives, counts.positives - _correct(counts)
    if ood:
        return accepted + counts.negatives, failed + counts.negatives
    steps = np.flatnonzero(np.diff(accepted, prepend=0))
    return accepted[steps], failed[steps]


def _correct(counts: RocCounts) -> Counts:
    if counts.correct is None:
        raise ValueError("the counts do not know which rows are classified correctly")
    return counts.correct
