"""Run a model and leave it unchanged: device, modes, precision, and identity."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ood_scores.errors import BadInput
from ood_scores.runtime import CPU, find_device

WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(model: nn.Module, device: str | torch.device, local_rank: int = 0) -> torch.device:
    """Return the device to run on; ``"auto"`` is the model's own, or on the CPU the choice of ``find_device``."""
    return find_device(device, model_device(model), local_rank)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the original model, whose hooks run and whose weights keep their names.

    The wrappers of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, and ``AveragedModel`` are removed.

    Raises:
        BadInput: if this is not a module, or one from ``torch.jit`` or ``torch.export``, which runs no hooks; or if
            weights are elsewhere (offloaded), not created (lazy), or cannot be read (quantized).
    """
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, getattr(model, "_orig_mod", None) or model.module)
    if isinstance(model, (torch.jit.ScriptModule, torch.export.ExportedProgram)) or _is_exported(model):
        raise BadInput(
            f"a model from torch.jit or torch.export ({type(model).__name__}) runs no hooks, which read its features: "
            "pass the original nn.Module."
        )
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model must be a torch.nn.Module, got {type(model).__name__}: pass the classifier.")
    _require_weights(model)
    return model


def _require_weights(model: nn.Module) -> None:
    """Check that all weights can be read, which the head and the identity of the model need."""
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(weight):
            raise BadInput(
                f"{name!r} is not initialized, since a lazy layer (LazyLinear) creates it from its first input: run "
                "the model once, model(inputs), and load its weights."
            )
        if weight.device.type == "meta":
            raise BadInput(
                f"{name!r} is on the device 'meta', since the weights are offloaded (accelerate, device_map) or were "
                "never loaded: load the whole model, without offloading."
            )
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise BadInput(
                f"{name!r} is quantized ({type(module).__name__}), so that its weights cannot be read and its outputs "
                "are not an affine map: pass the model before quantization."
            )


def _is_exported(model: Any) -> bool:
    """Whether a module is one from ``ExportedProgram.module()``, which has no modes."""
    return isinstance(model, torch.fx.GraphModule) and "eval" in vars(model)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return CPU if first is None else first.device


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, without a second one on its device.

    A model on the CPU, or on several devices, is returned itself.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1 or CPU in devices:
        return model
    return copy.deepcopy(model, {number: _copied_to_cpu(tensor) for number, tensor in tensors.items()})


def _copied_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().cpu()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def model_dtype(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the type of the first floating-point parameter; ``default`` for a model without any."""
    return next((values.dtype for values in model.parameters() if values.is_floating_point()), default)


@contextmanager
def evaluating(model: nn.Module, device: torch.device, differentiable: bool = False) -> Iterator[None]:
    """Put a model in eval mode, on the device, and disable gradients.

    Every module's mode and the device are restored afterwards.

    Args:
        model: the model.
        device: the device to run on.
        differentiable: whether tensors that the model returns can be used in computations with gradients; otherwise
            inference mode is used, which is faster, if the model runs in it.
    """
    home = model_device(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if home != device:
            model.to(device)
        with (
            _original_parts(model),
            _current(device),
            torch.inference_mode(not differentiable and all(map(_is_plain, model.parameters()))),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, mode in modes:  # parents come before their children
            if module.training != mode:
                module.train(mode)  # some models discard values cached for evaluation here
        for module, mode in modes:
            module.training = mode
        if home != device:
            model.to(home)


@contextmanager
def _original_parts(model: nn.Module) -> Iterator[None]:
    """Run the originals of compiled modules, in place or parts of the model: compiled code runs no hooks."""
    in_place = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    parts = [(module, vars(module)["forward"]) for module in model.modules() if hasattr(module, "_orig_mod")]
    try:
        for module, _ in in_place:
            module._compiled_call_impl = None
        for module, _ in parts:
            vars(module)["forward"] = module._orig_mod
        yield
    finally:
        for module, compiled in in_place:
            module._compiled_call_impl = compiled
        for module, compiled in parts:
            vars(module)["forward"] = compiled


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether a model is likely to run faster in the channels-last memory format: a convolutional one on a GPU.

    Tensor cores read this format. A single convolution, as in a vision transformer, makes no model convolutional.
    """
    return device.type == "cuda" and sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


@contextmanager
def laid_out(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Use a memory format for the weights of convolutions, and restore their own afterwards."""
    weights = [weight for weight in model.parameters() if weight.ndim == 4]
    before = [weight.data for weight in weights]
    with torch.inference_mode(False):
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=memory_format)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for weight, data in zip(weights, before, strict=True):
                weight.data = data


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def autocasting(device: torch.device, amp: str | None) -> Iterator[None]:
    """Use mixed precision: ``"bf16"``, ``"fp16"``, or None for the model's own."""
    with torch.autocast(device.type, dtype=AMP_DTYPES.get(amp or ""), enabled=amp is not None):
        yield


_DIGESTS: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
"""The XXH3 (128 bits) and the SHA-256 of the weights that a model had when they were last hashed."""


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes, and bytes of all parameters and buffers, also those not saved.

    Names are those of the original modules, whichever parts of the model are compiled. For weights that have the same
    XXH3, which is computed in a fraction of the time, as when this was called before, the same digest is returned.
    """
    if model in _DIGESTS and _hashed(model, xxhash.xxh3_128())[0] == _DIGESTS[model][0]:
        return _DIGESTS[model][1]
    quick, digest = _hashed(model, xxhash.xxh3_128(), hashlib.sha256())
    _DIGESTS[model] = quick, digest
    return digest


def _hashed(model: nn.Module, *hashes: Any) -> list[str]:
    """Update hashes with the names, dtypes, shapes, and bytes of all weights; return their digests."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for whole, tensor in sorted({name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}.items()):
        for name, part in _plain_parts(whole, tensor.detach()):
            values = part.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            for each in hashes:
                each.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                each.update(values)
    return [each.hexdigest() for each in hashes]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is neither sparse nor of a subclass (as torchao's are), which inference mode does not run."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return a tensor, a sparse one as a dense one, or the tensors that one of a subclass (of torchao) consists of."""
    if not _is_plain(tensor) and tensor.layout == torch.strided:
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.to_dense()


def architecture(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the name of the model's class."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return str(name or type(model).__name__)
