"""Checks that a probe class has the properties that all probes have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.extraction import extract
from ood_scores.extraction.probes.base import PROBES, Probe, record_of
from ood_scores.features import FeatureSet, zero_shot_head
from ood_scores.features.provenance import from_json
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier

ROWS, BATCH = 12, 5

TOLERANCE = 1e-3
"""Maximum difference of a row between batches, relative to the largest value: rounding depends on the batch size."""

Check = Callable[["ProbeCase"], None]


class SmallNetwork(nn.Module):
    """A classifier of images ``[B, 3, 8, 8]`` with two stages, batch norm, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            self.stage1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.stage2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
            self.drop = nn.Dropout(0.2)
            self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.drop(self.stage2(self.stage1(images)).mean(dim=(2, 3))))


def _small_zero_shot_classifier() -> nn.Module:
    """Return a zero-shot classifier of images ``[B, 3, 8, 8]``, which needs transformers."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    texts = {**size, "vocab_size": 8, "bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 0}
    config = CLIPConfig(text_config=texts, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=8)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        return ZeroShotClassifier(CLIPModel(config), zero_shot_head(torch.randn(4, 8), 100.0), ["a", "b", "c", "d"])


class ProbeCase:
    """A probe class to check, with the parameters to check it with."""

    def __init__(self, cls: type[Probe], parameters: dict[str, Any]) -> None:
        self.cls, self.parameters = cls, parameters
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(ROWS, 3, 8, 8, generator=generator)
        self.labels = torch.arange(ROWS) % 4

    @cached_property
    def extras(self) -> dict[str, Tensor]:
        """The extras of all inputs, extracted in batches of ``BATCH`` rows."""
        return dict(self.extract().extras)

    def make(self) -> Probe:
        return self.cls(**self.parameters)

    def network(self) -> nn.Module:
        """Return a new network, of the kind that the probe needs, always with the same weights."""
        return _small_zero_shot_classifier() if self.cls.zero_shot else SmallNetwork()

    def extract(
        self, probes: Sequence[Probe] | None = None, batch: int = BATCH, rows: Tensor | None = None, model: Any = None
    ) -> FeatureSet:
        """Extract some rows, with the probe or other ones."""
        order = torch.arange(ROWS) if rows is None else rows
        batches = [(self.inputs[part], self.labels[part]) for part in order.split(batch)]
        chosen = [self.make()] if probes is None else probes
        return extract(model or self.network(), batches, device="cpu", probes=chosen, progress=False)


PROPERTIES: dict[str, Check] = {}
"""All properties by name, as messages name them."""


def _property(check: Check) -> Check:
    PROPERTIES[check.__name__] = check
    return check


def check_probe(cls: type[Probe], **parameters: Any) -> None:
    """Check that a probe class has all properties that probes have, on a small network.

    Use it in the test of your own probe::

        from ood_scores.testing import check_probe


        def test_my_probe():
            check_probe(MyProbe)

    Args:
        cls: the class. The rows of a class with ``random = True`` may depend on the size of batches.
        **parameters: parameters of the class to check; those that are left out have their defaults.

    Raises:
        AssertionError: if a property is missing; the message names the probe, the property, and the reason.
    """
    for _, check in probe_checks(cls, **parameters):
        check()


def probe_checks(cls: type[Probe], **parameters: Any) -> list[tuple[str, Callable[[], None]]]:
    """Return the checks of ``check_probe`` by the name of the property, to run each as a test of its own."""
    case = ProbeCase(cls, parameters)
    return [(name, partial(_checked, name, case)) for name in PROPERTIES]


def _checked(name: str, case: ProbeCase) -> None:
    """Run a check; whatever it raises becomes an AssertionError that names probe and property."""
    try:
        PROPERTIES[name](case)
    except Exception as error:
        found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"probe {case.cls.__name__}, property {name!r}: {found}") from error


@_property
def created_without_arguments(case: ProbeCase) -> None:
    probe = case.cls()
    registered = [name for name, cls in PROBES.items() if cls is case.cls]
    assert registered in ([], [probe.name]), f"it is registered as {registered}, but its name is {probe.name!r}"


@_property
def extras_start_with_its_name(case: ProbeCase) -> None:
    name = case.make().name
    strays = [extra for extra in case.extras if extra != name and not extra.startswith(f"{name}.")]
    assert case.extras, "it has no extras"
    assert not strays, f"its name is {name!r}, but it has the extras {strays}"


@_property
def finite_row_per_input(case: ProbeCase) -> None:
    for name, values in case.extras.items():
        assert len(values) == ROWS, f"{name} has {len(values)} rows for {ROWS} inputs"
        assert values.isfinite().all(), f"{name} contains NaN or infinite values"


@_property
def parameters_for_extras(case: ProbeCase) -> None:
    name = case.make().name
    for extra in case.extras:
        parts = [extra.removeprefix(f"{name}.")] if extra != name else []
        again = case.cls(**{**case.parameters, **case.cls.parameters_for(parts)})
        assert extra in case.extract([again]).extras, f"the parameters for {extra!r} do not compute it: {again!r}"


@_property
def independent_rows(case: ProbeCase) -> None:
    if case.cls.random:
        return
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    for batch, rows in ((1, None), (ROWS, None), (BATCH, order)):
        for name, values in case.extract(batch=batch, rows=rows).extras.items():
            expected = case.extras[name] if rows is None else case.extras[name][rows]
            error = (values - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            assert error <= TOLERANCE, f"{name} depends on the other rows of a batch: it differs by {float(error):.1e}"


@_property
def deterministic(case: ProbeCase) -> None:
    again = case.extract().extras
    assert again.keys() == case.extras.keys(), (
        f"a first call has the extras {list(case.extras)}, a second one {list(again)}"
    )
    for name, values in again.items():
        assert torch.equal(values, case.extras[name]), f"{name} differs between two calls"


@_property
def parameters_are_json(case: ProbeCase) -> None:
    probe = case.make()
    record = record_of(probe)
    written = json.loads(json.dumps(asdict(record), allow_nan=False))
    assert written["parameters"] == record.parameters, "its parameters change when they are written and read again"
    again = case.cls(**{name: from_json(value) for name, value in written["parameters"].items()})
    assert again == probe, f"its description restores {again!r}, not {probe!r}"


@_property
def model_unchanged(case: ProbeCase) -> None:
    model = case.network().train()
    *_, second, last = model.children()
    second.eval()
    next(last.parameters()).requires_grad_(False)
    before, generator = _state(model), torch.get_rng_state()
    case.extract(model=model)
    for name, value in _state(model).items():
        assert value == before[name], f"the {name} of the model have changed"
    assert torch.equal(torch.get_rng_state(), generator), "it draws from the global random generator"


@_property
def features_and_logits_unchanged(case: ProbeCase) -> None:
    plain, feats = case.extract(()), case.extract()
    assert torch.equal(feats.features, plain.features), "features differ from those without the probe"
    assert feats.logits is not None
    assert plain.logits is not None
    assert torch.equal(feats.logits, plain.logits), "logits differ from those without the probe"


def _state(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [module.training for module in model.modules()],
        "weights and buffers": {name: values.tolist() for name, values in model.state_dict().items()},
        "requires_grad settings": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
    }
