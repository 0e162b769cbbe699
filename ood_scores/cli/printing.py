"""Console output of the commands: errors, warnings, progress and tables of facts."""

from __future__ import annotations

from typing import Any

from rich.status import Status
from rich.table import Table
from rich.text import Text

from ood_scores import errors
from ood_scores.terminal import SafeConsole, marked

HERE: dict[type[Exception], str] = {
    errors.NotFitted: "pass --fit CACHE, usually of the training set",
    errors.StaleCache: "pass --overwrite, or another CACHE to keep both",
    errors.DamagedCache: "ood-scores extract ... --overwrite",
    errors.UnreadableRow: "add --on-error skip to the same command",
    errors.UnfinishedCache: "run the same ood-scores extract ... again",
}
"""What to do on the command line, for errors whose message is about Python."""


def console() -> SafeConsole:
    return SafeConsole()


def print_error(error: Exception) -> None:
    stderr = SafeConsole(stderr=True)
    stderr.print(Text(f"error: {error}", style="red"), soft_wrap=True)
    if type(error) in HERE:
        stderr.print(Text(f"here: {HERE[type(error)]}", style="dim"), soft_wrap=True)


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Replacement for ``warnings.showwarning`` that omits the location in the code."""
    SafeConsole(stderr=True).print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def busy(text: str) -> Status:
    """Context manager that shows a spinner on a terminal."""
    return SafeConsole(stderr=True).status(marked(text))


def facts(pairs: dict[str, str]) -> Table:
    """Table of names and values without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    return table
