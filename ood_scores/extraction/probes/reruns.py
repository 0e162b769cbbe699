"""Probes that run the model again with a change inside it."""

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

from ood_scores.errors import BadInput, ProbeDoesNotApply
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
"""The dropout functions that models, and the modules of ``torch.nn``, call."""

SQUARINGS = 20
"""How often matrices are squared: singular values that differ by a millionth are told apart."""


@register_probe
@dataclass(frozen=True)
class RankFeat(LayerProbe):
    """Logits without the rank-1 part of feature maps: the extra ``rankfeat`` ``[N, C]``, for the scorer ``rankfeat``.

    In one layer at a time, the output ``[C, P]`` of channels and positions, ``sum_i s_i u_i v_i^T``, is replaced by
    ``sum_{i > 1} s_i u_i v_i^T``, and the rest of the model runs on the result; the extra is the mean of the logits
    over the layers.

    Source: Song, Sebe & Wang 2022, "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection". The mean of
    the logits of blocks 3 and 4, each with its own removal, is the fusion in the authors' code. Departure: their code
    decomposes the maps; here the smaller of their Gram matrices is decomposed, in float64.

    Fails if the two largest singular values are equal: the removed part then depends on rounding.

    Args:
        layers: names of modules that output maps or tokens, or ``"stages"`` for the modules that end the last two
            stages of the model. (Other probes use all stages.)

    Cost: a forward pass per layer, and an eigendecomposition, ``min(C, P)^3``, per input and layer; on a GPU,
    ``SQUARINGS`` products of matrices of that size instead.
    """

    needs_logits = True
    name: str = "rankfeat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise BadInput("rankfeat: layers must name at least one layer.")

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
        """Return the logits with the output of one layer replaced."""
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
    """Return matrices ``[B, C, P]`` without the part of their largest singular value."""
    matrices = maps.double()  # autocast does not change float64
    wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    on_cpu = gram.device.type == "cpu"
    first = torch.linalg.eigh(gram).eigenvectors[:, :, -1:] if on_cpu else first_eigenvectors(gram)
    part = first @ (first.mT @ matrices) if wide else (matrices @ first) @ first.mT
    return (matrices - part).to(maps.dtype)


def first_eigenvectors(gram: Tensor) -> Tensor:
    """Return the eigenvectors ``[B, K, 1]`` of the largest eigenvalues of positive semi-definite ``[B, K, K]``.

    They are found by power iteration: the matrices are squared ``SQUARINGS`` times. A GPU multiplies many small
    matrices much sooner than it decomposes them, and the host does not wait for it.
    """
    smallest = torch.finfo(gram.dtype).tiny
    for _ in range(SQUARINGS):
        gram = gram / gram.abs().amax(dim=(1, 2), keepdim=True).clamp_min(smallest)
        gram = gram @ gram
    column = gram.diagonal(dim1=1, dim2=2).argmax(dim=1)
    first = gram.gather(2, column[:, None, None].expand(-1, gram.shape[1], 1))
    return first / first.norm(dim=1, keepdim=True).clamp_min(smallest)


def _with_maps(output: Any, change: Callable[[Tensor], Tensor], layer: str) -> Any:
    """Return the output of a layer with its maps ``[B, C, P]`` changed, in its original layout."""
    if isinstance(output, (tuple, list)):
        return type(output)([_with_maps(output[0], change, layer), *output[1:]])
    maps = as_maps(output)
    if output.ndim == 2:
        raise BadInput(f"the layer {layer!r} outputs vectors without positions: choose one with maps or tokens.")
    channels_last = output.ndim == 3 or maps.shape[1] != output.shape[1]
    changed = change(maps)
    return (changed.mT if channels_last else changed).reshape(output.shape)


@register_probe
@dataclass(frozen=True)
class MCDropout(Probe):
    """Monte Carlo dropout: the extras ``mc_dropout.mean`` ``[N, C]``, the mean softmax of several passes with dropout,
    and ``mc_dropout.entropy`` ``[N]``, the mean of their entropies (nats). They are used by the scorer ``mc_dropout``.

    Dropout is turned on in the modules and functions of ``torch.nn`` (Dropout, Dropout1d to 3d, AlphaDropout,
    FeatureAlphaDropout); everything else, including batch norm, stays in evaluation mode. Stochastic depth, and dropout
    of attention weights within ``scaled_dot_product_attention``, stay off.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation".

    Fails for models with little dropout, whose passes are nearly the same; models without any are refused. Most timm
    models apply ``drop_rate``, as in ``timm.create_model(name, drop_rate=0.2)``, before the last layer.

    Args:
        passes: the number of passes.
        seed: the seed of the dropout. Each batch derives its own from this and the number of its first row, so that the
            numbers depend on the size of batches, but not on whether the run was interrupted.

    Cost: ``passes`` forward passes.
    """

    name: str = "mc_dropout"
    passes: int = 16
    seed: int = 0
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1:
            raise BadInput(f"mc_dropout: passes must be at least 1, got {self.passes}.")

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = torch.zeros_like(done.logits, dtype=torch.float64)
        entropy = mean.sum(dim=1)
        with seeded(done.inputs.device, seed_of(self.seed, done.start)), Dropping() as dropping:
            for _ in range(self.passes):
                log_softmax = done.run(done.inputs).double().log_softmax(dim=1)
                mean += log_softmax.exp() / self.passes
                entropy = entropy - (log_softmax.exp() * log_softmax).sum(dim=1) / self.passes
        if not dropping.calls:
            raise ProbeDoesNotApply(
                self.name,
                "no dropout ran in the model, so that all passes are the same: create it with dropout "
                "(timm: drop_rate=0.2), or set p of its dropout modules to its value in training.",
            )
        return {f"{self.name}.mean": mean, f"{self.name}.entropy": entropy}


class Dropping(TorchFunctionMode):
    """A context in which dropout is on, whatever mode the modules are in; counts its calls."""

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
    """Seed the random generators of the CPU and of a device, and restore their states afterwards."""
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
    """Return a seed for the batch that starts at a row. (Generators on the CPU use 32 bits of it.)"""
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:4], "little")
