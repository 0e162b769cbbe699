"""Calibration of a classifier: how well its softmax probabilities agree with how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ood_scores.errors import BadInput, MissingInput
from ood_scores.evaluation.long_tail import expected_calibration_error
from ood_scores.features import Sets, as_feature_set
from ood_scores.runtime import default_torch_state

BINS = 15


@dataclass(frozen=True)
class ClassifierCalibration:
    """Proper scores and calibration errors of a classifier on a labeled set; lower is better.

    Attributes:
        brier: Mean squared distance of the probabilities from the one-hot label, summed over classes, in [0, 2].
        nll: Mean negative log-likelihood of the labels, in nats.
        ece: Expected calibration error of the largest probability, over bins of equal width.
        ece_equal_mass: The same over bins with equal numbers of rows.
        rms_debiased: Root of the mean squared calibration error over bins with equal numbers of rows, from which the
            part that is due to chance is subtracted; 0 if that leaves nothing.
    """

    brier: float
    nll: float
    ece: float
    ece_equal_mass: float
    rms_debiased: float


@default_torch_state()
def classifier_calibration(feats: Sets, bins: int = BINS) -> ClassifierCalibration:
    """Measure how well the softmax probabilities of a classifier are calibrated on a labeled ID set.

    Everything is computed in float64 from the logits, block by block.

    Args:
        feats: Set with logits and labels.
        bins: Number of bins of the calibration errors.

    Raises:
        MissingInput: if there are no logits.
        BadLabels: if there are no labels, or they are not class indices of the model.
        NotFinite: if a logit is NaN or infinite.
        BadInput: if ``bins`` is less than 1, or there are fewer than 2 rows per bin.

    Sources: Brier 1950, Verification of forecasts expressed in terms of probability; Guo et al. 2017, On calibration of
    modern neural networks, Eq. 3; Nixon et al. 2019, Measuring calibration in deep learning (equal mass); Kumar et al.
    2019, Verified uncertainty calibration, Definition 5.1 (debiased).
    """
    feats = as_feature_set(feats)
    if not feats.has("logits"):
        raise MissingInput("calibration needs logits, and this feature set has none: extract them.")
    if bins < 1:
        raise BadInput(f"bins must be at least 1, got {bins}.")
    if len(feats) < 2 * bins:
        raise BadInput(f"{bins} bins need at least {2 * bins} rows, and there are {len(feats)}: pass fewer bins.")
    labels = feats.class_labels().cpu()
    brier, nll, confidence, correct = (np.empty(len(feats)) for _ in range(4))
    for block in feats.blocks(device="cpu", only=["logits"]):
        block.require_finite()
        here = slice(block.start, block.start + len(block))
        log_p = torch.log_softmax(block.logits.double(), dim=1)
        label, p = labels[here, None], log_p.exp()
        of_label = p.gather(1, label)[:, 0]
        brier[here] = (p.square().sum(dim=1) - 2 * of_label + 1).numpy()
        nll[here] = -log_p.gather(1, label)[:, 0].numpy()
        confidence[here] = p.amax(dim=1).numpy()
        correct[here] = (block.prediction() == label[:, 0]).numpy()
    mass = np.empty(len(feats), dtype=np.int64)
    mass[np.argsort(confidence, kind="stable")] = np.arange(len(feats)) * bins // len(feats)
    return ClassifierCalibration(
        brier=float(brier.mean()),
        nll=float(nll.mean()),
        ece=expected_calibration_error(confidence, correct, bins),
        ece_equal_mass=float(np.abs(np.bincount(mass, weights=correct - confidence)).sum() / len(feats)),
        rms_debiased=_rms_debiased(confidence, correct, mass),
    )


def _rms_debiased(confidence: NDArray[np.float64], correct: NDArray[np.float64], bin_of: NDArray[np.int64]) -> float:
    rows = np.bincount(bin_of)
    accuracy, sure = (np.bincount(bin_of, weights=values) / rows for values in (correct, confidence))
    squared = (accuracy - sure) ** 2 - accuracy * (1 - accuracy) / (rows - 1)
    return float(np.sqrt(np.maximum(0, rows @ squared / len(confidence))))
