"""``ood-scores evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli import options
from ood_scores.cli.parsing import check_table_path, named_caches, write_table
from ood_scores.cli.printing import busy, console
from ood_scores.cli.tables import legend, metric_columns, metric_tables
from ood_scores.errors import OodScoresError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from ood_scores.features import FeatureSet
    from ood_scores.scorers import Scorer


def evaluate(
    id: Annotated[Path, typer.Option("--id", help="Cache of the in-distribution test set.")],
    ood: Annotated[
        list[str], typer.Option(metavar="[NAME=]CACHE", help="Cache of an out-of-distribution set; may be repeated.")
    ],
    fit: Annotated[Path | None, typer.Option(help="Cache of the set to fit on, usually the training set.")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="Scorer name; may be repeated. Default: all that can run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the table with all metrics, .csv or .json.")] = None,
    device: options.Device = "auto",
) -> None:
    """Compare how well scorers separate an in-distribution set from out-of-distribution sets.

    \b
    [bold]Examples[/]
      ood-scores evaluate --id val.h5 --ood textures.h5 --ood sun=cache/sun.h5
      ood-scores evaluate --id val.h5 --ood textures.h5 --fit train.h5 \\
          --out table.csv
      ood-scores evaluate --id val.h5 --ood textures.h5 --scorer energy \\
          --scorer gradnorm
    """
    import ood_scores

    check_table_path(out)
    id_feats = ood_scores.load(id, device)
    ood_feats = {name: ood_scores.load(cache, device) for name, cache in named_caches(ood).items()}
    fit_feats = ood_scores.load(fit, device) if fit else None
    left_out: dict[str, str] = {}
    with busy("fitting and scoring …"):
        if scorer:
            table = ood_scores.evaluate(scorer, id=id_feats, ood=ood_feats, fit=fit_feats)
        else:
            fitted, left_out = usable_scorers([id_feats, *ood_feats.values()], fit_feats)
            table = ood_scores.evaluate(fitted, id=id_feats, ood=ood_feats)
    _show(table, id, len(id_feats), left_out)
    if out:
        write_table(table, out)
        console().print(f"[green]✓[/] all metrics in [bold]{out}[/]")


def usable_scorers(sets: Sequence[FeatureSet], fit: FeatureSet | None) -> tuple[list[Scorer], dict[str, str]]:
    """Return every registered scorer that can score these sets, fitted; and why each of the others cannot."""
    from ood_scores.scorers import create_scorer, list_scorers
    from ood_scores.scorers.base import fit_each
    from ood_scores.scorers.requirements import unmet

    scorers = {name: create_scorer(name) for name in list_scorers()}
    has = [feats.has for feats in sets]
    missing = {name: unmet(scorer, fit.has if fit else None, has) for name, scorer in scorers.items()}
    left_out = {name: f"{need.reason}: {need.how_to_get('command line')}" for name, need in missing.items() if need}
    usable = [scorer for name, scorer in scorers.items() if name not in left_out]
    if fit:
        errors = zip(usable, fit_each(usable, fit), strict=True)
        left_out |= {scorer.name: str(error) for scorer, error in errors if error}
    for scorer in usable:
        try:
            for feats in sets:
                scorer.check_ready(feats)
        except OodScoresError as error:
            left_out.setdefault(scorer.name, str(error))
    return [scorer for scorer in usable if scorer.name not in left_out], left_out


def _show(table: pd.DataFrame, id: Path, rows: int, left_out: dict[str, str]) -> None:
    from ood_scores.evaluation.metrics import headline_metrics

    screen = console()
    accuracy = table.attrs["id_accuracy"]
    knows = "" if accuracy is None else f", accuracy [bold]{accuracy:.2%}[/]"
    screen.print(f"ID [bold]{table.attrs['id'] or id.stem}[/]: {rows:,} rows{knows}")
    sets = list(dict.fromkeys(table["ood"]))
    groups = {name: [name] for name in sets} | ({"average": sets} if len(sets) > 1 else {})
    for part in metric_tables(metric_columns(table, groups, headline_metrics()), screen.width):
        screen.print(part)
    screen.print(legend(headline_metrics()), style="dim")
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name in left_out if left_out[name] == reason)
        screen.print(f"[yellow]left out[/] {names} [dim]({reason})[/]")
