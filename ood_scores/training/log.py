"""Output of a run: a progress bar on a terminal, a line per epoch, ``log.csv``, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ood_scores.atomic import replace_text
from ood_scores.errors import BadInput
from ood_scores.optional_packages import install
from ood_scores.progress import ProgressBar, stderr_console
from ood_scores.training.state import CONTINUE, LOG


class Log:
    """A context manager that shows and records the progress of a run.

    Args:
        folder: Folder of ``log.csv`` and ``tensorboard/``.
        steps: Number of steps of all epochs.
        done: Number of steps completed at the start.
        epoch: Number of epochs completed at the start.
        show: Whether to show a line per epoch, and a progress bar on a terminal.
        tensorboard: Whether to write TensorBoard logs.
        silent: Whether to do nothing, for all processes but the first.
    """

    def __init__(
        self, folder: Path, steps: int, done: int, epoch: int, *, show: bool, tensorboard: bool, silent: bool
    ) -> None:
        self.folder = folder
        self.silent = silent
        self.show = show and not silent
        visible = self.show and stderr_console().is_terminal
        self.bar = ProgressBar(_title(epoch), steps, "steps", done=done, visible=visible)
        self.writer = _writer(folder / "tensorboard", epoch) if tensorboard and not silent else None

    def __enter__(self) -> Log:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()
        if self.writer:
            self.writer.close()

    def step(self) -> None:
        self.bar.advance()

    def show_numbers(self, epoch: int, numbers: Mapping[str, Any]) -> None:
        """Show the epoch and the means so far next to the progress bar."""
        self.bar.describe(_line(numbers), _title(epoch))

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Record an epoch; the last record of the history is new."""
        if self.silent:
            return
        write_log(self.folder, history)
        last = history[-1]
        if self.writer:
            for name, value in last.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, last["epoch"])
            self.writer.flush()
        self.say(f"epoch {last['epoch']}  {_line(last)}")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.show:
            stderr_console().print(text, soft_wrap=True)


def write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write ``log.csv``, one row for each epoch."""
    text = io.StringIO()
    columns = dict.fromkeys(name for entry in history for name in entry)
    rows = csv.DictWriter(text, list(columns), lineterminator="\n")
    rows.writeheader()
    rows.writerows(history)
    replace_text(folder / LOG, text.getvalue(), CONTINUE)


def require_tensorboard() -> None:
    """Raise BadInput if TensorBoard is not installed, without importing it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            f"TensorBoard is not installed: {install('train')}, or set tensorboard = false; {LOG} is enough."
        )


def _writer(folder: Path, epoch: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch + 1)


def _title(epoch: int) -> str:
    return f"epoch {epoch + 1}"


def _line(numbers: Mapping[str, Any]) -> str:
    line = f"loss {numbers['loss']:.3f}  accuracy {numbers['accuracy']:.1%}  ‖z‖ {numbers['feature_norm']:.2f}"
    line += f"  lr {numbers['lr']:.2g}"
    if "validation_accuracy" in numbers:
        line += f"  validation {numbers['validation_accuracy']:.1%}"
    return line
