"""Heads of logits that are a weighted sum: of the outputs of several layers, or of one layer's for several views.

Views are versions of each input that the model makes itself, such as flips and crops (test-time augmentation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ood_scores.extraction.affine import FEW, other_than
from ood_scores.extraction.head_layers import Layer, Recording
from ood_scores.extraction.hooks import Place
from ood_scores.extraction.outputs import close, raw_logits_of, rounding, rows_of
from ood_scores.features import Head

EXACT = 1e-5
"""The relative error of a weighted sum that rounding explains."""


@dataclass(frozen=True)
class Views:
    """The views of each input for which a layer is called.

    Attributes:
        weights: the weight of each view in the features, which are the weighted sum of what the layer receives.
        by_input: whether all views of an input are next to each other; otherwise a view of all inputs follows another.
    """

    weights: tuple[float, ...]
    by_input: bool

    def sum(self, values: Tensor) -> Tensor:
        """Return the weighted sum ``[B, D]`` over the views of values ``[V B, D]``."""
        weights = torch.tensor(self.weights, dtype=torch.float32, device=values.device)
        return (self.split(values).float() * weights[:, None, None]).sum(dim=0)

    def split(self, values: Tensor) -> Tensor:
        """Return values ``[V B, D]`` by view, ``[V, B, D]``."""
        count = len(self.weights)
        if self.by_input:
            return values.reshape(-1, count, values.shape[1]).transpose(0, 1)
        return values.reshape(count, -1, values.shape[1])

    def features(self, calls: Sequence[Any]) -> Tensor:
        """Return the features ``[B, D]`` from the values of all calls of the layer in a pass."""
        return self.sum(torch.cat([values for each in calls if (values := rows_of(each)) is not None]))


@dataclass(frozen=True)
class Combination:
    """Layers whose inputs are the features, the head, and the views, if there are several."""

    places: list[Place]
    head: Head
    views: Views | None = None


def find_combination(model: nn.Module, inputs: Tensor, recording: Recording, logits: Tensor) -> Combination | None:
    """Return the layers whose outputs the logits are a weighted sum of, with the same weights for all inputs.

    The weights are fitted on a pass over the inputs and one over noise, and must explain the logits of both.

    Args:
        model: the model, in eval mode.
        inputs: the inputs ``[B, ...]``.
        recording: the record of the pass over them.
        logits: the logits ``[B, C]`` of that pass.

    Returns:
        The combination; None if there is none.
    """
    noise = other_than(torch.cat([inputs[:FEW]] * FEW)[:FEW])
    again = Recording(model, recording.named)
    try:
        with again.running():
            noise_logits = raw_logits_of(model(noise)).to(logits.device)
    except Exception:  # of a model that does not run on noise
        return None
    both = torch.cat([logits, noise_logits])
    here, there = (each.layers_of_all_calls(inputs.device) for each in (recording, again))
    pairs = [(one, other) for one in here for other in there if one.name == other.name and _fits(one, logits)]
    pairs = [(one, other) for one, other in pairs if _fits(other, noise_logits)]
    once = [(one, other) for one, other in pairs if _views(one, logits) == _views(other, noise_logits) == 1]
    found = _of_several_layers(once, both) if len(once) > 1 else None
    for one, other in reversed(pairs):
        count = _views(one, logits)
        if found is None and count > 1 and count == _views(other, noise_logits):
            found = _of_views(one, other, count, both)
    return found if found and _reproduces(found, here, logits) else None


def viewed_layers(recording: Recording, logits: Tensor) -> list[tuple[str, int]]:
    """Return the layers with an output for each class that run for several views of each input, and for how many."""
    layers = recording.layers_of_all_calls(logits.device)
    return [(each.name, _views(each, logits)) for each in layers if _fits(each, logits) and _has_views(each, logits)]


def _fits(layer: Layer, logits: Tensor) -> bool:
    """Whether a layer returns values like the logits, for one view of each input or for several."""
    return layer.is_affine and _returned(layer).shape[1] == logits.shape[1] and len(layer.received) % len(logits) == 0


def _views(layer: Layer, logits: Tensor) -> int:
    return len(layer.received) // len(logits)


def _has_views(layer: Layer, logits: Tensor) -> bool:
    """Whether a layer runs several times for each input, and not each time on the same values."""
    count = len(logits)
    return _views(layer, logits) > 1 and not torch.equal(layer.received[:count], layer.received[count : 2 * count])


def _of_several_layers(pairs: Sequence[tuple[Layer, Layer]], logits: Tensor) -> Combination | None:
    outputs = torch.stack([torch.cat([_returned(one), _returned(other)]) for one, other in pairs])
    weights = _weights(outputs, logits)
    if weights is None:
        return None
    used = [(layer, weight) for (layer, _), weight in zip(pairs, weights, strict=True) if weight]
    head = Head(
        torch.cat([weight * layer.weight for layer, weight in used], dim=1).cpu(),
        sum(weight * layer.bias for layer, weight in used).cpu(),  # type: ignore[union-attr]
    )
    return Combination([Place(layer.name, layer.module) for layer, _ in used], head)


def _of_views(one: Layer, other: Layer, count: int, logits: Tensor) -> Combination | None:
    for by_input in (False, True):
        equal = Views((1.0,) * count, by_input)
        outputs = torch.cat([equal.split(_returned(one)), equal.split(_returned(other))], dim=1)
        weights = _weights(outputs, logits)
        if weights is None:
            continue
        total = sum(weights)
        scale = total if abs(total) > EXACT else 1.0
        views = Views(tuple(weight / scale for weight in weights), by_input)
        head = Head((scale * one.weight).cpu(), (total * one.bias).cpu())
        return Combination([Place(one.name, one.module)], head, views)
    return None


def _weights(outputs: Tensor, logits: Tensor) -> list[float] | None:
    """Return the weights ``[K]`` of outputs ``[K, B, C]`` whose weighted sum is the logits; None if there are none."""
    if not (outputs.isfinite().all() and logits.isfinite().all()):
        return None
    columns = outputs.flatten(1).T.double().cpu().numpy()
    if len(columns) < FEW * len(outputs):  # so few numbers are a weighted sum of anything
        return None
    weights = np.linalg.lstsq(columns, logits.flatten().double().cpu().numpy(), rcond=None)[0]
    weights[np.abs(weights) < EXACT * np.abs(weights).max()] = 0
    found = torch.from_numpy(columns @ weights).reshape(logits.shape)
    half = outputs.dtype in (torch.float16, torch.bfloat16)
    return weights.tolist() if close(found, logits.cpu(), 1e-2 if half else EXACT) else None


def _returned(layer: Layer) -> Tensor:
    assert layer.returned is not None
    return layer.returned


def _reproduces(found: Combination, layers: Sequence[Layer], logits: Tensor) -> bool:
    """Whether the head maps the features of the first batch to its logits."""
    received = {layer.name: layer.received for layer in layers}
    values = [received[place.name] for place in found.places]
    features = torch.cat(values, dim=1).float() if found.views is None else found.views.sum(values[0])
    return close(found.head(features.cpu()), logits.cpu(), rounding(logits, *values))
