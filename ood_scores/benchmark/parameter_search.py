"""Choice of scorer parameters on validation sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ood_scores.benchmark.spec import ScorerTable, Search
from ood_scores.evaluation.metrics import METRICS
from ood_scores.features import FeatureSet
from ood_scores.scorers.scorer_runs import ScorerRun, fit_runs, score_runs


def choose(
    search: Search, tables: Mapping[str, ScorerTable], sets: Mapping[str, FeatureSet], fit: FeatureSet | None
) -> tuple[dict[str, Mapping[str, Any]], list[dict[str, Any]]]:
    """Return the best setting of each scorer with a grid by its label, and one row for each setting that was tried.

    The first of equally good settings is chosen. Settings that fail have the value NaN.
    """
    tried = {
        (label, setting): ScorerRun(tables[label].create(dict(setting)))
        for label, grid in search.grid.items()
        if label in tables
        for setting in _settings(grid)
    }
    together = {str(number): each for number, each in enumerate(tried.values())}
    fit_runs(together, fit)
    inside = score_runs(together, sets[search.id])
    outside = [score_runs(together, sets[name]) for name in search.ood]
    metric = METRICS[search.metric]
    values = {}
    for number, (key, each) in zip(together, tried.items(), strict=True):
        figures = [metric(inside[number], of[number]) for of in outside if not each.failure]
        values[key] = float(np.mean(figures)) if figures else float("nan")
    best = max if metric.higher_is_better else min
    chosen = {}
    for label in dict.fromkeys(label for label, _ in tried):
        known = [key for key in tried if key[0] == label and not np.isnan(values[key])]
        if known:
            chosen[label] = best(known, key=values.__getitem__)[1]
    rows = [
        {
            "scorer": label,
            "parameters": json.dumps(dict(setting)),
            "metric": search.metric,
            "value": values[label, setting],
            "chosen": chosen.get(label) == setting,
        }
        for label, setting in tried
    ]
    return {label: dict(setting) for label, setting in chosen.items()}, rows


def _settings(grid: Mapping[str, tuple[Any, ...]]) -> list[tuple[tuple[str, Any], ...]]:
    """Return all combinations of the values."""
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
