"""sweep: one scorer over a grid of its parameters, each set read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ood_scores.errors import BadInput, EmptyInput
from ood_scores.evaluation.evaluate import evaluate
from ood_scores.features import FeatureSet
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import create_scorer

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    name: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    id: FeatureSet,
    ood: Mapping[str, FeatureSet],
    fit: FeatureSet | None = None,
) -> pd.DataFrame:
    """How well a scorer separates ID from OoD for every combination of some of its parameters.

    >>> sweep("react", {"q": [0.8, 0.9, 0.95], "base": ["energy", "gradnorm"]}, id=val, ood=val_ood, fit=train)

    The model is not run, and every set is read once for all combinations, the fit set too; combinations share its
    statistics. (A shaper around a scorer that is fitted takes a further pass over the fit set for each combination.)

    **Choose on validation data.** The best row of a sweep on the sets that you report is an optimistic number: sweep on
    held-out ID data and on OoD data of other kinds than those you report, then evaluate once with what was chosen.

    Args:
        name: a registered scorer.
        grid: the values to try of each parameter; the others keep their defaults.
        id: in-distribution validation data.
        ood: OoD sets by name, likewise for validation.
        fit: in-distribution features (usually of the training set), for a scorer that is fitted.

    Returns:
        The frame of ``evaluate`` with a column for each parameter after ``scorer``; one row for each combination and
        OoD set, the last parameter varying fastest. A parameter that is a Scorer is shown by its repr.

    Raises:
        UnknownName: no such scorer or parameter.
        BadInput: a value out of range, or a grid that does not map parameters to sequences of values.
        EmptyInput: a parameter without values, or no OoD set.
        NotFitted, MissingInput, NotFinite, ShapeMismatch, BadLabels: as ``evaluate``.
    """
    combinations = _combinations(grid)
    scorers = {str(number): create_scorer(name, **params) for number, params in enumerate(combinations)}
    table = evaluate(scorers, id=id, ood=ood, fit=fit)
    numbers = table["scorer"].astype(int)
    for place, parameter in enumerate(grid, start=1):
        table.insert(place, parameter, [_shown(combinations[number][parameter]) for number in numbers])
    table["scorer"] = name
    return table


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping):
        raise BadInput("grid maps parameters to the values to try: {'q': [0.8, 0.9]}.")
    for parameter, values in grid.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise BadInput(f"the grid's {parameter!r} is a list of values to try, got {values!r}.")
        if not len(values):
            raise EmptyInput(f"the grid has no value for {parameter!r}.")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _shown(value: Any) -> Any:
    return repr(value) if isinstance(value, Scorer) else value
