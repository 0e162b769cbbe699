"""Models in timm's own format: ``hf-hub:OWNER/NAME`` on the Hugging Face hub, and ``local-dir:PATH`` in a folder.

The description of a model, ``config.json``, may be a stranger's. Only its architecture, the arguments of the network
itself, and the entries of ``DATA_CONFIG`` are read, and the weights are opened like every other checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ood_scores.errors import BadInput, CheckpointError
from ood_scores.models.checkpoints import INDEX, read_checkpoint
from ood_scores.models.filling import fill
from ood_scores.models.hub import hub_file
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.models.kinds.timm_names import make

DATA_CONFIG = (
    *("input_size", "test_input_size", "fixed_input_size", "crop_pct", "test_crop_pct", "crop_mode"),
    *("interpolation", "mean", "std", "num_classes", "classifier", "first_conv"),
    *("label_names", "label_descriptions"),
)
"""Entries of timm's description of pretrained weights that locate no files."""

WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")


class TimmFolder(ModelKind):
    """A folder that timm's ``save_for_hf`` wrote."""

    form = "local-dir:NAME"
    offline = False

    def file(self, target: str, names: tuple[str, ...]) -> Path:
        """Return the path of the first of some files that exists.

        Raises:
            CheckpointError: if there is none.
        """
        folder = Path(target).expanduser()
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise CheckpointError(f"there is no {' or '.join(names)} in {folder}: pass the folder of timm's save_for_hf.")

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        if not target:
            raise BadInput(f"the name of the model is missing: write {self.form}.")

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        name, own, data = self._described(target)
        return make(name, {**own, **arguments}, pretrained_cfg_overlay=data)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        path = self.file(target, WEIGHTS)
        state = read_checkpoint(path)
        model = self.create(target, {**self.sizes(target, state, arguments), **arguments})
        fill(model, state, path)
        return model

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        name, own, _ = self._described(target)
        return name, {**own, **arguments}

    def _described(self, target: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Return the architecture, the arguments of the network, and the data configuration of the weights."""
        path = self.file(target, ("config.json",))
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            name, arguments = described["architecture"], dict(described.get("model_args") or {})
            weights = described.get("pretrained_cfg", described)
            known = {**described, **weights}
            data = {key: _tuple(known[key]) for key in DATA_CONFIG if known.get(key) is not None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} does not describe a model of timm ({error!r}): for one of transformers, write hf:{target}."
            ) from error
        if "num_classes" in described:
            arguments.setdefault("num_classes", described["num_classes"])
        return name, arguments, data


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TimmHub(TimmFolder):
    """A repository of the Hugging Face hub in timm's format, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""

    form = "hf-hub:NAME"

    def file(self, target: str, names: tuple[str, ...]) -> Path:
        return hub_file(target, names)


MODEL_KINDS["local-dir"] = TimmFolder()
MODEL_KINDS["hf-hub"] = TimmHub()
