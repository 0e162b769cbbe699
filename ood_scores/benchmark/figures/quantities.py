"""Quantities of the models of a part by epoch, by setting, or by scorer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ood_scores.benchmark.measures import shown_as
from ood_scores.benchmark.networks import checkpoints_of
from ood_scores.benchmark.planning import Unit
from ood_scores.benchmark.results import Results
from ood_scores.benchmark.spec import ModelTable, Part
from ood_scores.data.dataset_spec import expanded, located
from ood_scores.errors import BadInput, EmptyInput
from ood_scores.evaluation.metrics import METRICS
from ood_scores.features import FeatureSet

LOG = "log."
"""Start of the names of quantities that training logs have, such as ``log.loss``."""
FALSE_POSITIVES = "false_positives"
MEAN = "mean"


@dataclass(frozen=True)
class Source:
    """What a figure is drawn from.

    Attributes:
        part: the part.
        results: results of the run.
        units: the checkpoints that could be run.
        data: folder where relative paths of checkpoints start.
    """

    part: Part
    results: Results
    units: Sequence[Unit]
    data: Path

    @cached_property
    def models(self) -> Mapping[str, ModelTable]:
        """The models by title."""
        return {model.title: model for model in self.part.models}

    def scorer(self, wanted: str | None) -> str:
        """Return the label of a scorer of the part; by default that of its first one, or "" if it has none."""
        labels = [table.label for table in self.part.scorer_tables]
        if wanted is not None and wanted not in labels:
            raise BadInput(f"the figure's scorer {wanted!r} is not one of the part: {', '.join(labels)}.")
        return wanted or next(iter(labels), "")

    def feature_sets(self, unit: Unit) -> tuple[dict[str, FeatureSet], FeatureSet | None]:
        """Return the sets of a unit by name, and its fit set."""
        sets = {name: feats for name, jobs in unit.sets.items() if (feats := jobs[0].features()) is not None}
        return sets, unit.fit[0].features() if unit.fit else None

    def first_units(self) -> list[Unit]:
        """Return the first checkpoint of each model."""
        return list({unit.model: unit for unit in reversed(self.units)}.values())[::-1]


def title_of(name: str) -> str:
    """Return the title of a quantity."""
    if name == FALSE_POSITIVES:
        return "false positives"
    if name.startswith(LOG):
        return f"{name.removeprefix(LOG)}, training".replace("_", " ")
    return shown_as(name).title


def values(source: Source, name: str, scorer: str, ood: str) -> pd.DataFrame:
    """Return a quantity of every model and checkpoint: ``line``, ``x``, ``checkpoint``, ``value``.

    ``x`` is the epoch, or the value of the sweep of models without epochs, or NaN. Shares are in percent.

    Args:
        source: the results.
        name: a metric, ``false_positives``, a measure, or ``log.`` and a column of the training log.
        scorer: label of the scorer of metrics and false positives.
        ood: an OoD dataset, or ``near``, ``far`` or ``mean``.
    """
    if name.startswith(LOG):
        return _logged(source, name.removeprefix(LOG))
    found = _found(source, name, scorer, ood)
    found["x"] = [_place(source.models[model]) for model in found["model"]]
    found["line"] = [source.models[model].series for model in found["model"]]
    found["value"] *= 1 if name == FALSE_POSITIVES else shown_as(name).scale
    return found[["line", "x", "checkpoint", "value"]]


def _place(model: ModelTable) -> float:
    if model.epoch is not None:
        return float(model.epoch)
    return np.nan if model.setting is None else float(model.setting.partition("=")[2])


def _found(source: Source, name: str, scorer: str, ood: str) -> pd.DataFrame:
    part, results = source.part, source.results
    if name == FALSE_POSITIVES:
        return _false_positives(source, scorer, _sets(part, ood))
    measures = results.measures
    measured = measures[(measures["part"] == part.title) & (measures["measure"] == name)]
    if name in METRICS and measured.empty:
        table = results.table
        if name not in table:
            raise BadInput(f"{name} is computed on request only: write metrics = [{name!r}] in the part.")
        of_part = table[
            (table["part"] == part.title) & (table["scorer"] == scorer) & table["ood"].isin(_sets(part, ood))
        ]
        grouped = of_part.groupby(["model", "checkpoint"], sort=False)[name]
        return grouped.mean()[grouped.size() == len(_sets(part, ood))].rename("value").reset_index()
    return measured[["model", "checkpoint", "value"]].reset_index(drop=True)


def _sets(part: Part, ood: str) -> tuple[str, ...]:
    return {"near": part.near, "far": part.far, MEAN: part.ood}.get(ood, (ood,))


def _false_positives(source: Source, scorer: str, sets: Iterable[str]) -> pd.DataFrame:
    """Return the number of OoD rows among the N highest scores, with N the number of ID rows: the mean over the sets.

    Of several rows with the N-th highest score, the share that completes N counts. Source: Haas et al. 2022, §4.2.2.
    """
    rows = []
    for unit in source.results.scored:
        scores = unit.scores.get(scorer, {}) if unit.part == source.part.title else {}
        if all(name in scores for name in ("id", *sets)) and scores:
            counts = [false_positives(np.asarray(scores["id"]), np.asarray(scores[name])) for name in sets]
            rows.append({"model": unit.model, "checkpoint": unit.checkpoint, "value": float(np.mean(counts))})
    return pd.DataFrame(rows, columns=["model", "checkpoint", "value"])


def false_positives(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the number of OoD rows among the ``len(id_scores)`` highest scores; ties count in proportion."""
    together = np.concatenate([id_scores, ood_scores])
    lowest = np.sort(together)[len(ood_scores)]
    above, tied = (together > lowest).sum(), (together == lowest).sum()
    ood_above, ood_tied = (ood_scores > lowest).sum(), (ood_scores == lowest).sum()
    return float(ood_above + ood_tied * (len(id_scores) - above) / tied)


def _logged(source: Source, column: str) -> pd.DataFrame:
    """Return a column of the training logs beside the checkpoints."""
    frames, seen = [], set()
    for model in source.models.values():
        for number, checkpoint in enumerate(checkpoints_of(model)):
            path = located(expanded(checkpoint or ""), source.data).parent / "log.csv"
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            log = pd.read_csv(path)
            if column in log:
                kept = log[["epoch", column]].dropna().set_axis(["x", "value"], axis=1)
                frames.append(kept.assign(line=model.series, checkpoint=number))
    if not frames:
        raise EmptyInput(f"no training log has the column {column}: train the networks of this figure first.")
    return pd.concat(frames)[["line", "x", "checkpoint", "value"]]


def over_seeds(found: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return mean, SD and number of seeds of ``value`` for each combination of the keys."""
    grouped = found.groupby(list(keys), sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", n="size").reset_index()
