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

from ood_scores.errors import BadInput
from ood_scores.extraction.heads import logits_of
from ood_scores.extraction.layers import Layers, resolve_layers
from ood_scores.extraction.probes.base import Pass, Probe, register_probe
from ood_scores.extraction.probes.reruns import seed_of
from ood_scores.features.block import row_norm

GRADIENT_BYTES = 256 * 2**20
"""How much the gradients of several inputs, computed together, take at most; those of one input may take more."""

ALL = "all"
"""The group of all parameters."""

Loss = Callable[[Tensor], Tensor]
"""The loss of one input from its logits ``[1, C]``."""


@register_probe
@dataclass(frozen=True)
class ParameterGradients(Probe):
    """Norms of gradients of chosen parameters: an extra ``gradnorm.<group>`` ``[N]`` for each group of them.

    ``||grad_w KL(u || softmax(f(x) / T))||_p``, w being all parameters of the group together. Read by the scorer
    ``gradnorm_params``. For the weight of the last layer the scorer ``gradnorm`` has it in closed form, with no probe.

    Source: Huang et al. 2021 (GradNorm), Table 2: blocks 1 to 4, all parameters, the last layer. They find the last
    layer best. Their code uses targets of 1 in place of 1/C, so its values are C times these; the ranking is the same.
    Departure: frozen parameters count as well (theirs are all trainable).

    Args:
        groups: names of modules or of parameters, each of which stands for all parameters below it: ``"layer4"``,
            ``"layer4.1"``, ``"fc"`` (weight and bias), ``"fc.weight"`` (the paper's last layer). ``"all"`` is every
            parameter of the model. In place of the tuple ``"stages"``: the modules that end the stages of the model, if
            they have parameters, and ``"all"``. Where such a module is only part of its stage (a transition, a
            normalisation) name the block itself.
        p: order of the norm, in (0, inf].
        temperature: the divisor T of the logits.

    Fails in shallow blocks, whose gradients tell less (Table 2), and with ``amp="fp16"``, in which gradients underflow.

    Cost: three to five forward passes; several inputs at a time only if the gradients of all of them take less than
    ``GRADIENT_BYTES``, and the model has nothing that vmap refuses (writing into other tensors in place, branches that
    depend on values).
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
            raise BadInput(f"groups is a list of names of modules or parameters, or 'stages', got {self.groups!r}.")
        if not self.groups or not self.p > 0 or not 0 < self.temperature < float("inf"):
            raise BadInput(f"gradnorm: some group, p in (0, inf] and a positive temperature are needed, got {self!r}.")

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
                    f"the model has no parameters named {group!r} or below it; its children are {top}; see "
                    "model.named_parameters()."
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
        """KL(u || softmax) but for a constant."""
        return -log_softmax(logits / self.temperature, dim=1).mean()


@register_probe
@dataclass(frozen=True)
class LayerGradients(Probe):
    """L2 norms of the gradients of every parameter: an extra ``gradients.inputs`` ``[N, L]``, in the model's order.

    The gradients are those of the binary cross-entropy of the logits with a label that is in every class,
    ``mean_c softplus(-f_c)``. Read by the scorer ``gradient_classifier``. With ``noise`` the same of as many images of
    uniform noise, ``gradients.noise`` ``[N, L]``, wanted of the fit set only: they are what the classifier learns to
    tell from the inputs. The noise of a batch is uniform between the smallest and the largest value that each channel
    has in that batch, and is drawn anew for every batch.

    Source: Lee & AlRegib 2020, "Gradients as a Measure of Uncertainty in Neural Networks"; the noise in place of OoD
    images after GradNorm (Huang et al. 2021), supplement E. A "layer" is read here as a parameter: weights and biases
    count for themselves.

    Fails as ``ParameterGradients`` does with ``amp="fp16"``.

    Args:
        noise: also of noise.
        biases: also of parameters with a single dimension: biases, and what normalisations have.
        seed: of the noise.

    Cost: as ``ParameterGradients`` of all parameters; twice that with ``noise``.
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
            raise BadInput(f"{self.name}: the model has no parameters to differentiate by.")
        images = {"inputs": done.inputs}
        if self.noise:
            images["noise"] = noise_like(done.inputs, seed_of(self.seed, done.start))
        return {
            f"{self.name}.{kind}": gradient_norms(done, inputs, names, confounded, 2.0)
            for kind, inputs in images.items()
        }


def confounded(logits: Tensor) -> Tensor:
    """The binary cross-entropy of the logits ``[1, C]`` with all ones."""
    return softplus(-logits).mean()


def noise_like(inputs: Tensor, seed: int) -> Tensor:
    """Noise ``[B, channels, ...]``, uniform between the smallest and the largest value of each channel."""
    noise = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(inputs)
    others = [dim for dim in range(inputs.ndim) if dim != 1]
    low, high = inputs.amin(dim=others, keepdim=True), inputs.amax(dim=others, keepdim=True)
    return low + (high - low) * noise


def gradient_norms(
    done: Pass, inputs: Tensor, names: Sequence[str], loss: Loss, p: float, most_bytes: int = GRADIENT_BYTES
) -> Tensor:
    """The p-norm of the gradient of every named parameter for every input, float64 ``[B, len(names)]``.

    Several inputs at a time, by ``torch.func``, as long as their gradients take at most ``most_bytes``; one input at a
    time for a model that vmap cannot handle.
    """
    parameters = {name: _parameters(done.model)[name].detach() for name in names}
    rows = max(1, most_bytes // sum(values.nbytes for values in parameters.values()))
    parts = []
    with _casting_anew(inputs.device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that vmap does row by row
        for part in inputs.split(rows):
            try:
                found = _norms_together(done.model, parameters, part, loss, p)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                found = torch.cat([_norms_of_one(done.model, parameters, row, loss, p) for row in part.split(1)])
            parts.append(found)
    return torch.cat(parts)


def _norms_together(model: nn.Module, parameters: dict[str, Tensor], inputs: Tensor, loss: Loss, p: float) -> Tensor:
    def of_one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss(logits_of(functional_call(model, parameters, (row[None],))).float())

    return _norms(vmap(grad(of_one), in_dims=(None, 0))(parameters, inputs).values(), p)


def _norms_of_one(model: nn.Module, parameters: dict[str, Tensor], row: Tensor, loss: Loss, p: float) -> Tensor:
    with torch.enable_grad():
        leaves = {name: values.detach().requires_grad_() for name, values in parameters.items()}
        value = loss(logits_of(functional_call(model, leaves, (row,))).float())
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return _norms((gradient[None] for gradient in found), p)


def _norms(gradients: Iterable[Tensor], p: float) -> Tensor:
    """The p-norms of the gradients ``[B, ...]`` of every parameter, float64 ``[B, parameters]``."""
    rows = (gradient.reshape(len(gradient), -1) for gradient in gradients)
    return torch.stack([row_norm(row if row.dtype == torch.float64 else row.float(), p) for row in rows], dim=1)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: values for name, values in named if values.is_floating_point() and values.numel()}


def _below(group: str, parameters: Mapping[str, Tensor]) -> list[str]:
    """The parameters of that name, or below it."""
    return [name for name in parameters if group == ALL or f"{name}.".startswith(f"{group}.")]


def _casting_anew(device: torch.device) -> AbstractContextManager[object]:
    """The mixed precision there is, without keeping what was cast: every input has weights of its own to cast here."""
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
