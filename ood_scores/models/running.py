"""Run a model and leave it unchanged: device, modes, precision, and identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ood_scores.runtime import find_device

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(model: nn.Module, device: str | torch.device, local_rank: int = 0) -> torch.device:
    """Return the device to run on; ``"auto"`` is the model's own, or on the CPU the choice of ``find_device``."""
    return find_device(device, model_device(model), local_rank)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the original of a model from ``torch.compile``, whose hooks run and whose weights keep their names."""
    return getattr(model, "_orig_mod", model)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def model_dtype(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the type of the first floating-point parameter; ``default`` for a model without any."""
    return next((values.dtype for values in model.parameters() if values.is_floating_point()), default)


@contextmanager
def evaluating(
    model: nn.Module, device: torch.device, differentiable: bool = False, channels_last: bool = False
) -> Iterator[None]:
    """Put a model in eval mode, on the device, and disable gradients.

    Every module's mode, the device, and the memory format of the weights are restored afterwards.

    Args:
        model: the model.
        device: the device to run on.
        differentiable: whether tensors that the model returns can be used in computations with gradients; otherwise
            inference mode is used, which is faster.
        channels_last: whether to use the channels-last memory format for the weights of convolutions.
    """
    home = model_device(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if home != device:
            model.to(device)
        with (
            _laid_out(model, channels_last),
            _current(device),
            torch.inference_mode(not differentiable),
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
def _laid_out(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Use the channels-last memory format for the weights of convolutions, if requested."""
    weights = [weight for weight in model.parameters() if weight.ndim == 4 and channels_last]
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
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


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes, and bytes of all parameters and buffers, also those not saved."""
    digest = hashlib.sha256()
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the name of the model's class."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return str(name or type(model).__name__)
