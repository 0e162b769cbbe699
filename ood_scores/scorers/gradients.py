"""Gradients: norms of gradients, in closed form or kept by probes, and what can be learned from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet, load
from ood_scores.features.block import CERTAIN
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean, Means
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.compatibility import require_same_features
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.gaussian import classes_present
from ood_scores.scorers.neighbors import why_no_graph_of
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.numerics.exact_search import lengths_of
from ood_scores.scorers.numerics.nearest import nearest_neighbors
from ood_scores.scorers.papers import HUANG_2021
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, search_of


@register_scorer("gradnorm")
@dataclass
class GradNorm(Scorer):
    """Norm of the last layer's gradient, in closed form: ``||z||_p ||1 - C softmax(f / T)||_p / (C T)``.

    Source: Huang et al. 2021, Eq. 9. The gradient of ``KL(u || softmax(f / T))`` with respect to the weight is the
    rank-1 matrix ``g z^T``, so its entrywise p-norm is the product of the p-norms of the two vectors for *every* p in
    (0, inf], not only for p = 1 as in the paper. No backward pass is run.

    Args:
        p: The order of the norm, in (0, inf].
        temperature: The divisor T of the logits.
        target: ``"uniform"`` as above (the paper's), or ``"predicted"``: the gradient of the cross-entropy with the
            predicted class, ``||z||_p ||softmax(f / T) - onehot||_p / T`` (Fig. 3). That gradient is *small* for
            in-distribution inputs, so the score is its negative: higher = more in-distribution, as everywhere.
        part: ``"UV"`` for the product; ``"U"`` for the feature part ``||z||_p`` alone; ``"V"`` for the output part
            alone, ``||1 - C softmax||_p`` or the negative of ``||softmax - onehot||_p``; both without constant factors
            (Table 5).
        bias: Include the gradient of the bias, as if z had another entry of 1. The paper does not.

    The targets in the authors' code are 1 instead of 1/C, so its values are C times these; the ranking is the same.

    The softmax has the precision of the logits, as in ``msp``.

    Fails where feature norms do not grow with the evidence: on CIFAR networks, it often ranks below the energy (OpenOOD
    v1.5: 54.90 against 87.58 near CIFAR-10).

    Cost: one pass over features and logits and one softmax for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \Bigl\lVert \frac{\partial \, \mathrm{KL}(u \,\Vert\, \operatorname{softmax}(f / "
            r"T))}{\partial W} \Bigr\rVert_p = \frac{1}{C T} \, \lVert z \rVert_p \, \lVert 1 - C "
            r"\operatorname{softmax}(f / T) \rVert_p"
        ),
        paper=HUANG_2021,
    )
    p: float = 1.0
    temperature: float = 1.0
    target: Literal["uniform", "predicted"] = "uniform"
    part: Literal["UV", "U", "V"] = "UV"
    bias: bool = False

    def __post_init__(self) -> None:
        self.require(self.p > 0, f"p must be in (0, inf], got {self.p}")
        self.require_positive("temperature")
        self.require_choices()
        self.needs = {"UV": ("features", "logits"), "U": ("features",), "V": ("logits",)}[self.part]

    def score_block(self, block: Block) -> Tensor:
        if self.part == "U":
            return self._feature_part(block)
        if self.part == "V":
            return self._output_part(block)
        scale = self.temperature * (block.logits.shape[1] if self.target == "uniform" else 1)
        return self._feature_part(block) * self._output_part(block) / scale

    def _feature_part(self, block: Block) -> Tensor:
        norm = block.feature_norm(float(self.p))
        if not self.bias:
            return norm
        return row_norm(torch.stack([norm, torch.ones_like(norm)], dim=1), float(self.p))

    def _output_part(self, block: Block) -> Tensor:
        if self.target == "uniform":
            classes = block.logits.shape[1]
            return classes * block.from_native_softmax(
                self.temperature, lambda softmax: row_norm(softmax.sub_(1 / classes), float(self.p), overwritten=True)
            )
        found, rest = self._distance_to_predicted(block.softmax(self.temperature))

        def exact(logits: Tensor) -> Tensor:
            return self._distance_to_predicted(logits.softmax(dim=1))[0]

        return -block.refined(found, rest < CERTAIN, exact, self.temperature)

    def _distance_to_predicted(self, softmax: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the difference between softmax and predicted class, and the sum of the others, both ``[B]``."""
        others = softmax.scatter(1, softmax.argmax(dim=1, keepdim=True), 0.0)
        rest = others.sum(dim=1, keepdim=True)  # 1 minus the largest, which would cancel where p is nearly 1
        return row_norm(torch.cat([others, rest], dim=1), float(self.p)), rest[:, 0]


SMALLEST = 1e-12
"""The norm that a gradient of 0 counts as, so that its logarithm exists."""


STRENGTHS = tuple(10.0**power for power in range(-5, 4))
"""The choices of ``gradient_classifier`` for scikit-learn's C, the inverse strength of the regularization."""


@register_scorer("gradnorm_params")
@dataclass
class GradNormParams(Scorer):
    """Norm of the gradient of chosen parameters, ``||grad_w KL(u || softmax(f / T))||_p``.

    Reads ``gradnorm.<group>`` ``[N]``, which the probe ``gradnorm`` keeps for its p and T: ``extract(...,
    probes=[ParameterGradients(groups=("layer4", "all"))])``.

    Source: Huang et al. 2021 (GradNorm), Table 2. For the weight of the last layer, the scorer ``gradnorm`` needs no
    probe. With ``ParameterGradients(p=2)``, it ranks rows as the gradient-norm uncertainty of pytorch-ood does
    (``GradUncertainty``), whose score is the square of this one, times C squared.

    Fails as ``gradnorm`` does; also in shallow blocks, whose gradients are less informative (Table 2).

    Args:
        group: The group's name in the probe: ``"all"``, or a name of modules or parameters.

    Cost: none.
    """

    tags = Tags(
        formula=r"s(x) = \bigl\lVert \nabla_w \mathrm{KL}(u \,\Vert\, \operatorname{softmax}(f / T)) \bigr\rVert_p",
        paper=HUANG_2021,
        small_extras={
            "gradnorm.all": lambda features, logits: features.sum(dim=1),
        },
    )
    group: str = "all"
    needs = ("gradnorm.all",)

    def __post_init__(self) -> None:
        self.needs = (f"gradnorm.{self.group}",)

    def score_block(self, block: Block) -> Tensor:
        return read_extra(block, f"gradnorm.{self.group}", self.name).double()


@register_scorer("gradient_classifier")
@dataclass
class GradientClassifier(Scorer):
    """Log odds that the gradients are those of a training image rather than of noise.

    The log odds are those of a logistic regression, ``w (log g - mu) / sigma + b``, on the norms g of the gradients of
    all parameters. Reads ``gradients.inputs`` ``[N, L]`` and, from the fit set, ``gradients.noise`` ``[N, L]``, which
    the probe ``gradients`` keeps: ``extract(..., probes=[LayerGradients(noise=True)])`` for the fit set, and without
    noise for others.

    Fits mu, sigma, w, and b on two fifths of the rows, chooses the strength of the regularization among ``STRENGTHS``
    by the likelihood on another two fifths, and keeps the accuracy on the last fifth as ``accuracy_``. The values of a
    row and the seed determine its part, so that the order of rows does not matter.

    Source: Lee & AlRegib 2020, "Gradients as a Measure of Uncertainty in Neural Networks", whose classifier is trained
    on OoD images; the uniform noise in their place and the shares are from GradNorm (Huang et al. 2021), supplement E.
    Departure: no code of either classifier was found; this one is linear, on standardized logarithms.

    Fails where noise is so unlike images that it says nothing about other OoD inputs; ``accuracy_`` is then 1.

    Args:
        seed: The seed of the split.

    Cost: one product with L numbers for each row; the fit keeps the ``[N, 2 L]`` norms in float64.
    """

    tags = Tags(
        formula=(
            r"s(x) = w^\top \frac{\log g - \mu}{\sigma} + b, \quad g_l = \lVert \nabla_{\theta_l} \mathcal{L} "
            r"\rVert_2"
        ),
        paper=Paper(
            "Gradients as a Measure of Uncertainty in Neural Networks",
            "Jinsol Lee, Ghassan AlRegib",
            "ICIP",
            2020,
            "https://arxiv.org/abs/2008.08030",
        ),
        experimental="no code of the authors was found to compare with",
        small_extras={
            "gradients.inputs": lambda features, logits: features + 0.1,
            "gradients.noise": lambda features, logits: 0.3 * features.flip(1) + 0.1,
        },
    )
    seed: int = 0
    mean_: Tensor = fitted()
    scale_: Tensor = fitted()
    weight_: Tensor = fitted()
    bias_: float = fitted()
    strength_: float = fitted()
    accuracy_: float = fitted()
    needs = ("gradients.inputs",)
    fit_needs = ("gradients.inputs", "gradients.noise")

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        pairs = self._shuffled(feats)
        self.require(len(pairs) >= 3, f"the fit needs at least 3 rows, got {len(pairs)}")
        share = max(1, 2 * len(pairs) // 5)
        train, validation, test = (_labeled(part) for part in pairs.split([share, share, len(pairs) - 2 * share]))
        self.mean_, scale = train[0].mean(dim=0), train[0].std(dim=0, correction=0)
        self.scale_ = torch.where(scale > 0, scale, 1)
        models = [self._trained(train, strength) for strength in STRENGTHS]
        losses = [_log_loss(self._odds(validation[0], *model), validation[1]) for model in models]
        best = min(range(len(STRENGTHS)), key=losses.__getitem__)
        self.strength_, (self.weight_, self.bias_) = STRENGTHS[best], models[best]
        self.accuracy_ = float(((self._odds(test[0], self.weight_, self.bias_) > 0) == test[1]).double().mean())

    def score_block(self, block: Block) -> Tensor:
        return self._odds(_logs(read_extra(block, "gradients.inputs", self.name)), self.weight_, self.bias_)

    def _odds(self, logs: Tensor, weight: Tensor, bias: float) -> Tensor:
        standardized = (logs - self.mean_.to(logs.device)) / self.scale_.to(logs.device)
        return standardized @ weight.to(logs.device) + bias

    def _shuffled(self, feats: FeatureSet) -> Tensor:
        """Norms of inputs and of noise, float64 ``[N, 2, L]``, in an order that depends only on them and the seed."""
        parts = []
        for block in feats.blocks(only=self.fit_needs):
            block.require_finite()
            parts.append(
                torch.stack([read_extra(block, name, self.name).double() for name in self.fit_needs], dim=1).cpu()
            )
        pairs = torch.cat(parts)
        keys = [hashlib.sha256(str(self.seed).encode() + row.tobytes()).digest() for row in pairs.numpy()]
        return pairs[sorted(range(len(pairs)), key=keys.__getitem__)]

    def _trained(self, rows: tuple[Tensor, Tensor], strength: float) -> tuple[Tensor, float]:
        from sklearn.linear_model import LogisticRegression

        logs, labels = rows
        standardized = (logs - self.mean_) / self.scale_
        model = LogisticRegression(C=strength, max_iter=1000).fit(standardized.numpy(), labels.numpy())
        return torch.from_numpy(model.coef_[0].copy()), float(model.intercept_[0])


def _logs(norms: Tensor) -> Tensor:
    return norms.double().clamp_min(SMALLEST).log()


def _labeled(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms ``[2 N, L]`` of the norms of inputs, then of noise, and a mask of the inputs."""
    labels = torch.arange(2).repeat_interleave(len(pairs)) == 0
    return _logs(torch.cat([pairs[:, 0], pairs[:, 1]])), labels


def _log_loss(odds: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(odds, labels.double()))


@register_scorer("grood")
@dataclass
class GROOD(Scorer):
    """Negative distance of a gradient to the nearest gradient of the fit set, ``-min_i ||g - g_i||``.

    The gradient ``g = q (z - o) / ||z - o||`` is that of the loss ``-log softmax(-||z - p_c||)_yhat`` with respect to
    o. The softmax is over the prototypes p_c of the classes and one more, o, for all OoD inputs; q is the probability
    of o. Near a class prototype, o hardly matters. No backward pass is run. With ``by="norm"``, the score is ``-log
    ||g||_1``.

    Fits p_c, the mean feature of class c, and, unless it is given, o, the mean of all p_c; with ``by="nearest"`` also
    the gradients g_i of the fit rows that are predicted as their label.

    Source: ElAraby et al. 2025, "GROOD: GRadient-Aware Out-of-Distribution Detection". The distance to the nearest
    gradient of the training set is the paper's score and the configuration of the authors' code (``use_grad_norm:
    False``). Its o is the mean feature of validation OoD images (``use_val_ood: True``), which a fit on in-distribution
    data does not have: name their cache as ``prototype``. The default o is another option of that code
    (``use_proto_mean``), the only one that can be computed from the features of the fit set; the others are the mean
    feature of blurred noise images or of mixed inputs. The norm, ``by="norm"``, is an option of it too
    (``use_grad_norm``), and needs no search. Departures: the norm is a logarithm, which ranks rows in the same way and
    does not underflow near a prototype; a row at o itself has no direction and counts as if g had one entry; the search
    is exact and in float64, and its distances are not squared; o is the mean of all rows of the cache, and not of the
    first 100 images; a class without rows is left out.

    Fails where OoD rows are far from o and near a class prototype or beyond it; with a single class, that class is its
    own o, and all rows score nearly the same.

    Args:
        by: ``"nearest"``: the negative distance from g to the nearest of the fit set's gradients; or ``"norm"``.
        prototype: The prototype o: the path of a cache of validation OoD images, whose mean feature is taken, or one
            number for each feature. With None, it is the mean of the class prototypes.

    Cost: distances to C + 1 prototypes; with ``by="nearest"``, an inner product with each row of the fit set, in
    float32, and also in float64 for the rows whose nearest one that does not decide; ``4 D`` bytes for each row of the
    fit set.
    """

    tags = Tags(
        formula=r"s(x) = -\min_i \lVert g - g_i \rVert, \quad g = q \, \frac{z - o}{\lVert z - o \rVert}",
        paper=Paper(
            "GROOD: GRadient-Aware Out-of-Distribution Detection",
            "Mostafa ElAraby, Sabyasachi Sahoo, Yann Pequignot, Paul Novello, Liam Paull",
            "TMLR",
            2025,
            "https://openreview.net/forum?id=2V7itvvMVJ",
            "https://github.com/mostafaelaraby/Gradient-Aware-OOD-Detection",
        ),
        search_space={"by": ("nearest", "norm")},
    )
    by: Literal["nearest", "norm"] = "nearest"
    prototype: str | Sequence[float] | None = None
    prototypes_: Tensor = fitted()
    bank_: Tensor | None = fitted(None)
    needs = ("features",)

    def __post_init__(self) -> None:
        self.require_choices()
        if not isinstance(self.prototype, str):
            self.require(all(math.isfinite(value) for value in self.prototype or ()), "prototype must be finite")
        self.fit_needs = ("features", "labels") if self.by == "norm" else ("features", "logits", "labels")

    def work(self, sizes: Sizes) -> Work:
        if self.by == "norm":
            return Work()
        found = search_of(sizes.fit_rows, sizes.rows, sizes.features)
        return Work(found.operations, found.memory / 2)

    def statistics(self) -> tuple[Means]:
        return (Means("features", "label"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        groups = found[self.statistics()[0]]
        means = groups.means[classes_present(groups.counts, self.name)]
        self.prototypes_ = torch.cat([means, self._of_ood(means, feats)[None]])
        self.bank_ = self._gradients_of_correct(feats) if self.by == "nearest" else None

    def why_no_graph(self) -> str | None:
        return super().why_no_graph() or why_no_graph_of(self.bank_)

    def score_block(self, block: Block) -> Tensor:
        log_share, direction = self._gradient(block)
        if self.bank_ is None:
            return -log_share - direction.abs().sum(dim=1).clamp_min(1).log()
        return -self._nearest(block, log_share.exp()[:, None] * direction, self.bank_)

    def _gradient(self, block: Block) -> tuple[Tensor, Tensor]:
        """The logarithm of q ``[B]`` and the direction of z - o ``[B, D]``, float64."""
        prototypes = self.prototypes_.to(block.features.device)
        rows = block.space("features") - prototypes[-1]
        scores = -squared_distances(rows, prototypes - prototypes[-1]).sqrt()
        return scores.log_softmax(dim=1)[:, -1], normalize(rows, dim=1)

    def _nearest(self, block: Block, gradients: Tensor, bank: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return squared_distances(gradients, bank.to(gradients)).amin(dim=1).sqrt()
        bank, lengths = bank.to(gradients.device), self._bank_lengths(bank).to(gradients.device)
        numbers = nearest_neighbors(gradients, bank, lengths, block.happens)
        return torch.linalg.vector_norm(gradients - bank[numbers], dim=1)

    def _bank_lengths(self, bank: Tensor) -> Tensor:
        """The lengths of the bank rows, computed once."""
        known: tuple[Tensor, Tensor] | None = getattr(self, "_lengths", None)
        if known is None or known[0] is not bank:
            known = self._lengths = bank, lengths_of(bank)
        return known[1]

    def _gradients_of_correct(self, feats: FeatureSet) -> Tensor:
        """Gradients of the correctly predicted rows, float32 ``[M, D]`` on the CPU."""
        labels, found = feats.class_labels(), []
        for block in feats.blocks(only=("features", "logits")):
            block.require_finite()
            log_share, direction = self._gradient(block)
            correct = block.prediction().cpu() == labels[block.start : block.start + len(block)].cpu()
            found.append((log_share.exp()[:, None] * direction).float().cpu()[correct])
        bank = torch.cat(found)
        if not len(bank):
            raise BadInput("grood: no row of the fit set is predicted correctly: check the labels.")
        return bank

    def _of_ood(self, means: Tensor, feats: FeatureSet) -> Tensor:
        if self.prototype is None:
            return means.mean(dim=0)
        if isinstance(self.prototype, str):
            ood = load(self.prototype)
            require_same_features(ood.provenance, feats.provenance, f"prototype={self.prototype!r}", "the fit set")
            given = collect(ood, [FeatureMean()])[FeatureMean()].to(means)
        else:
            given = means.new_tensor([float(value) for value in self.prototype])
        self.require(
            len(given) == means.shape[1],
            f"prototype must have {means.shape[1]} numbers, one for each feature, got {len(given)}",
        )
        return given
