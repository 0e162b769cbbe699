"""Scaling shapers: features or logits are scaled, and nothing is set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ood_scores.features import Block
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.shapers.base import Shaper
from ood_scores.scorers.shapers.pruning import Pruner, largest, ratio
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("scale")
@dataclass
class SCALE(Pruner):
    """All activations times ``exp(s1 / s2)``, without pruning, scored by ``base``.

    s1 is the sum of all activations of the row, and s2 that of its largest ``D - round(D percentile)``; the ratio of a
    row without positive activations counts as 1. ``percentile=0`` scales every row by e. The precision is that of
    ``ash_s``.

    Source: Xu, Chen, Franchi & Yao 2024, "Scaling for Training Time and Post-hoc Out-of-distribution Detection
    Enhancement"; 0.85 is theirs and OpenOOD's, which chooses among 0.65 to 0.95 on validation data. The default of
    pytorch-ood is 0.65.

    Fails on features of both signs, for which s1 is not informative, and for a base that ignores the scale of the
    logits.

    Args:
        percentile: The share of a row's activations left out of s2, in [0, 1).
        base: The scorer of the scaled rows.

    Cost: a partial sort of each row and one product with the head for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{base}\bigl( z \, e^{s_1 / s_2} \bigr), \quad s_1 = \sum_d z_d, \; s_2 = "
            r"\sum_{d \in \text{top}} z_d"
        ),
        paper=Paper(
            "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement",
            "Kai Xu, Rongyu Chen, Gianni Franchi, Angela Yao",
            "ICLR",
            2024,
            "https://arxiv.org/abs/2310.00227",
            "https://github.com/kai422/SCALE",
        ),
        search_space={"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)},
    )
    percentile: float = 0.85

    def shape_features(self, features: Tensor) -> Tensor:
        values = self.wide_enough(features)
        return values * ratio(values, self.kept(features)).exp()


@register_scorer("lts")
@dataclass
class LTS(Shaper):
    """Logit scaling, ``f S(z)``, scored by ``base``; ``S = (sum of positive activations / sum of the top ones)^2``.

    The model's own logits are scaled, so no head is needed; the features are not changed. The top ones are the row's
    ``D - round(D (1 - top))`` largest activations, at least one, with negative ones counted as 0; a row without
    positive activations has S = 1.

    Source: Djurisic, Liu & Nikolic 2024, "Logit Scaling for Out-of-Distribution Detection"; top = 0.05 as in
    pytorch-ood. That negative activations count as 0 is from the authors' code.

    Fails for a base that ignores the scale of the logits. A base that would compute the logits anew (another shaper) is
    refused: make it the outer one, ``create_scorer("react", base="lts")``.

    Args:
        top: The share of a row's activations that counts as top, in (0, 1].
        base: The scorer of the scaled logits.

    Cost: a partial sort of each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{base}(f \cdot S), \quad S = \Bigl( \frac{\sum_d (z_d)_+}{\sum_{d \in "
            r"\text{top}} (z_d)_+} \Bigr)^2"
        ),
        paper=Paper(
            "Logit Scaling for Out-of-Distribution Detection",
            "Andrija Djurisic, Rosanne Liu, Mladen Nikolic",
            "arXiv",
            2024,
            "https://arxiv.org/abs/2409.01175",
            "https://github.com/andrijazz/lts",
        ),
    )
    top: float = 0.05
    shapes = ("logits",)

    def __post_init__(self) -> None:
        self.require(0 < self.top <= 1, f"top must be in (0, 1], got {self.top}")
        super().__post_init__()

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["features", *names]))

    def shape(self, block: Block) -> Block:
        positive = block.features.relu()
        return block.replaced(logits=block.logits * ratio(positive, largest(positive, self.top)).square())
