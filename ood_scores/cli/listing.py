"""``ood-scores list``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ood_scores.cli import completion
from ood_scores.cli.printing import answer, console
from ood_scores.registry import unknown

if TYPE_CHECKING:
    from ood_scores.data.known_set import KnownSet
    from ood_scores.scorers import Scorer

GROUPS = (
    "From logits",
    "From features and the last layer",
    "After a fit on the training set (--fit CACHE)",
    "From several passes, layers, or models (extract --probe, --layers)",
)
"""Titles of the groups of scorers; see ``_group``."""

WIDEST = 24
"""Number of characters of a parameter and its default that are not broken into lines."""


def list_scorers(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Scorers to describe; * and ? are wildcards. Default: only list all names.",
            autocompletion=completion.scorers,
        ),
    ] = None,
    papers: Annotated[
        bool, typer.Option("--papers", help="Show the paper and the authors' code of each scorer.")
    ] = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print the papers as BibTeX.")] = False,
    datasets: Annotated[
        bool, typer.Option("--datasets", help="List the datasets of papers instead, and how to get them.")
    ] = False,
) -> None:
    """List the scorers by what they need, or describe some: what they compute, what they read, their parameters.
    With --datasets, list known datasets with their licenses, and describe some: how to get and to open them.

    \b
    [bold]Examples[/]
      ood-scores list
      ood-scores list vim
      ood-scores list "*norm*"
      ood-scores list --papers
      ood-scores list energy --bibtex > references.bib
      ood-scores list --datasets
      ood-scores list ninco --datasets
    """
    if datasets:
        _list_datasets(pattern)
        return
    from ood_scores.scorers import list_scorers as names
    from ood_scores.scorers.families import families
    from ood_scores.scorers.registry import SCORERS, registered_name

    found = families((pattern and registered_name(pattern)) or pattern or "*")
    if not found:
        raise unknown("no scorer matches", pattern or "*", names(), listing=SCORERS.listing)
    scorers = [_described(title, cls) for title, group in found.items() for cls in group]
    if bibtex:
        answer({"scorers": scorers}, lambda: _print_bibtex(found))
    elif pattern is None and not papers:
        answer({"scorers": scorers}, lambda: _overview([cls() for group in found.values() for cls in group]))
    else:
        answer({"scorers": scorers}, lambda: _print_families(found, _papers if papers else _scorers))


def _list_datasets(pattern: str | None) -> None:
    """Print the known datasets, or all facts about those that match a pattern."""
    from ood_scores.data.catalog import CATALOG

    found = [known for known in CATALOG if fnmatch(known.name, pattern or "*")]
    if not found:
        names = [known.name for known in CATALOG]
        raise unknown("no dataset matches", pattern or "*", names, listing="ood-scores list --datasets")
    show = _print_overview_of_datasets if pattern is None else _print_datasets
    answer({"datasets": [_known(known) for known in found]}, lambda: show(found))


def _known(known: KnownSet) -> dict[str, Any]:
    """Return what is known about a dataset, as ``--json`` prints it."""
    from ood_scores.data.sources import remedy

    return {**asdict(known), "get": remedy(known.spec) or "opening it downloads it"}


def _print_overview_of_datasets(found: Sequence[KnownSet]) -> None:
    screen, table = console(), _grid()
    table.add_column(style="dim", justify="right", overflow="fold")
    for known in found:
        table.add_row(known.name, Text(known.license), f"{known.images:,}" if known.images else "")
    screen.print("[bold]Dataset, license, and number of images[/]", table)
    screen.print("\n[bold]ood-scores list NAME --datasets[/] shows how to get and to open a dataset.")


def _print_datasets(found: Sequence[KnownSet]) -> None:
    """Print everything that is known; commands are not broken into lines, so that they can be copied."""
    screen = console()
    for known in found:
        screen.print(Text(known.name, style="bold cyan"), Text(known.what), sep="\n", soft_wrap=True)
        facts = _known(known) | {"md5": known.checksums, "opens with": known.spec}
        for name in ("license", "size", "md5", "page", "get", "opens with"):
            if facts[name]:
                screen.print(Text(f"{name}: ", style="dim").append(facts[name], style="none"), soft_wrap=True)
        screen.print()


def _described(family: str, cls: type[Scorer]) -> dict[str, Any]:
    """Return what is known about a scorer, as ``--json`` prints it."""
    from ood_scores.scorers.families import summary_of

    scorer, paper = cls(), cls.tags.paper
    return {
        "name": scorer.name,
        "summary": summary_of(cls),
        "family": family,
        "needs": scorer.needs,
        "fit_needs": scorer.fit_needs,
        "parameters": {name: each.default for name, each in inspect.signature(cls).parameters.items()},
        "aliases": cls.tags.aliases,
        "experimental": cls.tags.experimental,
        "paper": paper and {**asdict(paper), "bibtex": paper.bibtex()},
    }


def _print_bibtex(families: Mapping[str, Sequence[type[Scorer]]]) -> None:
    known = {cls.tags.paper.key: cls.tags.paper for group in families.values() for cls in group if cls.tags.paper}
    typer.echo("\n\n".join(known[key].bibtex() for key in sorted(known)))


def _print_families(
    families: Mapping[str, Sequence[type[Scorer]]], table_of: Callable[[Sequence[type[Scorer]]], Table]
) -> None:
    screen = console()
    for title, group in families.items():
        screen.print(Text(title, style="bold"))
        screen.print(table_of(group), "")


def _overview(scorers: Sequence[Scorer]) -> None:
    """Print the names of the scorers, grouped by what they need."""
    screen = console()
    groups: dict[str, list[str]] = {title: [] for title in GROUPS}
    for scorer in scorers:
        groups[_group(scorer)].append(f"{scorer.name}{'*' if scorer.tags.experimental else ''}")
    for title, names in groups.items():
        screen.print(Text(title, style="bold"))
        screen.print(Padding(Text(", ".join(sorted(names)), style="cyan"), (0, 0, 0, 2)))
    screen.print("\n[bold]ood-scores list NAME[/] describes a scorer, [bold]ood-scores list '*'[/] all. * experimental")


def _group(scorer: Scorer) -> str:
    from ood_scores.scorers.requirements import COLUMNS

    logits, features, fitted, probed = GROUPS
    if not {*scorer.needs, *scorer.fit_needs} <= {*COLUMNS}:
        return probed
    if scorer.fit_needs:
        return fitted
    return logits if set(scorer.needs) == {"logits"} else features


def _scorers(group: Sequence[type[Scorer]]) -> Table:
    from ood_scores.scorers.families import summary_of

    table = _grid()
    table.add_column(ratio=3, style="dim", overflow="fold")
    longest = max(len(line) for cls in group for line in ["", *_parameters(cls).splitlines()])
    table.add_column(width=min(longest, WIDEST), style="dim", overflow="fold")
    for cls in group:
        scorer = cls()
        note = f" Elsewhere: {', '.join(cls.tags.aliases)}." if cls.tags.aliases else ""
        note += f" Experimental: {cls.tags.experimental}." if cls.tags.experimental else ""
        table.add_row(scorer.name, Text(f"{summary_of(cls)}{note}"), _needs(scorer), Text(_parameters(cls)))
    return table


def _papers(group: Sequence[type[Scorer]]) -> Table:
    table = _grid()
    for cls in group:
        paper = cls.tags.paper
        lines = [f"{paper.authors}. {paper.title}. {paper.venue} {paper.year}.", paper.url] if paper else ["–"]
        table.add_row(cls.name, Text("\n".join([*lines, paper.code] if paper and paper.code else lines)))
    return table


def _grid() -> Table:
    """A table without lines: names, and a wide column beside them."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="cyan", width=20)
    table.add_column(ratio=5, overflow="fold")
    return table


def _needs(scorer: Scorer) -> str:
    return ", ".join(scorer.needs) + (f"\nfit: {', '.join(scorer.fit_needs)}" if scorer.fit_needs else "")


def _parameters(cls: type[Scorer]) -> str:
    return "\n".join(f"{name}={parameter.default}" for name, parameter in inspect.signature(cls).parameters.items())
