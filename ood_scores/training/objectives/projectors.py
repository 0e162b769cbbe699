"""Projections of the features for the loss only; they are trained with the network and then discarded."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ood_scores.registry import Registry


def _mlp(num_features: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, width))


PROJECTORS: Registry[Callable[[int, int], nn.Module]] = Registry(
    "projector", {"mlp": _mlp, "linear": nn.Linear, "none": lambda num_features, width: nn.Identity()}
)


def create_projector(kind: str, num_features: int, width: int) -> nn.Module:
    """Create ``"mlp"``: Linear(D, D)-ReLU-Linear(D, width), ``"linear"``: Linear(D, width), or ``"none"``: identity.

    Raises:
        UnknownName: if there is no such projector.
    """
    return PROJECTORS[kind](num_features, width)
