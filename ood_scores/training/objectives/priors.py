"""Class counts and class priors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ood_scores.errors import BadInput, ShapeMismatch


def checked_counts(counts: Sequence[int] | Tensor, smallest: int = 1) -> Tensor:
    """Return class counts as int64 ``[C]`` with at least two classes.

    Raises:
        BadInput: if the counts are not integers of at least ``smallest``, or all are 0.
    """
    found = torch.as_tensor(counts)
    if found.ndim != 1 or len(found) < 2 or found.is_floating_point() or found.dtype == torch.bool:
        raise BadInput(f"class counts are {found.dtype} of shape {tuple(found.shape)}: pass one integer per class.")
    if found.min() < smallest or found.sum() == 0:
        raise BadInput(
            f"class {int(found.argmin())} has {int(found.min())} samples, but a class prior needs at least {smallest} "
            "of each class, and one overall: add samples, or choose an objective without a class prior."
        )
    return found.to(torch.int64)


def class_prior(counts: Tensor, like: Tensor) -> Tensor:
    """Return ``n_c / sum n`` ``[C]`` on the device of ``like``, in its precision or float32, whichever is higher."""
    found = counts.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return found / found.sum()


def class_log_prior(counts: Tensor, like: Tensor) -> Tensor:
    """Return ``log(n_c / sum n)`` ``[C]`` on the device of ``like``, in its precision or float32 if that is higher."""
    return class_prior(counts, like).log()


def require_classes(name: str, counts: Tensor, logits: Tensor) -> None:
    """Raise ShapeMismatch with the name of the objective unless there is one count for each logit."""
    if len(counts) != logits.shape[1]:
        raise ShapeMismatch(
            f"{name!r} got counts of {len(counts)} classes, but the head has {logits.shape[1]}: pass one for each."
        )
