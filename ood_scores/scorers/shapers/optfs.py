"""Optimal shapers: activations are scaled by a piecewise constant function fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.row_samples import SampledRows, quantiles
from ood_scores.scorers.base import fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.shapers.base import FeatureShaper
from ood_scores.scorers.tags import Paper, Tags

TAIL = 1e-3
"""The share of activations below the first bin, and of those above the last."""

LENGTH = 1000.0
"""The Euclidean length of all factors together."""


@register_scorer("optfs")
@dataclass
class OptFS(FeatureShaper):
    """Activations times a factor for their bin, ``theta_i z``, and 0 outside all bins, scored by ``base``.

    Fits ``bins`` equal bins between the 0.001 and the 0.999 quantile of the N D activations of the fit set taken
    together (exact up to 2^26 of them, beyond that from evenly spaced rows, ``SampledRows``), and theta: for each bin,
    the mean over the rows of the contribution of its activations to the predicted logit, ``sum_{d in bin} w_yhat,d
    z_d``, scaled so that all factors together have length 1,000.

    Source: Zhao, Xu, Gupta, Asthana, Zheng & Gould 2024, "Towards Optimal Feature-Shaping Methods for
    Out-of-Distribution Detection", its closed form without OoD data; with ``base="energy"``, it is their "Ours (E)". No
    base computes their "Ours (V)", the contribution to the logit that was predicted before shaping; ``"max_logit"`` is
    close. Departure: there are always ``bins`` bins, while theirs are sometimes one more by rounding.

    Fails where fit and OoD rows differ beyond the range of the bins, because all activations there are set to 0.

    Args:
        bins: The number of bins.
        base: The scorer of the shaped rows.

    Cost: one product with the head for each block; a second pass to fit.
    """

    tags = Tags(
        formula=r"s(x) = \operatorname{base}(\tilde z), \quad \tilde z_d = \theta_{\operatorname{bin}(z_d)} \, z_d",
        paper=Paper(
            "Towards Optimal Feature-Shaping Methods for Out-of-Distribution Detection",
            "Qinyu Zhao, Ming Xu, Kartik Gupta, Akshay Asthana, Liang Zheng, Stephen Gould",
            "ICLR",
            2024,
            "https://arxiv.org/abs/2402.00865",
            "https://github.com/Qinyu-Allen-Zhao/OptFSOOD",
        ),
        no_graph="its factors jump at the edges of bins, and rounding alone moves activations over them",
    )
    bins: int = 100
    low_: float = fitted(math.nan)
    high_: float = fitted(math.nan)
    factors_: Tensor = fitted()
    fit_reads = ("features", "head")

    def __post_init__(self) -> None:
        self.require_count("bins")
        super().__post_init__()

    def statistics(self) -> Sequence[Statistic]:
        return (SampledRows(),)

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        low, high = quantiles(found[SampledRows()].flatten(), [TAIL, 1 - TAIL]).tolist()
        if not high > low:
            raise BadInput("optfs: the features do not vary and have no range to divide into bins: fit on more rows.")
        self.low_, self.high_ = low, high
        total = torch.zeros(self.bins + 1, dtype=torch.float64)
        for block in feats.blocks(only=("features",)):
            total = total.to(block.features.device) + self._contributions(block, feats.head)
        factors = total[: self.bins]
        self.factors_ = LENGTH * factors / factors.norm().clamp_min(torch.finfo(torch.float64).tiny)

    def shape_features(self, features: Tensor) -> Tensor:
        factors = torch.cat([self.factors_, self.factors_.new_zeros(1)]).to(features)
        return features * factors[self._bin(features)]

    def _contributions(self, block: Block, head: Head | None) -> Tensor:
        """The sums of the contributions to the predicted logits in each bin and outside all of them, ``[bins + 1]``."""
        assert head is not None
        head, features = head.to(block.features.device), block.space("features")
        parts = head.weight.double()[head(block.features).argmax(dim=1)] * features
        return features.new_zeros(self.bins + 1).index_add_(0, self._bin(features).flatten(), parts.flatten())

    def _bin(self, features: Tensor) -> Tensor:
        """The number of each activation's bin; ``bins`` for activations in none."""
        values = features.double()
        numbers = ((values - self.low_) * (self.bins / (self.high_ - self.low_))).floor().clamp(0, self.bins - 1).long()
        return torch.where((values >= self.low_) & (values < self.high_), numbers, self.bins)
