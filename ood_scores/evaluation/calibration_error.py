"""Calibration of a classifier: how well its softmax probabilities agree with how often it is right.

Rows with equal confidence are interchangeable, so the order of the rows makes no difference.

Sources: Brier 1950, Verification of forecasts expressed in terms of probability; Guo et al. 2017, On calibration of
modern neural networks, Eq. 3; Nixon et al. 2019, Measuring calibration in deep learning (equal mass); Kumar et al.
2019, Verified uncertainty calibration, Definition 5.1 (debiased).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import nan
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ood_scores.errors import BadInput, EmptyInput, MissingInput, NotFinite, ShapeMismatch
from ood_scores.features import FeatureSet, Sets, as_feature_set
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

    Args:
        feats: Set with logits and labels.
        bins: Number of bins of the calibration errors.

    Raises:
        MissingInput: if there are no logits.
        BadLabels: if there are no labels, or they are not class indices of the model.
        NotFinite: if a logit is NaN or infinite.
        BadInput: if ``bins`` is less than 1, or there are fewer than 2 rows per bin.
    """
    feats = as_feature_set(feats)
    if not feats.has("logits"):
        raise MissingInput("calibration needs logits, and this feature set has none: extract them.")
    if bins < 1:
        raise BadInput(f"bins must be at least 1, got {bins}.")
    if len(feats) < 2 * bins:
        raise BadInput(f"{bins} bins need at least {2 * bins} rows, and there are {len(feats)}: pass fewer bins.")
    rows = ClassifiedRows.of(feats, feats.class_labels())
    return ClassifierCalibration(
        brier=brier_of(rows),
        nll=nll_of(rows),
        ece=ece_of(rows, bins),
        ece_equal_mass=ece_equal_mass_of(rows, bins),
        rms_debiased=rms_debiased_of(rows, bins),
    )


@dataclass(frozen=True, eq=False)
class ClassifiedRows:
    """What metrics of a classifier read of labeled rows, float64 ``[N]`` each.

    Attributes:
        brier: Squared distance of the probabilities from the one-hot label.
        nll: Negative log-likelihood of the label; both are NaN for rows whose label is not a class.
        confidence: Largest probability.
        correct: 1 for rows that are classified correctly, else 0.
    """

    brier: NDArray[np.float64]
    nll: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.float64]

    @classmethod
    def of(cls, feats: FeatureSet, labels: torch.Tensor) -> ClassifiedRows:
        """Compute them in float64 from the logits ``[N, C]`` of a set, block by block, and labels ``[N]``.

        Raises:
            NotFinite: if a logit is NaN or infinite.
        """
        found = np.empty((4, len(feats)))
        labels = labels.cpu().long()
        for block in feats.blocks(device="cpu", only=["logits"]):
            block.require_finite()
            here = slice(block.start, block.start + len(block))
            log_p = torch.log_softmax(block.logits.double(), dim=1)
            label, p = labels[here, None], log_p.exp()
            is_class = (label >= 0) & (label < p.shape[1])
            index = label.where(is_class, 0)
            brier = p.square().sum(dim=1, keepdim=True) - 2 * p.gather(1, index) + 1
            log_loss = -log_p.gather(1, index)
            correct = block.prediction()[:, None] == label
            columns = brier.where(is_class, nan), log_loss.where(is_class, nan), p.amax(dim=1, keepdim=True), correct
            found[:, here] = torch.cat(columns, dim=1).T.numpy()
        return cls(*found)

    @classmethod
    def joined(cls, parts: Sequence[ClassifiedRows]) -> ClassifiedRows:
        """Concatenate the rows of several sets."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def __len__(self) -> int:
        return len(self.confidence)

    def __getitem__(self, rows: Any) -> ClassifiedRows:
        """Return some of the rows, by a mask or by their numbers."""
        return ClassifiedRows(*(getattr(self, each.name)[rows] for each in fields(self)))

    def by_confidence(self) -> ClassifiedRows:
        """Return the rows in ascending order of their confidence."""
        return self[np.argsort(self.confidence, kind="stable")]

    def resamples(self, replicates: int, rng: np.random.Generator) -> Iterator[ClassifiedRows]:
        """Yield resamples of the rows by confidence, which formulas sort in linear time."""
        ordered, count = self.by_confidence(), len(self)
        for _ in range(replicates):
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            yield ordered[np.repeat(np.arange(count), times)]


def brier_of(rows: ClassifiedRows) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes."""
    return float(rows.brier.mean())


def nll_of(rows: ClassifiedRows) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return float(rows.nll.mean())


def ece_of(rows: ClassifiedRows, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal width; NaN if a row has no label."""
    return nan if np.isnan(rows.nll).any() else expected_calibration_error(rows.confidence, rows.correct, bins)


def ece_equal_mass_of(rows: ClassifiedRows, bins: int = BINS) -> float:
    """Expected calibration error over bins with equal numbers of rows; NaN if a row has no label."""
    count, accuracy, confidence = _equal_mass(rows, bins)
    return float(count @ np.abs(accuracy - confidence) / len(rows))


def rms_debiased_of(rows: ClassifiedRows, bins: int = BINS) -> float:
    """Root of the debiased mean squared calibration error; NaN with fewer than 2 rows per bin, or without labels."""
    if len(rows) < 2 * bins:
        return nan
    count, accuracy, confidence = _equal_mass(rows, bins)
    squared = (accuracy - confidence) ** 2 - accuracy * (1 - accuracy) / (count - 1)
    return float(np.sqrt(np.maximum(0, count @ squared / len(rows))))


def _equal_mass(rows: ClassifiedRows, bins: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the number of rows, the accuracy and the mean confidence of each bin that has rows.

    Rows with equal confidence may belong to two bins: each of them counts with the accuracy of all of them.
    """
    rows = rows.by_confidence()
    first = np.flatnonzero(np.diff(rows.confidence, prepend=-1))
    tied = np.diff(first, append=len(rows))
    right = np.where(np.isnan(rows.nll), nan, rows.correct)
    correct = np.repeat(np.add.reduceat(right, first) / tied, tied)
    bin_of = np.arange(len(rows)) * min(bins, len(rows)) // len(rows)
    count = np.bincount(bin_of)
    accuracy, confidence = (np.bincount(bin_of, weights=values) / count for values in (correct, rows.confidence))
    return count, accuracy, confidence


def expected_calibration_error(
    confidence: torch.Tensor | ArrayLike, correct: torch.Tensor | ArrayLike, bins: int = BINS
) -> float:
    """Compute ``sum_m |B_m| / N  |acc(B_m) - conf(B_m)|`` over M bins of equal width.

    Bin m contains the confidences in ``((m-1)/M, m/M]``; a confidence of exactly 0 belongs to the first bin. The edges
    are the float64 numbers closest to m/M, so a confidence of 0.2 lies on the edge 3/15 and not above it.

    Args:
        confidence: Confidences in [0, 1], ``[N]``, usually the maximum softmax.
        correct: Whether each prediction is correct, ``[N]``.
        bins: Number of bins M.

    Raises:
        BadInput: if confidences are outside [0, 1], or ``bins`` is less than 1.
        NotFinite: if a confidence is NaN.
        EmptyInput: if there are no rows.
        ShapeMismatch: if ``confidence`` and ``correct`` are not both ``[N]``.

    Source: Guo et al. 2017, "On calibration of modern neural networks", Eq. 3; Shin et al. 2024, Table 7.
    """
    sure, right = _array(confidence), _array(correct)
    if bins < 1:
        raise BadInput(f"bins must be at least 1, got {bins}.")
    if sure.ndim != 1 or sure.shape != right.shape:
        raise ShapeMismatch(
            f"confidence has shape {list(sure.shape)} and correct {list(right.shape)}: pass [N] for both."
        )
    if not len(sure):
        raise EmptyInput("there are no confidences: pass at least one row.")
    if np.isnan(sure).any():
        raise NotFinite("a confidence is NaN: check the logits.")
    if sure.min() < 0 or sure.max() > 1:
        raise BadInput(f"confidences run from {sure.min()} to {sure.max()}: pass probabilities, not scores or logits.")
    number = np.searchsorted(np.arange(1, bins) / bins, sure, side="left")
    return float(np.abs(np.bincount(number, weights=right - sure, minlength=bins)).sum() / len(sure))


def _array(values: Any) -> NDArray[np.float64]:
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
