"""Find the place in a model from which on it is affine, by replacing what its modules receive and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ood_scores.extraction.hooks import Place, hooked_at
from ood_scores.extraction.outputs import close, joined, raw_logits_of, rounding, rows_of
from ood_scores.features import Head

FEW = 4
"""The number of inputs on which places are tried; a smaller batch is repeated, so that there is as much noise."""

MOST_PLACES = 32
"""The number of places, from the output on, that are tried."""

SEED = 27_182_818
"""The seed of the noise, one that inputs are unlikely to be drawn with."""

PRODUCTS = frozenset({"addmm", "baddbmm", "bmm", "_cdist_forward", "_euclidean_dist", "convolution", "linear", "mm"})
"""The operations after the last of which a model only rescales, selects, and combines its outputs."""


def find_affine_place(model: nn.Module, inputs: Tensor, named: nn.Module | None) -> tuple[Place, Head] | None:
    """Return the last place at which the logits are an affine map of one vector per input, and that map.

    A place is accepted if the gradients of the logits are the same for all rows, and if the map that they form
    reproduces the logits, also those of other inputs whose vectors at this place are replaced by noise: nothing else
    may reach the logits. Places after the last matrix product are not features.

    Args:
        model: the model, in eval mode.
        inputs: the inputs ``[B, ...]``, of which the first few are used.
        named: the module that must receive the features, if it is called; None for any.

    Returns:
        The place and the map; None if there is none.
    """
    with _differentiable(inputs):
        inputs = torch.cat([inputs[:FEW]] * FEW)[:FEW]
        trace = _Trace(model, inputs)
        for place, values in trace.candidates(named)[:MOST_PLACES]:
            try:
                head = _map_from(model, inputs, trace.logits, place, values)
            except Exception:  # of a model that cannot be differentiated, or that does not run on other values
                continue
            if head is not None:
                return place, head
    return None


def place_of_features(model: nn.Module, inputs: Tensor) -> Place | None:
    """Return the place of the features of a model that has no affine head; None if they are the model's output.

    They are the vector that the last matrix product receives, if the output depends on nothing else, or that a layer
    receives whose outputs are added to other logits. What a gate or a convolution receives is neither.
    """
    with _differentiable(inputs), torch.no_grad():
        inputs = torch.cat([inputs[:FEW]] * FEW)[:FEW]
        trace = _Trace(model, inputs)
        try:
            last = trace.into_last_product()
            if last and _determines(model, inputs, trace.logits, *last):
                return last[0]
            layers = reversed(trace.layers_like_logits())
            return next((place for place in layers if _adds(model, inputs, trace.logits, place)), None)
        except Exception:  # of a model that does not run on other values
            return None


def is_trunk(model: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether a model without an affine head has the form of an encoder: its last matrix product returns maps or
    tokens, which are normalized afterwards.

    A classifier applies its last product to vectors, or does not normalize what it returns. A model that declares as
    many classes as its output ``[B, D]`` has values is none.
    """
    if getattr(model, "num_classes", None) == output.shape[1]:
        return False
    with _differentiable(inputs), torch.no_grad():
        trace = _Trace(model, inputs[:FEW])
    return trace.normalizes_last_product()


@dataclass(frozen=True)
class _Event:
    """A place that was reached, its value as rows ``[B, D]`` (None if it is not one vector per input), and whether it
    has two dimensions."""

    place: Place
    rows: Tensor | None
    is_matrix: bool


class _Trace:
    """What the modules of a model receive and return in one pass, in order."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.events: list[_Event] = []
        places = [Place(name, module, after) for name, module in model.named_modules() for after in (False, True)]
        products = _LastProduct(self.events)
        with torch.no_grad(), hooked_at((place, self._recorder(place)) for place in places), products:
            self.logits = raw_logits_of(model(inputs))
        self._before_last_product = self.events[: products.position]

    def _recorder(self, place: Place) -> Callable[[Any], None]:
        def record(value: Any) -> None:
            self.events.append(_Event(place, rows_of(value), isinstance(value, Tensor) and value.ndim == 2))

        return place.hook(record)

    def candidates(self, named: nn.Module | None) -> list[tuple[Place, Tensor]]:
        """Return the places before the last product and their values ``[B, D]``, from the last to the first.

        If ``named`` is called, they are those whose values it, or a module in it, receives.
        """
        inside = set(named.modules()) if named else set()
        named_places = {event.place for event in self.events if event.place.module in inside and not event.place.after}
        wanted = [self._value(place) for place in named_places]
        latest = {event.place: None for event in reversed(self._before_last_product)}
        values = [(place, self._value(place)) for place in latest]
        return [
            (place, rows)
            for place, rows in values
            if rows is not None and (not wanted or any(_same(rows, each) for each in wanted))
        ]

    def _value(self, place: Place) -> Tensor | None:
        return joined([event.rows for event in self.events if event.place == place], len(self.logits))

    def into_last_product(self) -> tuple[Place, Tensor] | None:
        """Return the place and value reached just before the last product, if it is a matrix ``[B, D]``."""
        last = self._before_last_product[-1] if self._before_last_product else None
        return (last.place, last.rows) if last and last.rows is not None and last.is_matrix else None

    def normalizes_last_product(self) -> bool:
        """Whether the last product returns maps or tokens, and a normalization runs after it."""
        after = self.events[len(self._before_last_product) :]
        return not after[0].is_matrix and any("norm" in type(event.place.module).__name__.lower() for event in after)

    def layers_like_logits(self) -> list[Place]:
        """Return the inputs of the layers with weights that map matrices to matrices of the shape of the logits."""
        received: dict[nn.Module, _Event] = {}
        found = []
        for event in self.events:
            module = event.place.module
            if not event.place.after:
                received[module] = event
                continue
            is_layer = getattr(module, "weight", None) is not None and received[module].is_matrix
            if is_layer and event.rows is not None and event.rows.shape == self.logits.shape:
                found.append(received[module].place)
        return found


class _LastProduct(TorchDispatchMode):
    """Remember how many events there were before the last of the ``PRODUCTS``."""

    def __init__(self, events: list[_Event]) -> None:
        super().__init__()
        self.events, self.position = events, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.position = len(self.events)
        return func(*args, **kwargs or {})


def _map_from(model: nn.Module, inputs: Tensor, logits: Tensor, place: Place, values: Tensor) -> Head | None:
    """Return the affine map from the values ``[B, D]`` at a place to the logits ``[B, C]``; None if there is none."""
    features = values.clone().requires_grad_()
    replaced = _logits_with(model, inputs, place, features)
    weight = _jacobian(replaced, features)
    if weight is None:
        return None
    with torch.no_grad():
        bias = (replaced.double() - features.double() @ weight.double().T).mean(dim=0)
        head, tolerance = Head(weight.float(), bias.float()), rounding(values, logits)
        noise = _noise_like(values) * values.abs().max()
        others = _logits_with(model, other_than(inputs), place, noise)
        is_map = close(head(values), logits, tolerance) and close(head(noise), others, tolerance)
    return head if is_map else None


def _jacobian(logits: Tensor, features: Tensor) -> Tensor | None:
    """Return the derivatives ``[C, D]`` of the logits, if they are the same for all rows and combine features."""

    def gradient(value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, features, retain_graph=True, materialize_grads=True)
        return found

    mixed = gradient((logits * torch.linspace(1, 2, logits.shape[1]).to(logits)).sum())
    if not close(mixed, mixed[:1].expand_as(mixed), rounding(features)):
        return None
    weight = torch.stack([gradient(logits[:, number].sum())[0] for number in range(logits.shape[1])])
    return weight if bool(((weight != 0).sum(dim=1) > 1).any()) else None


def _determines(model: nn.Module, inputs: Tensor, logits: Tensor, place: Place, values: Tensor) -> bool:
    """Whether the logits depend on nothing but the values ``[B, D]`` at a place."""
    return close(_logits_with(model, other_than(inputs), place, values), logits, rounding(values, logits))


def _adds(model: nn.Module, inputs: Tensor, logits: Tensor, place: Place) -> bool:
    """Whether what a layer returns is added to the logits."""
    added = _noise_like(logits) * logits.abs().max()
    after = Place(place.name, place.module, after=True)
    with hooked_at([(after, after.hook(lambda values: values + added))]):
        moved = raw_logits_of(model(inputs))
    return close(moved, logits + added, rounding(logits))


def _logits_with(model: nn.Module, inputs: Tensor, place: Place, values: Tensor) -> Tensor:
    """Return the logits with the values ``[B, D]`` at a place; chunks of a batch receive their parts of them."""
    start = 0

    def replace(old: Tensor) -> Tensor:
        nonlocal start
        part = values[start : start + len(old)]
        start = (start + len(old)) % len(values)
        return part.reshape(old.shape)

    with hooked_at([(place, place.hook(replace))]):
        return raw_logits_of(model(inputs))


@contextmanager
def _differentiable(inputs: Tensor) -> Iterator[None]:
    """Leave inference mode and mixed precision."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(inputs.device.type, enabled=False),
    ):
        yield


def _noise_like(values: Tensor) -> Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator("cpu").manual_seed(SEED), device="cpu")
    return noise.to(values)


def other_than(inputs: Tensor) -> Tensor:
    """Return other inputs that the model takes: noise, or for integers the same in another order."""
    return _noise_like(inputs) if inputs.is_floating_point() else inputs.flip(-1)


def _same(rows: Tensor, others: Tensor | None) -> bool:
    return others is not None and rows.shape == others.shape and torch.equal(rows, others)
