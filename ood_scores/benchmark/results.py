"""Results of a benchmark: schema, saving and loading."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ood_scores.atomic import read_text, replace_text, user_path
from ood_scores.benchmark import unit_files
from ood_scores.benchmark.unit_files import Scored
from ood_scores.errors import BadInput
from ood_scores.evaluation.metrics import METRICS, Metric, headline_metrics, table_metrics
from ood_scores.notebook import facts_html
from ood_scores.terminal import csv_text

JSON = "results.json"
CSV = "results.csv"
KEY = ("part", "model", "checkpoint", "scorer", "ood")
"""Columns that identify a row of ``Results.table``."""
COSTS = ("fit_seconds", "score_microseconds")
HASHES = ("weights_sha256", "id_sha256", "ood_sha256", "fit_sha256")
FRAMES = {
    "comparison": (
        "part", "model", "scorer", "ood", "metric", "published", "ours", "difference", "sd", "n", "source",
    ),
    "measures": ("part", "model", "checkpoint", "measure", "value"),
    "searched": ("part", "model", "checkpoint", "scorer", "parameters", "metric", "value", "chosen"),
    "overlap": ("part", "model", "checkpoint", "set", "other", "rows", "of"),
    "warnings": ("part", "model", "checkpoint", "warning"),
}  # fmt: skip
"""Columns of the other data frames of ``Results``."""
TEXTS = (
    "part",
    "model",
    "scorer",
    "ood",
    "group",
    "parameters",
    *HASHES,
    "versions",
    "metric",
    "source",
    "measure",
    "set",
    "other",
    "warning",
)
WHOLE = ("checkpoint", "n_id", "n_ood", "n", "rows", "of")


def interval_columns(metric: Metric) -> tuple[str, ...]:
    """Names of the columns with the ends of a metric's interval; empty for a metric without an interval."""
    return (f"{metric.name}_low", f"{metric.name}_high") if metric.headline or metric.on_request else ()


def table_columns(asked: Iterable[str] = ()) -> tuple[str, ...]:
    """Columns of ``Results.table`` with the metrics on request that are asked for."""
    figures = [name for metric in table_metrics(asked) for name in (metric.name, *interval_columns(metric))]
    return (*KEY, "group", *figures, "n_id", "n_ood", "id_accuracy", *COSTS, "parameters", *HASHES, "versions")


@dataclass(frozen=True)
class NotRun:
    """A model, dataset or scorer of a spec that could not be run.

    Attributes:
        part: Title of the part.
        what: Name of the model, dataset or scorer, as tables show it.
        reason: Reason in one sentence.
        remedy: Command or address for getting what is missing; empty if there is none.
    """

    part: str
    what: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Results:
    """Results of a benchmark in memory.

    Attributes:
        name, title: Name and title of the spec.
        folder: Folder with the caches, scores and reports of the run.
        spec: Spec of the run as plain tables (JSON).
        table: Tidy data frame with one row for each part, model, checkpoint, scorer and OoD set. Metrics are shares,
            not percentages; ``group`` is ``near`` or ``far``; see ``table_columns`` for the columns.
        comparison: One row for each published number: ``part, model, scorer, ood, metric, published, ours, difference,
            sd, n, source``. Shares are in percent; ``ours`` is NaN if it was not run.
        measures: Tidy data frame of ``accuracy`` and the ``measures`` of the spec: ``part, model, checkpoint, measure,
            value``.
        not_run: Models, datasets and scorers that could not be run.
        scored: Scores of each part, model and checkpoint.
        searched: One row for each parameter setting that was tried: ``part, model, checkpoint, scorer, parameters,
            metric, value, chosen``.
        environment: ``versions``, ``device``, ``created`` and ``seconds`` of the last run that computed something.
        overlap: One row for each two sets that share rows, see ``ood_scores.evaluate``: ``part, model, checkpoint, set,
            other, rows, of``.
        warnings: Warnings about shared rows and about an accuracy near chance: ``part, model, checkpoint, warning``.
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
    overlap: pd.DataFrame = field(default_factory=lambda: frame("overlap", []))
    warnings: pd.DataFrame = field(default_factory=lambda: frame("warnings", []))

    def _repr_html_(self) -> str:
        facts = {"folder": self.folder, "rows": len(self.table), "not run": len(self.not_run) or None}
        auroc = self.table.pivot_table("auroc", ["part", "model", "scorer"], "ood", sort=False)
        return facts_html(self.title, facts, f"AUROC in percent{(100 * auroc).round(1).to_html(max_rows=30)}")

    @property
    def metrics(self) -> list[Metric]:
        """The metrics of ``table``, in the order of ``METRICS``."""
        return table_metrics(_on_request(map(str, self.table.columns)))

    @property
    def headline(self) -> list[Metric]:
        """The metrics of summary tables, in the order of ``METRICS``."""
        return headline_metrics(_on_request(map(str, self.table.columns)))


def load_results(folder: str | os.PathLike[str]) -> Results:
    """Load the results of a finished run from its folder. Scores are read when they are accessed.

    Raises:
        BadInput: if there is no finished run in the folder, or files are missing or damaged.
    """
    folder = user_path(folder)
    try:
        return _loaded(folder, json.loads(read_text(folder / JSON)))
    except FileNotFoundError as error:
        raise BadInput(
            f"there is no finished benchmark in {folder}, since {JSON} is missing: run the benchmark first."
        ) from error
    except BadInput:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{folder / JSON} is damaged ({error}): run the benchmark again, which computes nothing again."
        ) from error


def _loaded(folder: Path, kept: Mapping[str, Any]) -> Results:
    scored = []
    for name in kept["scores"]:
        path = folder / unit_files.FOLDER / name
        facts = unit_files.read(path)
        if facts is None:
            raise BadInput(f"{path} is missing or damaged: run the benchmark again.")
        if facts["sets"]:
            scored.append(unit_files.scored(path, facts))
    return Results(
        name=kept["name"],
        title=kept["title"],
        folder=folder,
        spec=kept["spec"],
        **{name: frame(name, kept.get(name, [])) for name in ("table", *FRAMES)},
        not_run=tuple(NotRun(**entry) for entry in kept["not_run"]),
        scored=tuple(scored),
        environment=kept["environment"],
    )


def recorded_environment(folder: Path, files: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the environment of the finished run with these score files in a folder, or None if there is none."""
    try:
        kept = json.loads((folder / JSON).read_text(encoding="utf-8"))
        found: Mapping[str, Any] | None = kept["environment"] if kept["scores"] == list(files) else None
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None


def frame(name: str, rows: Any) -> pd.DataFrame:
    """Make a data frame of ``Results`` from rows; columns that are missing in rows of an earlier version are NaN."""
    columns = table_columns(_on_request(name for row in rows for name in row)) if name == "table" else FRAMES[name]
    made = pd.DataFrame(rows, columns=list(columns))
    kinds = {name: "int64" if name in WHOLE else "float64" for name in columns if name not in (*TEXTS, "chosen")}
    return made.astype(kinds | ({"chosen": bool} if "chosen" in columns else {}))


def _on_request(columns: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(columns) if name in METRICS and METRICS[name].on_request]


def save(results: Results, files: Sequence[str]) -> None:
    """Write ``results.csv`` and ``results.json``; ``files`` are the names of the score files."""
    kept = {
        "name": results.name,
        "title": results.title,
        "spec": results.spec,
        **{name: getattr(results, name).to_dict("records") for name in ("table", *FRAMES)},
        "not_run": [asdict(entry) for entry in results.not_run],
        "scores": list(files),
        "environment": results.environment,
    }
    replace_text(results.folder / CSV, csv_text(results.table))
    replace_text(results.folder / JSON, json.dumps(plain(kept), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Convert a value for JSON: keys to strings, tuples to lists, NaN to None, infinity to a string."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
