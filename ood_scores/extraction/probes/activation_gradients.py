"""Probes of the gradients of layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ood_scores.errors import BadInput
from ood_scores.extraction.hooks import hooked
from ood_scores.extraction.layers import as_maps
from ood_scores.extraction.probes.base import LayerProbe, Pass, register_probe


@register_probe
@dataclass(frozen=True)
class NeuronStates(LayerProbe):
    """Activations times their influence on the prediction: one extra ``nac.<module>`` ``[N, C]`` per layer.

    For each channel of a layer's output z, the sum of z over the positions times the sum of the gradient ``d KL(u ||
    softmax(f)) / dz`` over the positions, where u is uniform. Used by the scorer ``nac``, which computes the states of
    the penultimate features in closed form, without a probe.

    Source: Liu et al. 2024, "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization",
    and their code, which sums both factors over the positions before they are multiplied. Departure: tokens are summed
    in all layers, while their code reads only the class token after the last normalization of a ViT.

    Fails with ``amp="fp16"``, in which gradients underflow.

    Args:
        layers: names of modules, or ``"stages"`` for the modules that end the stages of the model.

    Cost: one additional forward and backward pass.
    """

    name: str = "nac"
    gradients = True
    needs_logits = True

    def reduce(self, maps: Tensor) -> Tensor:
        return maps.float().sum(dim=2)

    def watch(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext({})

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not done.inputs.is_floating_point():
            raise BadInput(f"a probe that differentiates needs floating-point inputs, got {done.inputs.dtype}.")
        outputs: dict[str, Tensor] = {}
        hooks = [(done.model.get_submodule(layer), _keeper(layer, outputs)) for layer in self.layers]
        with torch.enable_grad(), hooked(hooks):
            inputs = done.inputs.detach().clone().requires_grad_()  # unlike its source, a clone is no inference tensor
            loss = -log_softmax(done.run(inputs).float(), dim=1).mean(dim=1).sum()
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        pairs = zip(outputs.items(), gradients, strict=True)
        states = {
            name: self.reduce(as_maps(output.detach())) * self.reduce(as_maps(gradient))
            for (name, output), gradient in pairs
        }
        return super().columns(done, states)


def _keeper(name: str, outputs: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, (tuple, list)) else output
        as_maps(first)
        outputs[name] = first
        passed_on = first.clone()  # what follows may write into it
        return type(output)([passed_on, *output[1:]]) if isinstance(output, (tuple, list)) else passed_on

    return keep
