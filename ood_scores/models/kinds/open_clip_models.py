"""Models of open_clip, such as ``open_clip:ViT-B-32/laion2b_s34b_b79k``, as zero-shot classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ood_scores.errors import BadInput, CheckpointError
from ood_scores.models.checkpoints import first_sentence
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.optional_packages import require
from ood_scores.registry import unknown

CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}
"""timm's names of open_clip's ways to resize an image."""


class OpenClipModel(ModelKind):
    """``NAME/PRETRAINED``, the name of a model and of its weights; with a checkpoint, ``NAME``.

    The preprocessing of the model becomes timm's data configuration, which describes the same images.
    """

    form = "open_clip:NAME"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        if arguments:
            raise BadInput(f"a model of open_clip has no argument {min(arguments)!r}: remove it.")
        name, weights = _parts(target)
        library = _library()
        if name not in library.list_models():
            raise unknown("open_clip has no model", name, library.list_models())
        known = library.list_pretrained_tags_by_model(name)
        if weights and weights.lower() not in known:
            raise unknown(f"open_clip has no weights of {name}", weights, known)

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        return self._made(_parts(target)[0], None)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        name, weights = _parts(target)
        if not weights:
            known = ", ".join(_library().list_pretrained_tags_by_model(name)) or "none"
            raise BadInput(f"write open_clip:{name}/WEIGHTS; open_clip has the weights {known}.")
        try:
            return self._made(name, weights)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the weights of open_clip:{target} cannot be fetched ({first_sentence(error)}): try again where the "
                "network is reachable, or pass a checkpoint file."
            ) from error

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def tokenizer(self, target: str) -> Any:
        return _library().get_tokenizer(_parts(target)[0])

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"open_clip:{_parts(target)[0]}", {}

    def _made(self, name: str, weights: str | None) -> nn.Module:
        model = _library().create_model(name, pretrained=weights, device="cpu")
        visual = model.visual
        shown = getattr(visual, "preprocess_cfg", {})
        size = visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        vars(model)["pretrained_cfg"] = {
            "input_size": (3, height, width),
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[shown.get("resize_mode", "shortest")],
            "interpolation": shown.get("interpolation", "bicubic"),
            "mean": tuple(shown["mean"]),
            "std": tuple(shown["std"]),
        }
        return model


def _parts(target: str) -> tuple[str, str]:
    name, _, weights = target.partition("/")
    return name, weights


def _library() -> Any:
    require("models of open_clip need", "clip", "open_clip")
    import open_clip

    return open_clip


MODEL_KINDS["open_clip"] = OpenClipModel()
