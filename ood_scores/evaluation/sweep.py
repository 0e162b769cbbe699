"""Parameter sweeps: one scorer over a grid of parameters, in one pass over each set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ood_scores.errors import BadInput, EmptyInput
from ood_scores.evaluation.evaluate import evaluate
from ood_scores.features import Sets
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import create_scorer

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    name: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    id: Sets,
    ood: Mapping[str, Sets],
    fit: Sets | None = None,
) -> pd.DataFrame:
    """Measure how well a scorer separates ID from OoD rows for every combination of parameter values.

    >>> sweep("react", {"q": [0.8, 0.9, 0.95], "base": ["energy", "gradnorm"]}, id=val, ood=val_ood, fit=train)

    The model is not run. Each set, including the fit set, is read once for all combinations, which share the statistics
    of the fit set. (A shaper around a fitted scorer needs one more pass over the fit set per combination.)

    **Choose on validation data.** The best row of a sweep on the sets that you report is optimistic. Sweep on held-out
    ID data and on OoD data that differ in kind from those you report, then evaluate the chosen parameters once.

    Args:
        name: Name of a registered scorer.
        grid: Values to try for each parameter; other parameters keep their defaults.
        id: ID validation set, given as in ``evaluate``; this also holds for ``ood`` and ``fit``.
        ood: OoD validation sets by name.
        fit: ID set that the scorer is fitted on, usually the training set.

    Returns:
        The data frame of ``evaluate`` with a column for each parameter after ``scorer``, and one row for each
        combination and OoD set; the last parameter varies fastest. A Scorer as a parameter is shown by its repr.

    Raises:
        UnknownName: if there is no such scorer or parameter.
        BadInput: if a value is out of range, or ``grid`` does not map parameters to sequences of values.
        EmptyInput: if a parameter has no values, or there is no OoD set.
        NotFitted, MissingInput, NotFinite, ShapeMismatch, BadLabels: as for ``evaluate``.
    """
    combinations = _combinations(grid)
    scorers = {str(number): create_scorer(name, **params) for number, params in enumerate(combinations)}
    table = evaluate(scorers, id=id, ood=ood, fit=fit)
    numbers = table["scorer"].astype(int)
    for place, parameter in enumerate(grid, start=1):
        table.insert(place, parameter, [_shown(combinations[number][parameter]) for number in numbers])
    table["scorer"] = scorers["0"].name
    return table


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping):
        raise BadInput("grid must map parameters to the values to try: pass {'q': [0.8, 0.9]}.")
    for parameter, values in grid.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise BadInput(f"grid must map {parameter!r} to a list of values, got {values!r}.")
        if not len(values):
            raise EmptyInput(f"grid has no values for {parameter!r}: list at least one.")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _shown(value: Any) -> Any:
    return repr(value) if isinstance(value, Scorer) else value
