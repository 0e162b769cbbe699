"""Probes of layers, computed in the ordinary forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ood_scores.errors import ProbeDoesNotApply
from ood_scores.extraction.hooks import first_argument, hooked
from ood_scores.extraction.probes.base import LayerProbe, Pass, Probe, register_probe

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
"""The modules whose inputs the probe ``extremes`` reads; the code of COMBOOD knows the first three."""


@register_probe
@dataclass(frozen=True)
class PooledLayers(LayerProbe):
    """The mean of every channel of some layers: one extra ``layers.<module>`` ``[N, C]`` per layer.

    ``extract(layers=...)`` adds this probe. Source: Lee et al. 2018, "A Simple Unified Framework for Detecting
    Out-of-Distribution Samples and Adversarial Attacks".

    Args:
        layers: names of modules, or ``"stages"`` for the modules that end the stages of the model.
    """

    name: str = "layers"

    def reduce(self, maps: Tensor) -> Tensor:
        return maps.float().mean(dim=2)


@register_probe
@dataclass(frozen=True)
class LayerNorms(LayerProbe):
    """The mean over channels of the norm of the activated map: one extra ``norms.<module>`` ``[N]`` per layer.

    ``1/C sum_c ||relu(a_c)||_2``, the norm over the positions of channel c: block-wise feature norms, used by the
    scorer ``block_norm``.

    Source: Yu et al. 2023, "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection", Eq. 3.

    Args:
        layers: names of modules, or ``"stages"`` for the modules that end the stages of the model.
    """

    name: str = "norms"

    def reduce(self, maps: Tensor) -> Tensor:
        return maps.float().relu().norm(dim=2).mean(dim=1)


@register_probe
@dataclass(frozen=True)
class ActiveShares(LayerProbe):
    """The share of the map that is positive, before pooling: one extra ``activations.<module>`` ``[N]`` per layer.

    Used by the scorer ``activation_ratio`` with ``of="map"``. Source: Shin et al. 2024 (RNA), section 5.2: the
    activation ratio at the last ReLU layer.

    Args:
        layers: names of modules, or ``"stages"`` for the modules that end the stages of the model.
    """

    name: str = "activations"

    def reduce(self, maps: Tensor) -> Tensor:
        return (maps > 0).float().mean(dim=(1, 2))


@register_probe
@dataclass(frozen=True)
class GramSums(LayerProbe):
    """Row sums of the Gram matrices of some layers: one extra ``gram.<module>`` ``[N, orders, C]`` per layer.

    ``G^p = (F^p F^pT)^(1/p)`` for the maps F ``[C, P]`` and every order p. The extra contains the sums of the rows,
    taken before the root, ``(sum_j F^p_i . F^p_j)^(1/p)`` with the sign kept, as in the authors' code. It is used by
    the scorer ``gram``.

    Source: Sastry & Oore 2020, "Detecting Out-of-Distribution Examples with Gram Matrices", section 3. Row sums are
    computed without the matrix: ``F^p (sum_j F^p_j)``.

    Args:
        layers: names of modules, or ``"stages"`` for the modules that end the stages of the model. (The authors use
            every convolution and activation.)
        orders: the powers p; the authors use 1 to 10.
    """

    name: str = "gram"
    orders: tuple[int, ...] = tuple(range(1, 11))

    def reduce(self, maps: Tensor) -> Tensor:
        maps = maps.float()
        scale = maps.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)  # high powers overflow otherwise
        unit = maps / scale
        powers, sums = torch.ones_like(unit), {}
        for order in range(1, max(self.orders) + 1):
            powers = powers.mul_(unit)
            if order in self.orders:
                sums[order] = _signed_root_of_row_sums(powers, order)
        return torch.stack([sums[order] for order in self.orders], dim=1) * scale**2


def _signed_root_of_row_sums(powers: Tensor, order: int) -> Tensor:
    sums = torch.einsum("bcp,bp->bc", powers, powers.sum(dim=1))
    return sums.sign() * sums.abs() ** (1 / order)


@register_probe
@dataclass(frozen=True)
class ActivationExtremes(Probe):
    """Smallest and largest values that activation functions receive: the extra ``extremes`` ``[N, 2 L]``.

    For each module of a class in ``ACTIVATIONS``, minus the smallest and then the largest value of its input, in the
    model's order; a module that runs several times counts with its last run. Used by the scorer ``combood``.

    Source: Rajasekaran et al. 2024, "COMBOOD: A Semiparametric Approach for Detecting Out-of-distribution Data for
    Image Classification", after Berglind et al. 2022 (XOOD), and their code.

    Fails for models that call activation functions without modules: these are refused.
    """

    name: str = "extremes"
    needs_logits = False

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        with hooked(((module, _extremes_of(name, seen)) for name, module in activations(model)), before=True):
            yield seen

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not seen:
            raise ProbeDoesNotApply(self.name, "no activation module ran in the model, such as torch.nn.ReLU.")
        ordered = [seen[name] for name, _ in activations(done.model) if name in seen]
        return {self.name: torch.cat(ordered, dim=1)}


@register_probe
@dataclass(frozen=True)
class BatchNormGaps(Probe):
    """Distances of the channels from the running means of the last BatchNorm: the extra ``batch_norm_gap`` ``[N, C]``.

    The input of the BatchNorm module that runs last, averaged over the positions of each channel, minus the running
    mean. ``ood_scores.evaluation.batch_norm_gaps`` reads it.

    Source: Shin et al. 2024 (RNA), appendix E.5 and Table 13.

    Fails for models without BatchNorm modules that have running statistics: these are refused.
    """

    name: str = "batch_norm_gap"
    needs_logits = False

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def keep(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = first_argument(inputs, named).float()
            means = values.flatten(2).mean(dim=2) if values.ndim > 2 else values
            seen[self.name] = means - module.running_mean

        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        hooks = [(layer, keep) for layer in layers if layer.running_mean is not None]
        with hooked(hooks, before=True, with_kwargs=True):
            yield seen

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not seen:
            raise ProbeDoesNotApply(self.name, "no BatchNorm module with running statistics ran in the model.")
        return dict(seen)


def activations(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the activation modules of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ACTIVATIONS)]


def _extremes_of(name: str, seen: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any) -> None:
        low, high = inputs[0].flatten(1).float().aminmax(dim=1)
        seen[name] = torch.stack([-low, high], dim=1)

    return keep
