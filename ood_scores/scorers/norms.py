"""Norms: the size of features, logits, and feature maps, and the share of active features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import by_pieces, row_norm
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.papers import HAAS_2024, SHIN_2024
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("feature_norm")
@dataclass
class FeatureNorm(Scorer):
    """Norm of the penultimate features, ``||z||_p``, or of another space.

    Source: Haas et al. 2024 (p = 2), for models trained with L2-normalized features, where z is the feature *before*
    normalization (as extraction keeps it). The RN score of Shin et al. 2024 (RNA) is the negative of this, for which
    OoD rows score high.

    Fails on models trained with plain cross-entropy, whose norms are less informative (AUROC 0.77 of a DenseNet-BC-100,
    CIFAR-10 against CIFAR-100, where the energy reaches 0.90).

    Args:
        p: The order of the norm, in (0, inf].
        space: ``"features"``, ``"logits"``, or the name of an extra ``[N, K]``: ``"layers.layer4"`` for the channel
            means of a layer, which ``extract(layers=...)`` keeps.

    Cost: one pass over the features.
    """

    tags = Tags(formula=r"s(x) = \lVert z \rVert_p", paper=HAAS_2024)
    p: float = 2.0
    space: str = "features"
    needs = ("features",)

    def __post_init__(self) -> None:
        self.require(self.p > 0, f"p must be in (0, inf], got {self.p}")
        self.needs = (self.space,)

    def score_block(self, block: Block) -> Tensor:
        if self.space == "features":
            return block.feature_norm(float(self.p))
        values = block.logits64() if self.space == "logits" else read_extra(block, self.space, self.name).double()
        self.require(values.ndim == 2, f"{self.space!r} must have shape [N, K], got {tuple(values.shape)}")
        return row_norm(values, float(self.p))


@register_scorer("logit_norm")
@dataclass
class LogitNorm(Scorer):
    """Norm of the logits, ``||f||_p``.

    Source: Haas et al. 2024, Table 3 (p = 2). It is not the training loss of the same name (Wei et al. 2022).

    Fails as ``max_logit`` does, of which it is the two-sided form: very negative logits raise it too.

    Args:
        p: The order of the norm, in (0, inf].

    Cost: one pass over the logits.
    """

    tags = Tags(formula=r"s(x) = \lVert f \rVert_p", paper=HAAS_2024)
    p: float = 2.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(self.p > 0, f"p must be in (0, inf], got {self.p}")

    def score_block(self, block: Block) -> Tensor:
        return row_norm(block.logits64(), float(self.p))


@register_scorer("activation_ratio")
@dataclass
class ActivationRatio(Scorer):
    """Share of the activations of the last layer that are positive, between 0 and 1.

    Source: Shin et al. 2024 (RNA), section 5.2, at the last ReLU layer, which is the map *before* it is pooled. It is
    read by default if all sets to score have it, from ``extract(..., probes=["activations"])``; otherwise the share of
    the penultimate features is read, *after* pooling, which is another quantity. ``evaluate`` and benchmark results say
    which; in other calls, score either only sets that have the map, or set ``of``.

    Fails for features that are averages over many positions, nearly all of which are positive (0.999 of those of a
    ResNet-20).

    Args:
        of: ``"map"`` for the last map of the extra ``activations``, before pooling; ``"features"``, after pooling;
            ``"auto"`` for the map if all sets to score have it, else for the features. Inside of another scorer,
            ``"auto"`` reads the features.

    Cost: one pass over the features, or none.
    """

    tags = Tags(
        formula=r"s(x) = \frac{1}{D} \, \#\{ d : z_d > 0 \}", paper=SHIN_2024, parameters_before={"of": "features"}
    )
    of: Literal["auto", "map", "features"] = "auto"
    needs = ("features",)

    def __post_init__(self) -> None:
        self.require_choices()
        self.needs = ("activations",) if self.of == "map" else ("features",)

    def decided_for(self, sets: Sequence[FeatureSet]) -> Scorer:
        if self.of != "auto":
            return self
        return replace(self, of="map" if all(feats.has("activations") for feats in sets) else "features")

    def score_block(self, block: Block) -> Tensor:
        if self.of == "map":
            return [share for name, share in block.extras.items() if name.startswith("activations.")][-1].double()
        positive = by_pieces(lambda features: (features > 0).float().sum(dim=1), block.features)
        return positive.double() / block.features.shape[1]


@register_scorer("block_norm")
@dataclass
class BlockNorm(Scorer):
    """Norm of the feature maps of one block, ``1/C sum_c ||relu(a_c)||_2``.

    Reads ``norms.<layer>`` ``[N]``, which the probe ``norms`` keeps: ``extract(..., probes=["norms"])``.

    Source: Yu et al. 2023, "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection", Eq. 3. The
    paper chooses the block without OoD data, by the ratio of these norms for training images and for jigsaw puzzles of
    them; here, the caller chooses it.

    Fails in a block that was not chosen in this way: where the network is confident beyond its data, the norms of the
    last block are larger for OoD inputs.

    Args:
        layer: The name of the module; None for the last one for which the set has norms.

    Cost: none.
    """

    tags = Tags(
        formula=r"s(x) = \frac{1}{C} \sum_c \lVert \max(a_c, 0) \rVert_2",
        paper=Paper(
            "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection",
            "Yeonguk Yu, Sungho Shin, Seongju Lee, Changhyun Jun, Kyoobin Lee",
            "CVPR",
            2023,
            "https://arxiv.org/abs/2212.02295",
            "https://github.com/gist-ailab/block-selection-for-OOD-detection",
        ),
        small_extras={
            "norms.a": lambda features, logits: features.square().mean(dim=1),
        },
    )
    layer: str | None = None
    needs = ("norms",)

    def __post_init__(self) -> None:
        self.needs = ("norms" if self.layer is None else f"norms.{self.layer}",)

    def score_block(self, block: Block) -> Tensor:
        if self.layer is not None:
            return read_extra(block, f"norms.{self.layer}", self.name).double()
        last = [values for name, values in block.extras.items() if name.startswith("norms.")][-1]
        return last.double()
