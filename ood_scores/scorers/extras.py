"""Reading an extra that a probe has kept."""

from __future__ import annotations

from torch import Tensor

from ood_scores.errors import MissingInput
from ood_scores.features import Block


def read_extra(block: Block, name: str, scorer: str) -> Tensor:
    """The extra of that name. Where a set has only extras below it, says which."""
    if name in block.extras:
        return block.extras[name]
    below = [extra for extra in block.extras if extra.startswith(f"{name}.")]
    raise MissingInput(f"{scorer!r} needs {name} to score this feature set; it has only {', '.join(below)}.")
