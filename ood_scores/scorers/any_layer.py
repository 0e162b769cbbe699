"""Several layers: any scorer of features at inner layers, and the combination of its scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.halves import halves
from ood_scores.features.layer_set import LayerSet
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.moments import GlobalMoments
from ood_scores.scorers.base import Scorer, as_scorer, fitted
from ood_scores.scorers.fusion import fisher, leveled, p_values
from ood_scores.scorers.multilayer import LayeredScorer
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.requirements import COLUMNS
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, work_alone

COMBINED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda standardized: standardized.mean(dim=0),
    "min": lambda standardized: standardized.amin(dim=0),
    "max": lambda standardized: standardized.amax(dim=0),
}
"""Combinations of standardized scores ``[L, B]``."""


@register_scorer("layers")
@dataclass
class Layers(LayeredScorer):
    """A scorer of features at inner layers: the pooled outputs of each layer take the place of the features.

    ``create_scorer("knn", space="layers.layer3")`` is this scorer at a single layer, with the scores of ``base``
    unchanged. With several layers, the scores of each layer become comparable by those of reference rows, and are
    combined. Reads ``layers.<module>``, which ``extract(layers=...)`` keeps.

    Fits ``base`` for each layer. With several layers, it is fitted on half of the rows of each class, and the other
    rows are the reference rows, as in ``fusion``: scores of rows that a scorer was fitted on are too high. The logits
    of a layer are those of the model. A base that reads the head finds, in its place, the affine map from the layer to
    the model's logits with the least squared error on the rows it is fitted on; at the penultimate layer, this is the
    head of the model. Where the reference scores of a layer vary by rounding alone, as those of constant features do,
    all scores that are not below them count as equal.

    Source: our construction of what oodeel and scio offer for some scorers; ``"mean"`` ranks rows as the default of
    oodeel does, and ``"fisher"`` as its Fisher aggregator does (Haroush et al. 2022, "A Statistical Framework for
    Efficient Out of Distribution Detection in Deep Neural Networks"; Brown's correction changes no rank). Departures:
    oodeel uses the rows that the scorer was fitted on as reference rows, and centers ViM's residual at the mean in all
    but the last layer.

    Fails where shallow layers say nothing about OoD rows: every combination dilutes the layers that do (AUROC of knn on
    a ResNet-20, CIFAR-10 against CIFAR-100: 0.60 for the mean of three stages, 0.84 for the last one alone). Fisher's
    p-values do not distinguish rows below all reference rows in every layer; the weights of ``"learned"`` are noise if
    there are few reference rows.

    Args:
        base: A scorer that reads features, as a name or a Scorer, which is copied and never changed.
        layers: Names of modules among the extras; None uses all ``layers.*`` of the fit set.
        combine: ``"mean"``, ``"min"`` (a single layer that is unlike the reference rows is enough), or ``"max"`` of the
            standardized scores; ``"fisher"``: the sum of the logarithms of their p-values; or ``"learned"``: the
            weighted mean that varies least over the reference rows, ``1^T S^-1 s``, with the correlations S of the
            layers' scores s.

    Cost: that of ``base`` for each layer, and for a base that reads the head one more pass over the fit set and an
    eigendecomposition.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{mean}_{l} \, \frac{s_l(z_l) - "
            r"\operatorname{mean}(s_l)}{\operatorname{std}(s_l)}"
        ),
        paper=Paper(
            "A Statistical Framework for Efficient Out of Distribution Detection in Deep Neural Networks",
            "Matan Haroush, Tzviel Frostig, Ruth Heller, Daniel Soudry",
            "ICLR",
            2022,
            "https://arxiv.org/abs/2102.12967",
        ),
        small_parameters={"base": "mahalanobis"},
        small_extras={
            "layers.a": lambda features, logits: features[:, :5],
            "layers.b": lambda features, logits: features[:, 2:].square(),
        },
        exceptions={"blocks_and_order_of_fit_rows": "half of the fit rows, drawn by their numbers, are reference rows"},
        search_space={"combine": ("mean", "min", "max", "fisher", "learned")},
    )
    base: str | Scorer = "knn"
    layers: Sequence[str] | None = None
    combine: Literal["mean", "min", "max", "fisher", "learned"] = "mean"
    layers_: list[str] = fitted()
    shapes_: list[list[int]] = fitted()
    members_: list[Scorer] = fitted()
    heads_: list[Head] = fitted()
    reference_: Tensor | None = fitted(None)
    weights_: Tensor | None = fitted(None)
    extra = "layers"
    dimensions = 1

    def __post_init__(self) -> None:
        self.require_choices()
        self._check_layers()
        self._inner = copy.deepcopy(as_scorer(self.base))
        needs = {*self._inner.needs, *self._inner.fit_needs}
        self.require("features" in needs, f"base={self._inner.name!r} does not read features: choose another base")
        extras = sorted(needs - set(COLUMNS))
        self.require(not extras, f"base={self._inner.name!r} reads {', '.join(extras)}: choose another base")
        self._reads_head = "head" in needs
        read = ["layers"] if self.layers is None else [f"layers.{name}" for name in self.layers]
        self.needs = (*read, *(name for name in self._inner.needs if name not in ("features", "head")))
        fitted_on = dict.fromkeys([*self.needs, *["logits"] * self._reads_head, *self._inner.fit_needs])
        self.fit_needs = tuple(name for name in fitted_on if name not in ("features", "head"))

    def work(self, sizes: Sizes) -> Work:
        halved = sizes
        if self.layers is None or len(self.layers) > 1:
            halved = replace(sizes, fit_rows=sizes.fit_rows // 2, rows=sizes.rows + sizes.fit_rows // 2)
        at_layers = [replace(halved, features=sizes.width(name)) for name in self.read_from(sizes)]
        return sum((work_alone(self._inner, at) for at in at_layers), Work())

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self._find_layers(feats)
        self.require(len(feats) >= 4 or len(self.layers_) == 1, "several layers need at least 4 rows to fit")
        if "labels" in self.fit_needs:
            feats.class_labels()  # a member sees only the labels of its own rows
        parts = halves(feats) if len(self.layers_) > 1 else None
        self.members_, self.heads_, references = [], [], []
        for view in (LayerSet(feats, name) for name in self.names()):
            rows, *reference = [view] if parts is None else [view[part] for part in parts]
            if self._reads_head:
                self.heads_.append(head_at(rows))
                for part in (rows, *reference):
                    part.head = self.heads_[-1]
            member = copy.deepcopy(self._inner)
            self.members_.append(member.fit(rows) if member.fit_needs else member)
            references += [leveled(member.score(part), member, part) for part in reference]
        self.reference_ = torch.stack(references).sort(dim=1).values if references else None
        self.weights_ = least_varying(torch.stack(references)) if references else None

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits if "logits" in self.needs else None
        blocks = [
            block.replaced(features=block.extras[name], logits=logits, head=head)
            for name, head in zip_longest(self.names(), self.heads_)
        ]
        scores = torch.stack(
            [member.score_block(at).double() for member, at in zip(self.members_, blocks, strict=True)]
        )
        return scores[0] if self.reference_ is None else self._combined(scores, self.reference_.to(scores.device))

    def compared(self, block: Block) -> Tensor:
        """Return the vectors of the last layer as the base compares them."""
        logits = block.logits if "logits" in self.needs else None
        return self.members_[-1].compared(block.replaced(features=block.extras[self.names()[-1]], logits=logits))

    def _combined(self, scores: Tensor, reference: Tensor) -> Tensor:
        """The combination of the scores ``[L, B]`` of several layers, ``[B]``."""
        if self.combine == "fisher":
            return fisher(p_values(scores, reference))
        standardized = _standardized(scores, reference)
        if self.combine == "learned":
            assert self.weights_ is not None
            return self.weights_.to(scores.device) @ standardized
        return COMBINED[self.combine](standardized)


def head_at(feats: FeatureSet) -> Head:
    """Return the affine map from the features to the logits of a set with the least squared error, float64.

    Of several such maps, the one with the smallest weight is taken.
    """
    moments, logits = GlobalMoments(), Means("logits")
    found = collect(feats, [moments, logits])
    center, mean = found[moments].means[0], found[logits].means[0]
    products = center.new_zeros(len(center), len(mean))
    for block in feats.blocks(only=("features", "logits")):
        products += (block.space("features") - center).T @ (block.logits64() - mean)
    weight = (torch.linalg.pinv(found[moments].scatter, hermitian=True) @ products).T
    return Head(weight, mean - weight @ center)


def least_varying(scores: Tensor) -> Tensor:
    """The weights ``[L]`` that sum to 1 and with which the mean of standardized scores ``[L, N]`` varies least."""
    standardized = _standardized(scores, scores)
    weights = torch.linalg.pinv(standardized @ standardized.T, hermitian=True).sum(dim=1)
    return weights / weights.sum()


def _standardized(scores: Tensor, reference: Tensor) -> Tensor:
    """Scores ``[L, B]`` in standard deviations from the mean of the reference scores ``[L, N]`` of their layers.

    Where all reference scores are equal, the unit is 1, and scores above them count as equal to them.
    """
    above_mean = scores - reference.mean(dim=1, keepdim=True)
    equal = reference.amin(dim=1, keepdim=True) == reference.amax(dim=1, keepdim=True)
    spread = torch.where(equal, 1, reference.std(dim=1, correction=0, keepdim=True))
    return torch.where(equal, above_mean.clamp_max(0), above_mean / spread)
