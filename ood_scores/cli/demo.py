"""``ood-scores demo``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli.printing import console
from ood_scores.cli.tables import percent_tables

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

INTRODUCTION = """\
[bold]Handwritten digits[/]: a small network learns 0 to 6, twice; then it is shown what it has never seen.
[dim]unseen: digits 7 to 9 · photo: patches of two photographs · noise: uniform noise[/]"""
LEGEND = (
    "Percent, best of each column in bold. AUROC: higher is better. FPR95: share of OoD that passes when 95% of ID "
    "does; lower is better. CE: trained with cross-entropy. L2: the same network trained on L2-normalised features."
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the caches, the table and the picture.")] = Path(
        "ood_scores_demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the split, the networks and the noise.")] = 0,
) -> None:
    """Trains, extracts, scores and compares on real handwritten digits: offline, in half a minute.

    \b
    [bold]Examples[/]
      ood-scores demo
      ood-scores demo --out elsewhere --seed 1
    """
    from ood_scores.demo import run

    screen = console()
    screen.print(INTRODUCTION)
    found = run(out, seed)
    measures = found.results.measures
    for training, accuracy in measures[measures["measure"] == "accuracy"].set_index("model")["value"].items():
        screen.print(f"{training}: [bold]{accuracy:.1%}[/] of new digits 0 to 6 are classified correctly")
    for part in percent_tables(wide(found.results.table), screen.width):
        screen.print(part)
    screen.print(LEGEND, style="dim")
    _say_where(screen, out, found.caches["l2_norm"])


SHORT = {"cross_entropy": "CE", "l2_norm": "L2"}


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A scorer per row, best mean AUROC first; columns ``(OoD set, training, metric)``."""
    import pandas as pd

    metrics = table.pivot(index="scorer", columns=["ood", "model"], values=["auroc", "fpr95_id"])
    columns = {
        (name, SHORT[training], heading): metrics[metric][name][training]
        for name in dict.fromkeys(table["ood"])
        for training in dict.fromkeys(table["model"])
        for metric, heading in (("auroc", "AUROC"), ("fpr95_id", "FPR95"))
    }
    best_first = table.groupby("scorer")["auroc"].mean().sort_values(ascending=False, kind="stable").index
    return pd.DataFrame(columns).loc[best_first]


def _say_where(screen: Console, out: Path, caches: Mapping[str, Path]) -> None:
    screen.print(
        f"""
[green]✓[/] all metrics    [bold]{out / "results.csv"}[/]
[green]✓[/] report         [bold]{out / "report.html"}[/]
[green]✓[/] distributions  [bold]{out / "scores.png"}[/]

[bold]Try next[/]
  ood-scores inspect {caches["test"]}
  ood-scores evaluate --id {caches["test"]} \\
      --fit {caches["train"]} \\
      --ood unseen={caches["unseen"]} \\
      --ood noise={caches["noise"]}""",
        soft_wrap=True,
    )
