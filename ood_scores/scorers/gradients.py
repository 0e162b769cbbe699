"""GradNorm: the norm of a gradient that never has to be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ood_scores.features import Block
from ood_scores.features.block import row_norm
from ood_scores.scorers.base import Scorer, register_scorer


@register_scorer("gradnorm")
@dataclass
class GradNorm(Scorer):
    """Norm of the last layer's gradient, in closed form: ``||z||_p ||1 - C softmax(f / T)||_p / (C T)``.

    Source: Huang et al. 2021, Eq. 9. The gradient of ``KL(u || softmax(f / T))`` with respect to the weight is the
    rank-1 matrix ``g z^T``, so its entrywise p-norm is the product of the two vectors' p-norms for *every* p in
    (0, inf], not only for the paper's p = 1. No backward pass is run.

    Args:
        p: order of the norm, in (0, inf].
        temperature: the divisor T of the logits.
        target: ``"uniform"`` as above (the paper's), or ``"predicted"``: the gradient of the cross-entropy with the
            predicted class, ``||z||_p ||softmax(f / T) - onehot||_p / T`` (Fig. 3). That gradient is *small* for
            in-distribution inputs, so its negative is returned: higher = more in-distribution, here too.
        part: ``"UV"`` the product; ``"U"`` the feature part ``||z||_p`` alone; ``"V"`` the output part alone,
            ``||1 - C softmax||_p`` or minus ``||softmax - onehot||_p``; both without constant factors (Table 5).
        bias: also count the gradient of the bias, as if z had one more entry 1. The paper leaves it out.

    The authors' code uses targets of 1 in place of 1/C, so its values are C times these; the ranking is the same.

    The softmax has the logits' own precision, as ``msp`` has it.

    Fails where feature norms do not grow with the evidence: on CIFAR networks it often ranks below the energy (OpenOOD
    v1.5: 54.90 against 87.58 near CIFAR-10).

    Cost: one pass over features and logits, and one softmax for each row.
    """

    p: float = 1.0
    temperature: float = 1.0
    target: Literal["uniform", "predicted"] = "uniform"
    part: Literal["UV", "U", "V"] = "UV"
    bias: bool = False

    def __post_init__(self) -> None:
        self.require(self.p > 0, f"p must be in (0, inf], got {self.p}")
        self.require_positive("temperature")
        self.require(
            self.target in ("uniform", "predicted"), f"target is 'uniform' or 'predicted', got {self.target!r}"
        )
        self.require(self.part in ("UV", "U", "V"), f"part is 'UV', 'U' or 'V', got {self.part!r}")
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
                self.temperature, lambda softmax: row_norm(softmax.sub_(1 / classes), float(self.p))
            )
        softmax = block.softmax(self.temperature)
        others = softmax.scatter(1, block.prediction()[:, None], 0.0)
        one_minus_largest = others.sum(dim=1, keepdim=True)  # as a sum: a difference cancels to 0 where p is nearly 1
        return -row_norm(torch.cat([others, one_minus_largest], dim=1), float(self.p))
