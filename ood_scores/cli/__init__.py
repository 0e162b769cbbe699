"""The command line of ood_scores."""

from __future__ import annotations

import inspect as inspect_module
import io
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ood_scores.cli import (
    benchmark,
    calibrate,
    compare,
    demo,
    doctor,
    evaluate,
    extract,
    inspect,
    linear_probe,
    listing,
    paper,
    predict,
    score,
    show,
    train,
)
from ood_scores.cli.options import takes_common_options
from ood_scores.cli.printing import print_error, stoppable, warning_printer
from ood_scores.errors import OodScoresError
from ood_scores.user_code import traceback_of_imported
from ood_scores.version import __version__


class Commands(TyperGroup):
    """Command group that prints errors of the package and the file system in red and exits with code 1.

    Of other errors that the user's own code raises, the traceback starts there.
    """

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = warning_printer()
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                with stoppable("run the same command again"):
                    raise
            except BrokenPipeError:  # the reader closed the pipe: typer exits quietly
                raise
            except (OodScoresError, OSError) as error:
                print_error(error)
                raise typer.Exit(1) from error
            except Exception as error:
                raise error.with_traceback(traceback_of_imported(error)) from error.__cause__


app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ood-scores {__version__}")
        raise typer.Exit


@app.callback(context_settings={"help_option_names": ["-h", "--help"]})
def ood_scores(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Out-of-distribution scores for trained image classifiers: run the model once, then compute every score. Higher scores always mean more in-distribution.

    \b
    [bold]From a model to a table[/]
      ood-scores extract resnet50 folder:imagenet/val cache/val.h5
      ood-scores extract resnet50 folder:textures cache/textures.h5
      ood-scores evaluate --id cache/val.h5 --ood cache/textures.h5

    \b
    [bold]No model or data?[/] This demo runs offline in half a minute:
      ood-scores demo
    """  # noqa: E501  a terminal wraps it


def _help_of(command: Callable[..., None]) -> str:
    """Return the docstring of a command with every paragraph on one line, which a terminal wraps; but not examples."""
    paragraphs = (inspect_module.getdoc(command) or "").split("\n\n")
    return "\n\n".join(text if text.startswith("\b") else " ".join(text.split()) for text in paragraphs)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "extract": extract.extract,
    "linear-probe": linear_probe.linear_probe,
    "score": score.score,
    "show": show.show,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "benchmark": benchmark.benchmark,
    "paper": paper.paper,
    "calibrate": calibrate.calibrate,
    "predict": predict.predict,
    "inspect": inspect.inspect,
    "list": listing.list_scorers,
    "demo": demo.demo,
    "doctor": doctor.doctor,
}

for name, command in COMMANDS.items():
    app.command(name, help=_help_of(command))(takes_common_options(command))


def main() -> None:
    """The entry point of ``ood-scores``; what a stream cannot encode is shown as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="ood-scores")
