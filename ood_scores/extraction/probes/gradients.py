"""Probes of the gradients of parameters, one input at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import log_softmax, softplus

from ood_scores.device_memory import bytes_on
from ood_scores.errors import BadInput
from ood_scores.extraction.layers import Layers, resolve_layers
from ood_scores.extraction.outputs import logits_of
from ood_scores.extraction.probes.base import Pass, Probe, register_probe
from ood_scores.extraction.probes.reruns import seed_of
from ood_scores.features.row_reductions import row_norm

GRADIENT_BYTES = 256 * 2**20
"""Maximum size of the gradients of several inputs computed together; those of one input may be larger."""

GPU_GRADIENT_SHARE = 1 / 64
"""That on a GPU, as a share of its memory, if it is more."""

ALL = "all"
"""The group of all parameters."""

Loss = Callable[[Tensor], Tensor]
"""The loss of one input from its logits ``[1, C]``."""


@register_probe
@dataclass(frozen=True)
class ParameterGradients(Probe):
    """Norms of gradients of groups of parameters: one extra ``gradnorm.<group>`` ``[N]`` per group.

    ``||grad_w KL(u || softmax(f(x) / T))||_p``, where w is all parameters of the group together. Used by the scorer
    ``gradnorm_params``. For the weight of the last layer, the scorer ``gradnorm`` computes the norm in closed form,
    without a probe.

    Source: Huang et al. 2021 (GradNorm), Table 2: blocks 1 to 4, all parameters, the last layer. They find the last
    layer best. Their code uses targets of 1 instead of 1/C, so that its values are C times these; the ranking is the
    same. Departure: frozen parameters are included (theirs are all trainable).

    Args:
        groups: names of modules or parameters, each of which stands for all parameters below it: ``"layer4"``,
            ``"layer4.1"``, ``"fc"`` (weight and bias), ``"fc.weight"`` (the paper's last layer). ``"all"`` is every
            parameter of the model. The text ``"stages"`` instead of a tuple: the modules that end the stages of the
            model, if they have parameters, and ``"all"``. If such a module is only part of its stage (a transition, a
            normalization), name the block itself.
        p: the order of the norm, in (0, inf].
        temperature: the divisor T of the logits.

    Fails in shallow blocks, whose gradients are less informative (Table 2), and with ``amp="fp16"``, in which gradients
    underflow.

    Cost: three to five forward passes; several inputs at a time only if their gradients take less than
    ``GRADIENT_BYTES``, or 1/64 of the memory of a GPU, and vmap supports the model (no in-place writes into other
    tensors, no branches that depend on values).
    """

    name: str = "gradnorm"
    groups: Layers = (ALL,)
    p: float = 1.0
    temperature: float = 1.0
    gradients = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, str):
            object.__setattr__(self, "groups", tuple(self.groups))
        elif self.groups != "stages":
            raise BadInput(
                f"groups must be a list of names of modules or parameters, or 'stages', got {self.groups!r}."
            )
        if not self.groups or not self.p > 0 or not 0 < self.temperature < float("inf"):
            raise BadInput(
                f"gradnorm: needs at least one group, p in (0, inf], and a positive temperature, got {self!r}."
            )

    @classmethod
    def parameters_for(cls, parts: Sequence[str]) -> Mapping[str, Any]:
        return {"groups": tuple(parts)} if parts else {}

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        groups = self.groups
        if groups == "stages":
            ends = resolve_layers(model, "stages", inputs)
            groups = (*(end for end in ends if _below(end, _parameters(model))), ALL)
        for group in groups:
            if not _below(group, _parameters(model)):
                top = ", ".join(child for child, _ in model.named_children())
                raise BadInput(
                    f"the model has no parameters named {group!r} or below it; its children are {top}: choose a "
                    "name in model.named_parameters()."
                )
        return replace(self, groups=groups)

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = {group: _below(group, _parameters(done.model)) for group in self.groups}
        names = list(dict.fromkeys(name for group in groups.values() for name in group))
        norms = dict(zip(names, gradient_norms(done, done.inputs, names, self._loss, self.p).unbind(1), strict=True))
        return {
            f"{self.name}.{group}": row_norm(torch.stack([norms[name] for name in members], dim=1), self.p)
            for group, members in groups.items()
        }

    def _loss(self, logits: Tensor) -> Tensor:
        """KL(u || softmax) up to a constant."""
        return -log_softmax(logits / self.temperature, dim=1).mean()


@register_probe
@dataclass(frozen=True)
class LayerGradients(Probe):
    """L2 norms of the gradients of every parameter: the extra ``gradients.inputs`` ``[N, L]``, in the model's order.

    The loss is the binary cross-entropy of the logits with a label that is in every class, ``mean_c softplus(-f_c)``.
    Used by the scorer ``gradient_classifier``. With ``noise``, the extra ``gradients.noise`` ``[N, L]`` contains the
    norms for equally many images of uniform noise. Only the fit set needs them: the classifier learns to separate them
    from the inputs. The noise of a batch is uniform between the smallest and the largest value of each channel in that
    batch, and is drawn anew for every batch.

    Source: Lee & AlRegib 2020, "Gradients as a Measure of Uncertainty in Neural Networks"; noise instead of OoD images
    after GradNorm (Huang et al. 2021), supplement E. Departure: a "layer" is taken to be a parameter, so that weights
    and biases are separate.

    Fails with ``amp="fp16"``, as ``ParameterGradients`` does.

    Args:
        noise: whether to compute the norms for noise, too.
        biases: whether to include parameters with a single dimension: biases, and those of normalizations.
        seed: the seed of the noise.

    Cost: that of ``ParameterGradients`` for all parameters; twice that with ``noise``.
    """

    name: str = "gradients"
    noise: bool = False
    biases: bool = True
    seed: int = 0
    gradients = True

    @classmethod
    def parameters_for(cls, parts: Sequence[str]) -> Mapping[str, Any]:
        return {"noise": True} if "noise" in parts else {}

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name, values in _parameters(done.model).items() if self.biases or values.ndim > 1]
        if not names:
            raise BadInput(f"{self.name}: the model has no parameters with respect to which to differentiate.")
        images = {"inputs": done.inputs}
        if self.noise:
            images["noise"] = noise_like(done.inputs, seed_of(self.seed, done.start))
        return {
            f"{self.name}.{kind}": gradient_norms(done, inputs, names, confounded, 2.0)
            for kind, inputs in images.items()
        }


def confounded(logits: Tensor) -> Tensor:
    """Return the binary cross-entropy of the logits ``[1, C]`` with all ones."""
    return softplus(-logits).mean()


def noise_like(inputs: Tensor, seed: int) -> Tensor:
    """Return noise ``[B, channels, ...]``, uniform between the smallest and the largest value of each channel."""
    noise = torch.rand(inputs.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(inputs)
    others = [dim for dim in range(inputs.ndim) if dim != 1]
    low, high = inputs.amin(dim=others, keepdim=True), inputs.amax(dim=others, keepdim=True)
    return low + (high - low) * noise


def gradient_norms(
    done: Pass, inputs: Tensor, names: Sequence[str], loss: Loss, p: float, most_bytes: int | None = None
) -> Tensor:
    """Return the p-norm of the gradient of every named parameter for every input, float64 ``[B, len(names)]``.

    Several inputs are computed together, by ``torch.func``, if their gradients take at most ``most_bytes``, by default
    ``GRADIENT_BYTES``, and more on a large GPU; if vmap does not support the model, one input at a time.
    """
    most_bytes = most_bytes or bytes_on(inputs.device, GRADIENT_BYTES, GPU_GRADIENT_SHARE)
    parameters = {name: _parameters(done.model)[name].detach() for name in names}
    rows = max(1, most_bytes // sum(values.nbytes for values in parameters.values()))
    parts = []
    with _casting_anew(inputs.device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that vmap runs row by row
        for part in _parts({**done.further, "": inputs}, rows):
            try:
                found = _norms_together(done.model, parameters, part, loss, p)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                found = torch.cat([_norms_of_one(done.model, parameters, row, loss, p) for row in _parts(part, 1)])
            parts.append(found)
    return torch.cat(parts)


def _parts(inputs: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Split all inputs of a model into parts of some rows; the name of the first input is empty."""
    split = [values.split(rows) for values in inputs.values()]
    return [dict(zip(inputs, part, strict=True)) for part in zip(*split, strict=True)]


def _logits(model: nn.Module, parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    further = {name: values for name, values in inputs.items() if name}
    return logits_of(functional_call(model, parameters, (inputs[""],), further)).float()


def _norms_together(
    model: nn.Module, parameters: dict[str, Tensor], inputs: dict[str, Tensor], loss: Loss, p: float
) -> Tensor:
    def of_one(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        return loss(_logits(model, parameters, {name: values[None] for name, values in row.items()}))

    return _norms(vmap(grad(of_one), in_dims=(None, 0))(parameters, inputs).values(), p)


def _norms_of_one(
    model: nn.Module, parameters: dict[str, Tensor], row: dict[str, Tensor], loss: Loss, p: float
) -> Tensor:
    with torch.enable_grad():
        leaves = {name: values.detach().requires_grad_() for name, values in parameters.items()}
        value = loss(_logits(model, leaves, row))
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return _norms((gradient[None] for gradient in found), p)


def _norms(gradients: Iterable[Tensor], p: float) -> Tensor:
    """Return the p-norms of the gradients ``[B, ...]`` of every parameter, float64 ``[B, parameters]``."""
    rows = (gradient.reshape(len(gradient), -1) for gradient in gradients)
    return torch.stack([row_norm(row if row.dtype == torch.float64 else row.float(), p) for row in rows], dim=1)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: values for name, values in named if values.is_floating_point() and values.numel()}


def _below(group: str, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters with that name, or below it."""
    return [name for name in parameters if group == ALL or f"{name}.".startswith(f"{group}.")]


def _casting_anew(device: torch.device) -> AbstractContextManager[object]:
    """Continue the current mixed precision without caching casts: under vmap every input casts weights of its own."""
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
