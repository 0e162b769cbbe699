"""Console output of the commands: what they found, as tables or as JSON, errors, warnings, and tables of facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from ood_scores import errors
from ood_scores.progress import stderr_console
from ood_scores.terminal import SafeConsole

if TYPE_CHECKING:
    import pandas as pd

HERE: dict[type[Exception], str] = {
    errors.NotFitted: "pass --fit CACHE, usually of the training set",
    errors.StaleCache: "pass --overwrite, or another CACHE to keep both",
    errors.DamagedCache: "ood-scores extract ... --overwrite",
    errors.UnreadableRow: "leave out --on-error raise",
    errors.TooManyUnreadableRows: "repair or remove these images, then add --overwrite",
    errors.UnfinishedCache: "run the same ood-scores extract ... again",
}
"""What to do on the command line, for errors whose message is about Python."""


_AS_JSON: ContextVar[bool] = ContextVar("as_json", default=False)
"""Whether standard output is one JSON object."""


@contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Let ``answer`` print JSON, or what people read."""
    token = _AS_JSON.set(as_json)
    try:
        yield
    finally:
        _AS_JSON.reset(token)


def console() -> SafeConsole:
    """Return the console for people: standard output, or standard error with ``--json``."""
    return SafeConsole(stderr=_AS_JSON.get())


def answer(document: Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print what a command found: with ``--json``, the document as JSON, else what a function prints."""
    if _AS_JSON.get():
        typer.echo(json_text(document), nl=False)
    else:
        show()


def json_text(document: Mapping[str, Any]) -> str:
    """Return a document as JSON; see ``plain``, and a data frame becomes a list of rows."""
    from ood_scores.benchmark.results import plain

    values = {name: _rows(value) if hasattr(value, "to_dict") else value for name, value in document.items()}
    return json.dumps(plain(values), indent=2, allow_nan=False) + "\n"


def table_document(table: pd.DataFrame) -> dict[str, Any]:
    """Return a table as a document: its ``attrs``, and its rows."""
    return {**{str(name): value for name, value in table.attrs.items()}, "rows": table}


def _rows(table: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Return the rows of a table, with None for missing values."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def print_error(error: Exception) -> None:
    stderr = stderr_console()
    stderr.print(Text(f"error: {error}", style="red"), soft_wrap=True)
    here = getattr(error, "command", "") or HERE.get(type(error))
    if here and here not in str(error):
        stderr.print(Text(f"here: {here}", style="dim"), soft_wrap=True)


def warning_printer() -> Callable[..., None]:
    """Return a replacement for ``warnings.showwarning`` that prints each text once, without its place in the code."""
    printed: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            stderr_console().print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    return show


@contextmanager
def stoppable(kept: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, say what is kept and how to go on, or what a function returns, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        text = kept if isinstance(kept, str) else kept()
        stderr_console().print(f"[yellow]stopped[/]: {text}", soft_wrap=True)
        raise typer.Exit(130) from None


def facts(pairs: dict[str, str]) -> Table:
    """Table of names and values without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table
