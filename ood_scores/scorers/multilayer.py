"""Several layers: Mahalanobis distances in several layers, combined into one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.features import Block, FeatureSet
from ood_scores.features.finite_pass import FinitePass
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.moments import ClassMoments, Moments
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.gaussian import classes_present
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.numerics.whitening import whitening
from ood_scores.scorers.papers import LEE_2018
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.requirements import Requirement
from ood_scores.scorers.tags import Tags
from ood_scores.scorers.work import Sizes, Work

SMALLEST_REST = 1e-8
"""A row cannot be left out if this share or less of the variation along its own direction remains without it."""


class LayeredScorer(Scorer):
    """Base class of scorers that read the extras ``extra.<module>`` of several layers.

    It finds the layers in the fit set, and checks that a scored set has them too.
    """

    extra: ClassVar[str]
    dimensions: ClassVar[int]
    layers: Sequence[str] | None
    layers_: list[str]
    shapes_: list[list[int]]

    def names(self) -> list[str]:
        """The extras of the layers on which the scorer was fitted."""
        return [f"{self.extra}.{layer}" for layer in self.layers_]

    def read_from(self, sizes: Sizes) -> list[str]:
        """The extras that a fit on sets of these sizes reads."""
        return sizes.below(self.extra) if self.layers is None else [f"{self.extra}.{layer}" for layer in self.layers]

    def check_ready(self, feats: FeatureSet) -> None:
        super().check_ready(feats)
        found = self._shapes(feats, self.names(), "score")
        for name, known, here in zip(self.names(), self.shapes_, found, strict=True):
            if known != here:
                raise ShapeMismatch(
                    f"{self.name!r} was fitted on {name} of shape {known}, here they have {here}: both sets must come "
                    "from the same model and probe."
                )

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._read_only_these()

    def _check_layers(self) -> None:
        given = self.layers is None or (not isinstance(self.layers, str) and len(self.layers) > 0)
        self.require(given, f"layers must be a list of module names or None, got {self.layers!r}")

    def _find_layers(self, feats: FeatureSet) -> None:
        """Choose the layers named, or all in the set."""
        stored = [name.removeprefix(f"{self.extra}.") for name in feats.extras if name.startswith(f"{self.extra}.")]
        self.layers_ = stored if self.layers is None else list(self.layers)
        self.shapes_ = self._shapes(feats, self.names(), "be fitted on")
        for name, shape in zip(self.names(), self.shapes_, strict=True):
            if len(shape) != self.dimensions:
                raise ShapeMismatch(
                    f"{self.name!r} reads extras of the probe {self.extra!r}, but a row of {name} has shape {shape}."
                )
        self._read_only_these()

    def _read_only_these(self) -> None:
        self.needs = (*self.names(), *(name for name in self.needs if name.partition(".")[0] != self.extra))

    def _shapes(self, feats: FeatureSet, names: Sequence[str], purpose: str) -> list[list[int]]:
        """The shape of a row of each extra, without reading any."""
        stored = list(feats.extras)
        missing = [name for name in names if name not in stored]
        if missing or not names:
            needed = Requirement(missing[0] if missing else self.extra, together=names)
            has = ", ".join(stored) or "no extras"
            raise MissingInput(
                f"{self.name!r} needs {needed.name} to {purpose} this feature set, which has {has}: "
                f"{needed.how_to_get('python')}, with the same layers for all sets.",
                needed.how_to_get("command line"),
            )
        nothing = feats[:0].extras
        return [list(nothing[name].shape[1:]) for name in names]


@register_scorer("mahalanobis_layers")
@dataclass
class MahalanobisLayers(LayeredScorer):
    """Mahalanobis distances in several layers, combined: ``sum_l w_l s_l + b``.

    ``s_l = max_c -1/2 (z_l - mu_lc)^T Sigma_l^-1 (z_l - mu_lc)`` of the pooled outputs z_l of layer l, which
    ``extract(layers=...)`` keeps as extras ``layers.<module>``. Fits, in float64, class means and one tied covariance
    for each layer, then w and b by a logistic regression that separates the fit rows from adversarially perturbed
    copies of them, the extras ``fgsm.<module>`` of the fit set (``extract(layers=..., probes=["fgsm"])``). It uses no
    OoD data.

    The layer scores of a row and of its perturbed copy in the regression are those of Gaussians fitted without that
    row, which are exact and need no other fit (a rank-one downdate): rows are nearer to means and covariances that
    include them, and the regression would learn that.

    Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
    Attacks", section 2.2; the regression on FGSM samples is as in GradNorm's comparison (Huang et al. 2021).
    Departures: scored inputs are not perturbed; their code fits the regression on 500 validation images and their
    perturbed copies, while here it uses all rows of the fit set, each left out in turn; layer scores are standardized
    first, so that the penalty of the regression (C = 1) is the same for all layers, while their code searches C; the
    score is the logit of the regression's probability, which ranks rows in the same way but does not become 1 for many
    of them.

    Fails where OoD rows differ from ID rows in other layers than adversarial rows do: the weights of these layers may
    be negative.

    Args:
        layers: Names of modules among the extras; None uses all ``layers.*`` of the fit set.
        combine: ``"regression"``; or ``"sum"``: the plain sum of the layer scores, which needs no ``fgsm`` extras.

    Cost: as ``mahalanobis`` for each layer; the fit reads the layers twice and ``fgsm`` once.
    """

    tags = Tags(
        formula=(
            r"s(x) = \sum_l w_l s_l + b, \quad s_l = \max_c \, -\tfrac{1}{2} (z_l - \mu_{lc})^\top \Sigma_l^{-1} "
            r"(z_l - \mu_{lc})"
        ),
        aliases=("mds_ensemble", "multimahalanobis"),
        paper=LEE_2018,
        search_space={"combine": ("regression", "sum")},
        small_extras={
            "layers.a": lambda features, logits: features[:, :5],
            "layers.b": lambda features, logits: features[:, 2:].square(),
            "fgsm.a": lambda features, logits: 0.6 * features[:, :5],
            "fgsm.b": lambda features, logits: 0.8 * features[:, 2:].square(),
        },
    )
    layers: Sequence[str] | None = None
    combine: Literal["regression", "sum"] = "regression"
    layers_: list[str] = fitted()
    shapes_: list[list[int]] = fitted()
    centres_: list[Tensor] = fitted()
    whitenings_: list[Tensor] = fitted()
    means_: list[Tensor] = fitted()
    weights_: Tensor = fitted()
    bias_: float = fitted()
    extra = "layers"
    dimensions = 1
    needs = ("layers",)

    def __post_init__(self) -> None:
        self.require_choices()
        self._check_layers()
        self.fit_needs = ("layers", "labels") if self.combine == "sum" else ("layers", "fgsm", "labels")

    def work(self, sizes: Sizes) -> Work:
        total = Work()
        for width in map(sizes.width, self.read_from(sizes)):
            one = 4.0 * width * (width + sizes.classes)  # for a row, in float64
            left_out = 2 * sizes.fit_rows * (one + 4.0 * width * sizes.classes) if self.combine == "regression" else 0
            total += Work(4.0 * sizes.fit_rows * width**2 + left_out + sizes.rows * one)
        return total

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self._find_layers(feats)
        found = collect(feats, [ClassMoments(name) for name in self.names()])
        moments: list[Moments] = list(found.values())
        present = classes_present(moments[0].counts, self.name)
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
        """For each layer, rows ``[B, K]`` transformed so that the tied covariance is the identity."""
        values = [block.space(f"{extra}.{layer}") for layer in self.layers_]
        ready = zip(values, self.centres_, self.whitenings_, strict=True)
        return [(rows - center.to(rows)) @ root.to(rows) for rows, center, root in ready]

    def _scores_left_out(self, feats: FeatureSet, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Layer scores ``[M, L]`` of fit rows and of their perturbed copies, from Gaussians fitted without the row."""
        perturbed_names = [f"fgsm.{layer}" for layer in self.layers_]
        if self._shapes(feats, perturbed_names, "be fitted on") != self.shapes_:
            raise ShapeMismatch(f"{self.name!r}: the extras fgsm.* and layers.* differ in width: extract them again.")
        ours, theirs = [], []
        whole = FinitePass(feats, (*self.names(), *perturbed_names, "labels"))
        for block in whole.blocks():
            with whole.used(block):
                rows, perturbed = self._block_left_out(block, feats, counts)
                ours.append(rows)
                theirs.append(perturbed)
        rows, perturbed = torch.cat(ours), torch.cat(theirs)
        usable = torch.cat([rows, perturbed], dim=1).isfinite().all(dim=1)
        rows, perturbed = rows[usable], perturbed[usable]
        if not len(rows):
            raise BadInput(
                f"{self.name}: no row can be left out of the covariance of every layer: fit on more rows than the "
                "layers have channels, or use combine='sum'."
            )
        return rows, perturbed

    def _block_left_out(self, block: Block, feats: FeatureSet, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the rows of a block; minus infinity for a row that cannot be left out of a layer."""
        labels = block.labels.to(counts.device)
        own, size = (counts > 0).cumsum(dim=0)[labels] - 1, counts[labels]
        ours, theirs = [], []
        layers = zip(self._whitened(block, "layers"), self._whitened(block, "fgsm"), self.means_, strict=True)
        for rows, perturbed, means in layers:
            without = LeftOut(rows, means.to(rows), own.to(rows.device), size.to(rows.device), len(feats))
            ours.append(without.scores(rows))
            theirs.append(without.scores(perturbed))
        return torch.stack(ours, dim=1), torch.stack(theirs, dim=1)


@dataclass
class LeftOut:
    """Gaussians of a layer, each without one row, in coordinates where the covariance of all N rows is the identity.

    With u the row minus its class mean and n the number of rows of its class, leaving it out moves that mean by ``-u /
    (n - 1)`` and the scatter by ``-n / (n - 1) u u^T``, so that (Sherman-Morrison) ``d^2 = (N - 1)/N (|v|^2 + a (v.u)^2
    / (1 - a |u|^2))``, ``a = n / (n - 1) / N``, where v is relative to the mean without the row.

    The rows ``[B, K]`` are left out, their classes are ``own`` ``[B]``, with ``size`` ``[B]`` rows each; ``means`` is
    ``[C, K]``; ``total`` is N.
    """

    rows: Tensor
    means: Tensor
    own: Tensor
    size: Tensor
    total: int

    def scores(self, values: Tensor) -> Tensor:
        """``-1/2 min_c d^2`` of values ``[B, K]``, each from the Gaussians without its row, ``[B]``.

        It is minus infinity where these do not exist: for the only row of the only class, or for a row that alone spans
        a direction.
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
        distances[row, self.own] = distances[row, self.own].where(self.size > 1, torch.inf)
        distances.masked_fill_((rest <= SMALLEST_REST)[:, None], torch.inf)
        return -0.5 * distances.amin(dim=1) * ((self.total - 1) / self.total)


def regression(rows: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """Weights ``[L]`` and bias of a logistic regression that separates rows ``[M, L]`` from others ``[M, L]``.

    Rows are the positive class. Columns are standardized for the L2 penalty (C = 1); the result is for columns that are
    not.
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
