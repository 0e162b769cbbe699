"""Heads: the last affine maps of classifiers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from ood_scores.errors import BadInput, NotFinite, ShapeMismatch
from ood_scores.features.finite import all_finite

NEGATIVES = ("nouns", "adjectives", "conjugated")
"""The kinds of words that are not classes; see ``ood_scores.models.zero_shot.negatives``."""

UNIT = 1e-2
"""The difference of a length from 1 that rounding to half precision may cause."""


class Head:
    """The last affine map of a classifier: ``head(features) = features @ weight.T + bias`` are the logits.

    Args:
        weight: Floating-point ``[C, D]``, a torch tensor or NumPy array.
        bias: ``[C]``, or None for a map without a bias, which is stored as zeros.
        negatives: For zero-shot classifiers, text features ``[M, D]`` of words that are not classes, by kind: any of
            ``NEGATIVES``. The logits do not depend on them.
        unit: Whether the features must have length 1; see ``zero_shot_head``. Not stored with the head.

    Raises:
        BadInput: if the weight, the bias, or the negatives are not arrays, or a kind does not exist.
        ShapeMismatch: if the shapes do not match.
        NotFinite: if a value is NaN or infinite.
    """

    def __init__(
        self, weight: Any, bias: Any = None, negatives: Mapping[str, Any] | None = None, *, unit: bool = False
    ) -> None:
        self.unit = unit
        self.weight = _floating(weight)
        if self.weight.ndim != 2:
            raise ShapeMismatch(f"the weight of a head must be [classes, features], got {tuple(self.weight.shape)}.")
        self.bias = self.weight.new_zeros(len(self.weight)) if bias is None else _floating(bias).to(self.weight)
        if self.bias.shape != self.weight.shape[:1]:
            raise ShapeMismatch(
                f"a head with weight {tuple(self.weight.shape)} needs a bias of shape [{len(self.weight)}], "
                f"got {tuple(self.bias.shape)}."
            )
        if not (all_finite(self.weight) and all_finite(self.bias)):
            raise NotFinite("the weight or bias of the head holds NaN or infinite values: check the checkpoint.")
        self.negatives = {kind: self._checked_negatives(kind, values) for kind, values in (negatives or {}).items()}

    def _checked_negatives(self, kind: str, values: Any) -> Tensor:
        words = _floating(values)
        if kind not in NEGATIVES:
            raise BadInput(f"negatives must be of the kinds {', '.join(NEGATIVES)}, got {kind!r}.")
        if words.ndim != 2 or words.shape[1] != self.num_features or not len(words):
            raise ShapeMismatch(
                f"negatives of a head with {self.num_features} inputs must be [words, {self.num_features}], got "
                f"{tuple(words.shape)}."
            )
        if not words.isfinite().all():
            raise NotFinite(f"the {kind} among the negatives hold NaN or infinite values: check the text encoder.")
        return words

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

    def require_unit(self, features: Tensor) -> None:
        """Check that features ``[N, D]`` have length 1, if the head needs that.

        Raises:
            BadInput: if they have another.
        """
        if not self.unit or not len(features):
            return
        lengths = features.double().norm(dim=1)
        farthest = float(lengths[(lengths - 1).abs().argmax()])
        if abs(farthest - 1) > UNIT:
            raise BadInput(
                "the head compares directions (zero_shot_head), so the features must have length 1, but one has "
                f"{farthest:.4g}: normalize the output of the model, such as by a wrapper whose forward returns "
                "torch.nn.functional.normalize(model(x)), or pass a vision-language model with classes=."
            )

    @property
    def digest(self) -> str:
        """The name of a head that was given to an extraction: ``head`` and the SHA-256 of its tensors."""
        words = [self.negatives[kind] for kind in NEGATIVES if kind in self.negatives]
        tensors = (self.weight, self.bias, *words)
        parts = [values.detach().cpu().float().contiguous().numpy().tobytes() for values in tensors]
        return f"head {hashlib.sha256(b''.join(parts)).hexdigest()}"

    def with_two_classes(self) -> Head:
        """Return the head, with the logits (0, z) if it computes a single logit z."""
        if self.num_classes > 1:
            return self
        weight = torch.cat([torch.zeros_like(self.weight), self.weight])
        return Head(weight, as_two_classes(self.bias[None])[0], self.negatives, unit=self.unit)

    def to(self, device: torch.device | str) -> Head:
        """Return the head on a device, itself if it is there."""
        if self.weight.device == self.bias.device == torch.device(device):
            return self
        negatives = {kind: values.to(device) for kind, values in self.negatives.items()}
        return Head(self.weight.to(device), self.bias.to(device), negatives, unit=self.unit)

    def __repr__(self) -> str:
        words = f", {sum(map(len, self.negatives.values())):,} negatives" if self.negatives else ""
        return f"Head({self.num_features} features -> {self.num_classes} classes{words})"


def zero_shot_head(
    text_features: Any, logit_scale: float, logit_bias: float = 0.0, *, negatives: Mapping[str, Any] | None = None
) -> Head:
    """Return the head that compares image features with the texts of classes, as CLIP and SigLIP do.

    ``logit_scale * cos(image, text_c) + logit_bias`` is affine in image features of length 1: ``features`` of a set
    with this head must be L2-normalized, and ``head(features)`` are the logits. ``extract`` and ``with_head`` refuse
    others.

    Source: Radford et al. 2021 (CLIP), section 3.1.4; Zhai et al. 2023 (SigLIP), Algorithm 1, for the bias.

    Args:
        text_features: Features of the classes, ``[C, D]``, of any length; or those of the T templates of each class,
            ``[C, T, D]``, whose directions are averaged.
        logit_scale: The factor of the cosine, about 100 for CLIP: ``model.logit_scale.exp()``, not its logarithm.
        logit_bias: The constant that SigLIP adds.
        negatives: Text features ``[M, D]`` of words that are not classes, by kind; see ``Head``.

    Raises:
        BadInput: if the features are not arrays, or the scale is not positive and finite.
        ShapeMismatch: if the shapes do not match.
        NotFinite: if a feature is NaN or infinite, or is zero.
    """
    scale, constant = float(logit_scale), float(logit_bias)
    if not (0 < scale < math.inf and math.isfinite(constant)):
        raise BadInput(f"logit_scale must be positive and finite, and logit_bias finite, got {scale} and {constant}.")
    texts = _floating(text_features)
    if texts.ndim not in (2, 3) or 0 in texts.shape:
        raise ShapeMismatch(
            f"text features must be [classes, features] or [classes, templates, features], got {tuple(texts.shape)}."
        )
    unit = mean_direction(texts if texts.ndim == 3 else texts[:, None])
    units = {kind: mean_direction(_floating(values)[:, None]) for kind, values in (negatives or {}).items()}
    return Head(scale * unit, unit.new_full((len(unit),), constant), units, unit=True)


def mean_direction(texts: Tensor) -> Tensor:
    """Return the directions ``[C, D]``, of length 1, of the mean directions of features ``[C, T, D]``.

    Raises:
        NotFinite: if a feature is NaN or infinite, or has no direction.
    """
    mean = (texts / texts.norm(dim=-1, keepdim=True)).mean(dim=1)
    unit: Tensor = mean / mean.norm(dim=-1, keepdim=True)
    if not unit.isfinite().all():
        raise NotFinite("a text feature is zero, NaN, or infinite: check the text encoder and the tokenizer.")
    return unit


def as_two_classes(logits: Tensor) -> Tensor:
    """Return the logits ``[B, C]``; a single logit z per row becomes (0, z), whose softmax is ``sigmoid(z)``."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def _floating(values: Any) -> Tensor:
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise BadInput(f"the weight and bias of a head must be torch tensors or NumPy arrays: {error}") from error
    return tensor if tensor.is_floating_point() else tensor.float()
