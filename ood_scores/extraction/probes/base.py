"""Probe: the base class of extras that ``extract`` computes for every input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.extraction.layers import Layers, resolve_layers, watching
from ood_scores.extraction.outputs import logits_of
from ood_scores.features.provenance import ProbeRecord, from_json, to_json
from ood_scores.parameters import between_commas, from_texts, require_known
from ood_scores.registry import Registry
from ood_scores.user_code import defined, is_reference, referenced, split_reference

PROBES: Registry[type[Probe]] = Registry("probe")
"""The probe classes by their default names."""

P = TypeVar("P", bound="type[Probe]")


@dataclass(frozen=True)
class Pass:
    """A batch after its ordinary forward pass.

    Attributes:
        model: the model, in eval mode.
        inputs: the inputs ``[B, ...]``, on the model's device.
        logits: their logits ``[B, C]``, on the model's device; ``[B, 0]`` of an encoder.
        labels: their labels ``[B]``, on the loader's device; None if there are none.
        start: the number of the first row.
        further: the other inputs ``[B, ...]`` of a model with several, by name. Calls of the model with all ``inputs``
            receive them; a call with some rows must pass their rows.
        features_of: returns the features ``[B, D]`` of other inputs, as extraction stores those of ``inputs``.
        transform: the function that makes an input from an image of the dataset; None if the loader does not tell.
    """

    model: nn.Module
    inputs: Tensor
    logits: Tensor
    labels: Tensor | None
    start: int
    further: Mapping[str, Tensor] = field(default_factory=dict)
    features_of: Callable[[Tensor], Tensor] | None = None
    transform: Callable[[Any], Any] | None = None

    def run(self, inputs: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of other inputs."""
        return logits_of(self.model(inputs))


@dataclass(frozen=True)
class Probe(ABC):
    """Computes named extras for every input. Its parameters are part of the cache's identity.

    A new probe defines ``columns``; one that reads layers of the ordinary forward pass also defines ``watch``. It is a
    frozen dataclass whose parameters are plain values: numbers, strings, None, and sequences of them. Test it with
    ``ood_scores.testing.check_probe``.

    Attributes:
        name: the name of its extras, or what these start with.
        gradients: whether it differentiates.
        needs_logits: whether it reads the logits of the model, so that it is refused for encoders.
        random: whether it draws random numbers, so that its extras depend on the size of batches or the order of rows.
        zero_shot: whether it needs a zero-shot classifier.
        reads_a_file: whether it reads files that a parameter names, so that no detector can contain it. Its
            parameter ``root``, if it has one, is the folder where relative paths start: no part of its identity.
    """

    name: str = ""
    gradients: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = True
    random: ClassVar[bool] = False
    zero_shot: ClassVar[bool] = False
    reads_a_file: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise BadInput(f"the name of a probe must be a text without '/', got {self.name!r}.")

    @classmethod
    def parameters_for(cls, parts: Sequence[str]) -> Mapping[str, Any]:
        """Return the parameters with which the extras ``name.part`` are computed; {} for the defaults."""
        return {}

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        """Return the probe with its open parameters decided for this model. Called once, with the first inputs."""
        return self

    def watch(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Provide the values that the ordinary forward pass, made within this context, collects for ``columns``."""
        return nullcontext({})

    @abstractmethod
    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the extras ``[B, ...]`` of a batch under the name of the probe, or names below it (``name.part``)."""


@dataclass(frozen=True)
class LayerProbe(Probe):
    """A probe of the outputs of layers in the ordinary forward pass, with one extra ``name.layer`` per layer."""

    needs_logits: ClassVar[bool] = False
    layers: Layers = "stages"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        elif self.layers != "stages":
            raise BadInput(f"layers must be a list of module names or 'stages', got {self.layers!r}.")

    @classmethod
    def parameters_for(cls, parts: Sequence[str]) -> Mapping[str, Any]:
        return {"layers": tuple(parts)} if parts else {}

    @abstractmethod
    def reduce(self, maps: Tensor) -> Tensor:
        """Reduce a layer's output ``[B, C, P]`` to the extra ``[B, ...]``."""

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        return replace(self, layers=resolve_layers(model, self.layers, inputs))

    def watch(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        return watching(model, self.layers, self.reduce)

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [layer for layer in self.layers if layer not in seen]
        if missing:
            raise BadInput(f"the layer {missing[0]!r} did not run in the forward pass: choose another.")
        return {f"{self.name}.{layer}": seen[layer] for layer in self.layers}


def register_probe(cls: P) -> P:
    """Register a probe under its default name.

    Raises:
        BadInput: if the name belongs to another probe.
    """
    return PROBES.register(cls.name)(cls)


def probe_from(text: str, root: str = "") -> Probe:
    """Create a probe from its ``name``, or from ``name:key=value,key=value`` with parameters.

    The name may be ``FILE.py:CLASS`` or ``MODULE:CLASS`` in code that has been imported.

    Args:
        text: the text.
        root: the folder where relative paths start, for a probe that has this parameter, if the text has none.

    Raises:
        UnknownName: if there is no such probe, or it has no such parameter.
        BadInput: if a parameter has a value of the wrong type, or the name is that of code that has not been imported.
    """
    cls, params = parsed_probe(text)
    has_root = any(each.name == "root" for each in fields(cls))
    return cls(**({"root": root} if root and has_root else {}) | params)


def parsed_probe(text: str) -> tuple[type[Probe], dict[str, Any]]:
    """Return the class and the parameters that a text of ``probe_from`` names, and open no file.

    Raises:
        UnknownName, BadInput: see ``probe_from``.
    """
    name, _, rest = text.partition(":")
    if name not in PROBES and is_reference(text):
        name, rest = _registered_reference(text)
    cls = PROBES[name]
    params = from_texts(cls, between_commas(rest), f"{name}:key=value,key=value")
    require_known(cls, params, f"probe {name!r}")
    return cls, params


def _registered_reference(text: str) -> tuple[str, str]:
    """Register the probe of the user's code that a text starts with; return its name and the rest of the text."""
    module, attribute, rest = split_reference(text) or ("", "", "")
    cls = referenced(f"{module}:{attribute}")
    if not isinstance(cls, type) or not issubclass(cls, Probe):
        raise BadInput(f"{module}:{attribute} is not a probe: name a class that inherits ood_scores.probes.Probe.")
    register_probe(cls)
    return cls.name, rest.removeprefix(":")


def as_probes(layers: Layers | None, probes: Iterable[str | Probe]) -> list[Probe]:
    """Return probes from names and objects, with the probe of ``layers`` first.

    Raises:
        UnknownName: if there is no probe of that name.
        BadInput: if a probe is neither, or two have the same name.
    """
    found = [PROBES["layers"](layers=layers)] if layers is not None else []  # type: ignore[call-arg]
    if isinstance(probes, (str, Probe)):
        raise BadInput(f"probes must be a list of names or Probe objects, got {probes!r}: write probes=['odin'].")
    for probe in probes:
        if not isinstance(probe, (str, Probe)):
            raise BadInput(f"a probe must be a name or a Probe object, got {probe!r}.")
        found.append(probe_from(probe) if isinstance(probe, str) else probe)
    names = [probe.name for probe in found]
    twice = [probe for probe in found if names.count(probe.name) > 1]
    if twice:
        kind = type(twice[0]).__name__
        raise BadInput(f"two probes are named {twice[0].name!r}: give one of them another name, {kind}(name=...).")
    return found


def record_of(probe: Probe) -> ProbeRecord:
    """Return the description of a probe for a provenance."""
    parameters = {each.name: to_json(getattr(probe, each.name)) for each in fields(probe) if each.repr}
    return ProbeRecord(type(probe).__qualname__, parameters)


def class_of(record: ProbeRecord) -> type[Probe] | None:
    """Return the class of a probe, registered or in code that has been imported; None if it is in neither."""
    own = defined(record.kind)
    known = {cls.__qualname__: cls for cls in PROBES.values()}
    return known.get(record.kind, own if isinstance(own, type) and issubclass(own, Probe) else None)


def probe_of(record: ProbeRecord) -> Probe:
    """Create a probe from its description.

    Raises:
        BadInput: if its class is not registered, a parameter cannot be restored, or it names a file, which may be any
            file of this machine.
    """
    cls = class_of(record)
    if cls is not None and cls.reads_a_file:
        raise BadInput(
            f"the probe {record.parameters.get('name')!r} reads a file, which a cache or a detector must not name: no "
            "detector can contain it, so choose another scorer."
        )
    try:
        if cls is None:
            raise TypeError(f"there is no class {record.kind}")
        return cls(**{name: from_json(value) for name, value in record.parameters.items()})
    except (TypeError, ValueError) as error:
        known = ", ".join(sorted(each.__qualname__ for each in PROBES.values()))
        raise BadInput(
            f"cannot create the probe {record} again; registered are {known}: import the module "
            "that registers it first (--import on the command line)."
        ) from error


@contextmanager
def watch_all(probes: Sequence[Probe], model: nn.Module) -> Iterator[list[Mapping[str, Tensor]]]:
    """Provide the values that each probe collects in the forward pass made within this context."""
    with ExitStack() as stack:
        yield [stack.enter_context(probe.watch(model)) for probe in probes]


def input_gradient(done: Pass, loss: Any) -> Tensor:
    """Return the gradient of ``loss(logits)``, summed over the batch, with respect to the inputs ``[B, ...]``."""
    if not done.inputs.is_floating_point():
        raise BadInput(f"a probe that differentiates needs floating-point inputs, got {done.inputs.dtype}.")
    with torch.enable_grad():
        inputs = done.inputs.detach().clone().requires_grad_()  # unlike its source, a clone is not an inference tensor
        (gradient,) = torch.autograd.grad(loss(done.run(inputs).float()).sum(), inputs)
    return gradient
