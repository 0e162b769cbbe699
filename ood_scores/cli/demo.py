"""``ood-scores demo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli.printing import answer, console
from ood_scores.cli.tables import best_first, experimental_in, legend, metric_tables
from ood_scores.terminal import marked

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ood_scores.demo import Demo
    from ood_scores.evaluation.metrics import Metric

INTRODUCTION = """\
[bold]Handwritten digits[/]: two small networks learn 0 to 6 and are then tested on images they have never seen.
[dim]unseen: digits 7 to 9 · photo: patches of two photographs · noise: uniform noise[/]"""
LEGEND = "CE: trained with cross-entropy. L2: the same network trained on L2-normalized features."


def demo(
    out: Annotated[Path, typer.Option(help="Output folder for caches, tables, and the figure.")] = Path(
        "ood_scores_demo"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split, the networks, and the noise.")
    ] = 0,
) -> None:
    """Train, extract, score, and compare on real handwritten digits; offline, in half a minute.

    \b
    [bold]Examples[/]
      ood-scores demo
      ood-scores demo --out elsewhere --seed 1
    """
    from ood_scores.demo import run

    console().print(INTRODUCTION)
    found = run(out, seed)
    measures = found.results.measures
    measured = measures[measures["measure"] == "accuracy"]
    accuracy = dict(zip(measured["model"], measured["value"], strict=True))
    document = {"folder": str(out), "accuracy": accuracy, "rows": found.results.table}
    answer(document, lambda: _show(found, out, accuracy))


def _show(found: Demo, out: Path, accuracy: Mapping[str, float]) -> None:
    from ood_scores.evaluation.metrics import headline_metrics

    screen = console()
    for training, share in accuracy.items():
        screen.print(f"{training}: [bold]{share:.1%}[/] of new digits 0 to 6 are classified correctly")
    metrics, starred = headline_metrics()[:2], experimental_in(found.results.table)
    for part in metric_tables(_columns(found.results.table, metrics), screen.width, starred):
        screen.print(part)
    screen.print(f"{legend(metrics, starred)} {LEGEND}", style="dim")
    _say_where(screen, out, found.caches["l2_norm"])


SHORT = {"cross_entropy": "CE", "l2_norm": "L2"}


def _columns(table: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """Return a table with a scorer per row, best mean AUROC first, and columns ``(OoD dataset, training, metric)``."""
    import pandas as pd

    values = table.pivot(index="scorer", columns=["ood", "model"], values=[metric.name for metric in metrics])
    columns = {
        (name, SHORT[training], metric.name): values[metric.name][name][training]
        for name in dict.fromkeys(table["ood"])
        for training in dict.fromkeys(table["model"])
        for metric in metrics
    }
    return pd.DataFrame(columns).loc[best_first(table)]


def _say_where(screen: Console, out: Path, caches: Mapping[str, Path]) -> None:
    files = {"all metrics": "results.csv", "report": "report.html", "distributions": "scores.png"}
    written = "\n".join(
        f"[green]✓[/] {what:<13}  [bold]{marked(out / name)}[/]"
        for what, name in files.items()
        if (out / name).exists()
    )
    screen.print(
        f"""
{written}

[bold]Try next[/]
  ood-scores inspect {marked(caches["test"])}
  ood-scores evaluate --id {marked(caches["test"])} \\
      --fit {marked(caches["train"])} \\
      --ood unseen={marked(caches["unseen"])} \\
      --ood noise={marked(caches["noise"])}""",
        soft_wrap=True,
    )
