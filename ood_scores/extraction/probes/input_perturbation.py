"""Probes that run the model again on perturbed inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ood_scores.errors import BadInput
from ood_scores.extraction.layers import watching
from ood_scores.extraction.probes.base import LayerProbe, Pass, Probe, input_gradient, register_probe
from ood_scores.extraction.probes.layers import PooledLayers


@register_probe
@dataclass(frozen=True)
class ODIN(Probe):
    """Logits of inputs moved toward their prediction: the extra ``odin`` ``[N, C]``, used by the scorer ``odin``.

    ``f(x - epsilon sign(grad_x CE(f(x) / T, y)))``, where y is the predicted class.

    Source: Liang et al. 2018, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks".
    Epsilon is 0.0014 in the authors' code for CIFAR; GradNorm's comparison uses 0.004 on CIFAR and 0 on ImageNet, where
    the logits are those of the ordinary pass. It is in units of the model's inputs, after their normalization.
    Departure: where a gradient is exactly 0, the input is not changed; the authors' code changes it.

    Args:
        epsilon: the size of the step.
        temperature: the temperature T of the loss; the scorer has its own.
        std: the standard deviation of each channel by which the step is divided, as in the authors' code (the step then
            has the same size in pixels for every channel); None as in GradNorm's code.

    Cost: one additional forward and backward pass, and a forward pass; none with ``epsilon=0``.
    """

    name: str = "odin"
    epsilon: float = 0.0014
    temperature: float = 1000.0
    std: tuple[float, ...] | None = None
    gradients = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0 or self.temperature <= 0:
            raise BadInput(f"{self.name}: epsilon must be at least 0 and temperature positive, got {self!r}.")

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.epsilon == 0:
            return {self.name: done.logits}
        predicted = done.logits.argmax(dim=1)
        scale = self.temperature  # only the sign of the gradient matters, and small numbers underflow in fp16
        gradient = input_gradient(done, lambda logits: scale * cross_entropy(logits / self.temperature, predicted))
        return {self.name: done.run(done.inputs - step(gradient, self.epsilon, self.std) * self.moved(gradient))}

    def moved(self, gradient: Tensor) -> Tensor | float:
        """Return a mask of the values of the inputs that are moved; 1 for all."""
        return 1.0


@register_probe
@dataclass(frozen=True)
class IODIN(ODIN):
    """Logits of inputs whose most influential value is moved: the extra ``iodin`` ``[N, C]``, for the scorer ``iodin``.

    As ``ODIN``, but only the value of the input with the largest gradient is moved toward the prediction.

    Source: OpenOOD v1.5 (``iodin``), by the author of AdaSCALE, whose defaults are those of its ODIN; no paper is named
    there. Of several equal gradients, the first counts.

    Args:
        epsilon: the size of the step.
        temperature: the temperature T of the loss; the scorer has its own.
        std: the standard deviation of each channel by which the step is divided; OpenOOD divides by those of its
            normalization.

    Cost: one additional forward and backward pass, and a forward pass; none with ``epsilon=0``.
    """

    name: str = "iodin"

    def moved(self, gradient: Tensor) -> Tensor:
        largest = gradient.flatten(1).abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(gradient.flatten(1)).scatter_(1, largest, 1).view_as(gradient)


@register_probe
@dataclass(frozen=True)
class FGSM(LayerProbe):
    """Pooled layers of adversarial inputs: one extra ``fgsm.<module>`` ``[N, C]`` per layer.

    The inputs are ``x + epsilon sign(grad_x CE(f(x), y))``, where y is the label, or the predicted class if there is no
    label or it is not a class of the model. Only the fit set needs them: ``mahalanobis_layers`` learns to weight layers
    by separating them from the fit set, without OoD data.

    Source: Lee et al. 2018, section 2.2, after Goodfellow et al. 2015; epsilon as in GradNorm's comparison. Departure:
    the perturbed input is not clipped to the range of pixels, which is unknown here.

    Args:
        layers: names of modules, or ``"stages"``; the same as in ``extract(layers=...)``.
        epsilon: the size of the step, in units of the model's inputs.
        std: the same as for ``ODIN``.

    Cost: one additional forward and backward pass, and a forward pass.
    """

    name: str = "fgsm"
    epsilon: float = 0.05
    std: tuple[float, ...] | None = None
    gradients = True
    needs_logits = True

    def reduce(self, maps: Tensor) -> Tensor:
        return PooledLayers.reduce(PooledLayers(), maps)

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        target = done.logits.argmax(dim=1)
        if done.labels is not None:
            labels = done.labels.to(target)
            target = torch.where((labels >= 0) & (labels < done.logits.shape[1]), labels, target)
        gradient = input_gradient(done, lambda logits: cross_entropy(logits, target))
        with watching(done.model, self.layers, self.reduce) as adversarial:
            done.run(done.inputs + step(gradient, self.epsilon, self.std))
        return super().columns(done, adversarial)


@register_probe
@dataclass(frozen=True)
class AdaSCALE(Probe):
    """Features of inputs whose least influential values are moved: the extra ``adascale`` ``[N, D]``.

    ``z(x + epsilon sign(g) m)``, where g is the gradient of the largest logit and m selects the ``share`` of the
    input's values with the smallest ``|g|``. Used by the scorers ``adascale_a`` and ``adascale_l``.

    Source: Regmi 2025, "AdaSCALE: Adaptive Scaling for OOD Detection"; share and epsilon are those of the authors'
    code.

    Args:
        epsilon: the size of the step, in units of the model's inputs, after their normalization.
        share: the share of the values that are moved, rounded down to a number of values.

    Cost: one additional forward and backward pass, and a forward pass.
    """

    name: str = "adascale"
    epsilon: float = 0.5
    share: float = 0.05
    gradients = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0 or not 0 < self.share <= 1:
            raise BadInput(f"adascale: epsilon must be positive and share in (0, 1], got {self!r}.")

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert done.features_of is not None
        predicted = done.logits.argmax(dim=1, keepdim=True)
        gradient = input_gradient(done, lambda logits: logits.gather(1, predicted))
        sizes = gradient.flatten(1).abs()
        least = sizes.topk(int(sizes.shape[1] * self.share), dim=1, largest=False).indices
        moved = torch.zeros_like(sizes).scatter_(1, least, 1).view_as(gradient)
        return {self.name: done.features_of(done.inputs + step(gradient, self.epsilon, None) * moved)}


def step(gradient: Tensor, epsilon: float, std: tuple[float, ...] | None) -> Tensor:
    """Return epsilon times the sign of the gradient ``[B, channels, ...]``, divided by the channels' std."""
    signed = epsilon * gradient.sign()
    if std is None:
        return signed
    if gradient.ndim < 2 or len(std) != gradient.shape[1]:
        raise BadInput(
            f"std has {len(std)} values for inputs of shape {tuple(gradient.shape)}: pass one value per channel."
        )
    return signed / torch.tensor(std).to(gradient).view(-1, *[1] * (gradient.ndim - 2))
