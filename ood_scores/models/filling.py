"""Loading weights into a network, with errors that name what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from ood_scores.errors import CheckpointError
from ood_scores.models.checkpoints import first_sentence, shared_prefix
from ood_scores.models.running import architecture


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    checkpoint: str | os.PathLike[str],
    new_head: nn.Module | None = None,
) -> None:
    """Load weights into a model, which must need all of them and no others.

    Args:
        model: Network to fill.
        state: Weights by name, as ``read_checkpoint`` returns them.
        checkpoint: Where the weights come from, for the error message.
        new_head: Submodule that keeps its own weights if the others have none for it or of another shape.

    Raises:
        CheckpointError: if the weights are those of another architecture.
    """
    own = model.state_dict()
    state = {f"{shared_prefix(own)}{key}": values for key, values in state.items()}
    paths = [f"{path}." for path, part in model.named_modules() if part is new_head]
    head = {key for key in own if key.startswith(tuple(paths))}
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        state = {key: value for key, value in state.items() if key not in head}
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    counts = {key for key in own if key.endswith("num_batches_tracked")}  # which old checkpoints lack
    missing = [f"{key} is missing" for key in sorted(own.keys() - state.keys() - head - counts)]
    unexpected = [f"{key} is not of this model" for key in sorted(state.keys() - own.keys())]
    wrong = [*shapes[:4], *missing[:2], *unexpected[:2]]
    if not wrong:
        try:
            model.load_state_dict(state, strict=False)
        except Exception as error:  # of values that torch cannot copy
            wrong = [first_sentence(error)]
    if wrong:
        hidden = len(shapes) + len(missing) + len(unexpected) - len(wrong)
        more = f"; and {hidden:,} more" if hidden > 0 else ""
        raise CheckpointError(
            f"{checkpoint} does not fit {architecture(model)!r} ({'; '.join(wrong)}{more}): pass "
            "the name and the arguments of the model that it was trained with."
        )


def classes_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Return the number of rows of the weights that differ from the model's in nothing else; None if there are none."""
    own = model.state_dict()
    given = {f"{shared_prefix(own)}{key}": values for key, values in state.items()}
    pairs = [(given[key].shape, own[key].shape) for key in own.keys() & given.keys()]
    rows = {found[0] for found, expected in pairs if found != expected and found[1:] == expected[1:]}
    return rows.pop() if len(rows) == 1 else None
