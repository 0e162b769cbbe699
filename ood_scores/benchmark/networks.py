"""The networks of a part: their weights and their preprocessing."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError, safe_open

from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.spec import ModelTable, Preprocessing
from ood_scores.data.dataset_spec import expanded, located
from ood_scores.errors import MissingData

if TYPE_CHECKING:
    from torch import nn

RECIPES = "benchmarks/recipes"
RUNS = "runs"
TRAINED = "last.safetensors"
"""The file of weights in the folder of a training."""


@dataclass(frozen=True)
class Network:
    """A model with one of its checkpoints.

    Attributes:
        table: the model.
        checkpoint: file of the weights; None for the weights of timm.
        weights_sha256: SHA-256 of this file; "" for the weights of timm.
    """

    table: ModelTable
    checkpoint: Path | None
    weights_sha256: str

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"checkpoint"})

    @property
    def key(self) -> str:
        """A file name that identifies the network."""
        return f"{file_name(self.table.title)}-{digest(self)[:8]}"

    def open(self, preprocessing: Preprocessing) -> tuple[nn.Module, Callable[[Any], Any]]:
        """Create the model, in eval mode, and the transform from a PIL image to its input."""
        from ood_scores.models import opening

        table = self.table
        model = opening.load_model(table.name, self.checkpoint, table.num_classes, **table.arguments)
        changes = {key: value for key, value in asdict(preprocessing).items() if value is not None}
        return model, opening.preprocessing(model, **changes)

    def widths(self) -> tuple[int, int] | str:
        """Return the numbers of features and classes of the model, or why they are unknown; see ``widths_of``."""
        from ood_scores.models import opening

        table = self.table
        return opening.widths_of(table.name, self.checkpoint, table.num_classes, **table.arguments)


def checkpoints_of(model: ModelTable) -> tuple[str | None, ...]:
    """Return the checkpoint files of a model, one for each seed; None for the weights of timm."""
    if model.recipe is not None:
        name = model.recipe if model.setting is None else f"{model.recipe}_{model.setting}"
        folders = [f"{name}_seed{seed}" for seed in model.seeds] or [name]
        file = TRAINED if model.epoch is None else f"epoch_{model.epoch:03d}.safetensors"
        return tuple(f"{RUNS}/{folder}/{file}" for folder in folders)
    return model.checkpoint if isinstance(model.checkpoint, tuple) else (model.checkpoint,)


def find(model: ModelTable, number: int, data: Path) -> Network:
    """Return the network of a model with one of its checkpoints.

    Raises:
        MissingData: if the checkpoint or a file of texts does not exist, or an environment variable in its path is not
            set.
    """
    from ood_scores.models.zero_shot.prompts import with_files_read

    model = replace(model, arguments=with_files_read(model.arguments, lambda path: _existing(path, data)))
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


def _existing(text: str, data: Path) -> Path:
    path = located(expanded(text), data)
    if not path.is_file():
        raise MissingData(f"there is no file {path}")
    return path


def _how_to_train(model: ModelTable, number: int, data: Path) -> str:
    if model.recipe is None:
        return ""
    recipe = f"{RECIPES}/{model.recipe}.toml"
    folder = data / Path(checkpoints_of(model)[number] or "").parent
    settings = {
        "seed": model.seeds[number] if model.seeds else None,
        "checkpoint_every": model.checkpoint_every,
    }
    changes = [f"{key}={value}" for key, value in settings.items() if value is not None]
    changes += [model.setting] if model.setting else []
    command = ["ood-scores", "train", recipe, *(part for change in changes for part in ("--set", change))]
    again = ["--overwrite"] if _is_finished(folder / TRAINED, model.epoch) else []
    return shlex.join([*command, "--out", str(folder), *again])


def _is_finished(trained: Path, epoch: int | None) -> bool:
    """Return whether a training has passed an epoch, whose weights it did not keep."""
    if epoch is None or not trained.is_file():
        return False
    with suppress(SafetensorError), safe_open(trained, "pt") as file:
        return int((file.metadata() or {}).get("epoch", 0)) >= epoch
    return False


def file_name(text: str) -> str:
    """Turn a text into a name that is valid on every file system."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.") or "unnamed"
