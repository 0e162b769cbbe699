"""Scores of what probes have kept as extras: they need the model at extraction, not afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ood_scores.errors import MissingInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collect import Statistic, require_finite
from ood_scores.scorers.base import Scorer, register_scorer

SMALLEST = 1e-12
"""The norm that a gradient of 0 counts as, whose logarithm there would not be."""

STRENGTHS = tuple(10.0**power for power in range(-5, 4))
"""What ``gradient_classifier`` chooses from: scikit-learn's C, one over the strength of the regularisation."""


@register_scorer("odin")
@dataclass
class ODIN(Scorer):
    """Maximum softmax probability of perturbed inputs, ``max_c softmax(f(x') / T)_c``, in float64.

    Reads ``odin`` ``[N, C]``, the logits that the probe of that name keeps: ``extract(..., probes=["odin"])``.

    Source: Liang et al. 2018, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks";
    T = 1000 there and in GradNorm's comparison, whose epsilon of 0 on ImageNet leaves only the temperature.

    Fails where the perturbation is not that of the data: epsilon is the probe's, and tuned by its authors on OoD data.

    Args:
        temperature: the divisor T of the logits.

    Cost: one softmax for each row.
    """

    temperature: float = 1000.0
    needs = ("odin",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        return (column(block, "odin", self.name).double() / self.temperature).softmax(dim=1).amax(dim=1)


@register_scorer("rankfeat")
@dataclass
class RankFeat(Scorer):
    """Energy of logits without the rank-1 part of the feature maps, ``T logsumexp(f / T)``.

    Reads ``rankfeat`` ``[N, C]``, the logits that the probe of that name keeps, which are the mean over the layers it
    has: ``extract(..., probes=["rankfeat"])``.

    Source: Song, Sebe & Wang 2022, "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection", T = 1; the
    mean of logits before the energy as in the authors' code.

    Fails where the largest singular value of an OoD input's maps is no larger than that of others.

    Args:
        temperature: the divisor T of the logits.

    Cost: one logsumexp for each row.
    """

    temperature: float = 1.0
    needs = ("rankfeat",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        logits = column(block, "rankfeat", self.name).double()
        return self.temperature * (logits / self.temperature).logsumexp(dim=1)


class _Averaged(Scorer):
    """What several predictions of an input say: the mean of their softmax ``[N, C]`` and of their entropies ``[N]``."""

    averaged: ClassVar[str]
    output: Literal["entropy", "msp", "mutual_information"]

    def __post_init__(self) -> None:
        outputs = ("entropy", "msp", "mutual_information")
        self.require(self.output in outputs, f"output is one of {', '.join(outputs)}; got {self.output!r}")
        both = (f"{self.averaged}.mean", f"{self.averaged}.entropy")
        self.needs = both if self.output == "mutual_information" else both[:1]

    def score_block(self, block: Block) -> Tensor:
        mean = column(block, f"{self.averaged}.mean", self.name).double()
        if self.output == "msp":
            return mean.amax(dim=1)
        entropy = -torch.special.xlogy(mean, mean).sum(dim=1)
        if self.output == "entropy":
            return -entropy
        return column(block, f"{self.averaged}.entropy", self.name).double() - entropy


@register_scorer("mc_dropout")
@dataclass
class MCDropout(_Averaged):
    """How sure the mean of several passes with dropout is: minus its entropy, ``sum_c m_c log m_c``.

    m is the mean softmax. Reads ``mc_dropout.mean`` ``[N, C]`` and, for the mutual information, ``mc_dropout.entropy``
    ``[N]``, which the probe of that name keeps: ``extract(..., probes=["mc_dropout"])``.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation"; entropy and mutual information as measures in
    Gal's thesis of that year. Departure: OpenOOD takes the largest probability of the softmax of the mean logits;
    ``output="msp"`` has that of the mean softmax.

    Fails where dropout changes little; the entropy then is that of the model itself, the mutual information rounding.

    Args:
        output: ``"entropy"``; ``"msp"``, the largest m_c; or ``"mutual_information"``, minus that between prediction
            and pass, ``-(H(m) - mean H)``: only what the passes disagree on.

    Cost: one pass over C numbers for each row.
    """

    output: Literal["entropy", "msp", "mutual_information"] = "entropy"
    averaged = "mc_dropout"
    needs = ("mc_dropout.mean",)


@register_scorer("ensemble")
@dataclass
class Ensemble(_Averaged):
    """How sure the mean of several models is: minus its entropy, ``sum_c m_c log m_c``.

    m is the mean softmax of the models. Reads ``ensemble.mean`` ``[N, C]`` and, for the mutual information,
    ``ensemble.entropy`` ``[N]``, the mean of the models' entropies (nats).

    Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles":
    the mean of probabilities. Departure: OpenOOD takes the softmax of the mean logits.

    Fails where the models are alike, all wrong in the same way.

    Args:
        output: ``"entropy"``; ``"msp"``, the largest m_c; or ``"mutual_information"``, minus that between prediction
            and model, ``-(H(m) - mean H)``: only what the models disagree on.

    Cost: one pass over C numbers for each row.
    """

    output: Literal["entropy", "msp", "mutual_information"] = "entropy"
    averaged = "ensemble"
    needs = ("ensemble.mean",)


@register_scorer("gradnorm_params")
@dataclass
class GradNormParams(Scorer):
    """Norm of the gradient of chosen parameters, ``||grad_w KL(u || softmax(f / T))||_p``.

    Reads ``gradnorm.<group>`` ``[N]``, which the probe ``gradnorm`` keeps, with p and T:
    ``extract(..., probes=[ParameterGradients(groups=("layer4", "all"))])``.

    Source: Huang et al. 2021 (GradNorm), Table 2. For the last layer's weight the scorer ``gradnorm`` needs no probe.

    Fails as ``gradnorm`` does, and in shallow blocks, whose gradients tell less (Table 2).

    Args:
        group: the probe's name of the group: ``"all"``, or a name of modules or parameters.

    Cost: none.
    """

    group: str = "all"
    needs = ("gradnorm.all",)

    def __post_init__(self) -> None:
        self.needs = (f"gradnorm.{self.group}",)

    def score_block(self, block: Block) -> Tensor:
        return column(block, f"gradnorm.{self.group}", self.name).double()


@register_scorer("block_norm")
@dataclass
class BlockNorm(Scorer):
    """The norm of the maps of one block, ``1/C sum_c ||relu(a_c)||_2``.

    Reads ``norms.<layer>`` ``[N]``, which the probe ``norms`` keeps: ``extract(..., probes=["norms"])``.

    Source: Yu et al. 2023, "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection", Eq. 3. The
    paper chooses the block without OoD data, by the ratio of these norms for training images and for jigsaw puzzles of
    them; that choice is left to the caller.

    Fails in a block that was not chosen so: where the network is confident beyond its data, the norms of the last block
    are larger for OoD inputs.

    Args:
        layer: the name of the module; None for the last one that the set has norms of.

    Cost: none.
    """

    layer: str | None = None
    needs = ("norms",)

    def __post_init__(self) -> None:
        self.needs = ("norms" if self.layer is None else f"norms.{self.layer}",)

    def score_block(self, block: Block) -> Tensor:
        if self.layer is not None:
            return column(block, f"norms.{self.layer}", self.name).double()
        last = [values for name, values in block.extras.items() if name.startswith("norms.")][-1]
        return last.double()


@register_scorer("gradient_classifier")
@dataclass
class GradientClassifier(Scorer):
    """How much the gradients look like those of training images, and not like those of noise.

    The log odds of a logistic regression, ``w (log g - mu) / sigma + b``, on the norms g of the gradients of every
    parameter. Reads ``gradients.inputs`` ``[N, L]`` and, of the fit set, ``gradients.noise`` ``[N, L]``, which the
    probe ``gradients`` keeps: ``extract(..., probes=[LayerGradients(noise=True)])`` for the fit set, and without noise
    for others.

    Fits mu, sigma, w and b on two fifths of the rows, chooses the strength of the regularisation, of ``STRENGTHS``, by
    the likelihood on two fifths, and keeps the accuracy on the last fifth as ``accuracy_``. Which row is in which part
    depends on its values and the seed, and not on the order of rows.

    Source: Lee & AlRegib 2020, "Gradients as a Measure of Uncertainty in Neural Networks", whose classifier learns from
    OoD images; uniform noise in their place, and the shares, after GradNorm (Huang et al. 2021), supplement E.
    Departure: no code of either classifier was found to follow; this one is linear, on standardised logarithms.

    Fails where noise is so unlike images that it teaches nothing about other OoD inputs; ``accuracy_`` is then 1.

    Args:
        seed: of the split.

    Cost: one product with L numbers for each row; the fit keeps the ``[N, 2 L]`` norms in float64.
    """

    seed: int = 0
    mean_: Tensor = field(init=False, repr=False, compare=False)
    scale_: Tensor = field(init=False, repr=False, compare=False)
    weight_: Tensor = field(init=False, repr=False, compare=False)
    bias_: float = field(init=False, repr=False, compare=False)
    strength_: float = field(init=False, repr=False, compare=False)
    accuracy_: float = field(init=False, repr=False, compare=False)
    needs = ("gradients.inputs",)
    fit_needs = ("gradients.inputs", "gradients.noise")

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        pairs = self._shuffled(feats)
        self.require(len(pairs) >= 3, f"at least 3 rows are needed to fit, got {len(pairs)}")
        share = max(1, 2 * len(pairs) // 5)
        train, validation, test = (_labelled(part) for part in pairs.split([share, share, len(pairs) - 2 * share]))
        self.mean_, scale = train[0].mean(dim=0), train[0].std(dim=0, correction=0)
        self.scale_ = torch.where(scale > 0, scale, 1)
        models = [self._trained(train, strength) for strength in STRENGTHS]
        losses = [_log_loss(self._odds(validation[0], *model), validation[1]) for model in models]
        best = min(range(len(STRENGTHS)), key=losses.__getitem__)
        self.strength_, (self.weight_, self.bias_) = STRENGTHS[best], models[best]
        self.accuracy_ = float(((self._odds(test[0], self.weight_, self.bias_) > 0) == test[1]).double().mean())

    def score_block(self, block: Block) -> Tensor:
        return self._odds(_logs(column(block, "gradients.inputs", self.name)), self.weight_, self.bias_)

    def _odds(self, logs: Tensor, weight: Tensor, bias: float) -> Tensor:
        standardised = (logs - self.mean_.to(logs.device)) / self.scale_.to(logs.device)
        return standardised @ weight.to(logs.device) + bias

    def _shuffled(self, feats: FeatureSet) -> Tensor:
        """Norms of inputs and of noise, float64 ``[N, 2, L]``, in an order that depends only on them and the seed."""
        parts = []
        for block in feats.blocks(only=self.fit_needs):
            require_finite(block, feats)
            parts.append(torch.stack([column(block, name, self.name).double() for name in self.fit_needs], dim=1).cpu())
        pairs = torch.cat(parts)
        keys = [hashlib.sha256(str(self.seed).encode() + row.tobytes()).digest() for row in pairs.numpy()]
        return pairs[sorted(range(len(pairs)), key=keys.__getitem__)]

    def _trained(self, rows: tuple[Tensor, Tensor], strength: float) -> tuple[Tensor, float]:
        from sklearn.linear_model import LogisticRegression

        logs, labels = rows
        standardised = (logs - self.mean_) / self.scale_
        model = LogisticRegression(C=strength, max_iter=1000).fit(standardised.numpy(), labels.numpy())
        return torch.from_numpy(model.coef_[0].copy()), float(model.intercept_[0])


def _logs(norms: Tensor) -> Tensor:
    return norms.double().clamp_min(SMALLEST).log()


def _labelled(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms ``[2 N, L]`` of the norms of inputs, then of noise, and which are inputs."""
    labels = torch.arange(2).repeat_interleave(len(pairs)) == 0
    return _logs(torch.cat([pairs[:, 0], pairs[:, 1]])), labels


def _log_loss(odds: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(odds, labels.double()))


def column(block: Block, name: str, scorer: str) -> Tensor:
    """The extra of that name. Where a set has only extras below it, says which."""
    if name in block.extras:
        return block.extras[name]
    below = [extra for extra in block.extras if extra.startswith(f"{name}.")]
    raise MissingInput(f"{scorer!r} needs {name} to score this feature set; it has only {', '.join(below)}.")
