"""The objective of a stage of a recipe, and the parameters that it trains."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from ood_scores.errors import BadInput
from ood_scores.models.networks.classifier import batchnorms, linear_classifier
from ood_scores.training.objectives import Objective, create_objective
from ood_scores.training.recipe import Stage
from ood_scores.training.step import leaves_some_unread


def make_objective(stage: Stage, model: nn.Module, class_counts: list[int], seed: int) -> Objective:
    """Create the objective of a stage; its own parameters depend on the seed."""
    head = linear_classifier(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        objective = create_objective(
            stage.objective.name,
            class_counts=class_counts,
            num_features=head.in_features,
            **stage.objective.settings,
        )
    if objective.through_batchnorm and not batchnorms(model):
        raise BadInput(
            f"objective {objective.name!r} works through BatchNorm, and {type(model).__name__} has none: choose "
            "another model, or set objective.auxiliary = false."
        )
    return objective


def tried_objective(stage: Stage, model: nn.Module, class_counts: list[int]) -> Objective:
    """Create the objective of a stage and try it on random features, because not all check their settings."""
    try:
        objective = make_objective(stage, model, class_counts, seed=0)
        leaves_some_unread(objective, linear_classifier(model))
    except TypeError as error:
        settings = dict(stage.objective.settings)
        raise BadInput(
            f"objective {stage.objective.name!r} failed ({error}): check its settings {settings}."
        ) from error
    return objective


def trainable_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the parameters that the patterns of ``Stage.trainable`` select.

    Raises:
        BadInput: if a pattern matches no parameter, or no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    chosen = {name for pattern in wanted for name in _matching(model, names, pattern)} if wanted else set(names)
    for pattern in patterns:
        if pattern.startswith("!"):
            chosen -= set(_matching(model, names, pattern[1:]))
    if not chosen:
        raise BadInput(f"trainable = {list(patterns)} leaves no parameter to train: remove a pattern.")
    return [name for name in names if name in chosen]


def _matching(model: nn.Module, names: list[str], pattern: str) -> list[str]:
    if pattern == "batchnorm":  # BatchNorm without parameters still updates its statistics
        norms = {id(p) for norm in batchnorms(model) for p in norm.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in norms]
    if pattern == "head":
        head = {id(parameter) for parameter in linear_classifier(model).parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in head]
    found = fnmatch.filter(names, pattern)
    if not found:
        raise BadInput(
            f"trainable: no parameter matches {pattern!r}: write batchnorm, head or a pattern such as {names[0]!r}."
        )
    return found
