"""Toy: a score that shows what a new scorer costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Tags


@register_scorer("logit_spread")
@dataclass
class LogitSpread(Scorer):
    """Standard deviation of a row's logits, in float64.

    Source: none; it shows what a new scorer costs. Fails where the spread of the logits does not depend on the input.

    Cost: one pass over the logits.
    """

    tags = Tags(no_graph="it is an example")
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.logits64().std(dim=1, correction=0)
