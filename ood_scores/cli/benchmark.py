"""``ood-scores benchmark``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli import options
from ood_scores.cli.printing import console, stoppable
from ood_scores.cli.tables import legend, metric_columns, metric_tables
from ood_scores.terminal import marked

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ood_scores.benchmark import Results, Spec
    from ood_scores.benchmark.costs import Estimates
    from ood_scores.benchmark.planning import Plan, Unit
    from ood_scores.benchmark.results import NotRun

LEGEND = "near, far, mean: unweighted means over OoD datasets. The report has intervals, all other metrics, and costs."
SHOWN = 8
"""Number of names in a line about what did not run."""


def benchmark(
    spec: Annotated[Path, typer.Argument(help="TOML file of models, datasets, and scorers.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Value that overrides the file; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; defaults to runs/NAME.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder where relative paths start.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Extractions at the same time; 1 by default on a GPU, else one per core, up to 4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be done, what is costly, and what is missing.")
    ] = False,
    device: options.Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print a line for each step.")] = False,
) -> None:
    """Compare scorers on models and datasets; write tables and a report.

    Each model processes each dataset once. The same command continues an interrupted run, and shows a finished one
    again. What needs missing data or weights does not run and is listed with the way to get it.

    \b
    [bold]Examples[/]
      ood-scores benchmark benchmarks/suites/real.toml --dry-run
      ood-scores benchmark benchmarks/suites/real.toml
      ood-scores benchmark mine.toml --set extraction.rows=500 --out quick
      ood-scores benchmark mine.toml --data /data --jobs 2
      ood-scores benchmark mine.toml --import my_scorers.py

    \b
    [bold]Example of a file[/]
      id = "cifar10_test"
      near = \\["cifar100_test"]
      far = \\["mine"]
      fit = "cifar10_train"
      scorers = "all"                # or \\["msp", "energy"]
      \\[sets]
      cifar10_train = "torchvision:CIFAR10?split=train&download=true"
      cifar10_test = "torchvision:CIFAR10?split=test&download=true"
      cifar100_test = "torchvision:CIFAR100?split=test&download=true"
      mine = "folder:photos"
      \\[\\[model]]
      name = "cifar_resnet20"        # timm's names too
      checkpoint = "cifar10.safetensors"
      num_classes = 10
    """
    from ood_scores.benchmark import load_spec, run

    screen = console()
    if dry_run:
        _show_plan(screen, load_spec(spec, set or ()), out, data)
        return
    with stoppable("run the same command again to continue"):
        results = run(spec, out=out, data=data, overrides=set or (), device=device, jobs=jobs, progress=not quiet)
    _show(screen, results)
    if results.table.empty and results.measures.empty:
        raise typer.Exit(1)


def _show(screen: Console, results: Results) -> None:
    """Print the first two headline metrics and those on request, averaged over checkpoints."""
    headline = results.headline
    metrics = [metric for metric in headline if metric in headline[:2] or metric.on_request]
    screen.print(f"[bold]{marked(results.title)}[/]")
    for (part, model), table in results.table.groupby(["part", "model"], sort=False):
        title = f"{part}: {model}" if part != results.title else str(model)
        screen.print(f"\n[bold]{marked(title)}[/]{_accuracy(table)}")
        of_checkpoints = table.groupby(["scorer", "ood"], sort=False)[[metric.name for metric in metrics]].mean()
        columns = metric_columns(of_checkpoints.reset_index(), _groups(table), metrics)
        for shown in metric_tables(columns, screen.width):
            screen.print(shown)
    if len(results.table):
        screen.print(f"{legend(metrics)} {LEGEND}", style="dim")
    show_not_run(screen, results.not_run)
    if (results.folder / "report.html").exists():
        screen.print(f"[green]✓[/] report [bold]{marked(str(results.folder / 'report.html'))}[/]", soft_wrap=True)
    screen.print(f"[green]✓[/] all metrics [bold]{marked(str(results.folder / 'results.csv'))}[/]", soft_wrap=True)


def _accuracy(table: pd.DataFrame) -> str:
    by_checkpoint = table.groupby("checkpoint")["id_accuracy"].first()
    if by_checkpoint.isna().all():
        return ""
    spread = f" ± {by_checkpoint.std():.2%}, {len(by_checkpoint)} checkpoints" if len(by_checkpoint) > 1 else ""
    return f"  accuracy {by_checkpoint.mean():.2%}{spread}"


def _groups(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the OoD datasets of each column by its title: averages first, then each dataset."""
    sets = {name: [name] for name in dict.fromkeys(table["ood"])}
    groups = {group: list(dict.fromkeys(table[table["group"] == group]["ood"])) for group in ("near", "far")}
    averages = {"mean": list(sets)} | groups
    shown = {name: over for name, over in averages.items() if len(over) > 1 and (name == "mean" or over != list(sets))}
    return shown | sets


def show_not_run(screen: Console, not_run: Iterable[NotRun]) -> None:
    """Print what did not run, grouped by reason; networks that one training makes are together."""
    groups: dict[tuple[str, ...], list[NotRun]] = {}
    for entry in not_run:
        trained = entry.remedy.startswith("ood-scores train ")
        groups.setdefault((entry.remedy,) if trained else (entry.reason, entry.remedy), []).append(entry)
    for entries in groups.values():
        names = list(dict.fromkeys(entry.what for entry in entries))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = marked(", ".join(names[:SHOWN]) + more)
        screen.print(f"[yellow]not run[/] {listed} [dim]({marked(entries[0].reason)})[/]", soft_wrap=True)
        if entries[0].remedy:
            screen.print(f"        [dim]→ {marked(entries[0].remedy)}[/]", soft_wrap=True)


def _show_plan(screen: Console, spec: Spec, out: Path | None, data: Path | None) -> None:
    from ood_scores.benchmark import plan
    from ood_scores.benchmark.costs import Estimates
    from ood_scores.benchmark.runner import places

    folder, base = places(spec, out, data)
    planned = plan(spec, folder, base, download=False)
    screen.print(f"[bold]{marked(spec.title)}[/] → {marked(str(folder))}")
    for line in _caches(planned, folder):
        screen.print(line, soft_wrap=True)
    estimates = Estimates(planned.facts)
    for unit in planned.units:
        for line in _scorers(unit, planned, estimates):
            screen.print(line, soft_wrap=True)
    show_not_run(screen, planned.not_run)


def _caches(planned: Plan, folder: Path) -> Iterator[str]:
    pending = {job.cache: job for job in planned.pending}
    for job in {job.cache: job for unit in planned.units for job in unit.jobs}.values():
        what = marked(f"{job.network.table.title} · {job.set}")
        place = marked(str(job.cache.relative_to(folder)))
        if job.cache not in pending:
            yield f"[green]exists[/]   {what} [dim]{place}[/]"
            continue
        rows = planned.facts[job.source].rows
        size = "number of rows unknown" if rows is None else f"{rows:,} rows"
        computed = ", ".join(map(str, job.options.probes))
        probes = f", probes {computed}" if computed else ""
        yield f"[cyan]extract[/]  {what}: {size}{marked(probes)} [dim]{place}[/]"


def _scorers(unit: Unit, planned: Plan, estimates: Estimates) -> Iterator[str]:
    """Yield lines about the scorers that would run, as far as it is known before the extraction."""
    from ood_scores.benchmark.planning import runnable_after_extraction

    run, lacking = runnable_after_extraction(unit, planned.facts)
    yield f"[cyan]score[/]    {marked(f'{unit.part.title} · {unit.title}')}: {len(run)} scorers"
    yield f"         [dim]{marked(', '.join(run))}[/]"
    if costly := estimates.costly(unit, run):
        yield f"         [yellow]expected to be costly[/] {marked(', '.join(costly))}"
    left_out: dict[str, list[str]] = {}
    for label, missing in lacking.items():
        left_out.setdefault(f"{missing.reason}: {missing.how_to_get('benchmark')}", []).append(label)
    for reason, names in left_out.items():
        yield f"         [yellow]without[/] {marked(', '.join(names))} [dim]({marked(reason)})[/]"
