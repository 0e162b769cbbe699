"""``ood-scores show``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from ood_scores.cli import completion, options
from ood_scores.cli.parsing import parameters, scorer_name
from ood_scores.cli.printing import answer, console
from ood_scores.errors import BadInput
from ood_scores.progress import showing_work
from ood_scores.terminal import marked

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
DEFAULT_COUNT = 24


def show(
    cache: Annotated[Path, typer.Argument(help="Feature cache, written by ood-scores extract.")],
    scorer: Annotated[
        str, typer.Option(help="Scorer name; ood-scores list shows all names.", autocompletion=completion.scorers)
    ] = "energy",
    fit: Annotated[Path | None, typer.Option(help="Cache to fit on, usually the ID training data.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Scorer parameter as KEY=VALUE; may be repeated.")
    ] = None,
    most_ood: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Number of pictures with the lowest scores; default 24.")
    ] = None,
    most_id: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Number of pictures with the highest scores, instead.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|DATA",
            help="Folder or dataset of the pictures, as it was given to extract.",
            autocompletion=completion.paths_and_datasets,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File of the grid: .png, .pdf, .svg, .jpg, or .webp.")] = Path("grid.png"),
    device: options.Device = "auto",
) -> None:
    """Draw the pictures with the lowest or highest scores of a cache.

    Pictures are found by the names of the rows, which the cache keeps. The cache also records where they were, but it
    may come from somebody else: only pictures that you name with --data are opened.

    \b
    [bold]Examples[/]
      ood-scores show textures.h5 --data folder:textures --out grid.png
      ood-scores show textures.h5 --data folder:textures --most-id 24
      ood-scores show val.h5 --data val --scorer mahalanobis --fit train.h5
    """
    import ood_scores
    from ood_scores.atomic import replacing, require_writable, user_path
    from ood_scores.evaluation.pictures import dataset_of
    from ood_scores.plotting.picture_grid import picture_grid

    if most_ood and most_id:
        raise BadInput("--most-ood and --most-id cannot be combined: run the command once for each.")
    if out.suffix not in FORMATS:
        raise BadInput(f"cannot write {out}: use a file name that ends in {', '.join(FORMATS[:-1])}, or {FORMATS[-1]}.")
    require_writable(user_path(out).parent)
    feats = ood_scores.load(cache, device)
    pictures = dataset_of(feats, data)
    scorer = scorer_name(scorer)
    params = parameters(scorer, param or ())
    with showing_work(f"{scorer} …"):
        scores = ood_scores.score(scorer, feats, ood_scores.load(fit, device) if fit else None, **params)
        most, count = ("id", most_id) if most_id else ("ood", most_ood or DEFAULT_COUNT)
        figure = picture_grid(feats, scores, pictures, most=most, count=count, title=scorer)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=out.suffix[1:])
    with replacing(user_path(out)) as file:
        file.write(drawn.getvalue())
        file.check()
    which = "highest" if most_id else "lowest"
    line = f"[green]✓[/] pictures with the {which} [bold]{scorer}[/] scores in [bold]{marked(out)}[/]"
    answer({"picture": str(out), "scorer": scorer, "scores": which}, lambda: console().print(line))
