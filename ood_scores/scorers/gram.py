"""Gram matrices: how far Gram sums of several layers lie outside their range on the fit set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.finite_pass import FinitePass
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import fitted
from ood_scores.scorers.multilayer import LayeredScorer
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work
from ood_scores.user_warnings import warn_user

SMALLEST_BOUND = 1e-6
"""The smallest bound by which a deviation is divided, and the constant added to the mean deviation, as in Gram's code.
"""


SMALLEST_MEAN = 1e-7


@register_scorer("gram")
@dataclass
class Gram(LayeredScorer):
    """Negative deviation of the Gram sums of several layers from their range on fit rows of the predicted class.

    ``-sum_l delta_l / mean(delta_l)``, where ``delta_l`` sums over the orders and channels of layer l, divided by the
    confidence of the prediction: ``(low - v) / |low|`` for values v below the range of the class, ``(v - high) /
    |high|`` for values above it, and 0 for values within it. The values are extras ``gram.<module>`` (``extract(...,
    probes=["gram"])``).

    Fits the ranges on the rows predicted as each class, then the mean deviation of each layer, for which each row is
    compared with the ranges of the other rows (the two smallest and the two largest values of a class are enough to
    compute them).

    Source: Sastry & Oore 2020, "Detecting Out-of-Distribution Examples with Gram Matrices", section 3; the division by
    the confidence is in the authors' code. Departures: the mean deviation is that of the fit rows, each left out in
    turn, while the authors use a tenth of the test set; bounds nearer to 0 than 1e-6 count as 1e-6, while their code
    adds 1e-6 to them. OpenOOD uses the powers 1 to 5.

    A class that is predicted for no fit row has the range of all rows, with a warning. Fails with few fit rows for each
    class: ranges are then narrow, and every row is outside.

    Args:
        layers: Names of modules among the extras; None uses all ``gram.*`` of the fit set.
        confidence: Divide by the largest softmax probability, as the authors' code does.

    Cost: two passes in the fit; ``2 classes orders channels`` values in the precision of the extras, twice that during
    the fit.
    """

    tags = Tags(
        formula=r"s(x) = -\sum_l \frac{\delta_l}{\operatorname{mean}(\delta_l)}",
        paper=Paper(
            "Detecting Out-of-Distribution Examples with Gram Matrices",
            "Chandramouli Shama Sastry, Sageev Oore",
            "ICML",
            2020,
            "https://arxiv.org/abs/1912.12510",
            "https://github.com/VectorInstitute/gram-ood-detection",
        ),
        small_extras={
            "gram.a": lambda features, logits: torch.stack([features, features.square()], dim=1),
            "gram.b": lambda features, logits: logits[:, None] * features.sum(dim=1)[:, None, None],
        },
    )
    layers: Sequence[str] | None = None
    confidence: bool = True
    layers_: list[str] = fitted()
    shapes_: list[list[int]] = fitted()
    low_: list[Tensor] = fitted()
    high_: list[Tensor] = fitted()
    usual_: Tensor = fitted()
    extra = "gram"
    dimensions = 2
    needs = ("gram", "logits")
    fit_needs = ("gram", "logits")

    def __post_init__(self) -> None:
        self._check_layers()

    def work(self, sizes: Sizes) -> Work:
        values = float(sum(map(sizes.width, self.read_from(sizes))))
        fitting, scoring = 6000, 2500  # measured, per value
        return Work(values * (fitting * sizes.fit_rows + scoring * sizes.rows), 16 * sizes.classes * values)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self._find_layers(feats)
        counts, low, high = self._two_extremes(feats)
        self.usual_ = self._usual_deviations(feats, counts, low, high) + SMALLEST_MEAN
        self.low_ = [smallest[:, 0].clone() for smallest in low]
        self.high_ = [largest[:, 0].clone() for largest in high]
        if (counts == 0).any():
            warn_user(
                f"gram: {int((counts == 0).sum())} of {len(counts)} classes are never predicted in the fit set and "
                "get the range of all rows.",
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

    def _two_extremes(self, feats: FeatureSet) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Count the rows of each predicted class, and find the two smallest and two largest values of each layer.

        Returns int64 ``[C]``, and for each layer tensors ``[C, 2, orders, channels]``, the outermost value first;
        values are infinite where a class has too few rows.
        """
        classes = feats.num_classes or 1
        counts: Tensor | None = None
        low: list[Tensor] = []
        high: list[Tensor] = []
        whole = FinitePass(feats, self.needs)
        for block in whole.blocks():
            with whole.used(block):
                predicted, layers = block.prediction(), self._values(block)
                counts = predicted.new_zeros(classes) if counts is None else counts
                counts.index_add_(0, predicted, torch.ones_like(predicted))
                low = low or [rows.new_full((classes, 2, *rows.shape[1:]), torch.inf) for rows in layers]
                high = high or [torch.full_like(smallest, -torch.inf) for smallest in low]
                for rows, smallest, largest in zip(layers, low, high, strict=True):
                    smallest.copy_(two_smallest(rows, predicted, smallest))
                    largest.copy_(-two_smallest(-rows, predicted, -largest))
        assert counts is not None
        return counts, low, high

    def _usual_deviations(
        self, feats: FeatureSet, counts: Tensor, low: Sequence[Tensor], high: Sequence[Tensor]
    ) -> Tensor:
        """The mean over the rows of each layer's deviation from the ranges of the other rows, ``[L]``.

        Rows that are the only one of their class do not count.
        """
        total = torch.zeros(len(low), dtype=torch.float64, device=counts.device)
        for block in feats.blocks(only=self.needs):
            predicted = block.prediction()
            found = []
            for values, smallest, largest in zip(self._values(block), low, high, strict=True):
                lowest, next_lowest = smallest[predicted].unbind(dim=1)
                highest, next_highest = largest[predicted].unbind(dim=1)
                lowest = torch.where(values <= lowest, next_lowest, lowest)
                highest = torch.where(values >= highest, next_highest, highest)
                found.append(deviation(values, lowest, highest))
            deviations = torch.stack(found, dim=1) / self._confidence(block)[:, None]
            total += deviations.where((counts[predicted] > 1)[:, None], 0).sum(dim=0)
        rows = counts[counts > 1].sum()
        if not rows:
            raise BadInput("gram: no two rows of the fit set are predicted as the same class: fit on more rows.")
        return total / rows


def two_smallest(rows: Tensor, classes: Tensor, known: Tensor) -> Tensor:
    """Return the smallest and the second smallest value of each class, ``[C, 2, ...]``, of rows ``[B, ...]`` and of
    those ``known`` before. Equal values count as often as they occur.
    """
    index = classes.view(-1, *[1] * (rows.ndim - 1)).expand_as(rows)
    before, second = (part.contiguous() for part in known.unbind(dim=1))
    first = before.scatter_reduce(0, index, rows, "amin")
    is_first, was_first = rows == first[classes], before == first
    second = torch.where(was_first, second, before).scatter_reduce(0, index, rows.where(~is_first, torch.inf), "amin")
    occurrences = was_first.to(rows.dtype).index_add(0, classes, is_first.to(rows.dtype))
    return torch.stack([first, torch.where(occurrences > 1, first, second)], dim=1)


def deviation(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sum of how far values ``[B, orders, C]`` are outside their ranges, relative to the bound, float64 ``[B]``."""
    values, low, high = values.double(), low.double(), high.double()
    below = (low - values).clamp_min(0) / low.abs().clamp_min(SMALLEST_BOUND)
    above = (values - high).clamp_min(0) / high.abs().clamp_min(SMALLEST_BOUND)
    return (below + above).flatten(1).sum(dim=1)
