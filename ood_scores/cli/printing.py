"""Console output of the commands: errors, warnings, progress and tables of facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from ood_scores import errors
from ood_scores.progress import stderr_console
from ood_scores.terminal import SafeConsole

HERE: dict[type[Exception], str] = {
    errors.NotFitted: "pass --fit CACHE, usually of the training set",
    errors.StaleCache: "pass --overwrite, or another CACHE to keep both",
    errors.DamagedCache: "ood-scores extract ... --overwrite",
    errors.UnreadableRow: "leave out --on-error raise",
    errors.TooManyUnreadableRows: "repair or remove these images, then add --overwrite",
    errors.UnfinishedCache: "run the same ood-scores extract ... again",
}
"""What to do on the command line, for errors whose message is about Python."""


def console() -> SafeConsole:
    return SafeConsole()


def print_error(error: Exception) -> None:
    stderr = stderr_console()
    stderr.print(Text(f"error: {error}", style="red"), soft_wrap=True)
    here = getattr(error, "command", "") or HERE.get(type(error))
    if here:
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
