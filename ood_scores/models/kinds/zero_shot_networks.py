"""Networks of zero-shot classifiers, ``zero-shot:KIND:NAME``, as detectors store them; their texts are in the weights.

The name after ``zero-shot:`` is that of the vision-language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, UnknownName
from ood_scores.features.head import Head
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.models.zero_shot.build import STORED
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier

OWN = ("classes", "templates", "width", "negatives")
"""Arguments of the classifier; all others are those of the model."""


class ZeroShotNetwork(ModelKind):
    """A zero-shot classifier without its weights, which contain the bank of texts. Detectors store this kind."""

    form = f"{STORED}:NAME"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        kind, name = self._inner(target)
        kind.check(name, {key: value for key, value in arguments.items() if key not in OWN})
        width = arguments.get("width", 1)
        counts = dict(arguments.get("negatives", {}))
        if not all(type(count) is int and 0 < count < 10**9 for count in (width, *counts.values())):
            raise BadInput(f"the sizes of a bank of texts must be positive numbers, got {width} and {counts}.")

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        missing = [name for name in OWN if name not in arguments]
        if missing:
            raise BadInput(
                f"{self.form} is for detectors, which store their texts: open the model by its own name, with classes=."
            )
        kind, name = self._inner(target)
        model = kind.create(name, {key: value for key, value in arguments.items() if key not in OWN})
        classes, width = arguments["classes"], arguments["width"]
        negatives = {key: torch.zeros(count, width) for key, count in arguments["negatives"].items()}
        head = Head(torch.zeros(len(classes), width), None, negatives)
        return ZeroShotClassifier(model, head, classes, arguments["templates"])

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        raise BadInput(
            f"{self.form} has no weights of its own: open the model by its own name, such as hf:OWNER/NAME, with "
            "classes=."
        )

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"{STORED}:{target}", dict(arguments)

    def _inner(self, target: str) -> tuple[ModelKind, str]:
        kind, _, name = target.partition(":")
        if kind not in MODEL_KINDS or not MODEL_KINDS[kind].offline or kind == STORED:
            raise UnknownName(f"there is no network {STORED}:{target}: write {STORED}:transformers:CLASS.")
        return MODEL_KINDS[kind], name


MODEL_KINDS[STORED] = ZeroShotNetwork()
