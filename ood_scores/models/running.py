"""Running somebody's model without leaving a trace: device, mode, precision, identity."""

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
    """``"auto"``: the model's own device if it is not the CPU, else as ``find_device`` has it."""
    return find_device(device, model_device(model), local_rank)


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, whose hooks run and whose weights have their own names; else the model."""
    return getattr(model, "_orig_mod", model)


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def model_dtype(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of the first floating-point parameter; ``default`` for a model without any."""
    return next((values.dtype for values in model.parameters() if values.is_floating_point()), default)


@contextmanager
def evaluating(
    model: nn.Module, device: torch.device, differentiable: bool = False, channels_last: bool = False
) -> Iterator[None]:
    """In eval mode, on the device, without gradients; every module's mode, the device and the layout of the weights are
    restored afterwards.

    What a ``differentiable`` run makes may be used where gradients are enabled again; otherwise it is made faster.
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
                module.train(mode)  # some models drop what they kept for evaluation here
        for module, mode in modes:
            module.training = mode
        if home != device:
            model.to(home)


@contextmanager
def _laid_out(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """With the weights of convolutions in the order of channels-last inputs."""
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
    """With a GPU being the one that kernels are started on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def autocasting(device: torch.device, amp: str | None) -> Iterator[None]:
    """Mixed precision: ``"bf16"``, ``"fp16"`` or None for the model's own."""
    with torch.autocast(device.type, dtype=AMP_DTYPES.get(amp or ""), enabled=amp is not None):
        yield


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, those that are not saved included."""
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
    """timm's name of the architecture, or the model's class."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return str(name or type(model).__name__)
