"""Probes that run the model again with something in it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ood_scores.errors import BadInput
from ood_scores.extraction.hooks import hooked
from ood_scores.extraction.layers import as_maps, stages
from ood_scores.extraction.probes.base import LayerProbe, Pass, Probe, register_probe

DROPOUTS = frozenset(
    {
        functional.alpha_dropout,
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.feature_alpha_dropout,
    }
)
"""What drops: the functions that models call, and that the modules of ``torch.nn`` call."""


@register_probe
@dataclass(frozen=True)
class RankFeat(LayerProbe):
    """Logits without the rank-1 part of feature maps: an extra ``rankfeat`` ``[N, C]``, which the scorer of that name
    reads.

    In each of some layers by itself the output ``[C, P]`` of channels and positions, ``sum_i s_i u_i v_i^T``, is
    replaced by ``sum_{i > 1} s_i u_i v_i^T``, and the rest of the model runs on that; kept is the mean of the logits,
    over the layers.

    Source: Song, Sebe & Wang 2022, "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection". The mean of
    the logits of blocks 3 and 4, each with its own removal, is the fusion of the authors' code. Theirs decomposes the
    maps, here it is their smaller Gram matrix, in float64.

    Fails where the two largest singular values are equal: which part is removed is then a matter of rounding.

    Args:
        layers: names of modules that give maps or tokens, or ``"stages"`` for those that end the last two stages of the
            model. (``extract``'s other probes take all stages.)

    Cost: a forward pass for each layer, and an eigendecomposition, ``min(C, P)^3``, for each input and layer.
    """

    name: str = "rankfeat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise BadInput("rankfeat: at least one layer is needed.")

    def reduce(self, maps: Tensor) -> Tensor:
        return without_rank_1(maps)

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        if self.layers == "stages":
            return replace(self, layers=stages(model, inputs)[-2:])
        return super().for_model(model, inputs)

    def watch(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext({})

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.stack([self._logits(done, layer) for layer in self.layers]).mean(dim=0)}

    def _logits(self, done: Pass, layer: str) -> Tensor:
        """Logits with the output of one layer replaced."""
        ran = False

        def replaced(module: nn.Module, received: Any, output: Any) -> Any:
            nonlocal ran
            ran = True
            return _with_maps(output, self.reduce, layer)

        with hooked([(done.model.get_submodule(layer), replaced)]):
            logits = done.run(done.inputs)
        if not ran:
            raise BadInput(f"the layer {layer!r} did not run in the forward pass: choose another.")
        return logits.float()


def without_rank_1(maps: Tensor) -> Tensor:
    """Matrices ``[B, C, P]`` without the part of their largest singular value."""
    matrices = maps.double()  # mixed precision leaves float64 alone
    wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    first = torch.linalg.eigh(gram).eigenvectors[:, :, -1:]
    part = first @ (first.mT @ matrices) if wide else (matrices @ first) @ first.mT
    return (matrices - part).to(maps.dtype)


def _with_maps(output: Any, change: Callable[[Tensor], Tensor], layer: str) -> Any:
    """The output of a layer with its maps ``[B, C, P]`` changed, in the layout that it had."""
    if isinstance(output, (tuple, list)):
        return type(output)([_with_maps(output[0], change, layer), *output[1:]])
    maps = as_maps(output)
    if output.ndim == 2:
        raise BadInput(f"the layer {layer!r} gives vectors, without positions: choose one that gives maps or tokens.")
    channels_last = output.ndim == 3 or maps.shape[1] != output.shape[1]
    changed = change(maps)
    return (changed.mT if channels_last else changed).reshape(output.shape)


@register_probe
@dataclass(frozen=True)
class MCDropout(Probe):
    """Monte Carlo dropout: extras ``mc_dropout.mean`` ``[N, C]``, the mean softmax of some passes with dropout, and
    ``mc_dropout.entropy`` ``[N]``, the mean of their entropies (nats). The scorer ``mc_dropout`` reads them.

    What drops are the modules and functions of ``torch.nn`` by that name (Dropout, Dropout1d to 3d, AlphaDropout,
    FeatureAlphaDropout); all else stays as in evaluation, batch norm among it. Stochastic depth stays off, and dropout
    of attention weights within ``scaled_dot_product_attention``.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation".

    Fails for models with little dropout, of which all passes are nearly the same; for those with none it is refused.
    timm's take ``drop_rate``: ``timm.create_model(name, drop_rate=0.2)``; of most it is dropout before the last layer.

    Args:
        passes: how many.
        seed: of the dropout; each batch has its own from this and the number of its first row, so the numbers depend on
            the size of batches, and those of a run that was interrupted are the same.

    Cost: ``passes`` forward passes.
    """

    name: str = "mc_dropout"
    passes: int = 16
    seed: int = 0
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1:
            raise BadInput(f"mc_dropout: passes is a whole number of at least 1, got {self.passes}.")

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = torch.zeros_like(done.logits, dtype=torch.float64)
        entropy = mean.sum(dim=1)
        with seeded(done.inputs.device, seed_of(self.seed, done.start)), Dropping() as dropping:
            for _ in range(self.passes):
                log_softmax = done.run(done.inputs).double().log_softmax(dim=1)
                mean += log_softmax.exp() / self.passes
                entropy = entropy - (log_softmax.exp() * log_softmax).sum(dim=1) / self.passes
        if not dropping.calls:
            raise BadInput(
                f"{self.name}: no dropout ran in the model, so that all passes are the same: make it with dropout "
                "(timm: drop_rate=0.2) or set the p of its dropout modules, the same as in training."
            )
        return {f"{self.name}.mean": mean, f"{self.name}.entropy": entropy}


class Dropping(TorchFunctionMode):
    """Within this context dropout drops, in whatever mode modules are; counts how often it did."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function in DROPOUTS:
            given |= dict(zip(("input", "p", "training", "inplace"), args, strict=False))
            args, given["training"] = (), True
            self.calls += given.get("p", 0.5) > 0
        return function(*args, **given)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers of the CPU and of a device from a seed; afterwards both go on as if nothing had been drawn."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        module = torch.get_device_module(device)
        with seeded(torch.device("cpu"), seed), torch.random.fork_rng([device], device_type=device.type):
            with module.device(device):
                module.manual_seed(seed)
            yield


def seed_of(seed: int, start: int) -> int:
    """A seed for the batch that starts at a row. (Generators on the CPU take 32 bits of it.)"""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4], "little")
