"""Scores of several layers, read from the extras that the probes of ``extract`` keep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collect import Statistic, collect, require_finite
from ood_scores.features.statistics.moments import ClassMoments, Moments
from ood_scores.scorers.base import Scorer, register_scorer
from ood_scores.scorers.gaussian import squared_distances, whitening

SMALLEST_BOUND = 1e-6
"""What a deviation from a bound is at least divided by, and what is added to the mean deviation, as in Gram's code."""
SMALLEST_MEAN = 1e-7

SMALLEST_REST = 1e-8
"""A row without which this share or less of the variation along its own direction is left cannot be left out."""


class LayeredScorer(Scorer):
    """A scorer of the extras ``extra.<module>`` of some layers: which they are, and that a scored set has them too."""

    extra: ClassVar[str]
    dimensions: ClassVar[int]
    layers: Sequence[str] | None
    layers_: list[str]
    shapes_: list[list[int]]

    def names(self) -> list[str]:
        """The extras of the layers that the scorer was fitted on."""
        return [f"{self.extra}.{layer}" for layer in self.layers_]

    def check_ready(self, feats: FeatureSet) -> None:
        super().check_ready(feats)
        found = self._shapes(feats, self.names(), "score")
        for name, fitted, here in zip(self.names(), self.shapes_, found, strict=True):
            if fitted != here:
                raise ShapeMismatch(
                    f"{self.name!r} was fitted on {name} of shape {fitted}, here they have {here}: both sets must come "
                    "from the same model and probe."
                )

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._read_only_these()

    def _check_layers(self) -> None:
        given = self.layers is None or (not isinstance(self.layers, str) and len(self.layers) > 0)
        self.require(given, f"layers is a list of module names, or None for all that are there, got {self.layers!r}")

    def _find_layers(self, feats: FeatureSet) -> None:
        """Takes the layers named, or all that the set has."""
        stored = [name.removeprefix(f"{self.extra}.") for name in feats.extras if name.startswith(f"{self.extra}.")]
        self.layers_ = stored if self.layers is None else list(self.layers)
        self.shapes_ = self._shapes(feats, self.names(), "be fitted on")
        for name, shape in zip(self.names(), self.shapes_, strict=True):
            if len(shape) != self.dimensions:
                raise ShapeMismatch(
                    f"{self.name!r} reads extras of the probe {self.extra!r}; a row of {name} is {shape}."
                )
        self._read_only_these()

    def _read_only_these(self) -> None:
        self.needs = (*self.names(), *(name for name in type(self).needs if name != self.extra))

    def _shapes(self, feats: FeatureSet, names: Sequence[str], purpose: str) -> list[list[int]]:
        """The shape of a row of each extra, without reading any."""
        stored = list(feats.extras)
        missing = [name for name in names if name not in stored]
        if missing or not names:
            raise MissingInput(
                f"{self.name!r} needs {missing[0] if missing else self.extra} to {purpose} this feature set, which has "
                f"{', '.join(stored) or 'no extras'}; extract it: it is read from extras, which extract(..., "
                "layers=[...]) and probes=[...] make; the layers must be the same for all sets."
            )
        nothing = feats[:0].extras
        return [list(nothing[name].shape[1:]) for name in names]


@register_scorer("mahalanobis_layers")
@dataclass
class MahalanobisLayers(LayeredScorer):
    """Mahalanobis distances in several layers, combined: ``sum_l w_l s_l + b``.

    ``s_l = max_c -1/2 (z_l - mu_lc)^T Sigma_l^-1 (z_l - mu_lc)`` of the pooled outputs z_l of layer l, which
    ``extract(layers=...)`` keeps as extras ``layers.<module>``. Fits, in float64, class means and one tied covariance
    for each layer, then w and b by a logistic regression that tells the fit rows from the same rows adversarially
    perturbed, extras ``fgsm.<module>`` of the fit set (``extract(layers=..., probes=["fgsm"])``). No OoD data.

    The layer scores that the regression sees of a row and of its perturbed copy are those of Gaussians fitted without
    that row, exact and without another fit (a rank-one downdate): rows are nearer to means and covariances that they
    took part in, and the regression would learn that.

    Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
    Attacks", section 2.2; the regression on FGSM samples as GradNorm's comparison has it (Huang et al. 2021).
    Departures: no perturbation of the scored inputs; their code fits the regression on 500 validation images and their
    perturbed copies, here it is all rows of the fit set, each left out in turn; layer scores are standardised first, so
    that the regression's penalty (C = 1) is the same for all layers, where their code searches C; the score is the
    logit of the regression's probability, which orders rows alike but does not become 1 for many of them.

    Fails where OoD rows differ from ID rows in other layers than adversarial rows do: their weights may be negative.

    Args:
        layers: names of modules among the extras; None takes all ``layers.*`` of the fit set.
        combine: ``"regression"``; or ``"sum"``: the plain sum of the layer scores, which needs no ``fgsm`` extras.

    Cost: for each layer as ``mahalanobis``; the fit reads the layers twice and ``fgsm`` once.
    """

    layers: Sequence[str] | None = None
    combine: Literal["regression", "sum"] = "regression"
    layers_: list[str] = field(init=False, repr=False, compare=False)
    shapes_: list[list[int]] = field(init=False, repr=False, compare=False)
    centres_: list[Tensor] = field(init=False, repr=False, compare=False)
    whitenings_: list[Tensor] = field(init=False, repr=False, compare=False)
    means_: list[Tensor] = field(init=False, repr=False, compare=False)
    weights_: Tensor = field(init=False, repr=False, compare=False)
    bias_: float = field(init=False, repr=False, compare=False)
    extra = "layers"
    dimensions = 1
    needs = ("layers",)

    def __post_init__(self) -> None:
        known = self.combine in ("regression", "sum")
        self.require(known, f"combine is 'regression' or 'sum', got {self.combine!r}")
        self._check_layers()
        self.fit_needs = ("layers", "labels") if self.combine == "sum" else ("layers", "fgsm", "labels")

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        self._find_layers(feats)
        found = collect(feats, [ClassMoments(name) for name in self.names()])
        moments: list[Moments] = list(found.values())
        present = _classes_with_rows(moments[0].counts, self.name)
        self.centres_, self.whitenings_, self.means_ = [], [], []
        for layer in moments:
            means = layer.means[present]
            self.centres_.append(means.mean(dim=0))
            self.whitenings_.append(whitening(layer.scatter / layer.counts.sum()))
            self.means_.append((means - self.centres_[-1]) @ self.whitenings_[-1])
        self.weights_, self.bias_ = self.means_[0].new_ones(len(self.layers_)), 0.0
        if self.combine == "regression":
            self.weights_, self.bias_ = regression(*self._scores_left_out(feats, moments[0].counts))

    def score_block(self, block: Block) -> Tensor:
        pairs = zip(self._whitened(block, "layers"), self.means_, strict=True)
        scores = [-0.5 * squared_distances(rows, means.to(rows)).amin(dim=1) for rows, means in pairs]
        return torch.stack(scores, dim=1) @ self.weights_.to(scores[0]) + self.bias_

    def _whitened(self, block: Block, extra: str) -> list[Tensor]:
        """For each layer the rows ``[B, K]`` such that the tied covariance is the identity."""
        values = [block.space(f"{extra}.{layer}") for layer in self.layers_]
        ready = zip(values, self.centres_, self.whitenings_, strict=True)
        return [(rows - centre.to(rows)) @ root.to(rows) for rows, centre, root in ready]

    def _scores_left_out(self, feats: FeatureSet, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Layer scores ``[M, L]`` of fit rows and of their perturbed copies, by Gaussians fitted without the row."""
        perturbed_names = [f"fgsm.{layer}" for layer in self.layers_]
        if self._shapes(feats, perturbed_names, "be fitted on") != self.shapes_:
            raise ShapeMismatch(f"{self.name!r}: fgsm.* have other widths than layers.*: extract them again.")
        blocks = feats.blocks(only=(*self.names(), *perturbed_names, "labels"))
        ours, theirs = zip(*(self._block_left_out(block, feats, counts) for block in blocks), strict=True)
        rows, perturbed = torch.cat(ours), torch.cat(theirs)
        if not len(rows):
            raise BadInput(
                f"{self.name}: no row can be left out of the covariance of every layer: fit on more rows than the "
                "layers have channels, or use combine='sum'."
            )
        return rows, perturbed

    def _block_left_out(self, block: Block, feats: FeatureSet, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the rows of a block that can be left out."""
        require_finite(block, feats)
        labels = block.labels.to(counts.device)
        own, size = (counts > 0).cumsum(dim=0)[labels] - 1, counts[labels]
        ours, theirs = [], []
        layers = zip(self._whitened(block, "layers"), self._whitened(block, "fgsm"), self.means_, strict=True)
        for rows, perturbed, means in layers:
            without = LeftOut(rows, means.to(rows), own.to(rows.device), size.to(rows.device), len(feats))
            ours.append(without.scores(rows))
            theirs.append(without.scores(perturbed))
        found = torch.stack(ours, dim=1), torch.stack(theirs, dim=1)
        usable = torch.cat(found, dim=1).isfinite().all(dim=1)
        return found[0][usable], found[1][usable]


@dataclass
class LeftOut:
    """Gaussians of a layer without one row each, in coordinates where the covariance of all N rows is the identity.

    With u the row minus its class mean and n the rows of its class, leaving it out moves that mean by ``-u / (n - 1)``
    and the scatter by ``-n / (n - 1) u u^T``, so that (Sherman-Morrison)
    ``d^2 = (N - 1)/N (|v|^2 + a (v.u)^2 / (1 - a |u|^2))``, ``a = n / (n - 1) / N``, v to the mean without the row.

    ``rows`` ``[B, K]`` are left out, their classes are ``own`` ``[B]``, with ``size`` ``[B]`` rows each; ``means``
    ``[C, K]``; ``total`` is N.
    """

    rows: Tensor
    means: Tensor
    own: Tensor
    size: Tensor
    total: int

    def scores(self, values: Tensor) -> Tensor:
        """``-1/2 min_c d^2`` of values ``[B, K]``, each by the Gaussians without its row, ``[B]``.

        Minus infinity where there are none: of the only row of the only class, or one that nothing else goes along
        with in some direction.
        """
        direction = self.rows - self.means[self.own]
        length = direction.square().sum(dim=1)
        others = (self.size - 1).clamp_min(1).double()
        share = self.size / others / self.total
        rest = 1 - share * length

        squares = squared_distances(values, self.means)
        along = (values * direction).sum(dim=1, keepdim=True) - direction @ self.means.T
        row = torch.arange(len(values), device=values.device)
        squares[row, self.own] += 2 * along[row, self.own] / others + length / others**2
        along[row, self.own] += length / others

        distances = squares + along.square() * (share / rest)[:, None]
        alone = self.size == 1
        distances[row[alone], self.own[alone]] = torch.inf
        distances[rest <= SMALLEST_REST] = torch.inf
        return -0.5 * distances.amin(dim=1) * ((self.total - 1) / self.total)


def regression(rows: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """Weights ``[L]`` and bias of a logistic regression that tells rows ``[M, L]`` (positive) from others ``[M, L]``.

    Columns are standardised for the L2 penalty (C = 1); what is returned is for columns as they are.
    """
    from sklearn.linear_model import LogisticRegression

    columns = torch.cat([rows, others])
    mean, std = columns.mean(dim=0), columns.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    is_row = torch.arange(len(columns)) < len(rows)
    model = LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=1000)
    model.fit(((columns - mean) / std).cpu().numpy(), is_row.numpy())
    weights = torch.from_numpy(model.coef_[0]).to(columns) / std
    return weights, float(model.intercept_[0]) - float(weights @ mean)


@register_scorer("gram")
@dataclass
class Gram(LayeredScorer):
    """How far Gram sums of several layers lie outside the range they have among fit rows of the predicted class.

    ``-sum_l delta_l / mean(delta_l)``, where ``delta_l`` sums over orders and channels of layer l, divided by the
    confidence of the prediction, ``(low - v) / |low|`` for values v below the range of the class, ``(v - high) /
    |high|`` above it and 0 within. The values are extras ``gram.<module>`` (``extract(..., probes=["gram"])``).

    Fits the ranges on the rows predicted as each class, then the mean deviation of every layer, for which each row is
    measured against the ranges of the other rows (those without it: the two smallest and the two largest values of a
    class are enough to know them).

    Source: Sastry & Oore 2020, "Detecting Out-of-Distribution Examples with Gram Matrices", section 3; the division by
    the confidence is in the authors' code. Departures: the mean deviation is that of the fit rows, each left out in
    turn, where the authors take a tenth of the test set; bounds nearer to 0 than 1e-6 count as 1e-6, where their code
    adds 1e-6 to them.

    A class that no fit row is predicted as has the range of all rows, with a warning. Fails with few fit rows a class:
    ranges are then narrow, and every row is outside.

    Args:
        layers: names of modules among the extras; None takes all ``gram.*`` of the fit set.
        confidence: divide by the largest softmax probability, as the authors' code does.

    Cost: two passes in the fit; ``2 classes orders channels`` values kept in the precision of the extras, twice that
    during the fit.
    """

    layers: Sequence[str] | None = None
    confidence: bool = True
    layers_: list[str] = field(init=False, repr=False, compare=False)
    shapes_: list[list[int]] = field(init=False, repr=False, compare=False)
    low_: list[Tensor] = field(init=False, repr=False, compare=False)
    high_: list[Tensor] = field(init=False, repr=False, compare=False)
    usual_: Tensor = field(init=False, repr=False, compare=False)
    extra = "gram"
    dimensions = 2
    needs = ("gram", "logits")
    fit_needs = ("gram", "logits")

    def __post_init__(self) -> None:
        self._check_layers()

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        self._find_layers(feats)
        counts, low, high = self._two_extremes(feats)
        self.usual_ = self._usual_deviations(feats, counts, low, high) + SMALLEST_MEAN
        self.low_ = [smallest[:, 0].clone() for smallest in low]
        self.high_ = [largest[:, 0].clone() for largest in high]
        if (counts == 0).any():
            warnings.warn(
                f"gram: {int((counts == 0).sum())} of {len(counts)} classes are predicted for no row of the fit set "
                "and get the range of all rows.",
                stacklevel=3,
            )
            for smallest, largest in zip(self.low_, self.high_, strict=True):
                smallest[counts == 0], largest[counts == 0] = smallest.amin(dim=0), largest.amax(dim=0)

    def score_block(self, block: Block) -> Tensor:
        predicted = block.prediction()
        found = []
        for values, low, high in zip(self._values(block), self.low_, self.high_, strict=True):
            lowest, highest = low.to(values.device)[predicted], high.to(values.device)[predicted]
            found.append(deviation(values, lowest, highest))
        return -(torch.stack(found, dim=1) / self.usual_.to(found[0])).sum(dim=1) / self._confidence(block)

    def _values(self, block: Block) -> list[Tensor]:
        """The extras ``[B, orders, C]`` of each layer, float32 or float64."""
        values = [block.extras[name] for name in self.names()]
        return [rows if rows.dtype in (torch.float32, torch.float64) else rows.float() for rows in values]

    def _confidence(self, block: Block) -> Tensor:
        return block.softmax().amax(dim=1) if self.confidence else block.softmax().new_ones(len(block))

    def _blocks(self, feats: FeatureSet) -> Iterator[Block]:
        for block in feats.blocks(only=self.needs):
            require_finite(block, feats)
            yield block

    def _two_extremes(self, feats: FeatureSet) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Rows of each predicted class, and for each layer its two smallest and two largest values, from the outside.

        Int64 ``[C]``, and tensors ``[C, 2, orders, channels]``; infinite where a class has not as many rows.
        """
        classes = feats.num_classes or 1
        counts = torch.zeros(classes, dtype=torch.int64)
        low: list[Tensor] = []
        high: list[Tensor] = []
        for block in self._blocks(feats):
            predicted, layers = block.prediction(), self._values(block)
            low = low or [rows.new_full((classes, 2, *rows.shape[1:]), torch.inf) for rows in layers]
            high = high or [torch.full_like(smallest, -torch.inf) for smallest in low]
            counts += torch.bincount(predicted, minlength=classes).cpu()
            for rows, smallest, largest in zip(layers, low, high, strict=True):
                for row, c in zip(rows, predicted.tolist(), strict=True):  # faster than topk by class
                    _take_in(row, smallest[c], torch.minimum, torch.maximum)
                    _take_in(row, largest[c], torch.maximum, torch.minimum)
        return counts.to(low[0].device), low, high

    def _usual_deviations(
        self, feats: FeatureSet, counts: Tensor, low: Sequence[Tensor], high: Sequence[Tensor]
    ) -> Tensor:
        """The mean over the rows of each layer's deviation from the ranges of the other rows, ``[L]``."""
        total, rows = torch.zeros(len(low), dtype=torch.float64, device=counts.device), 0
        for block in self._blocks(feats):
            predicted = block.prediction()
            kept = counts[predicted] > 1
            classes = predicted[kept]
            found = []
            for values, smallest, largest in zip(self._values(block), low, high, strict=True):
                own = values[kept]
                lowest, next_lowest = smallest[classes].unbind(dim=1)
                highest, next_highest = largest[classes].unbind(dim=1)
                lowest = torch.where(own <= lowest, next_lowest, lowest)
                highest = torch.where(own >= highest, next_highest, highest)
                found.append(deviation(own, lowest, highest))
            total += (torch.stack(found, dim=1) / self._confidence(block)[kept, None]).sum(dim=0)
            rows += len(classes)
        if not rows:
            raise BadInput("gram: no two rows of the fit set are predicted as the same class: fit on more rows.")
        return total / rows


def _take_in(row: Tensor, extremes: Tensor, further: Any, nearer: Any) -> None:
    """Updates the outermost and the second outermost value, ``[2, orders, channels]``, with those of a row."""
    extremes[1] = further(extremes[1], nearer(extremes[0], row))
    extremes[0] = further(extremes[0], row)


def deviation(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far values ``[B, orders, C]`` lie outside their ranges, relative to the bound; summed, float64 ``[B]``."""
    values, low, high = values.double(), low.double(), high.double()
    below = (low - values).clamp_min(0) / low.abs().clamp_min(SMALLEST_BOUND)
    above = (values - high).clamp_min(0) / high.abs().clamp_min(SMALLEST_BOUND)
    return (below + above).flatten(1).sum(dim=1)


def _classes_with_rows(counts: Tensor, name: str) -> Tensor:
    present = counts > 0
    if not present.all():
        warnings.warn(
            f"{name}: {int((~present).sum())} of {len(counts)} classes have no row to fit and are left out.",
            stacklevel=4,
        )
    return present
