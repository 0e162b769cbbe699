"""What models and their modules return: logits, and one vector for each input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ood_scores.errors import HeadNotFound
from ood_scores.features.head import as_two_classes


def logits_of(output: Any) -> Tensor:
    """Return the logits ``[B, C]``, C > 1, from the output of a model: a tensor, or an object or dict with ``logits``.

    A single logit z becomes the two logits (0, z).
    """
    return as_two_classes(raw_logits_of(output))


def raw_logits_of(output: Any) -> Tensor:
    """Return the logits ``[B, C]`` as the model returns them; ``[B, C, 1, 1]`` without the last dimensions.

    Raises:
        HeadNotFound: if there are none.
    """
    logits = output
    if isinstance(output, dict):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise HeadNotFound(
            f"the model returned {_in_words(output)}, but a classifier returns a tensor of logits [batch, classes], or "
            "an object or dict with logits: wrap the model so that it does, with the four lines under 'Models that "
            "return more than logits' in docs/models.md."
        )
    if is_flat(logits):
        return logits.flatten(1)
    if logits.ndim != 2:
        raise HeadNotFound(
            f"the model returned a tensor of shape {tuple(logits.shape)}, not logits [batch, classes]; it has no "
            "classifier (timm: num_classes=0?) or is not an image classifier: create it with num_classes, or wrap it "
            "so that it returns logits."
        )
    return logits


def _in_words(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, dict):
        return f"a {kind} with the keys {', '.join(map(str, output))}"
    return f"a {kind} of {len(output)} values" if isinstance(output, (tuple, list)) else f"an object of type {kind}"


def is_flat(values: Tensor) -> bool:
    """Whether these are maps ``[B, C, 1, 1]`` of a single position."""
    return values.ndim == 4 and values.shape[2:] == (1, 1)


def rows_of(values: Any) -> Tensor | None:
    """Return ``[B, K]`` for a tensor with one vector per input, wherever its dimensions of size 1 are, else None."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim < 2:
        return None
    width = max(values.shape[1:])
    return values.flatten(1) if math.prod(values.shape[1:]) == width else None


def features_of(calls: Sequence[Sequence[Any]], logits: Tensor) -> Tensor:
    """Return the features ``[B, D]`` from the values of all calls at some places, which are concatenated.

    Args:
        calls: for each place, its values in the order of the calls; without places, the features are the logits.
        logits: the logits ``[B, C]`` of the same pass.

    Raises:
        HeadNotFound: if a place was not reached, or its values are not one vector per input.
    """
    if not calls:
        return logits
    present = [joined([rows_of(values) for values in each], logits.shape[0]) for each in calls]
    rows = [values for values in present if values is not None]
    if len(rows) < len(present):
        raise HeadNotFound("the head did not receive one feature vector per input in this batch.")
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def joined(calls: Sequence[Tensor | None], rows: int) -> Tensor | None:
    """Join the last calls that together have ``rows`` rows, since a model may run a batch in chunks.

    If there are none, return the rows of the last call.
    """
    if len(calls) > 1:
        missing = rows
        for number, values in enumerate(reversed(calls), start=1):
            missing = -1 if values is None else missing - len(values)
            if missing == 0:
                return torch.cat([part for part in calls[-number:] if part is not None])
            if missing < 0:
                break
    return calls[-1] if calls else None


def close(values: Tensor | None, logits: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether values are equal within a tolerance relative to the largest logit."""
    if values is None or values.shape != logits.shape or not logits.isfinite().all():
        return False
    scale = logits.abs().max().clamp_min(1e-6).double()
    return bool(((values.double() - logits.double()).abs().max() / scale) <= tolerance)


def rounding(*values: Tensor | None) -> float:
    """The relative error that rounding may cause: autocast and TF32 compute float32 inputs with less precision."""
    present = [each for each in values if each is not None]
    if any(each.dtype in (torch.float16, torch.bfloat16) for each in present):
        return 2e-2
    return 5e-3 if any(each.is_cuda for each in present) else 1e-4
