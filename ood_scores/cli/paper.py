"""``ood-scores paper``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ood_scores.cli import options
from ood_scores.cli.benchmark import show_not_run
from ood_scores.cli.printing import console, stoppable
from ood_scores.errors import UnknownName
from ood_scores.registry import unknown
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from rich.console import Console

    from ood_scores.benchmark import Results, Spec
    from ood_scores.benchmark.report.tables import Compared, ComparisonTable

PAPERS = Path("benchmarks/papers")


def paper(
    name: Annotated[
        str | None, typer.Argument(help="Name of a file in benchmarks/papers, or its path; default: list them.")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also measure and draw the figures.")] = False,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Value that overrides the file; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; defaults to runs/NAME.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder where relative paths start.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Extractions at the same time.")] = None,
    device: options.Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print a line for each step.")] = False,
) -> None:
    """Compare the published tables of a paper with ours, and draw its figures.

    What can be measured with the networks and images at hand is measured once. What is missing is listed with the
    command that makes it.

    \b
    [bold]Examples[/]
      ood-scores paper
      ood-scores paper haas2024 --data data
      ood-scores paper haas2024 --data data --figures
      ood-scores paper mine.toml --figures --out runs/mine
    """
    from ood_scores.benchmark import load_spec, run
    from ood_scores.benchmark.figures import write_figures

    screen = console()
    if name is None:
        _list(screen)
        return
    spec = load_spec(_path(name), set or ())
    tables = tuple(part for part in spec.parts if part.figure is None)
    chosen = spec if figures or not tables else replace(spec, parts=tables)
    with stoppable("run the same command again to continue"):
        results = run(chosen, out=out, data=data, device=device, jobs=jobs, progress=not quiet)
    _show_tables(screen, results, chosen)
    show_not_run(screen, results.not_run)
    if figures:
        page, written = write_figures(results, chosen, data or Path())
        for figure in written:
            place = f"[green]✓[/] {marked(figure.title)}: [bold]{marked(str(page.parent / figure.picture))}[/]"
            lacks = f"[yellow]not drawn[/] {marked(figure.title)} [dim]({marked(figure.reason)})[/]"
            screen.print(place if figure.picture else lacks, soft_wrap=True)
        screen.print(f"[green]✓[/] all figures [bold]{marked(str(page))}[/]", soft_wrap=True)
    if results.table.empty and results.measures.empty:
        raise typer.Exit(1)


def _list(screen: Console) -> None:
    """Print the names and titles of the papers."""
    from ood_scores.benchmark import load_spec

    for path in _files():
        screen.print(f"[bold]{marked(path.stem)}[/]  {marked(load_spec(path).title)}", soft_wrap=True)


def _files() -> list[Path]:
    files = sorted(PAPERS.glob("*.toml"))
    if not files:
        raise UnknownName(f"there is no {PAPERS} here: run the command in a clone of the repository, or pass a file.")
    return files


def _path(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    names = [path.stem for path in _files()]
    if name not in names:
        raise unknown("there is no paper", name, names)
    return PAPERS / f"{name}.toml"


def _show_tables(screen: Console, results: Results, spec: Spec) -> None:
    """Print each published table with our numbers below the published ones."""
    from ood_scores.benchmark.report.tables import comparison_tables

    for part in spec.parts:
        for table in comparison_tables(results, part.title):
            screen.print(f"\n[bold]{marked(table.source)}[/] [dim]{marked(part.title)}; published / ours[/]")
            screen.print(_table(table))


def _table(table: ComparisonTable) -> Table:
    shown = Table("model", "scorer", "metric", *table.columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in table.rows:
        shown.add_row(*map(Text, (row.model, row.scorer, row.metric)), *map(_cell, row.cells))
    return shown


def _cell(cell: Compared | None) -> Text:
    if cell is None:
        return Text("")
    ours = (cell.ours, "bold") if cell.difference else ("–", "dim")
    return Text.assemble(cell.published, " / ", ours)
