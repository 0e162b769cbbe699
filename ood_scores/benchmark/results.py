"""What a benchmark found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

COLUMNS = (
    "part",
    "model",
    "checkpoint",
    "scorer",
    "ood",
    "group",
    "auroc",
    "auroc_low",
    "auroc_high",
    "aupr_in",
    "aupr_out",
    "fpr95_id",
    "fpr95_id_low",
    "fpr95_id_high",
    "fpr95_ood",
    "fpr95_ood_low",
    "fpr95_ood_high",
    "n_id",
    "n_ood",
    "id_accuracy",
    "fit_seconds",
    "score_microseconds",
    "parameters",
    "weights_sha256",
    "id_sha256",
    "ood_sha256",
    "fit_sha256",
    "versions",
)
"""Of the table: one row for each part, model, checkpoint, scorer and OoD set."""


@dataclass(frozen=True)
class NotRun:
    """Something that a spec names and this run could not do.

    Attributes:
        part: its title.
        what: a model, set or scorer, as tables show it.
        reason: why, in one sentence.
        remedy: the command or address that gets what is missing; empty if there is none.
    """

    part: str
    what: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Scored:
    """The scores of one checkpoint on the sets of a part.

    Attributes:
        part: title of the part.
        model: label of the model.
        checkpoint: its number among those of the model, from 0.
        scores: float64 ``[N]`` by scorer and set; ``scores["msp"]["id"]`` of the ID rows, the others by the OoD
            set's name. Read from the run's folder when they are asked for.
        labels, predictions: int64 ``[N]`` by set, ``"id"`` among them; -1 for rows without a label.
        rows: int64 ``[N]`` by set: which row of the data set each one is. With ``relabel`` or ``covariate`` the ID rows
            come from several sets: ``origins`` then names the set of each.
        origins: names of the sets, ``[N]`` by set.
    """

    part: str
    model: str
    checkpoint: int
    scores: Mapping[str, Mapping[str, Tensor]]
    labels: Mapping[str, Tensor]
    predictions: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    origins: Mapping[str, list[str]]


@dataclass(frozen=True)
class Results:
    """What a benchmark found, in memory.

    Attributes:
        name, title: of the spec.
        folder: where the run keeps its caches, scores and reports.
        spec: the spec as it was run, as plain tables (JSON).
        table: tidy, shares and not percentages, with ``COLUMNS``; ``group`` is ``near`` or ``far``.
        comparison: one row for each published number: ``part, model, scorer, ood, metric, published, ours, difference,
            sd, n, source`` in percent; ``ours`` is NaN where it was not run.
        measures: tidy: ``part, model, checkpoint, measure, value`` for ``accuracy`` and what ``measures`` asked for.
        not_run: what could not be done, and how it can.
        scored: one for each part, model and checkpoint.
        searched: one row for each parameter setting tried: ``part, model, checkpoint, scorer, parameters, metric,
            value, chosen``.
        environment: ``versions``, ``device``, ``created``, ``seconds`` of the run.
    """

    name: str
    title: str
    folder: Path
    spec: Mapping[str, Any]
    table: pd.DataFrame
    comparison: pd.DataFrame
    measures: pd.DataFrame
    not_run: tuple[NotRun, ...]
    scored: tuple[Scored, ...]
    searched: pd.DataFrame
    environment: Mapping[str, Any] = field(default_factory=dict)
