"""Conformal e-values, for batches of rows that depend on each other, and p-values under covariate shift.

Benjamini and Hochberg's procedure on p-values (``conformal.benjamini_hochberg``) assumes that the rows of a batch are
independent. Frames of one video are not: with e-values, the false discovery rate holds for any dependence.

Sources: Wang & Ramdas 2022, False discovery rate control with e-values (e-BH); Vovk & Wang 2021, E-values: calibration,
combination and applications (the calibrator); Tibshirani et al. 2019, Conformal prediction under covariate shift; Jin &
Candès 2023, Model-free selective inference under covariate shift (weighted p-values).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_scores.detector.conformal import ROUNDING, check_shares, p_values
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.evaluation.threshold_counts import Scores, checked_scores

FOLDS = 5


def e_values(calibration: Scores, scores: Scores) -> NDArray[np.float64]:
    """Return conformal e-values: evidence against "this row is in-distribution". A large value means OoD.

    The e-value is ``f(p) / mean f``, where p is the conformal p-value, f(p) = (1 - p + p ln p) / (p ln^2 p) (Vovk &
    Wang 2021, Eq. (2)), and the mean is over the possible p-values 1 / (n + 1), ..., 1. Its expectation for an ID row
    is 1 without ties, and less with ties, over the draw of the calibration rows and the row. The largest e-value is
    about n / ln^2 n, so that many calibration rows are needed: it is 15 for n = 500, and 77 for n = 5,000.

    Args:
        calibration: the scores ``[n]`` of calibration rows, as in ``conformal.threshold``.
        scores: the scores ``[m]`` of the rows to test.

    Returns:
        float64 ``[m]``, at least 0. By Markov's inequality, P(e >= 1 / a) <= a for an ID row.

    Raises:
        BadInput: the errors of ``conformal.threshold`` for scores.
    """
    p = p_values(calibration, scores)
    n = len(calibration)
    return _calibrated(p) / float(_calibrated(np.arange(1, n + 2) / (n + 1)).mean())


def e_benjamini_hochberg(e: Scores, rate: float) -> NDArray[np.bool_]:
    """Return which rows of a batch to declare OoD, so that on average a share of at most ``rate`` of them is ID.

    Unlike ``conformal.benjamini_hochberg``, the rate holds however the rows depend on each other. The price is power.

    Args:
        e: the e-values ``[m]`` of one batch.
        rate: the false discovery rate, in (0, 1).

    Returns:
        bool ``[m]``, True for rows declared OoD: the k largest e-values for the largest k whose k-th largest is at
        least m / (rate k).

    Raises:
        BadInput: if e-values are negative, or the rate is not in (0, 1). Other errors are those of
            ``conformal.threshold`` for scores.
    """
    check_shares(rate=rate)
    values = checked_scores(e, "e-value")
    if values.min() < 0:
        raise BadInput(f"e-values must not be negative, got {values.min():g}.")
    m = len(values)
    order = np.argsort(-values, kind="stable")
    met = np.flatnonzero(rate * np.arange(1, m + 1) * values[order] * (1 + ROUNDING) >= m)
    rejected = np.zeros(m, dtype=bool)
    if len(met):
        rejected[order[: met[-1] + 1]] = True
    return rejected


def weighted_p_values(
    calibration: Scores, scores: Scores, calibration_weights: Scores, weights: Scores
) -> NDArray[np.float64]:
    """Return p-values that hold although the distribution of features has changed since the calibration.

    Args:
        calibration: the scores ``[n]`` of calibration rows, as in ``conformal.threshold``.
        scores: the scores ``[m]`` of the rows to test.
        calibration_weights: for each calibration row, the density of new ID rows at its features, divided by that of
            calibration rows, ``[n]``; see ``density_ratios``. A common factor makes no difference.
        weights: the same for the rows to test, ``[m]``.

    Returns:
        float64 ``[m]``: (sum of weights of calibration rows with at most the same score + own weight) / (sum of weights
        of all calibration rows + own weight). Equal weights give ``conformal.p_values``. For an ID row, P(p <= u) <= u
        for every u if the weights are the true ratios (Tibshirani et al. 2019, Lemma 3). The p-values of a batch are
        not positively dependent, so that Benjamini and Hochberg's procedure guarantees nothing for them.

    Raises:
        BadInput: if weights are negative or infinite, or a row to test has no weight although no calibration row has.
        ShapeMismatch: if there is not one weight per row. Other errors are those of ``conformal.threshold``.
    """
    known, new = checked_scores(calibration, "calibration"), checked_scores(scores, "new")
    of_known, of_new = _checked_weights(calibration_weights, known), _checked_weights(weights, new)
    order = np.argsort(known, kind="stable")
    sums = np.append(0, np.cumsum(of_known[order]))
    if sums[-1] == 0 and (of_new == 0).any():
        raise BadInput("all weights of the calibration rows are 0: pass density ratios, which are above 0 somewhere.")
    below = sums[np.searchsorted(known[order], new, side="right")]
    return (below + of_new) / (sums[-1] + of_new)


def density_ratios(calibration: Any, new: Any, *, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate by how much more often features occur among new rows than among calibration rows.

    A logistic regression on standardized features tells calibration rows from new rows, and each row gets the odds of
    models that were fitted without it, divided by the odds of the numbers of rows (5 folds). New rows that are OoD
    distort the ratios: pass rows that you believe to be ID.

    Args:
        calibration: the features ``[n, D]`` of calibration rows: a tensor or an array.
        new: the features ``[m, D]`` of new rows.
        seed: the seed of the folds.

    Returns:
        The ratios of the calibration rows, float64 ``[n]``, and of the new rows, ``[m]``, for ``weighted_p_values``.

    Raises:
        EmptyInput: if there are fewer than 5 rows on a side.
        ShapeMismatch: if the features are not ``[n, D]`` and ``[m, D]``.
        NotFinite: if a feature is NaN or infinite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, other = _features(calibration, "calibration"), _features(new, "new")
    if known.shape[1] != other.shape[1]:
        raise ShapeMismatch(f"calibration rows have {known.shape[1]} features and new rows {other.shape[1]}.")
    is_new = np.repeat([False, True], [len(known), len(other)])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    log_p = cross_val_predict(model, np.concatenate([known, other]), is_new, cv=folds, method="predict_log_proba")
    ratios = np.exp(log_p[:, 1] - log_p[:, 0]) * len(known) / len(other)
    return ratios[: len(known)], ratios[len(known) :]


def _calibrated(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 - p + p ln p) / (p ln^2 p) = (exp(x) - 1 - x) / x^2 with x = -ln p; near 0, where that cancels, its series."""
    x = -np.log(p)
    series = 0.5 + x * (1 / 6 + x * (1 / 24 + x / 120))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x < 1e-3, series, (np.expm1(x) - x) / x**2)


def _checked_weights(weights: Scores, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    values = checked_scores(weights, "weight")
    if values.shape != scores.shape:
        raise ShapeMismatch(f"there are {len(values)} weights for {len(scores)} scores: pass one weight per row.")
    if values.min() < 0 or np.isinf(values).any():
        raise BadInput(f"weights must be finite and not negative, got {values.min():g} to {values.max():g}.")
    return values


def _features(features: Any, name: str) -> NDArray[np.float64]:
    array = np.asarray(features.detach().cpu() if isinstance(features, torch.Tensor) else features, dtype=np.float64)
    if array.ndim != 2:
        raise ShapeMismatch(f"{name} features have shape {list(array.shape)}: pass [rows, features].")
    if len(array) < FOLDS:
        raise EmptyInput(f"there are {len(array)} {name} rows: pass at least {FOLDS}.")
    if not np.isfinite(array).all():
        raise NotFinite(f"a {name} feature is NaN or infinite: check where it comes from.")
    return array
