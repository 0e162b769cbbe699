"""``ood-scores linear-probe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ood_scores.atomic import make_folder, require_writable, user_path
from ood_scores.cli import options
from ood_scores.cli.printing import answer, console, facts
from ood_scores.errors import BadInput
from ood_scores.progress import showing_work
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from ood_scores.features.linear_probe import LinearProbe


def linear_probe(
    train: Annotated[Path, typer.Argument(help="Cache with features and labels to fit on, usually the training set.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the caches with logits and head.")],
    others: Annotated[list[Path] | None, typer.Argument(help="Further caches of the same model.")] = None,
    l2: Annotated[
        float | None, typer.Option(min=0, help="Weight of the penalty; by default chosen on held-out rows.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the choice of held-out rows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace caches in the folder.")] = False,
    device: options.Device = "auto",
) -> None:
    """Fit a linear classifier on the features of an encoder, and write caches that have its logits and head.

    With them, every score, evaluate, and calibrate work as on the caches of a classifier. The caches keep their names.

    \b
    [bold]Examples[/]
      ood-scores extract vit_small_patch14_dinov2 folder:imagenet/train train.h5
      ood-scores extract vit_small_patch14_dinov2 folder:imagenet/val val.h5
      ood-scores extract vit_small_patch14_dinov2 folder:textures textures.h5
      ood-scores linear-probe train.h5 val.h5 textures.h5 --out probed
      ood-scores evaluate --id probed/val.h5 --ood probed/textures.h5
    """
    import ood_scores
    from ood_scores.features import linear_probe as probes
    from ood_scores.features.accuracy import accuracy_of
    from ood_scores.scorers.compatibility import require_same_features

    paths = [user_path(each) for each in (train, *(others or ()))]
    out = user_path(out)
    targets = {path: out / path.name for path in paths}
    if len(set(targets.values())) < len(paths):
        raise BadInput("two of the caches have the same file name: rename one of them.")
    for path, target in targets.items():
        if target.exists() and (not overwrite or target.samefile(path)):
            raise BadInput(f"{target} exists: choose another --out, or pass --overwrite.")
    require_writable(out)
    sets = {path: ood_scores.load(path, device) for path in paths}
    for path, feats in sets.items():
        require_same_features(sets[paths[0]].provenance, feats.provenance, str(paths[0]), str(path))
    make_folder(out)
    with showing_work("linear probe …"):
        fitted = probes.linear_probe(sets[paths[0]], l2=l2, seed=seed)
    written = []
    for path, target in targets.items():
        probed = sets[path].with_head(fitted.head)
        probed.save(target)
        written.append({"cache": str(target), "rows": len(probed), "accuracy": accuracy_of(probed)})
    found = {"classes": fitted.head.num_classes, "l2": fitted.l2, "accuracy": fitted.accuracy, "caches": written}
    answer(found, lambda: _show(fitted, written))


def _show(fitted: LinearProbe, written: list[dict[str, Any]]) -> None:
    screen = console()
    chosen = f", chosen of {len(fitted.losses)} on held-out rows" if fitted.losses else ""
    held_out = {} if fitted.accuracy is None else {"accuracy": f"{fitted.accuracy:.2%} on held-out rows"}
    screen.print(facts({"classes": f"{fitted.head.num_classes:,}", "l2": f"{fitted.l2:g}{chosen}", **held_out}))
    for each in written:
        correct = "" if each["accuracy"] is None else f", accuracy {each['accuracy']:.2%}"
        screen.print(f"[green]✓[/] {each['rows']:,} rows{correct} in [bold]{marked(each['cache'])}[/]")
