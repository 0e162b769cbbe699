"""``ood-scores train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_scores.cli import options
from ood_scores.cli.printing import answer, console, stoppable
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from ood_scores.training import Recipe, Trained


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file of the recipe.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Key of the recipe to override; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; defaults to runs/ and the recipe's name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard a previous run in this folder.")] = False,
    device: options.Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show neither a progress bar nor a line per epoch.")] = False,
) -> None:
    """Train a network by a recipe, or resume an interrupted run when the same command is given again.

    The output folder contains last.safetensors, which timm and extract open, log.csv, and the state to resume from.

    \b
    [bold]Examples[/]
      ood-scores train benchmarks/recipes/digits.toml
      ood-scores train benchmarks/recipes/haas_resnet18_60_l2.toml \\
          --set seed=1 --out runs/l2_seed1
      ood-scores train benchmarks/recipes/rna_cifar10_lt.toml \\
          --set auxiliary.data=npz:300k.npz --set amp=bf16
      torchrun --nproc-per-node 4 -m ood_scores train RECIPE.toml

    \b
    [bold]A recipe[/]
      epochs = 60
      \\[model]
      name = "cifar_resnet20"          # or any other timm model
      \\[data]
      train = "torchvision:CIFAR10?split=train&download=true"
      validation = 0.1
      augmentation = "crop_flip"
      \\[objective]
      name = "l2_norm"
      \\[optimizer]
      lr = 0.1
      \\[schedule]
      name = "steps"
      milestones = [40, 50]
    """
    from ood_scores.runtime import Ranks
    from ood_scores.training import load_recipe
    from ood_scores.training import train as run

    read = load_recipe(recipe, set or ())
    folder = out or Path("runs") / read.name
    without = ", without --overwrite," if overwrite else ""
    with stoppable(f"run the same command{without} to resume from [bold]{marked(folder)}[/]"):
        trained = run(read, folder, device=device, overwrite=overwrite, progress=not quiet)
    if Ranks.here().first:
        found = {
            "checkpoint": str(trained.checkpoint),
            "epochs": len(trained.history),
            "accuracy": trained.accuracy,
        }
        answer(found, lambda: _say_where(read, trained))


def _say_where(recipe: Recipe, trained: Trained) -> None:
    accuracy = ", ".join(f"{marked(name)} [bold]{value:.2%}[/]" for name, value in trained.accuracy.items())
    console().print(f"accuracy: {accuracy}", soft_wrap=True)
    console().print(
        f"""[green]✓[/] weights after {len(trained.history)} epochs in [bold]{marked(trained.checkpoint)}[/]

[bold]Try next[/]
  ood-scores extract {marked(recipe.model.name)} "{marked(recipe.data.test or recipe.data.train)}" cache.h5 \\
      --checkpoint {marked(trained.checkpoint)}""",
        soft_wrap=True,
    )
