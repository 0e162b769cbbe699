"""``ood-scores evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from ood_scores.cli import completion, options
from ood_scores.cli.parsing import check_table_path, labeled_scorers, named_caches, write_table
from ood_scores.cli.printing import answer, console, stoppable, table_document
from ood_scores.cli.tables import experimental_in, legend, metric_columns, metric_tables
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd

    from ood_scores.features import FeatureSet


def evaluate(
    id: Annotated[Path, typer.Option("--id", help="Cache of the in-distribution test set.")],
    ood: Annotated[
        list[str], typer.Option(metavar="[NAME=]CACHE", help="Cache of an out-of-distribution set; may be repeated.")
    ],
    fit: Annotated[Path | None, typer.Option(help="Cache of the set to fit on, usually the training set.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="Scorer name, and parameters that differ from their defaults; may be repeated. By default, "
            "all that can run.",
            autocompletion=completion.scorers,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Further metrics: aurc, e_aurc, augrc (each also with _scod), oscr, ccr_fpr1 … ccr_fpr4, "
            "detection_error, autc; of the classifier alone: brier, nll, ece, ece_equal_mass, rms_debiased.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for all metrics: .csv, .parquet, or .json.")] = None,
    details: Annotated[
        Path | None, typer.Option(help="File for the scores of every row: .csv, .parquet, or .json.")
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Compare how well scorers separate an in-distribution set from out-of-distribution sets.

    \b
    [bold]Examples[/]
      ood-scores evaluate --id val.h5 --ood textures.h5 --ood sun=cache/sun.h5
      ood-scores evaluate --id val.h5 --ood textures.h5 --fit train.h5 \\
          --out table.csv
      ood-scores evaluate --id val.h5 --ood textures.h5 --scorer energy \\
          --scorer gradnorm:p=2 --details rows.parquet
      ood-scores evaluate --id val.h5 --ood textures.h5 --metrics oscr,augrc
    """
    import ood_scores
    from ood_scores.evaluation import evaluate_details

    check_table_path(out)
    check_table_path(details)
    id_feats = ood_scores.load(id, device)
    ood_feats = {name: ood_scores.load(cache, device) for name, cache in named_caches(ood).items()}
    fit_feats = ood_scores.load(fit, device) if fit else None
    asked = [name.strip() for name in metrics.split(",")] if metrics else []
    chosen = labeled_scorers(scorer) if scorer and scorer != ["all"] else "all"
    with stoppable("the caches are unchanged; run the same command again"):
        if details:
            table, rows = evaluate_details(chosen, id=id_feats, ood=ood_feats, fit=fit_feats, metrics=asked)
        else:
            table = ood_scores.evaluate(chosen, id=id_feats, ood=ood_feats, fit=fit_feats, metrics=asked)
    table.attrs["left_out"] |= _remedies(table.attrs["left_out"], [id_feats, *ood_feats.values()], fit_feats)
    write_table(table, out)
    if details:
        write_table(rows, details)
    answer(table_document(table), lambda: _show(table, id, len(id_feats), asked))
    if out:
        console().print(f"[green]✓[/] all metrics in [bold]{marked(out)}[/]")
    if details:
        console().print(f"[green]✓[/] the scores of every row in [bold]{marked(details)}[/]")


def _remedies(left_out: Iterable[str], sets: Sequence[FeatureSet], fit: FeatureSet | None) -> dict[str, str]:
    """Return the reasons why scorers cannot run on these sets, with remedies for the command line."""
    from ood_scores.scorers import create_scorer
    from ood_scores.scorers.requirements import cannot_run

    scorers = {name: create_scorer(name) for name in left_out}
    return cannot_run(scorers, fit.has if fit else None, [feats.has for feats in sets], "command line")


def _show(table: pd.DataFrame, id: Path, rows: int, asked: Sequence[str]) -> None:
    from ood_scores.evaluation.metrics import headline_metrics

    screen = console()
    accuracy = table.attrs["id_accuracy"]
    knows = "" if accuracy is None else f", accuracy [bold]{accuracy:.2%}[/]"
    screen.print(f"ID [bold]{marked(table.attrs['id'] or id.stem)}[/]: {rows:,} rows{knows}")
    sets = list(dict.fromkeys(table["ood"]))
    groups = {name: [name] for name in sets} | ({"average": sets} if len(sets) > 1 else {})
    starred = experimental_in(table)
    for part in metric_tables(metric_columns(table, groups, headline_metrics(asked)), screen.width, starred):
        screen.print(part)
    screen.print(legend(headline_metrics(asked), starred), style="dim")
    for label, parameters in table.attrs["decided"].items():
        screen.print(f"[dim]{marked(label)}: {marked(parameters)}[/]")
    left_out = table.attrs["left_out"]
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name in left_out if left_out[name] == reason)
        screen.print(f"[yellow]left out[/] {marked(names)}")
        screen.print(Padding(Text(reason, style="dim"), (0, 0, 0, 4)))
