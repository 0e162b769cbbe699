"""Find the last affine map of any classifier by what it computes, not by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, HeadMismatch, HeadNotFound
from ood_scores.extraction.hooks import hooked
from ood_scores.features import Head

HOW_TO_NAME = (
    "Name the affine map that computes the logits with head='module.name' (see model.named_modules()), or pass "
    "head=False to keep logits and the input of the last layer without a head, which some scorers need"
)


def logits_of(output: Any) -> Tensor:
    """Return the logits ``[B, C]`` from the output of a model: a tensor, or an object or dict with ``logits``."""
    logits = output
    if isinstance(output, dict):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise HeadNotFound(
            f"the model returned {type(output).__name__}, but a classifier returns a tensor of logits [batch, classes] "
            "or an object with .logits: wrap the model so that it does."
        )
    if logits.ndim != 2:
        raise HeadNotFound(
            f"the model returned a tensor of shape {tuple(logits.shape)}, not logits [batch, classes]; it has no "
            "classifier (timm: num_classes=0?) or is not an image classifier: create it with num_classes, or wrap it "
            "so that it returns logits."
        )
    return logits


@dataclass
class _Call:
    """The last input and output of a module, flattened to rows; None if they cannot be flattened."""

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


@contextmanager
def record_calls(model: nn.Module, only: nn.Module | None = None) -> Iterator[list[_Call]]:
    """List, in order of execution, the calls of leaf modules (in ``only``) whose input is one vector per sample."""
    calls: list[_Call] = []
    among = set((only or model).modules())
    leaves = [
        (name, module) for name, module in model.named_modules() if module in among and _is_leaf_with_weights(module)
    ]
    with hooked((module, _recorder(name, calls)) for name, module in leaves):
        yield calls


def _is_leaf_with_weights(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _recorder(name: str, calls: list[_Call]) -> Any:
    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        received = _rows(inputs[0]) if inputs else None
        if received is not None:
            calls.append(_Call(name, module, received, _rows(output)))

    return record


def _rows(values: Any) -> Tensor | None:
    """Return ``[B, K]`` for a tensor with one vector per sample, wherever its dimensions of size 1 are, else None."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim < 2:
        return None
    rows = values.flatten(1)
    return rows if rows.shape[1] == max(values.shape[1:]) else None


@dataclass
class FoundHead:
    """The modules whose inputs are the penultimate features, and the head that they form (None: no head)."""

    names: list[str]
    modules: list[nn.Module]
    head: Head | None

    def features_in(self, calls: list[_Call]) -> Tensor:
        """Return the features ``[B, D]`` from recorded calls."""
        last = {id(call.module): call.received for call in calls}
        return features_of([last[id(module)] for module in self.modules])


def features_of(received: Sequence[Tensor | None]) -> Tensor:
    """Return the features ``[B, D]`` from captured inputs; several are concatenated."""
    rows = [_rows(values) for values in received]
    present = [row for row in rows if row is not None]
    if len(present) < len(rows):
        raise HeadNotFound("the head did not receive one feature vector per input in this batch.")
    return torch.cat(present, dim=1) if len(present) > 1 else present[0]


def find_head(calls: list[_Call], logits: Tensor, requested: str | bool | None) -> FoundHead:
    """Find the head among recorded calls.

    The head is the affine module whose output *is* the logits; otherwise all affine modules with that many outputs, if
    the mean of their outputs is the logits (distilled models: features are concatenated and weights divided). The map
    is then checked to reproduce the logits from the features.

    Raises:
        HeadNotFound: if no affine map computes the logits.
        HeadMismatch: if the named module does not.
    """
    if requested is False:
        return _without_head(calls)
    candidates = [
        call for call in calls if call.is_affine and call.returned is not None and call.returned.shape == logits.shape
    ]
    latest = list({id(call.module): call for call in candidates}.values())
    exact = [call for call in reversed(latest) if _close(call.returned, logits)]
    if exact:
        chosen = exact[:1]
    elif len(latest) > 1 and _is_mean([call.returned for call in latest if call.returned is not None], logits):
        chosen = latest
    else:
        raise _not_found(latest, calls, logits, requested)
    return _checked(chosen, logits)


def resolve_module(
    model: nn.Module, requested: str | nn.Module | bool | None
) -> tuple[str | bool | None, nn.Module | None]:
    """Return the name and the module of a requested head; (request, None) if none is named."""
    if requested is None or requested is False:
        return requested, None
    for name, module in model.named_modules():
        if module is requested or name == requested:
            return name, module
    leaves = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    raise BadInput(f"the model has no module {requested!r}; its last modules with weights: {', '.join(leaves[-5:])}.")


def _without_head(calls: list[_Call]) -> FoundHead:
    if not calls:
        raise HeadNotFound("no layer of the model receives one vector per input, so there are no features to keep.")
    last = calls[-1]
    return FoundHead([last.name], [last.module], None)


def _checked(chosen: list[_Call], logits: Tensor) -> FoundHead:
    names = [call.name for call in chosen]
    weight = torch.cat([_weight(call.module) for call in chosen], dim=1) / len(chosen)
    biases = [getattr(call.module, "bias", None) for call in chosen]
    bias = sum((b.detach().float() for b in biases if b is not None), torch.zeros(len(weight), device=weight.device))
    head = Head(weight.cpu(), (bias / len(chosen)).cpu())
    features = torch.cat([call.received for call in chosen], dim=1).float()
    if not _close(head(features).to(logits.device), logits, _tolerance(chosen, logits)):
        raise HeadMismatch(
            f"{' + '.join(names)} outputs the logits, but not as weight @ input + bias (largest difference "
            f"{float((head(features).to(logits.device) - logits).abs().max()):.3g}). {HOW_TO_NAME}."
        )
    return FoundHead(names, [call.module for call in chosen], head)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1).float()


def _tolerance(chosen: list[_Call], logits: Tensor) -> float:
    """The relative error that rounding may cause: autocast and TF32 compute float32 inputs with less precision."""
    if any(_is_half(values) for call in chosen for values in (call.received, call.returned, logits)):
        return 2e-2
    return 5e-3 if logits.is_cuda else 1e-4


def _is_half(values: Tensor | None) -> bool:
    return values is not None and values.dtype in (torch.float16, torch.bfloat16)


def _is_mean(outputs: list[Tensor], logits: Tensor) -> bool:
    tolerance = 1e-2 if any(map(_is_half, outputs)) else 1e-6
    return _close(torch.stack(outputs).mean(0), logits, tolerance)


def _close(values: Tensor | None, logits: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether values are equal within a tolerance relative to the largest logit."""
    if values is None or not logits.isfinite().all():
        return False
    scale = logits.abs().max().clamp_min(1e-6).double()
    return bool(((values.double() - logits.double()).abs().max() / scale) <= tolerance)


def _not_found(
    candidates: list[_Call], calls: list[_Call], logits: Tensor, requested: str | bool | None
) -> HeadNotFound:
    if not logits.isfinite().all():
        return HeadNotFound(
            "the logits of the first batch contain NaN or infinite values: check the weights and inputs."
        )
    if isinstance(requested, str):
        return HeadMismatch(f"the module {requested!r} is not an affine map whose output is the logits. {HOW_TO_NAME}.")
    if not candidates:
        last = ", ".join(call.name for call in calls[-3:]) or "none"
        return HeadNotFound(
            f"no affine module (Linear or 1x1 convolution) outputs {logits.shape[1]} values per input (timm: "
            f"num_classes=0?); the last layers that receive one vector per input: {last}. {HOW_TO_NAME}."
        )
    found = ", ".join(
        f"{call.name} (differs by up to {float((call.returned - logits).abs().max()):.3g})"
        for call in candidates
        if call.returned is not None
    )
    return HeadNotFound(
        f"the logits are neither the output of an affine module nor the mean of several; modules with "
        f"{logits.shape[1]} outputs: {found}. {HOW_TO_NAME}."
    )
