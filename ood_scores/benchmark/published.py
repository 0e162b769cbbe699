"""Comparison of results with published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ood_scores.benchmark.checks import figure_of
from ood_scores.benchmark.measures import OF_SCORERS, of_scorer, shown_as
from ood_scores.benchmark.spec import Part, Published, Spec


def compared(spec: Spec, table: pd.DataFrame, measures: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each published number.

    Our number is the mean over the checkpoints, or the statistic that the name of the metric ends with, such as
    ``_sd``. It is NaN if nothing was run. Shares are in percent. The value of a group of OoD sets is their unweighted
    mean.
    """
    rows = []
    for part in spec.parts:
        of_part = table[table["part"] == part.title], measures[measures["part"] == part.title]
        rows += [_row(part, number, *of_part) for number in part.published]
    return rows


def _row(part: Part, number: Published, table: pd.DataFrame, measures: pd.DataFrame) -> dict[str, Any]:
    metric, statistic = figure_of(number.metric)
    if number.scorer is None or metric in OF_SCORERS:
        measure = of_scorer(metric, number.scorer, str(number.ood)) if number.scorer else metric
        values = measures[(measures["model"] == number.model) & (measures["measure"] == measure)]["value"]
    else:
        values = _by_checkpoint(part, number, metric, table)
    values = values * shown_as(metric).scale
    ours = {"": values.mean, "_sd": values.std, "_min": values.min, "_max": values.max}[statistic]()
    return {
        "part": part.title,
        "model": number.model,
        "scorer": number.scorer,
        "ood": number.ood,
        "metric": number.metric,
        "published": number.value,
        "ours": ours,
        "difference": ours - number.value,
        "sd": values.std(),
        "n": len(values),
        "source": number.source,
    }


def _by_checkpoint(part: Part, number: Published, metric: str, table: pd.DataFrame) -> pd.Series:
    """Return the mean over the named OoD sets for each checkpoint that has all of them."""
    groups: Mapping[str | None, Sequence[str]] = {"near": part.near, "far": part.far, "mean": part.ood}
    wanted = groups.get(number.ood, (number.ood,))
    ours = table[(table["model"] == number.model) & (table["scorer"] == number.scorer) & table["ood"].isin(wanted)]
    by_checkpoint = ours.groupby("checkpoint")[metric]
    return by_checkpoint.mean()[by_checkpoint.size() == len(wanted)]
