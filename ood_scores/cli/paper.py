"""``ood-scores paper``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ood_scores.cli import completion, options
from ood_scores.cli.benchmark import document, measured_nothing, show_not_run
from ood_scores.cli.printing import answer, console, stoppable
from ood_scores.cli.tables import only_model, published_table
from ood_scores.errors import UnknownName
from ood_scores.registry import unknown
from ood_scores.terminal import marked
from ood_scores.toml_tables import Table, read

if TYPE_CHECKING:
    from ood_scores.benchmark import Results, Spec
    from ood_scores.benchmark.figures.page import WrittenFigure
    from ood_scores.benchmark.report.comparison import ComparisonTable

PAPERS = Path("benchmarks/papers")


def paper(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of a file in benchmarks/papers, or its path; default: list them.",
            autocompletion=lambda incomplete: completion.starting(incomplete, (file.stem for file in PAPERS.glob("*"))),
        ),
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
    if name is None:
        titles = {path.stem: _title(path) for path in _files()}
        answer({"papers": titles}, lambda: _show_titles(titles))
        return

    from ood_scores.benchmark import load_spec, run
    from ood_scores.benchmark.report.comparison import comparison_tables

    spec = load_spec(_path(name), set or ())
    parts = tuple(part for part in spec.parts if part.figure is None)
    chosen = spec if figures or not parts else replace(spec, parts=parts)
    with stoppable("run the same command again to continue"):
        results = run(chosen, out=out, data=data, device=device, jobs=jobs, progress=not quiet)
    tables = [table for part in chosen.parts for table in comparison_tables(results, part.title)]
    page, written = _drawn(results, chosen, data) if figures else (None, [])
    found = {
        **document(results),
        "tables": list(map(asdict, tables)),
        "page": page and str(page),
        "figures": list(map(asdict, written)),
    }
    answer(found, lambda: _show(results, tables, page, written))
    if measured_nothing(results):
        raise typer.Exit(1)


def _drawn(results: Results, spec: Spec, data: Path | None) -> tuple[Path, list[WrittenFigure]]:
    from ood_scores.benchmark.figures import write_figures

    return write_figures(results, spec, data or Path())


def _title(spec: Path) -> str:
    """Return the title of a spec, without checking the rest, which needs every scorer and network."""
    found, _ = read(spec, Table({"title": str}, rest=Any), "spec")
    return str(found.get("title", spec.stem))


def _show_titles(titles: Mapping[str, str]) -> None:
    screen = console()
    for name, title in titles.items():
        screen.print(f"[bold]{marked(name)}[/]  {marked(title)}", soft_wrap=True)


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


def _show(
    results: Results, tables: Sequence[ComparisonTable], page: Path | None, figures: Sequence[WrittenFigure]
) -> None:
    """Print each published table with our numbers before the published ones, what did not run, and the figures."""
    screen = console()
    for table in tables:
        of = " · ".join(["", table.part, *only_model(table)])
        screen.print(f"\n[bold]{marked(table.source)}[/][dim]{marked(of)}; ours / published[/]", soft_wrap=True)
        screen.print(published_table(table))
    show_not_run(screen, results.not_run)
    folder = page.parent if page else Path()
    for figure in figures:
        lacks = f"[yellow]not drawn[/] {marked(figure.title)} [dim]({marked(figure.reason)})[/]"
        place = f"[green]✓[/] {marked(figure.title)}: [bold]{marked(folder / figure.picture)}[/]"
        screen.print(place if figure.picture else lacks, soft_wrap=True)
    if page:
        screen.print(f"[green]✓[/] all figures [bold]{marked(page)}[/]", soft_wrap=True)
