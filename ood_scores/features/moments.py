"""Moments: means and scatter of the features, of each class or of all rows, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput, BadLabels
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.statistics import Accumulator, Statistic

GRAM_COLUMNS = 128
"""Columns of a symmetric product that are computed at a time."""

CLASS_SCATTER_BYTES = 2**30
"""Most memory that the scatter of all classes may take; what takes more is left out of their moments."""


@dataclass(frozen=True)
class Moments:
    """Class means and the scatter around them, float64.

    ``counts`` int64 ``[C]``; ``means`` ``[C, D]`` (zeros for a class without rows); ``scatter`` ``[D, D]``: the sum
    over all rows of ``(z - mean_of_its_class)(z - mean_of_its_class)^T``, not divided by anything; ``class_scatter``
    ``[C, D, D]``: the same for each class, or None where it was not asked for or is more than ``CLASS_SCATTER_BYTES``.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    class_scatter: Tensor | None


@dataclass(frozen=True)
class ClassMoments:
    """Asks for the ``Moments`` of a space (``"features"``, ``"logits"`` or an extra), optionally L2-normalised."""

    space: str = "features"
    normalize: bool = False
    per_class: bool = False

    @property
    def reads(self) -> Sequence[str]:
        return (self.space,)

    def start(self, feats: FeatureSet) -> Accumulator:
        labels = feats.class_labels()
        return _ClassMomentsAccumulator(self, labels, feats.num_classes or int(labels.max()) + 1)


@dataclass(frozen=True)
class GlobalMoments:
    """Asks for the ``Moments`` of all rows together, whatever their labels: those of a single class.

    ``counts`` ``[1]``, ``means`` ``[1, D]``, and ``scatter`` around that one mean. Of a set with labels they follow
    from the moments of the classes, which others may ask for too: one product for both.
    """

    space: str = "features"
    normalize: bool = False

    def source(self, feats: FeatureSet) -> Statistic | None:
        with suppress(BadLabels):
            feats.class_labels()
            return ClassMoments(self.space, self.normalize)
        return None

    def derive(self, source: Moments) -> Moments:
        rows = source.counts.sum()
        shares = (source.counts.double() / rows)[:, None]
        first = source.means[source.counts.argmax()]
        mean = first + (shares * (source.means - first)).sum(dim=0, keepdim=True)  # so that a constant stays exact
        spread = source.counts.double().sqrt()[:, None] * (source.means - mean)
        return Moments(rows[None], mean, source.scatter + spread.T @ spread, None)

    @property
    def reads(self) -> Sequence[str]:
        return (self.space,)

    def start(self, feats: FeatureSet) -> Accumulator:
        together = torch.zeros(len(feats), dtype=torch.int64)
        return _ClassMomentsAccumulator(ClassMoments(self.space, self.normalize), together, 1)


class _ClassMomentsAccumulator:
    """Merges each block's own means and scatter: stable in one pass, exact for constants.

    Rows are first taken relative to their class mean so far (of a class not yet seen, relative to its first row), so
    that neither a large offset nor a constant leaves a rounding error.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance".
    """

    def __init__(self, statistic: ClassMoments, labels: Tensor, classes: int) -> None:
        self._statistic, self._labels, self._classes = statistic, labels, classes
        self._moments: Moments | None = None

    def update(self, block: Block) -> None:
        values = block.space(self._statistic.space, self._statistic.normalize)
        labels = self._labels[block.start : block.start + len(block)].to(values.device)
        old = self._moments or self._nothing_yet(values)

        counts = torch.bincount(labels, minlength=self._classes)
        total = old.counts + counts
        share = counts.double() / total.clamp_min(1)

        unseen = (counts > 0) & (old.counts == 0)
        old.means[unseen] = values[_first_rows(labels, counts)[unseen]]
        deviations = values - _by_label(old.means, labels)
        shift = _sums(deviations, labels, self._classes) / counts.clamp_min(1)[:, None]
        centred = deviations.sub_(_by_label(shift, labels))
        spread = (old.counts * share).sqrt()[:, None] * shift

        moved = spread[(counts > 0) & ~unseen]
        _add_gram(old.scatter, centred)
        old.scatter.addmm_(moved.T, moved)
        if old.class_scatter is not None:
            _add_class_scatter(old.class_scatter, centred, labels, counts, spread)
        self._moments = Moments(total, old.means.add_(share[:, None] * shift), old.scatter, old.class_scatter)

    def result(self) -> Moments:
        if self._moments is None:
            raise BadInput("no block was read.")
        return self._moments

    def _nothing_yet(self, values: Tensor) -> Moments:
        width = values.shape[1]
        per_class = self._statistic.per_class and 8 * self._classes * width**2 <= CLASS_SCATTER_BYTES
        return Moments(
            torch.zeros(self._classes, dtype=torch.int64, device=values.device),
            values.new_zeros(self._classes, width),
            values.new_zeros(width, width),
            values.new_zeros(self._classes, width, width) if per_class else None,
        )


def _by_label(means: Tensor, labels: Tensor) -> Tensor:
    """Each row's mean, ``[B, D]``; that of a single class as it is, ``[1, D]``."""
    return means if len(means) == 1 else means[labels]


def _sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Of the rows of each class, ``[C, D]``."""
    if classes == 1:
        return rows.sum(dim=0, keepdim=True)
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


def _add_gram(scatter: Tensor, rows: Tensor) -> None:
    """Adds ``rows^T rows``, of which only the blocks on and below the diagonal are computed: it is symmetric."""
    for start in range(0, len(scatter), GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        scatter[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])
        scatter[:start, start:stop] = scatter[start:stop, :start].T


def _first_rows(labels: Tensor, counts: Tensor) -> Tensor:
    """The number of the first row of each class, ``[C]``; of a class without rows, that of some row."""
    return labels.argsort(stable=True)[(counts.cumsum(0) - counts).clamp_max(len(labels) - 1)]


def _add_class_scatter(scatter: Tensor, centred: Tensor, labels: Tensor, counts: Tensor, spread: Tensor) -> None:
    """One matrix product for each class in the block: products of unequal heights have no batched form."""
    groups = centred[labels.argsort(stable=True)].split(counts.tolist())
    for label in counts.nonzero()[:, 0].tolist():
        scatter[label].addmm_(groups[label].T, groups[label]).addr_(spread[label], spread[label])
