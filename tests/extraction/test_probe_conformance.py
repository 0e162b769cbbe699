"""The properties of all registered probes, and that ``check_probe`` finds a probe that lacks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ood_scores.probes import PROBES, LayerGradients, ParameterGradients, Pass, Probe
from ood_scores.testing import check_probe, probe_checks

MORE: dict[type[Probe], dict[str, Any]] = {
    ParameterGradients: {"groups": ("stage2", "fc.weight"), "p": float("inf")},
    LayerGradients: {"biases": False},
}
"""Parameters to check some probes with, besides their defaults."""

CHECKS = [
    pytest.param(check, id=f"{probe.name}{len(parameters) or ''}-{name}")
    for probe in PROBES.values()
    if probe.__module__.startswith("ood_scores.") and not probe.reads_a_file
    for parameters in ({}, *([MORE[probe]] if probe in MORE else []))
    for name, check in probe_checks(probe, **parameters)
]


@pytest.mark.parametrize("check", CHECKS)
def test_probe(check: Callable[[], None]) -> None:
    check()


@dataclass(frozen=True)
class MeanPixel(Probe):
    """The mean of each input, times a factor."""

    name: str = "mean_pixel"
    factor: Any = 2.0

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: self.values(done)}

    def values(self, done: Pass) -> Tensor:
        return self.factor * done.inputs.mean(dim=(1, 2, 3))


def test_a_probe_of_a_third_party() -> None:
    check_probe(MeanPixel)
    check_probe(MeanPixel, name="mean_pixel_other", factor=float("3"))


class StrayName(MeanPixel):
    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"stray": self.values(done)}


class NotFinite(MeanPixel):
    def values(self, done: Pass) -> Tensor:
        return super().values(done) / 0


class ChangesTheModel(MeanPixel):
    def values(self, done: Pass) -> Tensor:
        done.model.get_submodule("fc").register_forward_hook(lambda *_: None)
        return super().values(done)


class DrawsGlobally(MeanPixel):
    def values(self, done: Pass) -> Tensor:
        return torch.rand(len(done.inputs))


class OfTheBatch(MeanPixel):
    def values(self, done: Pass) -> Tensor:
        return super().values(done) - done.inputs.mean()


class ChangesLogits(MeanPixel):
    def values(self, done: Pass) -> Tensor:
        done.logits.add_(1)
        return super().values(done)


@pytest.mark.parametrize(
    ("cls", "parameters", "properties"),
    [
        (StrayName, {}, {"extras_start_with_its_name"}),
        (NotFinite, {}, {"finite_row_per_input"}),
        (ChangesTheModel, {}, {"model_unchanged"}),
        (DrawsGlobally, {}, {"independent_rows", "deterministic", "model_unchanged"}),
        (OfTheBatch, {}, {"independent_rows"}),
        (ChangesLogits, {}, {"features_and_logits_unchanged"}),
        (MeanPixel, {"factor": torch.tensor(2.0)}, {"parameters_are_json"}),
        (MeanPixel, {"factor": nn.Identity()}, {"parameters_are_json"}),
    ],
)
def test_a_missing_property_is_found(cls: type[Probe], parameters: dict[str, Any], properties: set[str]) -> None:
    found = {}
    for name, check in probe_checks(cls, **parameters):
        try:
            check()
        except AssertionError as error:
            found[name] = str(error)
    assert properties <= found.keys()
    assert all(message.startswith(f"probe {cls.__name__}, property {name!r}: ") for name, message in found.items())
    with pytest.raises(AssertionError, match=f"probe {cls.__name__}, property"):
        check_probe(cls, **parameters)
