"""Find the last affine map of any classifier by what it computes, not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ood_scores.errors import BadInput, HeadMismatch, HeadNotFound
from ood_scores.extraction.affine import find_affine_place, is_trunk, place_of_features
from ood_scores.extraction.encoders import Encoder, declared_encoder
from ood_scores.extraction.hooks import Capture, Place, first_argument, hooked
from ood_scores.extraction.outputs import close, features_of, joined, logits_of, raw_logits_of, rounding, rows_of
from ood_scores.features import Head
from ood_scores.models.zero_shot.classifier import negatives_of

HOW_TO_NAME = (
    "Name the affine map that computes the logits with head='module.name' (see model.named_modules()); set "
    "model.num_classes = 0 if the model is an encoder, whose output is the features; or pass head=False to keep logits "
    "and features without a head, which some scorers need"
)


@dataclass
class FoundHead:
    """Where a model has its penultimate features, and the head that maps them to its logits.

    Attributes:
        places: the places whose values are concatenated to the features; none if the features are the model's output.
        head: the head; None if there is none.
        log_probabilities: whether the model returns the log-softmax of the logits, which are then those of the head.
        encoder: the model, if it has no classifier; its logits are those of the head, if there is one.
        is_given: whether the head is not the model's own.
    """

    places: list[Place]
    head: Head | None
    log_probabilities: bool = False
    encoder: Encoder | None = None
    is_given: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the places."""
        return [str(place) for place in self.places] or ["output of the model"]

    @property
    def returns_logits(self) -> bool:
        """Whether the model itself returns the logits."""
        return not (self.log_probabilities or self.encoder or self.is_given)

    def read(
        self, capture: Capture, output: Any, inputs: Tensor, mask: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the features ``[B, D]`` and the logits ``[B, C]`` of a pass from what it captured and returned.

        Args:
            capture: what the pass captured.
            output: what the model returned.
            inputs: the inputs of the pass.
            mask: which tokens are no padding, for encoders.
            start: the number of the first row.

        Returns:
            The features and the logits; None instead of these for an encoder without a head.

        Raises:
            BadInput: if the features are not those that the pooling or the head needs.
        """
        if self.encoder:
            features = self.encoder.features(output, inputs, mask, start)
        else:
            features = features_of(capture.calls, raw_logits_of(output))
        if self.returns_logits:
            return features, logits_of(output)
        if self.head is None:
            return features, None
        self.head.require_unit(features)
        return features, self.head(features)


@dataclass
class _Layer:
    """A leaf module with weights, and what it received ``[B, D]`` and returned ``[B, K]`` in a pass.

    ``returned`` is None if it is not one vector per input.
    """

    name: str
    module: nn.Module
    received: Tensor
    returned: Tensor | None

    @property
    def is_affine(self) -> bool:
        """Whether the module has a weight that could map each input row to its output row."""
        weight = getattr(self.module, "weight", None)
        if self.returned is None or not isinstance(weight, Tensor) or weight.ndim < 2:
            return False
        return weight[0].numel() == self.received.shape[1] and len(weight) == self.returned.shape[1]


class FirstPass:
    """The pass of a model over its first batch, made within ``recorded``, in which the head is found.

    Args:
        model: the model, in eval mode.
        inputs: the first batch ``[B, ...]``.
        requested: the head, as in ``ExtractionOptions``.
        pool: the pooling of an encoder, as in ``Encoder``.
        mask: which tokens are no padding, for encoders.
        start: the number of the first row.

    Raises:
        BadInput: if the requested module is not one of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        requested: str | nn.Module | bool | Head | None,
        pool: Any = None,
        mask: Tensor | None = None,
        start: int = 0,
    ) -> None:
        self._model, self._inputs, self._pool, self._mask, self._start = model, inputs, pool, mask, start
        self._given = requested if isinstance(requested, Head) else None
        self._requested, self._named = resolve_module(model, requested)
        self._calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what the leaf modules (in the requested one) with one vector per input receive and return."""
        inside = set((self._named or self._model).modules())
        leaves = [(name, leaf) for name, leaf in _leaves_with_weights(self._model) if leaf in inside]
        with hooked(((leaf, self._recorder(name)) for name, leaf in leaves), with_kwargs=True):
            yield

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            received = rows_of(first_argument(inputs, named))
            if received is not None:
                self._calls.setdefault(name, []).append((received, rows_of(output)))

        return record

    def find(self, output: Any) -> FoundHead:
        """Find the head from what the model returned.

        The head is the affine layer whose output *is* the logits; otherwise all affine layers with that many outputs,
        if the mean of their outputs is the logits (distilled models: features are concatenated and weights divided);
        otherwise the map from the last place at which the logits are an affine map of one vector per input. The map is
        checked to reproduce the logits from the features.

        An encoder has no head of its own: its pooled output is the features.

        Raises:
            HeadNotFound: if no affine map computes the logits, or an encoder returns several vectors per input.
            HeadMismatch: if the named module does not, or a given head is for features of another width.
        """
        if self._given:
            return replace(self._without_head(output), head=self._given.with_two_classes(), is_given=True)
        if self._requested is False:
            return self._without_head(output)
        encoder = None if self._named else declared_encoder(self._model, output, self._pool)
        if encoder:
            return FoundHead([], None, encoder=encoder)
        logits = raw_logits_of(output).to(self._inputs.device)
        try:
            found = self._find(logits)
        except HeadMismatch:
            raise
        except HeadNotFound:
            if self._named or not is_trunk(self._model, self._inputs, logits):
                raise
            return FoundHead([], None, encoder=Encoder(self._model, is_declared=False))
        assert found.head is not None
        with torch.inference_mode(False):  # tensors created in inference mode cannot be used under autograd
            words = {kind: values.cpu().clone() for kind, values in negatives_of(self._model).items()}
            head = Head(found.head.weight.cpu().clone(), found.head.bias.cpu().clone(), words)
            return replace(found, head=head.with_two_classes())

    def rows(self, found: FoundHead, output: Any) -> tuple[Tensor, Tensor | None]:
        """Return the features ``[B, D]`` and the logits ``[B, C]`` of the pass, as ``FoundHead.read``."""
        capture = Capture(found.places)
        recorded = [self._calls.get(place.name, []) for place in found.places if not place.after]
        if len(recorded) == len(found.places) and all(recorded):
            for calls, pairs in zip(capture.calls, recorded, strict=True):
                calls += [received for received, _ in pairs]
        else:
            with capture.running(), capture.recording():
                output = self._model(self._inputs)
                return found.read(capture, output, self._inputs, self._mask, self._start)
        return found.read(capture, output, self._inputs, self._mask, self._start)

    def _find(self, logits: Tensor) -> FoundHead:
        layers = self._layers(len(logits))
        try:
            return _of_layers(layers, logits, self._requested)
        except HeadNotFound:
            found = find_affine_place(self._model, self._inputs, self._named)
            if found is None:
                raise
            return FoundHead([found[0]], found[1])

    def _without_head(self, output: Any) -> FoundHead:
        encoder = declared_encoder(self._model, output, self._pool)
        if encoder:
            return FoundHead([], None, encoder=encoder)
        logits = raw_logits_of(output)
        try:
            return replace(self._find(logits), head=None)
        except HeadNotFound:
            place = place_of_features(self._model, self._inputs)
            return FoundHead([] if place is None else [place], None)

    def _layers(self, rows: int) -> list[_Layer]:
        found = []
        for name, pairs in self._calls.items():
            received, returned = (self._here(joined(list(calls), rows)) for calls in zip(*pairs, strict=True))
            assert received is not None
            found.append(_Layer(name, self._model.get_submodule(name), received, returned))
        return found

    def _here(self, values: Tensor | None) -> Tensor | None:
        """Move values of a model on several devices to that of its inputs."""
        return None if values is None else values.to(self._inputs.device)


def _leaves_with_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters and without children other than torch's parametrizations of weights."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if {child for child, _ in module.named_children()} <= {"parametrizations"}
        and next(module.parameters(), None) is not None
        and "parametrizations" not in name.split(".")
    ]


def resolve_module(
    model: nn.Module, requested: str | nn.Module | bool | Head | None
) -> tuple[str | bool | None, nn.Module | None]:
    """Return the name and the module of a requested head; (request, None) if none is named.

    A head that is given has its digest as a name.
    """
    if requested is None or requested is False:
        return requested, None
    if isinstance(requested, Head):
        return requested.digest, None
    for name, module in model.named_modules():
        if module is requested or name == requested:
            return name, module
    leaves = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    raise BadInput(f"the model has no module {requested!r}; its last modules with weights: {', '.join(leaves[-5:])}.")


def _of_layers(layers: list[_Layer], logits: Tensor, requested: str | bool | None) -> FoundHead:
    candidates = [layer for layer in layers if layer.is_affine and _has_shape(layer.returned, logits)]
    exact = [layer for layer in reversed(candidates) if close(layer.returned, logits)]
    if exact:
        return _checked(exact[:1], logits)
    outputs = [layer.returned for layer in candidates if layer.returned is not None]
    if len(candidates) > 1 and _is_mean(outputs, logits):
        return _checked(candidates, logits)
    if isinstance(requested, str):
        for layer in reversed(candidates):
            if layer.returned is not None and close(layer.returned.log_softmax(dim=1), logits, rounding(logits)):
                return replace(_checked([layer], layer.returned), log_probabilities=True)
    raise _not_found(candidates, layers, logits, requested)


def _has_shape(returned: Tensor | None, logits: Tensor) -> bool:
    return returned is not None and returned.shape == logits.shape


def _checked(chosen: list[_Layer], logits: Tensor) -> FoundHead:
    names = [layer.name for layer in chosen]
    weight = torch.cat([_weight(layer).to(logits.device) for layer in chosen], dim=1) / len(chosen)
    biases = [getattr(layer.module, "bias", None) for layer in chosen]
    bias = torch.zeros(len(weight), device=weight.device)
    bias = sum((b.detach().float().to(weight.device) for b in biases if b is not None), bias)
    head = Head(weight.cpu(), (bias / len(chosen)).cpu())
    features = torch.cat([layer.received for layer in chosen], dim=1).float()
    tolerance = rounding(logits, *(values for layer in chosen for values in (layer.received, layer.returned)))
    if not close(head(features).to(logits.device), logits, tolerance):
        raise HeadMismatch(
            f"{' + '.join(names)} outputs the logits, but not as weight @ input + bias (largest difference "
            f"{float((head(features).to(logits.device) - logits).abs().max()):.3g}). {HOW_TO_NAME}."
        )
    return FoundHead([Place(layer.name, layer.module) for layer in chosen], head)


def _weight(layer: _Layer) -> Tensor:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    if is_traceable_wrapper_subclass(weight):
        raise HeadMismatch(
            f"the weight of {layer.name} is quantized ({type(weight).__name__}), and the layer is not an affine map: "
            f"pass the model before quantization. {HOW_TO_NAME}."
        )
    return weight.detach().to_dense().flatten(1).float()


def _is_mean(outputs: list[Tensor], logits: Tensor) -> bool:
    half = any(values.dtype in (torch.float16, torch.bfloat16) for values in outputs)
    return close(torch.stack(outputs).mean(0), logits, 1e-2 if half else 1e-6)


def _not_found(
    candidates: list[_Layer], layers: list[_Layer], logits: Tensor, requested: str | bool | None
) -> HeadNotFound:
    if not logits.isfinite().all():
        return HeadNotFound(
            "the logits of the first batch contain NaN or infinite values: check the weights and inputs."
        )
    for layer in candidates:
        if layer.returned is not None and close(layer.returned.log_softmax(dim=1), logits, rounding(logits)):
            return HeadNotFound(
                f"the model returns the log-softmax of what {layer.name} outputs: pass head={layer.name!r} to keep the "
                "outputs as logits, or wrap the model so that it returns them."
            )
        if layer.returned is not None and close(layer.returned.softmax(dim=1), logits, rounding(logits)):
            return HeadNotFound(
                f"the model returns probabilities, the softmax of what {layer.name} outputs: wrap the model so that it "
                "returns these outputs."
            )
    if isinstance(requested, str):
        return HeadMismatch(f"the module {requested!r} is not an affine map whose output is the logits. {HOW_TO_NAME}.")
    if not candidates:
        last = ", ".join(layer.name for layer in layers[-3:]) or "none"
        return HeadNotFound(
            f"no affine module (Linear or 1x1 convolution) outputs {logits.shape[1]} values per input (timm: "
            f"num_classes=0?); the last layers that receive one vector per input: {last}. {HOW_TO_NAME}."
        )
    found = ", ".join(
        f"{layer.name} (differs by up to {float((layer.returned - logits).abs().max()):.3g})"
        for layer in candidates
        if layer.returned is not None
    )
    return HeadNotFound(
        f"the logits are neither the output of an affine module nor the mean of several; modules with "
        f"{logits.shape[1]} outputs: {found}. {HOW_TO_NAME}."
    )
