"""Tables of published numbers beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import TYPE_CHECKING

from ood_scores.benchmark.measures import shown_as
from ood_scores.benchmark.report.tables import not_run
from ood_scores.benchmark.results import NotRun, Results
from ood_scores.evaluation.metrics import number

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT = re.compile(r" \(\d+\)$")
"""Number of a checkpoint at the end of a name in ``NotRun``."""


@dataclass(frozen=True)
class Compared:
    """Texts of a published number and of ours: percentages have two decimals, as in papers.

    If our number was not run, ``ours`` is "not run" and ``difference`` is empty. ``sd`` is empty for one checkpoint.
    """

    published: str
    ours: str
    sd: str
    difference: str


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of a model and scorer; cells are None if the source has no number."""

    model: str
    scorer: str
    metric: str
    cells: tuple[Compared | None, ...]
    missing: str


@dataclass(frozen=True)
class ComparisonTable:
    """The numbers of one published table and ours; ``columns`` are OoD sets or groups of OoD sets."""

    part: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]


def comparison_tables(results: Results, part: str) -> list[ComparisonTable]:
    """Return one table for each source of published numbers of a part."""
    frame = results.comparison[results.comparison["part"] == part]
    missing = not_run(results, part)
    return [_comparison(part, str(source), of, missing) for source, of in frame.groupby("source", sort=False)]


def _comparison(part: str, source: str, frame: pd.DataFrame, missing: Sequence[NotRun]) -> ComparisonTable:
    columns = tuple(dict.fromkeys(_text(name) for name in frame["ood"]))
    keys = [frame[key].map(_text) for key in ("model", "scorer", "metric")]
    rows = []
    for key, of in frame.groupby(keys, sort=False):
        model, scorer, metric = map(str, key)
        cells = {_text(row["ood"]): _compared(row) for _, row in of.iterrows()}
        absent = of["ood"][of["ours"].isna()]
        names = {model, scorer, *map(_text, absent)} if len(absent) else set()
        reasons = [f"{each.what}: {each.reason}" for each in missing if CHECKPOINT.sub("", each.what) in names]
        rows.append(
            ComparisonRow(
                model,
                scorer,
                shown_as(metric).title,
                tuple(cells.get(name) for name in columns),
                "; ".join(reasons),
            )
        )
    return ComparisonTable(part, source, columns, tuple(rows))


def _compared(row: pd.Series) -> Compared:
    percent = shown_as(row["metric"]).percent
    text = partial(number, percent=percent, digits=2 if percent else None)
    published, ours = text(row["published"]), float(row["ours"])
    if isnan(ours):
        return Compared(published, "not run", "", "")
    sd = "" if isnan(row["sd"]) else text(row["sd"])
    return Compared(published, text(ours), sd, text(ours - row["published"], signed=True))


def _text(value: object) -> str:
    """Return the name, or an empty text for a figure of a model, which has no scorer and no OoD set."""
    return value if isinstance(value, str) else ""
