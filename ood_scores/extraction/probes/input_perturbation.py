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
    """Logits of inputs moved towards their prediction: an extra ``odin`` ``[N, C]``, which the scorer ``odin`` reads.

    ``f(x - epsilon sign(grad_x CE(f(x) / T, y)))`` with y the predicted class.

    Source: Liang et al. 2018, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks".
    Epsilon is 0.0014 in the authors' code for CIFAR; GradNorm's comparison takes 0.004 on CIFAR and 0 on ImageNet,
    where the logits are those of the ordinary pass. It is in units of the model's inputs, after their normalisation.
    Departure: where a gradient is exactly 0 the input stays; the authors' code moves it.

    Args:
        epsilon: the size of the step.
        temperature: T of the loss; that of the score is the scorer's own.
        std: standard deviation of each channel by which the step is divided, as the authors' code does (a step of the
            same size in pixels for every channel); None as in GradNorm's code.

    Cost: one more forward and backward pass, and a forward pass; none with ``epsilon=0``.
    """

    name: str = "odin"
    epsilon: float = 0.0014
    temperature: float = 1000.0
    std: tuple[float, ...] | None = None
    gradients = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0 or self.temperature <= 0:
            raise BadInput(f"odin: epsilon is 0 or more and temperature positive, got {self!r}.")

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.epsilon == 0:
            return {self.name: done.logits}
        predicted = done.logits.argmax(dim=1)
        scale = self.temperature  # of the loss: only the sign of the gradient counts, and fp16 has no small numbers
        gradient = input_gradient(done, lambda logits: scale * cross_entropy(logits / self.temperature, predicted))
        return {self.name: done.run(done.inputs - step(gradient, self.epsilon, self.std))}


@register_probe
@dataclass(frozen=True)
class FGSM(LayerProbe):
    """Pooled layers of adversarial inputs: an extra ``fgsm.<module>`` ``[N, C]`` for each layer.

    ``x + epsilon sign(grad_x CE(f(x), y))`` with y the label, or the predicted class where there is none or it is no
    class of the model. Wanted of the fit set only: ``mahalanobis_layers`` tells them from the fit set itself to learn
    how to weigh layers without OoD data.

    Source: Lee et al. 2018, section 2.2, after Goodfellow et al. 2015; epsilon as in GradNorm's comparison. Departure:
    the perturbed input is not clipped to the range of pixels, which is not known here.

    Args:
        layers: names of modules, or ``"stages"``: the same as in ``extract(layers=...)``.
        epsilon: the size of the step, in units of the model's inputs.
        std: as for ``ODIN``.

    Cost: one more forward and backward pass, and a forward pass.
    """

    name: str = "fgsm"
    epsilon: float = 0.05
    std: tuple[float, ...] | None = None
    gradients = True

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


def step(gradient: Tensor, epsilon: float, std: tuple[float, ...] | None) -> Tensor:
    """A step of size epsilon along the sign of the gradient ``[B, channels, ...]``, divided by the channels' std."""
    signed = epsilon * gradient.sign()
    if std is None:
        return signed
    if gradient.ndim < 2 or len(std) != gradient.shape[1]:
        raise BadInput(
            f"std has {len(std)} values, the inputs have shape {tuple(gradient.shape)}: one for each channel."
        )
    return signed / torch.tensor(std).to(gradient).view(-1, *[1] * (gradient.ndim - 2))
