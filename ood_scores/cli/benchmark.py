"""``ood-scores benchmark``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ood_scores.cli import options
from ood_scores.cli.printing import answer, console, stoppable
from ood_scores.cli.tables import experimental_in, legend, metric_columns, metric_tables
from ood_scores.terminal import marked

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ood_scores.benchmark import Results, Spec
    from ood_scores.benchmark.costs import Estimates
    from ood_scores.benchmark.planning import Job, Plan, Unit
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

    if dry_run:
        _answer_plan(load_spec(spec, set or ()), out, data)
        return
    with stoppable("run the same command again to continue"):
        results = run(spec, out=out, data=data, overrides=set or (), device=device, jobs=jobs, progress=not quiet)
    answer(document(results), lambda: _show(results))
    if measured_nothing(results):
        raise typer.Exit(1)


def document(results: Results) -> dict[str, Any]:
    """Return what ``--json`` prints of a run: its folder, all metrics, and what did not run."""
    report = results.folder / "report.html"
    return {
        "title": results.title,
        "folder": str(results.folder),
        "report": str(report) if report.exists() else None,
        "rows": results.table,
        "measures": results.measures,
        "not_run": [asdict(entry) for entry in results.not_run],
    }


def measured_nothing(results: Results) -> bool:
    """Return whether no scorer of the spec scored a row or, if it has none, nothing was measured."""
    asked = any(part["scorers"] for part in results.spec["parts"])
    return results.table.empty and (asked or results.measures.empty)


def _show(results: Results) -> None:
    """Print the first two headline metrics and those on request, averaged over checkpoints."""
    screen = console()
    headline = results.headline
    metrics = [metric for metric in headline if metric in headline[:2] or metric.on_request]
    starred = experimental_in(results.table)
    screen.print(f"[bold]{marked(results.title)}[/]")
    for (part, model), table in results.table.groupby(["part", "model"], sort=False):
        title = f"{part}: {model}" if part != results.title else str(model)
        screen.print(f"\n[bold]{marked(title)}[/]{_accuracy(table)}")
        of_checkpoints = table.groupby(["scorer", "ood"], sort=False)[[metric.name for metric in metrics]].mean()
        columns = metric_columns(of_checkpoints.reset_index(), _groups(table), metrics)
        for shown in metric_tables(columns, screen.width, starred):
            screen.print(shown)
    if len(results.table):
        screen.print(f"{legend(metrics, starred)} {LEGEND}", style="dim")
    show_not_run(screen, results.not_run)
    if (results.folder / "report.html").exists():
        screen.print(f"[green]✓[/] report [bold]{marked(str(results.folder / 'report.html'))}[/]", soft_wrap=True)
    if len(results.table):
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


def _answer_plan(spec: Spec, out: Path | None, data: Path | None) -> None:
    from ood_scores.benchmark import plan
    from ood_scores.benchmark.costs import Estimates
    from ood_scores.benchmark.runner import places

    folder, base = places(spec, out, data)
    planned = plan(spec, folder, base, download=False)
    estimates, pending = Estimates(planned.facts), {job.cache for job in planned.pending}
    found = {
        "title": spec.title,
        "folder": str(folder),
        "caches": [_cache(job, job.cache in pending, planned, folder) for job in _jobs(planned)],
        "units": [_unit(unit, planned, estimates) for unit in planned.units],
        "not_run": [asdict(entry) for entry in planned.not_run],
    }
    answer(found, lambda: _show_plan(found, planned.not_run))


def _jobs(planned: Plan) -> Iterable[Job]:
    return {job.cache: job for unit in planned.units for job in unit.jobs}.values()


def _cache(job: Job, pending: bool, planned: Plan, folder: Path) -> dict[str, Any]:
    """Return what is known about a cache before the extraction; ``rows`` is None if their number is unknown."""
    return {
        "cache": str(job.cache.relative_to(folder)),
        "model": job.network.table.title,
        "set": job.set,
        "exists": not pending,
        "rows": planned.facts[job.source].rows if pending else None,
        "probes": list(map(str, job.options.probes)),
    }


def _unit(unit: Unit, planned: Plan, estimates: Estimates) -> dict[str, Any]:
    """Return the scorers that would run, as far as it is known before the extraction, and why others would not."""
    from ood_scores.benchmark.planning import runnable_after_extraction

    run, lacking = runnable_after_extraction(unit, planned.facts)
    reasons = {label: f"{missing.reason}: {missing.how_to_get('benchmark')}" for label, missing in lacking.items()}
    return {
        "part": unit.part.title,
        "model": unit.title,
        "scorers": list(run),
        "costly": estimates.costly(unit, run),
        "costs_unknown": estimates.unknown(unit),
        "without": reasons,
    }


def _show_plan(found: Mapping[str, Any], not_run: Iterable[NotRun]) -> None:
    screen = console()
    screen.print(f"[bold]{marked(found['title'])}[/] → {marked(found['folder'])}")
    for each in found["caches"]:
        screen.print(_cache_line(each), soft_wrap=True)
    for unit in found["units"]:
        for line in _unit_lines(unit):
            screen.print(line, soft_wrap=True)
    show_not_run(screen, not_run)


def _cache_line(cache: Mapping[str, Any]) -> str:
    what, place = marked(f"{cache['model']} · {cache['set']}"), marked(cache["cache"])
    if cache["exists"]:
        return f"[green]exists[/]   {what} [dim]{place}[/]"
    size = "number of rows unknown" if cache["rows"] is None else f"{cache['rows']:,} rows"
    probes = f", probes {', '.join(cache['probes'])}" if cache["probes"] else ""
    return f"[cyan]extract[/]  {what}: {size}{marked(probes)} [dim]{place}[/]"


def _unit_lines(unit: Mapping[str, Any]) -> Iterator[str]:
    yield f"[cyan]score[/]    {marked(' · '.join([unit['part'], unit['model']]))}: {len(unit['scorers'])} scorers"
    yield f"         [dim]{marked(', '.join(unit['scorers']))}[/]"
    if unit["costly"]:
        yield f"         [yellow]expected to be costly[/] {marked(', '.join(unit['costly']))}"
    if unit["costs_unknown"]:
        yield f"         [yellow]costs are known after the extraction[/] [dim]({marked(unit['costs_unknown'])})[/]"
    for reason in dict.fromkeys(unit["without"].values()):
        names = ", ".join(label for label, why in unit["without"].items() if why == reason)
        yield f"         [yellow]without[/] {marked(names)} [dim]({marked(reason)})[/]"
