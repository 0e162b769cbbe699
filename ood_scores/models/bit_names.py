"""Names of the weights of Big Transfer (BiT) in Google's files and in GradNorm's, as timm's ``resnetv2_*`` has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

NPZ_ROOT = "resnet/root_block/standardized_conv2d/kernel"
TORCH_ROOT = "root.conv.weight"

_NPZ = (
    (r"resnet/root_block/standardized_conv2d/kernel", "stem.conv.weight"),
    (r"resnet/group_norm/(\w+)", r"norm.\1"),
    (r"resnet/head/conv2d/(\w+)", r"head.fc.\1"),
    (r"resnet/block(\d)/unit(\d+)/a/proj/standardized_conv2d/(\w+)", r"stages.\1.blocks.\2.downsample.conv.\3"),
    (r"resnet/block(\d)/unit(\d+)/(\w)/standardized_conv2d/(\w+)", r"stages.\1.blocks.\2.conv\3.\4"),
    (r"resnet/block(\d)/unit(\d+)/(\w)/group_norm/(\w+)", r"stages.\1.blocks.\2.norm\3.\4"),
)
_TORCH = (
    (r"root\.conv\.(\w+)", r"stem.conv.\1"),
    (r"(?:before_)?head\.gn\.(\w+)", r"norm.\1"),
    (r"head\.conv\.(\w+)", r"head.fc.\1"),
    (r"body\.block(\d)\.unit(\d+)\.downsample\.(\w+)", r"stages.\1.blocks.\2.downsample.conv.\3"),
    (r"body\.block(\d)\.unit(\d+)\.gn(\d)\.(\w+)", r"stages.\1.blocks.\2.norm\3.\4"),
    (r"body\.block(\d)\.unit(\d+)\.conv(\d)\.(\w+)", r"stages.\1.blocks.\2.conv\3.\4"),
)
_WORDS = {"kernel": "weight", "gamma": "weight", "beta": "bias", "conva": "conv1", "convb": "conv2", "convc": "conv3"}
_WORDS |= {"norma": "norm1", "normb": "norm2", "normc": "norm3"}


def as_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of BiT, and return all others as they are.

    Two forms are known: the arrays of Google's ``BiT-S-R101x1.npz``, whose kernels are ``[H, W, in, out]``, and the
    PyTorch port of Google and of Huang et al. 2021 (GradNorm), such as ``BiT-S-R101x1-flat-finetune.pth.tar``. timm
    counts stages and blocks from 0. A weight without a name in timm keeps its own, so that loading names it.
    """
    if NPZ_ROOT in state:
        return {_renamed(name, _NPZ): _oihw(values) for name, values in state.items()}
    if TORCH_ROOT in state and any(name.startswith("body.block1.unit01.") for name in state):
        return {_renamed(name, _TORCH): values for name, values in state.items()}
    return dict(state)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, form in rules:
        found = re.fullmatch(pattern, name)
        if found:
            parts = [_WORDS.get(part, part) for part in found.expand(form).split(".")]
            return ".".join(_from_zero(parts))
    return name


def _from_zero(parts: list[str]) -> list[str]:
    """Count stages and blocks from 0 instead of 1."""
    return [str(int(part) - 1) if part.isdecimal() else part for part in parts]


def _oihw(values: Tensor) -> Tensor:
    return values.permute(3, 2, 0, 1).contiguous() if values.ndim == 4 else values
