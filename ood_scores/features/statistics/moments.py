"""Moments: the mean and scatter of the features of each class or of all rows, computed in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ood_scores.errors import BadInput, BadLabels
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.statistics.base import Accumulator, Statistic
from ood_scores.runtime import CPU

GRAM_ROWS = 128
"""The number of rows of a symmetric product that are computed at a time."""

CLASS_SCATTER_BYTES = 2**30
"""The most memory for the scatter of all classes; a larger one is left out of the moments."""


@dataclass(frozen=True)
class Moments:
    """Class means and the scatter around them, float64.

    Attributes:
        counts: The number of rows of each class, int64 ``[C]``.
        means: The class means ``[C, D]`` (zeros for a class without rows).
        scatter: The sum over all rows of ``(z - mean_of_its_class)(z - mean_of_its_class)^T``, ``[D, D]``, without any
            division.
        class_scatter: The same for each class, ``[C, D, D]``; None if it was not requested or is larger than
            ``CLASS_SCATTER_BYTES``.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    class_scatter: Tensor | None


@dataclass(frozen=True)
class ClassMoments:
    """The ``Moments`` of a space (``"features"``, ``"logits"``, or an extra), optionally L2-normalized."""

    space: str = "features"
    normalize: bool = False
    per_class: bool = False
    stored_as: ClassVar[type] = Moments

    @property
    def reads(self) -> Sequence[str]:
        return (self.space,)

    @property
    def title(self) -> str:
        return _title(self.space, self.normalize, " of each class" if self.per_class else "")

    def operations(self, rows: int, width: int) -> float:
        return (24.0 if self.per_class else 4.0) * rows * width**2  # measured

    def start(self, feats: FeatureSet) -> Accumulator[Moments]:
        labels = feats.class_labels()
        return _ClassMomentsAccumulator(self, labels, feats.num_classes or int(labels.max()) + 1)


@dataclass(frozen=True)
class GlobalMoments:
    """The ``Moments`` of all rows as a single class, whatever their labels.

    They consist of ``counts`` ``[1]``, ``means`` ``[1, D]``, and the ``scatter`` around that mean. If the set has
    labels, they follow from the moments of the classes, which other scorers may request: one product serves both.
    """

    space: str = "features"
    normalize: bool = False
    stored_as: ClassVar[type] = Moments

    def source(self, feats: FeatureSet) -> Statistic[Moments] | None:
        with suppress(BadLabels):
            feats.class_labels()
            return ClassMoments(self.space, self.normalize)
        return None

    def derive(self, source: Moments) -> Moments:
        rows = source.counts.sum()
        shares = (source.counts.double() / rows)[:, None]
        first = source.means[source.counts.argmax()]
        mean = first + (shares * (source.means - first)).sum(dim=0, keepdim=True)  # a constant stays exact
        spread = source.counts.double().sqrt()[:, None] * (source.means - mean)
        return Moments(rows[None], mean, source.scatter + spread.T @ spread, None)

    @property
    def reads(self) -> Sequence[str]:
        return (self.space,)

    @property
    def title(self) -> str:
        return _title(self.space, self.normalize)

    def operations(self, rows: int, width: int) -> float:
        return ClassMoments(self.space, self.normalize).operations(rows, width)

    def start(self, feats: FeatureSet) -> Accumulator[Moments]:
        together = torch.zeros(len(feats), dtype=torch.int64)
        return _ClassMomentsAccumulator(ClassMoments(self.space, self.normalize), together, 1)


def _title(space: str, normalize: bool, of: str = "") -> str:
    return f"the covariance of {'normalized ' if normalize else ''}{space}{of}"


class _ClassMomentsAccumulator:
    """Sums of rows relative to the mean of their class in the first block that has rows of the class.

    Therefore neither a large offset nor a collapsed class costs precision. The contribution of the means of all rows is
    subtracted once at the end. The mean of that block is computed relative to its first row of the class, so that a
    constant leaves no rounding error.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", on shifted data.
    """

    def __init__(self, statistic: ClassMoments, labels: Tensor, classes: int) -> None:
        self._statistic, self._classes = statistic, classes
        self._labels = {CPU: labels.cpu(), labels.device: labels}  # on the CPU, they are counted without waiting
        self._sums: _Sums | None = None

    def update(self, block: Block) -> None:
        values = block.space(self._statistic.space, self._statistic.normalize)
        on_cpu, labels = (
            self._labels_on(device)[block.start : block.start + len(block)] for device in (CPU, values.device)
        )
        self._sums = sums = self._sums or self._nothing_yet(values)

        counts = torch.bincount(on_cpu, minlength=self._classes)
        unseen = ((counts > 0) & (sums.counts == 0)).nonzero()[:, 0]
        if len(unseen):
            new, first, rows = (
                part.to(values.device) for part in (unseen, _first_rows(on_cpu, counts)[unseen], counts[unseen])
            )
            sums.origins[new] = values[first]
            shifts = _sums(values - _by_label(sums.origins, labels), labels, self._classes)
            sums.origins[new] += shifts[new] / rows[:, None]
        deviations = values - _by_label(sums.origins, labels)

        sums.counts += counts
        sums.deviations += _sums(deviations, labels, self._classes)
        if sums.class_products is None:
            _add_lower_gram(sums.products, deviations)
        else:
            _add_class_products(sums.class_products, deviations, labels, counts)

    def result(self) -> Moments:
        if self._sums is None:
            raise BadInput("no block was read.")
        sums = self._sums
        counts = sums.counts.to(sums.deviations.device)
        means = sums.deviations / counts.clamp_min(1)[:, None]
        if sums.class_products is None:
            _add_lower_gram(sums.products, counts.double().sqrt()[:, None] * means, sign=-1)
            scatter = _symmetric(sums.products)
        else:
            sums.class_products.baddbmm_(sums.deviations[:, :, None], means[:, None, :], alpha=-1)
            scatter = sums.class_products.sum(dim=0)
        return Moments(counts, means.add_(sums.origins), scatter, sums.class_products)

    def _labels_on(self, device: torch.device) -> Tensor:
        if device not in self._labels:
            self._labels[device] = self._labels[CPU].to(device)
        return self._labels[device]

    def _nothing_yet(self, values: Tensor) -> _Sums:
        width = values.shape[1]
        per_class = self._statistic.per_class and 8 * self._classes * width**2 <= CLASS_SCATTER_BYTES
        return _Sums(
            torch.zeros(self._classes, dtype=torch.int64),
            values.new_zeros(self._classes, width),
            values.new_zeros(self._classes, width),
            values.new_zeros(width, width),
            values.new_zeros(self._classes, width, width) if per_class else None,
        )


@dataclass
class _Sums:
    """The sums over the rows so far, float64.

    Attributes:
        counts: The number of rows of each class, int64 ``[C]``, on the CPU.
        origins: The origin of each class ``[C, D]``.
        deviations: The sums of the deviations of the rows from the origin of their class ``[C, D]``.
        products: The sum of the outer products of all deviations ``[D, D]``.
        class_products: The same for each class ``[C, D, D]``.
    """

    counts: Tensor
    origins: Tensor
    deviations: Tensor
    products: Tensor
    class_products: Tensor | None


def _by_label(means: Tensor, labels: Tensor) -> Tensor:
    """The mean of the class of each row, ``[B, D]``; the only mean, ``[1, D]``, for a single class."""
    return means if len(means) == 1 else means[labels]


def _sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sum of the rows of each class, ``[C, D]``."""
    if classes == 1:
        return rows.sum(dim=0, keepdim=True)
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


def _add_lower_gram(products: Tensor, rows: Tensor, sign: int = 1) -> None:
    """Add ``rows^T rows`` on and below the diagonal, in panels, since it is symmetric."""
    for start in range(0, len(products), GRAM_ROWS):
        stop = start + GRAM_ROWS
        products[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=sign)


def _symmetric(products: Tensor) -> Tensor:
    """The symmetric matrix whose lower half is given."""
    return products.tril_().add_(products.tril(-1).T)


def _first_rows(labels: Tensor, counts: Tensor) -> Tensor:
    """The index of the first row of each class, ``[C]``; any index for a class without rows."""
    return labels.argsort(stable=True)[(counts.cumsum(0) - counts).clamp_max(len(labels) - 1)]


def _add_class_products(products: Tensor, rows: Tensor, labels: Tensor, counts: Tensor) -> None:
    """Add one matrix product for each class in the block, given its ``counts`` on the CPU.

    A device computes them in one batch, filled up with zeros, if that takes no more than four times the rows.
    """
    order, most = labels.argsort(stable=True), int(counts.max())
    if rows.device.type != "cpu" and len(counts) * most <= 4 * len(rows):
        sorted_labels, starts = labels[order], (counts.cumsum(0) - counts).to(rows.device)
        places = torch.arange(len(rows), device=rows.device) - starts[sorted_labels]
        filled = rows.new_zeros(len(counts), most, rows.shape[1])
        filled[sorted_labels, places] = rows[order]
        products.baddbmm_(filled.mT, filled)
        return
    groups = rows[order].split(counts.tolist())
    for label in counts.nonzero()[:, 0].tolist():
        products[label].addmm_(groups[label].T, groups[label])
