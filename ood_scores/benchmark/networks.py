"""The networks of a part: which weights each model stands for, where they are, and how images become their inputs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.spec import ModelTable, Preprocessing
from ood_scores.data.dataset_spec import expanded, located
from ood_scores.errors import MissingData

if TYPE_CHECKING:
    from torch import nn

RECIPES = "benchmarks/recipes"
RUNS = "runs"
TRAINED = "last.safetensors"
"""The file of weights that a training leaves in its folder."""


@dataclass(frozen=True)
class Network:
    """One set of weights.

    Attributes:
        table: the model that it belongs to.
        checkpoint: the file of its weights; None for timm's own.
        weights_sha256: of that file; "" for timm's own.
    """

    table: ModelTable
    checkpoint: Path | None
    weights_sha256: str

    NOT_IN_DIGEST: ClassVar = frozenset({"checkpoint"})

    @property
    def key(self) -> str:
        """A file name that tells the network from every other."""
        return f"{file_name(self.table.title)}-{digest(self)[:8]}"

    def open(self, preprocessing: Preprocessing) -> tuple[nn.Module, Callable[[Any], Any]]:
        """The model in eval mode, and the transform from a PIL image to its input."""
        from ood_scores.models import opening

        table = self.table
        model = opening.load_model(table.name, self.checkpoint, table.num_classes, **table.arguments)
        changes = {key: value for key, value in asdict(preprocessing).items() if value is not None}
        return model, opening.preprocessing(model, **changes)


def checkpoints_of(model: ModelTable) -> tuple[str | None, ...]:
    """The files of a model's weights, one for each seed; None for timm's own."""
    if model.recipe is not None:
        folders = [f"{model.recipe}_seed{seed}" for seed in model.seeds] or [model.recipe]
        return tuple(f"{RUNS}/{folder}/{TRAINED}" for folder in folders)
    return model.checkpoint if isinstance(model.checkpoint, tuple) else (model.checkpoint,)


def find(model: ModelTable, number: int, data: Path) -> Network:
    """The network of a model with one of its checkpoints.

    Raises:
        MissingData: the checkpoint is not there, or a variable of its path is not set.
    """
    text = checkpoints_of(model)[number]
    if text is None:
        return Network(model, None, "")
    path = located(expanded(text), data)
    if not path.is_file():
        raise MissingData(f"there is no checkpoint {path}", _how_to_train(model, number, data))
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            sha256.update(piece)
    return Network(model, path, sha256.hexdigest())


def _how_to_train(model: ModelTable, number: int, data: Path) -> str:
    if model.recipe is None:
        return ""
    folder = data / Path(checkpoints_of(model)[number] or "").parent
    seed = f" --set seed={model.seeds[number]}" if model.seeds else ""
    return f"ood-scores train {RECIPES}/{model.recipe}.toml{seed} --out {folder}"


def file_name(text: str) -> str:
    """A text as a name that every file system takes."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.") or "unnamed"
