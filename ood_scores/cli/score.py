"""``ood-scores score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli import completion, options
from ood_scores.cli.parsing import check_table_path, parameters, scorer_name, write_table
from ood_scores.cli.printing import answer, console, table_document
from ood_scores.progress import showing_work
from ood_scores.terminal import marked

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from torch import Tensor

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
LOWEST = 5


def score(
    scorer: Annotated[
        str, typer.Argument(help="Scorer name; ood-scores list shows all names.", autocompletion=completion.scorers)
    ],
    cache: Annotated[Path, typer.Argument(help="Feature cache to score, written by ood-scores extract.")],
    fit: Annotated[Path | None, typer.Option(help="Cache to fit on, usually the ID training data.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Scorer parameter as KEY=VALUE; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the score of every row: .csv, .parquet, or .json.")] = None,
    device: options.Device = "auto",
) -> None:
    """Score every row of a cache; higher = more in-distribution.

    \b
    [bold]Examples[/]
      ood-scores score energy val.h5 --out scores.csv
      ood-scores score energy val.h5 --out scores.parquet
      ood-scores score gradnorm val.h5 --param p=2 --param temperature=2
      ood-scores score mahalanobis textures.h5 --fit train.h5
      ood-scores score my_scorers.py:MyScorer val.h5
    """
    import ood_scores
    from ood_scores.evaluation.score_table import score_table
    from ood_scores.scorers.decisions import decided, decisions

    check_table_path(out)
    feats = ood_scores.load(cache, device)
    scorer = scorer_name(scorer)
    params = parameters(scorer, param or ())
    given = {scorer: ood_scores.create_scorer(scorer, **params)}
    ready = decided(given, [feats])
    with showing_work(f"{scorer} …"):
        scores = ood_scores.score(ready[scorer], feats, ood_scores.load(fit, device) if fit else None)
        table = score_table(feats, scores)
    chosen = decisions(given, ready)
    table.attrs = {"scorer": scorer, "parameters": params, "decided": chosen, "cache": str(cache)}
    write_table(table, out)
    answer(table_document(table), lambda: _show(table, scores))
    if out:
        console().print(f"[green]✓[/] every row in [bold]{marked(out)}[/]")


def _show(table: pd.DataFrame, scores: Tensor) -> None:
    screen = console()
    about = table.attrs
    title = " ".join([about["scorer"], *(f"({text})" for text in about["decided"].values())])
    of = f"{len(table):,} rows in {marked(about['cache'])}"
    screen.print(f"[bold]{marked(title)}[/] of {of} (higher = more in-distribution)")
    screen.print(_summary(scores))
    screen.print(_lowest(table))


def _summary(scores: Tensor) -> Table:
    import numpy as np
    from rich.table import Table

    table = Table(*QUANTILES, header_style="dim")
    table.add_row(*(f"{value:.6g}" for value in np.quantile(scores.numpy(), list(QUANTILES.values()))))
    return table


def _lowest(scores: pd.DataFrame) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Least in-distribution", title_justify="left", title_style="bold", header_style="dim")
    for column in scores.columns:
        table.add_column(column, justify="left" if column == "id" else "right", overflow="fold")
    for row in scores.nsmallest(LOWEST, "score").itertuples(index=False):
        table.add_row(*(Text(f"{value:.6g}" if isinstance(value, float) else str(value)) for value in row))
    return table
