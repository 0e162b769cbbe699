"""The vectors at the positions of a model's last map, from which its features are pooled, found by what they compute.

For a network with global average pooling, the features are the mean of the vectors at all positions, and so are the
logits. Some networks pass the mean through further layers before the head (ConvNeXt, MobileNetV3, transformers with
pooling of the mean). In a transformer with a class token, the features are that token, and the positions are the other
tokens. The vectors are those of the ordinary pass.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.extraction.hooks import first_argument, hooked
from ood_scores.extraction.outputs import close, rounding, rows_of

LAST_MAPS, LAST_LEAVES = 16, 16
"""The number of maps, and of calls of modules without submodules, that are remembered."""

MOST_PREFIX = 8
"""The most tokens before those of the positions: class tokens and registers."""


@dataclass(frozen=True)
class Positions:
    """The last map of a model for a batch.

    Attributes:
        vectors: the vector at each position, row by row, ``[B, P, K]``.
        grid: height and width of the map, whose product is P.
        pooled: whether the features are computed from the mean of the vectors; else they are another token.
        layers: the modules through which the mean passes to become the features, in order.
        shape: the shape in which these modules receive a vector of K values.
    """

    vectors: Tensor
    grid: tuple[int, int]
    pooled: bool
    layers: Sequence[nn.Module] = ()
    shape: tuple[int, ...] = ()

    def of_row(self, row: int) -> Positions:
        """Return a copy for one row of the batch."""
        return replace(self, vectors=self.vectors[row : row + 1].clone())

    def features(self, vectors: Tensor) -> Tensor:
        """Return the features ``[N, D]`` of a map that has a vector ``[N, K]`` as its mean, in its own precision."""
        if not self.layers:
            return vectors
        layers = nn.Sequential(*(copy.deepcopy(layer) for layer in self.layers)).to(vectors).eval()
        with torch.inference_mode():
            return layers(vectors.reshape(-1, *self.shape)).flatten(1)


@dataclass
class LastMaps:
    """The last maps of a pass, and the last calls of modules without submodules."""

    maps: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LAST_MAPS))
    leaves: deque[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=LAST_LEAVES))

    @torch.inference_mode()
    def find(self, features: Tensor, aspect: float = 1.0) -> Positions | None:
        """Return the map from which the features of the pass are pooled; None if there is none among the last maps.

        Args:
            features: the features ``[B, D]``.
            aspect: the width of the inputs divided by their height, from which the grid of tokens is found.
        """
        maps = [values for values in reversed(self.maps) if len(values) == len(features)]
        views = [view for values in maps for view in _views(values, aspect)]
        for vectors, grid in views:
            for activated in (vectors, vectors.relu()):
                mean = activated.mean(dim=1)
                if _same(mean, features):
                    return Positions(activated, grid, True)
        for vectors, grid in views:
            chain = self._chain(vectors.mean(dim=1), features)
            if chain:
                return Positions(vectors, grid, True, *chain)
        for values in maps:
            if values.ndim == 3 and _same(values[:, 0], features):
                found = [view for view in _views(values, aspect) if view[0].shape[1] < values.shape[1]]
                if found:
                    return Positions(*found[0], False)
        return None

    def _chain(self, mean: Tensor, features: Tensor) -> tuple[list[nn.Module], tuple[int, ...]] | None:
        """Return the modules that compute the features from the mean, and the shape of what the first receives."""
        calls = list(self.leaves)
        starts = [number for number, (_, received, _) in enumerate(calls) if _same(rows_of(received), mean)]
        for start in starts:
            value = calls[start][1]
            for stop in range(start, len(calls)):
                try:
                    value = calls[stop][0](value)
                except Exception:  # of a module that follows in another branch of the model
                    break
                if _same(rows_of(value), features):
                    layers = [module for module, _, _ in calls[start : stop + 1]]
                    return layers, tuple(calls[start][1].shape[1:])
        return None


@contextmanager
def recording_maps(model: nn.Module) -> Iterator[LastMaps]:
    """Record the last maps of the passes in this context."""
    seen = LastMaps()
    with hooked(((module, _recorder(module, seen)) for module in model.modules()), with_kwargs=True):
        yield seen


def _recorder(module: nn.Module, seen: LastMaps) -> Callable[..., None]:
    is_leaf = not any(True for _ in module.children())

    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        received = first_argument(inputs, named)
        if isinstance(output, Tensor) and output.ndim in (3, 4) and output[0].numel() > max(output.shape[1:]):
            seen.maps.append(output.detach())
        elif is_leaf and isinstance(received, Tensor) and isinstance(output, Tensor):
            seen.leaves.append((module, received.detach(), output.detach()))

    return record


def _views(values: Tensor, aspect: float) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Yield the vectors ``[B, P, K]`` and the grid of a map, for each layout that it may have."""
    values = values.float()
    if values.ndim == 4:
        yield values.flatten(2).transpose(1, 2), (values.shape[2], values.shape[3])
        yield values.flatten(1, 2), (values.shape[1], values.shape[2])
        return
    for prefix in range(min(MOST_PREFIX, values.shape[1] - 1) + 1):
        grid = _grid(values.shape[1] - prefix, aspect)
        if grid:
            yield values[:, prefix:], grid


def _grid(positions: int, aspect: float) -> tuple[int, int] | None:
    """Return height and width of a grid with this number of positions and about this aspect; None if there is none."""
    height = max(1, round(math.sqrt(positions / aspect)))
    width = round(height * aspect)
    return (height, width) if height * width == positions else None


def _same(values: Tensor | None, expected: Tensor) -> bool:
    return values is not None and close(values.to(expected), expected, 10 * rounding(expected))
