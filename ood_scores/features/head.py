"""Heads: the last affine maps of classifiers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ood_scores.errors import BadInput, NotFinite, ShapeMismatch


class Head:
    """The last affine map of a classifier: ``head(features) = features @ weight.T + bias`` are the logits.

    Args:
        weight: Floating-point ``[C, D]``, a torch tensor or NumPy array.
        bias: ``[C]``, or None for a map without a bias, which is stored as zeros.

    Raises:
        BadInput: if the weight or bias is not an array.
        ShapeMismatch: if the shapes do not match.
        NotFinite: if a value is NaN or infinite.
    """

    def __init__(self, weight: Any, bias: Any = None) -> None:
        self.weight = _floating(weight)
        if self.weight.ndim != 2:
            raise ShapeMismatch(f"the weight of a head must be [classes, features], got {tuple(self.weight.shape)}.")
        self.bias = self.weight.new_zeros(len(self.weight)) if bias is None else _floating(bias).to(self.weight)
        if self.bias.shape != self.weight.shape[:1]:
            raise ShapeMismatch(
                f"a head with weight {tuple(self.weight.shape)} needs a bias of shape [{len(self.weight)}], "
                f"got {tuple(self.bias.shape)}."
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise NotFinite("the weight or bias of the head holds NaN or infinite values: check the checkpoint.")

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def num_features(self) -> int:
        return self.weight.shape[1]

    def __call__(self, features: Tensor) -> Tensor:
        """Compute the logits ``[N, C]`` of features ``[N, D]`` in the wider of the two dtypes.

        Raises:
            ShapeMismatch: if the features have another width.
        """
        if features.shape[-1] != self.num_features:
            raise ShapeMismatch(
                f"the head is for {self.num_features} features, got {features.shape[-1]}: use features of the same "
                "model and pooling as those it was fitted on."
            )
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        return linear(features.to(dtype), self.weight.to(features.device, dtype), self.bias.to(features.device, dtype))

    @property
    def digest(self) -> str:
        """The name of a head that was given to an extraction: ``head`` and the SHA-256 of its weight and bias."""
        parts = [values.detach().cpu().float().contiguous().numpy().tobytes() for values in (self.weight, self.bias)]
        return f"head {hashlib.sha256(b''.join(parts)).hexdigest()}"

    def with_two_classes(self) -> Head:
        """Return the head, with the logits (0, z) if it computes a single logit z."""
        if self.num_classes > 1:
            return self
        return Head(torch.cat([torch.zeros_like(self.weight), self.weight]), as_two_classes(self.bias[None])[0])

    def to(self, device: torch.device | str) -> Head:
        return Head(self.weight.to(device), self.bias.to(device))

    def __repr__(self) -> str:
        return f"Head({self.num_features} features -> {self.num_classes} classes)"


def as_two_classes(logits: Tensor) -> Tensor:
    """Return the logits ``[B, C]``; a single logit z per row becomes (0, z), whose softmax is ``sigmoid(z)``."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def _floating(values: Any) -> Tensor:
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise BadInput(f"the weight and bias of a head must be torch tensors or NumPy arrays: {error}") from error
    return tensor if tensor.is_floating_point() else tensor.float()
