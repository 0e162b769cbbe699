"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="timm's name of the model, or one of this package's CIFAR networks.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights, .safetensors or .pth; without it timm's pretrained ones.")
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Classes of the checkpoint, where they cannot be read off it.")
]
OfChannels = Annotated[str | None, typer.Option(metavar="R,G,B", help="Of pixels in 0 to 1, if not the model's own.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
