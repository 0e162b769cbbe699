"""``ood-scores compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ood_scores.cli.parsing import check_table_path, write_table
from ood_scores.cli.printing import answer, console
from ood_scores.progress import showing_work
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from ood_scores.benchmark.results import Results
    from ood_scores.evaluation.metrics import Metric

LEVEL = 0.05
SHOWN = 20
LEGEND = (
    "Percent; changes are B minus A. p: p-value of the AUROC difference with Holm's correction for all compared rows; "
    "bold if below 5%. DeLong's paired test if both runs scored the same images, else (~) a two-sample z-test."
)


def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a benchmark run.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another benchmark run.")],
    out: Annotated[Path | None, typer.Option(help="File for all compared rows: .csv, .parquet, or .json.")] = None,
) -> None:
    """Compare two benchmark runs and test which changes are more than chance.

    \b
    [bold]Examples[/]
      ood-scores compare runs/real runs/real-new
      ood-scores compare runs/real runs/real-new --out changes.csv
    """
    from ood_scores.benchmark import load_results
    from ood_scores.benchmark.run_diff import compare_runs

    check_table_path(out)
    a, b = load_results(run_a), load_results(run_b)
    with showing_work("comparing …"):
        frame = compare_runs(a, b)
    runs = {name: {"folder": str(run.folder), "title": run.title} for name, run in (("a", a), ("b", b))}
    write_table(frame, out)
    answer({**runs, "rows": frame}, lambda: _show(frame, a, b))
    if out:
        console().print(f"[green]✓[/] every row in [bold]{marked(out)}[/]")


def _show(frame: pd.DataFrame, a: Results, b: Results) -> None:
    from ood_scores.benchmark.run_diff import comparison_columns, shared_headline

    screen = console()
    for name, run in (("A", a), ("B", b)):
        screen.print(
            f"{name} [bold]{marked(str(run.folder))}[/] {marked(run.title)}, {marked(run.environment['created'])}"
        )
    both = frame[frame["found"] == "both"]
    metrics = shared_headline(a, b)
    differences = [comparison_columns(metric)[-1] for metric in metrics]
    changed = both[(both[differences].fillna(0) != 0).any(axis=1)]
    real = int((both["p_holm"] < LEVEL).sum())
    screen.print(f"{len(both):,} rows in both: {len(changed):,} differ, {real:,} of them by more than chance")
    if len(changed):
        screen.print(_table(_largest(changed), metrics, several=bool(frame["checkpoint"].any())))
        more = f"The {SHOWN} largest of {len(changed):,}; --out writes all. " if len(changed) > SHOWN else ""
        screen.print(more + LEGEND, style="dim")
    for name, found in (("A", "a"), ("B", "b")):
        for what in _only(frame, found):
            screen.print(f"[yellow]only in {name}[/] {marked(what)}")


def _largest(changed: pd.DataFrame) -> pd.DataFrame:
    """Return the largest changes, significant ones first."""
    sized = changed.assign(real=changed["p_holm"] < LEVEL, size=changed["auroc_difference"].abs())
    return sized.sort_values(["real", "size"], ascending=False, kind="stable").head(SHOWN)


def _table(rows: pd.DataFrame, metrics: Sequence[Metric], several: bool) -> Table:
    """Return the table of changes; checkpoints are numbered if a model has several."""
    auroc, *others = metrics
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), header_style="")
    names = ["model", *(["checkpoint"] if several else []), "scorer", "ood"]
    if rows["part"].nunique() > 1:
        names.insert(0, "part")
    for name in names:
        table.add_column("no." if name == "checkpoint" else name, overflow="fold", min_width=3)
    labels = [f"{metric.label} {metric.positive or ''}".strip() for metric in others]
    for head in (f"{auroc.label} A", "B", "change", "p", *labels):
        table.add_column(head, justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        style = "bold" if row["p_holm"] < LEVEL else ""
        before, after, change = _numbers(auroc, row, digits=2)
        p_value = ("" if row["paired"] else "~") + f"{row['p_holm']:.2g}"
        figures = [before, after, change, p_value, *(_numbers(metric, row)[-1] for metric in others)]
        table.add_row(*(Text(str(row[name])) for name in names), *(Text(figure, style=style) for figure in figures))
    return table


def _numbers(metric: Metric, row: pd.Series, digits: int | None = None) -> tuple[str, str, str]:
    """Return the texts of a metric in both runs and of its change, with ``digits`` decimals."""
    from ood_scores.benchmark.run_diff import comparison_columns
    from ood_scores.evaluation.metrics import number

    before, after, change = (metric.scale * row[column] for column in comparison_columns(metric))
    return (
        number(before, metric.percent),
        number(after, metric.percent),
        number(change, metric.percent, digits, signed=True),
    )


def _only(frame: pd.DataFrame, found: str) -> list[str]:
    """Return a line for each part and model with the scorers and sets of one run only."""
    lines = []
    for (part, model), rows in frame[frame["found"] == found].groupby(["part", "model"], sort=False):
        scorers, sets = (", ".join(dict.fromkeys(rows[name])) for name in ("scorer", "ood"))
        lines.append(f"{part}, {model}: {scorers} on {sets}")
    return lines
