"""The command line of ood_scores."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from ood_scores.cli import (
    benchmark,
    calibrate,
    compare,
    demo,
    evaluate,
    extract,
    inspect,
    listing,
    predict,
    score,
    train,
)
from ood_scores.cli.printing import print_error, print_warning
from ood_scores.errors import OodScoresError


class Commands(TyperGroup):
    """Command group that prints errors of the package and the file system in red and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # the reader closed the pipe: typer exits quietly
                raise
            except (OodScoresError, OSError) as error:
                print_error(error)
                raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def ood_scores() -> None:
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


app.command("train")(train.train)
app.command("extract")(extract.extract)
app.command("score")(score.score)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("benchmark")(benchmark.benchmark)
app.command("calibrate")(calibrate.calibrate)
app.command("predict")(predict.predict)
app.command("inspect")(inspect.inspect)
app.command("list")(listing.list_scorers)
app.command("demo")(demo.demo)


def main() -> None:
    """The entry point of ``ood-scores``; what a stream cannot encode is shown as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="ood-scores")
