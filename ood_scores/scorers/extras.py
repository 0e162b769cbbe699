"""Reading an extra that a probe has kept."""

from __future__ import annotations

from torch import Tensor

from ood_scores.errors import MissingInput
from ood_scores.features import Block


def read_extra(block: Block, name: str, scorer: str) -> Tensor:
    """Return the extra of that name from a block.

    Raises:
        MissingInput: if the set has only extras below that name; the message lists them.
    """
    if name in block.extras:
        return block.extras[name]
    below = [extra for extra in block.extras if extra.startswith(f"{name}.")]
    raise MissingInput(
        f"{scorer!r} needs {name} to score this feature set; it has only {', '.join(below)}: name one of these."
    )
