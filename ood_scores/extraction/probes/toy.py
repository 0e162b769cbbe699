"""A probe that shows what a new probe costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ood_scores.extraction.probes.base import Pass, Probe, register_probe


@register_probe
@dataclass(frozen=True)
class MeanInput(Probe):
    """The mean of every input: the extra ``mean_input`` ``[N]``."""

    name: str = "mean_input"

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: done.inputs.flatten(1).mean(dim=1)}
