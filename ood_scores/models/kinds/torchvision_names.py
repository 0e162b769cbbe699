"""Classifiers of torchvision, such as ``torchvision:resnet50``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum, get_model, get_model_builder, get_model_weights, list_models

from ood_scores.errors import BadInput, CheckpointError
from ood_scores.models.arguments import check_plain, own_arguments
from ood_scores.models.checkpoints import first_sentence
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.registry import unknown

DEFAULT = "DEFAULT"


class TorchvisionNames(ModelKind):
    """A name of torchvision. The argument ``weights`` names its weights, such as ``IMAGENET1K_V1``.

    The preprocessing of the weights becomes timm's data configuration, which describes the same images.
    """

    form = "torchvision:NAME"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        known = list_models(module=models)
        if target not in known:
            raise unknown("torchvision has no classifier", target, known)
        own = own_arguments(get_model_builder(target)) - {"progress"} | {"num_classes"}
        check_plain(f"torchvision:{target}", arguments, own)
        self._weights(target, arguments)

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        return self._make(target, arguments, None)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        weights = self._weights(target, arguments)
        try:
            return self._make(target, arguments, weights)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{weights.url}, the weights of torchvision:{target}, cannot be downloaded ({first_sentence(error)}): "
                "try again where the network is reachable, or pass a checkpoint file."
            ) from error

    def _make(self, target: str, arguments: Mapping[str, Any], weights: WeightsEnum | None) -> nn.Module:
        own = {key: value for key, value in arguments.items() if key != "weights"}
        try:
            model = get_model(target, weights=weights, **own)
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInput(
                f"'torchvision:{target}' cannot be created with {own} ({first_sentence(error)}): change its arguments."
            ) from error
        chosen = self._weights(target, arguments)
        preset = chosen.transforms()
        (size,), (resized,) = preset.crop_size, preset.resize_size
        config = {
            "input_size": (3, size, size),
            "crop_pct": size / resized,
            "crop_mode": "center",
            "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "num_classes": own.get("num_classes", len(chosen.meta["categories"])),
        }
        vars(model)["pretrained_cfg"] = config  # which timm's resolve_model_data_config reads
        return model

    def _weights(self, target: str, arguments: Mapping[str, Any]) -> WeightsEnum:
        known = get_model_weights(target)
        name = arguments.get("weights", DEFAULT)
        if name not in known.__members__:
            raise unknown(f"torchvision:{target} has no weights", str(name), known.__members__)
        return known[name]


MODEL_KINDS["torchvision"] = TorchvisionNames()
