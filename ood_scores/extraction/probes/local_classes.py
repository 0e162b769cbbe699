"""A probe of local features of zero-shot classifiers: which class some place in the image is most certain of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, ProbeDoesNotApply
from ood_scores.extraction.hooks import first_argument, hooked
from ood_scores.extraction.probes.base import Pass, Probe, register_probe
from ood_scores.models.running import unwrapped
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier

TOKENS = "tokens"


@register_probe
@dataclass(frozen=True)
class LocalMCM(Probe):
    """The largest softmax probability of a class at a place in the image: ``local_mcm.<temperature>`` ``[N]``.

    ``max_{i,c} softmax(cos(x_i, t) / T)_c`` over the places i, whose features ``x_i`` are those of image tokens that
    attend to themselves alone in the last block, and the texts ``t_c`` of the classes. Only the maximum is kept. It is
    used by the scorer ``gl_mcm``.

    Source: Miyai et al. 2025, "GL-MCM: Global and Local Maximum Concept Matching for Zero-Shot Out-of-Distribution
    Detection", and the authors' code, which takes the values of the last attention layer as features, adds
    the token, and applies the rest of the block and the projection. Beyond the paper, a place of SigLIP has all the
    attention of its pooling.

    Args:
        temperatures: the divisors T of the cosines, one extra for each.
    """

    name: str = "local_mcm"
    zero_shot: ClassVar[bool] = True
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        if not self.temperatures or not all(0 < each < float("inf") for each in self.temperatures):
            raise BadInput(f"temperatures must be positive and finite, got {self.temperatures}.")

    @classmethod
    def parameters_for(cls, parts: Sequence[str]) -> Mapping[str, Any]:
        return {"temperatures": tuple(map(float, parts))} if parts else {}

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        _classifier(model).towers.last_block()
        return self

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def keep(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[TOKENS] = first_argument(inputs, named)

        with hooked([(_classifier(model).towers.last_block(), keep)], before=True, with_kwargs=True):
            yield seen

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cosines = _classifier(done.model).local_cosines(seen[TOKENS])
        return {f"{self.name}.{each}": _most_certain(cosines, each) for each in self.temperatures}


def _classifier(model: nn.Module) -> ZeroShotClassifier:
    model = unwrapped(model)
    if not isinstance(model, ZeroShotClassifier):
        raise ProbeDoesNotApply(
            "local_mcm",
            "only zero-shot classifiers have texts that local features are compared with: create one with "
            "ood_scores.zero_shot_classifier, or use another probe.",
        )
    return model


def _most_certain(cosines: Tensor, temperature: float) -> Tensor:
    """Return the largest softmax probability of cosines ``[B, P, C]``, float64 ``[B]``."""
    with torch.autocast(cosines.device.type, enabled=False):
        return (cosines.double() / temperature).softmax(dim=2).amax(dim=(1, 2))
