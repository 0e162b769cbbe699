"""The layers of any model: which of them end a stage, and their outputs as channels and positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.extraction.hooks import hooked

Layers = Literal["stages"] | Sequence[str]
"""Names of modules, or ``"stages"`` for the modules that ``stages`` finds."""

MOST_STAGES = 6
"""If a model names more stages than this (transformers name every block), four are chosen, evenly spaced."""


def resolve_layers(model: nn.Module, layers: Layers, inputs: Tensor) -> tuple[str, ...]:
    """Return the names of the layers, after checking that they are modules of the model.

    Raises:
        BadInput: if the model has no module of that name, or no stages are found.
    """
    if layers == "stages":
        return stages(model, inputs)
    known = dict(model.named_modules())
    for name in layers:
        if name not in known:
            top = ", ".join(child for child, _ in model.named_children())
            raise BadInput(f"the model has no layer {name!r}; its children are {top}; see model.named_modules().")
    return tuple(layers)


def stages(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the names of the modules that end the stages of a model, from the input to the output.

    They are taken from timm's ``feature_info``, if the model has it. Otherwise one input is run through the model: for
    every size of the feature maps, the last module that outputs it, except for inner parts of blocks that change the
    size; for models of tokens, four of the largest group of blocks of one class, evenly spaced.
    """
    names = _timm_stages(model)
    if not names:
        outputs = _outputs_of_modules(model, inputs[:1])
        names = _ends_of_sizes(model, outputs) or _token_blocks(model, outputs)
    if not names:
        raise BadInput("no stages were found in the model: name layers with layers=['layer1', ...].")
    return names if len(names) <= MOST_STAGES else tuple(names[len(names) * (i + 1) // 4 - 1] for i in range(4))


def as_maps(output: Any) -> Tensor:
    """Return the output of a layer as channels and positions, ``[B, C, P]``.

    The output may be maps ``[B, C, H, W]`` or ``[B, H, W, C]``, tokens ``[B, T, C]``, or vectors ``[B, C]``; the first
    of several tensors is used. Maps are taken to be channels-last if their second and third dimensions are equal and
    the last one differs: this assumes square maps.
    """
    values = _tensor(output)
    if values is None or values.ndim < 2:
        raise BadInput("a layer does not output a floating-point tensor [batch, ...]: choose another layer.")
    if values.ndim == 2:
        return values[:, :, None]
    if values.ndim == 3 or _is_channels_last(values):
        return values.flatten(1, -2).transpose(1, 2)
    return values.flatten(2)


@contextmanager
def watching(
    model: nn.Module, layers: Sequence[str], reduce: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Provide a dictionary that every pass of the model fills with ``reduce`` of each layer's output ``[B, C, P]``."""
    seen: dict[str, Tensor] = {}
    with hooked((model.get_submodule(name), _keeper(name, seen, reduce)) for name in layers):
        yield seen


def _keeper(name: str, seen: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = reduce(as_maps(output))

    return keep


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _is_channels_last(values: Tensor) -> bool:
    return values.ndim == 4 and values.shape[1] == values.shape[2] != values.shape[3]


def _timm_stages(model: nn.Module) -> tuple[str, ...]:
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)):
        return ()
    runs = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    named = [str(entry.get("module")) for entry in info if isinstance(entry, dict)]
    names = tuple(dict.fromkeys(name for name in named if name))  # "" is the model itself
    return names if runs.issuperset(names) else ()


@dataclass
class _Output:
    """The shapes of the feature maps that a module received and returned, and whether it returned tokens."""

    name: str
    received: tuple[int, ...] | None
    returned: tuple[int, ...] | None
    tokens: bool


def _outputs_of_modules(model: nn.Module, inputs: Tensor) -> list[_Output]:
    """Return the outputs of all modules that run exactly once, in the order in which they finish."""
    outputs: list[_Output] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, received: tuple[Any, ...], output: Any) -> None:
            values = _tensor(output)
            tokens = values is not None and values.ndim == 3
            outputs.append(_Output(name, _map_size(_tensor(received)), _map_size(values), tokens))

        return record

    with hooked((module, recorder(name)) for name, module in model.named_modules() if name):
        model(inputs)
    times = Counter(output.name for output in outputs)
    return [output for output in outputs if times[output.name] == 1]


def _map_size(values: Tensor | None) -> tuple[int, ...] | None:
    if values is None or values.ndim != 4:
        return None
    return tuple(values.shape[1:3] if _is_channels_last(values) else values.shape[2:])


def _ends_of_sizes(model: nn.Module, outputs: list[_Output]) -> tuple[str, ...]:
    """For each size of maps, return the last module that outputs it; none if there are fewer than two sizes."""
    containers = {name for name, module in model.named_modules() if type(module) is nn.Sequential}
    changing = {
        (output.name, output.received)
        for output in outputs
        if output.returned and output.received != output.returned and output.name not in containers
    }
    last: dict[tuple[int, ...], str] = {}
    for output in outputs:
        inside = any((parent, output.returned) in changing for parent in _parents(output.name))
        larger = any(min(output.returned or ()) > max(size) for size in last if output.returned)
        if output.returned and max(output.returned) > 1 and not inside and not larger:
            last.pop(output.returned, None)
            last[output.returned] = output.name
    return tuple(last.values()) if len(last) > 1 else ()


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _token_blocks(model: nn.Module, outputs: list[_Output]) -> tuple[str, ...]:
    """Return four, evenly spaced, of the largest group of sibling modules of one class that output tokens."""
    known = dict(model.named_modules())
    groups: dict[tuple[str, type], list[str]] = {}
    for output in outputs:
        if output.tokens:
            groups.setdefault((output.name.rpartition(".")[0], type(known[output.name])), []).append(output.name)
    largest = max(groups.values(), key=len, default=[])
    count = min(4, len(largest))
    return tuple(largest[len(largest) * (i + 1) // count - 1] for i in range(count)) if len(largest) > 1 else ()
