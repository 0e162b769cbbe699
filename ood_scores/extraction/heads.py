"""Find the last affine map of any classifier by what it computes, not by its name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, HeadMismatch, HeadNotFound
from ood_scores.extraction.affine import find_affine_place, is_trunk, place_of_features
from ood_scores.extraction.combined_heads import Views, find_combination, viewed_layers
from ood_scores.extraction.encoders import Encoder, declared_encoder
from ood_scores.extraction.head_layers import HOW_TO_NAME, Layer, Recording
from ood_scores.extraction.hooks import Capture, Place
from ood_scores.extraction.outputs import close, features_of, logits_of, raw_logits_of, rounding
from ood_scores.features import Head
from ood_scores.models.zero_shot.classifier import negatives_of


@dataclass
class FoundHead:
    """Where a model has its penultimate features, and the head that maps them to its logits.

    Attributes:
        places: the places whose values are concatenated to the features; none if the features are the model's output.
        head: the head; None if there is none.
        log_probabilities: whether the model returns the log-softmax of the logits, which are then those of the head.
        encoder: the model, if it has no classifier; its logits are those of the head, if there is one.
        is_given: whether the head is not the model's own.
        views: the views of each input whose weighted sum is the features; None without test-time augmentation.
    """

    places: list[Place]
    head: Head | None
    log_probabilities: bool = False
    encoder: Encoder | None = None
    is_given: bool = False
    views: Views | None = None

    @property
    def names(self) -> list[str]:
        """The names of the places."""
        if self.views:
            return [f"{place} (sum of {len(self.views.weights)} views)" for place in self.places]
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
        elif self.views:
            features = self.views.features(capture.calls[0])
        else:
            features = features_of(capture.calls, raw_logits_of(output))
        if self.returns_logits:
            return features, logits_of(output)
        if self.head is None:
            return features, None
        self.head.require_unit(features)
        return features, self.head(features)


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
        self._recording = Recording(model, self._named)

    def recorded(self) -> AbstractContextManager[None]:
        """Record what the leaf modules (in the requested one) with one vector per input receive and return."""
        return self._recording.running()

    def find(self, output: Any) -> FoundHead:
        """Find the head from what the model returned.

        The head is the affine layer whose output *is* the logits; otherwise all affine layers with that many outputs,
        if the mean of their outputs is the logits (distilled models: features are concatenated and weights divided);
        otherwise the map from the last place at which the logits are an affine map of one vector per input; otherwise
        the layers, or the views of each input, whose outputs the logits are a weighted sum of. The map is checked to
        reproduce the logits from the features.

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
        recorded = [self._recording.calls.get(place.name, []) for place in found.places if not place.after]
        if len(recorded) == len(found.places) and all(recorded):
            for calls, pairs in zip(capture.calls, recorded, strict=True):
                calls += [received for received, _ in pairs]
        else:
            with capture.running(), capture.recording():
                output = self._model(self._inputs)
                return found.read(capture, output, self._inputs, self._mask, self._start)
        return found.read(capture, output, self._inputs, self._mask, self._start)

    def _find(self, logits: Tensor) -> FoundHead:
        layers = self._recording.layers(len(logits), self._inputs.device)
        try:
            return _of_layers(layers, logits, self._requested)
        except HeadNotFound as error:
            found = find_affine_place(self._model, self._inputs, self._named)
            if found:
                return FoundHead([found[0]], found[1])
            combined = find_combination(self._model, self._inputs, self._recording, logits)
            if combined:
                return FoundHead(combined.places, combined.head, views=combined.views)
            if viewed := viewed_layers(self._recording, logits):
                raise _not_a_mean_of_views(*viewed[-1]) from error
            raise

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


def _of_layers(layers: list[Layer], logits: Tensor, requested: str | bool | None) -> FoundHead:
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


def _checked(chosen: list[Layer], logits: Tensor) -> FoundHead:
    names = [layer.name for layer in chosen]
    weight = torch.cat([layer.weight for layer in chosen], dim=1) / len(chosen)
    bias = sum((layer.bias for layer in chosen), torch.zeros(len(weight), device=weight.device)) / len(chosen)
    head = Head(weight.cpu(), bias.cpu())
    features = torch.cat([layer.received for layer in chosen], dim=1).float()
    tolerance = rounding(logits, *(values for layer in chosen for values in (layer.received, layer.returned)))
    if not close(head(features).to(logits.device), logits, tolerance):
        raise HeadMismatch(
            f"{' + '.join(names)} outputs the logits, but not as weight @ input + bias (largest difference "
            f"{float((head(features).to(logits.device) - logits).abs().max()):.3g}). {HOW_TO_NAME}."
        )
    return FoundHead([Place(layer.name, layer.module) for layer in chosen], head)


def _is_mean(outputs: list[Tensor], logits: Tensor) -> bool:
    half = any(values.dtype in (torch.float16, torch.bfloat16) for values in outputs)
    return close(torch.stack(outputs).mean(0), logits, 1e-2 if half else 1e-6)


def _not_a_mean_of_views(name: str, count: int) -> HeadNotFound:
    return HeadNotFound(
        f"{name} runs {count} times for each input, as with test-time augmentation, but the logits are not a weighted "
        "mean of what it returns: pass the model without the augmentation; make the wrapper average logits, not "
        "probabilities; or pass head=False to keep logits without a head, which some scorers need."
    )


def _not_found(
    candidates: list[Layer], layers: list[Layer], logits: Tensor, requested: str | bool | None
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
        f"the logits are neither the output of an affine module nor a weighted mean of several; modules with "
        f"{logits.shape[1]} outputs: {found}. {HOW_TO_NAME}."
    )
