"""ResNet-18 and ResNet-50 for CIFAR, as trained in the papers on feature norms.

``haas_*``: the network of DDU (Mukhoti et al., "Deep Deterministic Uncertainty", 2021) with the L2 head of Haas et al.
(TMLR 2022; 2024), with LeakyReLU, pooled shortcuts, and spectral normalization; ``l2_head=False`` is the DDU baseline.

``rna_*``: Shin et al., "Representation Norm Amplification for Out-of-Distribution Detection in Long-Tail Learning"
(2024). It has ReLU, convolutional shortcuts, and BatchNorm without scale and offset; images are not standardized. The
authors' CIFAR code keeps scale and offset in the BatchNorm of its shortcuts, as ``shortcut_affine=True`` does; their
text removes them everywhere, which is the default.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import cifar_cfg
from .l2_head import PooledL2Classifier
from .spectral import SpectralConv2d

__all__ = ["OodResNet"]

_HAAS_CFG = cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_RNA_CFG = cifar_cfg(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
default_cfgs = generate_default_cfgs(
    {
        "haas_resnet18": _HAAS_CFG,
        "haas_resnet50": _HAAS_CFG,
        "rna_resnet18": _RNA_CFG,
        "rna_resnet50": _RNA_CFG,
    }
)


class PooledShortcut(nn.Module):
    """Average pooling by the stride, then channels of zeros: ``[N, in, H, W]`` to ``[N, out, H/stride, W/stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_channels))


@dataclass(frozen=True)
class Parts:
    """Factory of the layers of a block; the fields are arguments of ``OodResNet``."""

    negative_slope: float
    pooled_shortcut: bool
    spectral_norm: float
    bn_affine: bool
    shortcut_affine: bool = False

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        shape = (in_channels, out_channels, kernel, stride, kernel // 2)
        if self.spectral_norm:
            return SpectralConv2d(*shape, bias=False, coefficient=self.spectral_norm)
        return nn.Conv2d(*shape, bias=False)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, affine=self.bn_affine)

    def shortcut_norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, affine=self.bn_affine or self.shortcut_affine)

    def activation(self) -> nn.Module:
        return nn.LeakyReLU(self.negative_slope) if self.negative_slope else nn.ReLU()

    def shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        if stride == 1 and in_channels == out_channels:
            return nn.Identity()
        if self.pooled_shortcut:
            return PooledShortcut(in_channels, out_channels, stride)
        return nn.Sequential(self.conv(in_channels, out_channels, 1, stride), self.shortcut_norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ``[N, in, H, W]`` to ``[N, width, H/stride, W/stride]``."""

    expansion: ClassVar[int] = 1

    def __init__(self, parts: Parts, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = parts.conv(in_channels, width, 3, stride)
        self.bn1 = parts.norm(width)
        self.conv2 = parts.conv(width, width, 3)
        self.bn2 = parts.norm(width)
        self.shortcut = parts.shortcut(in_channels, width, stride)
        self.act = parts.activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: ``[N, in, H, W]`` to ``[N, 4*width, H/stride, W/stride]``."""

    expansion: ClassVar[int] = 4

    def __init__(self, parts: Parts, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = parts.conv(in_channels, width, 1)
        self.bn1 = parts.norm(width)
        self.conv2 = parts.conv(width, width, 3, stride)
        self.bn2 = parts.norm(width)
        self.conv3 = parts.conv(width, out_channels, 1)
        self.bn3 = parts.norm(out_channels)
        self.shortcut = parts.shortcut(in_channels, out_channels, stride)
        self.act = parts.activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act(out + self.shortcut(x))


class OodResNet(PooledL2Classifier):
    """ResNet for 32x32 images: 3x3 stem of stride 1, no max-pooling, four stages of 64 to 512 channels.

    Args:
        block: ``BasicBlock`` (512 features) or ``Bottleneck`` (2,048 features).
        depths: Number of blocks in each of the four stages.
        l2_head: Whether the classifier is an ``L2Head``, which sees z/‖z‖ in training.
        normalize_eval: Whether the ``L2Head`` also normalizes in eval mode.
        negative_slope: Slope of the LeakyReLU for negative inputs; 0 is ReLU.
        pooled_shortcut: Whether shortcuts that change the shape average pixels and add zero channels, without
            parameters, instead of a 1x1 convolution and BatchNorm.
        spectral_norm: Bound on the spectral norm of each convolution, see ``SpectralConv2d``; 0 is none (timm drops
            keyword arguments that are None). BatchNorm and the classifier are not bounded.
        bn_affine: Whether BatchNorm learns a scale and an offset.
        shortcut_affine: Whether the BatchNorm of convolutional shortcuts does so even without ``bn_affine``.
        width: Number of channels of the first stage; those of the other stages and the features scale with it.
        embedding: Number of features of a linear layer after pooling, which replace the pooled ones; 0 is none.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        l2_head: bool = False,
        normalize_eval: bool = False,
        negative_slope: float = 0.0,
        pooled_shortcut: bool = False,
        spectral_norm: float = 0.0,
        bn_affine: bool = True,
        shortcut_affine: bool = False,
        width: int = 64,
        embedding: int = 0,
    ) -> None:
        channels = 8 * width * block.expansion
        super().__init__(in_chans, embedding or channels, l2_head, normalize_eval)
        parts = Parts(negative_slope, pooled_shortcut, spectral_norm, bn_affine, shortcut_affine)
        self.conv1 = parts.conv(in_chans, width, 3)
        self.bn1 = parts.norm(width)
        self.act = parts.activation()
        self.layer1 = _stage(block, parts, depths[0], width, width, stride=1)
        self.layer2 = _stage(block, parts, depths[1], width * block.expansion, 2 * width, stride=2)
        self.layer3 = _stage(block, parts, depths[2], 2 * width * block.expansion, 4 * width, stride=2)
        self.layer4 = _stage(block, parts, depths[3], 4 * width * block.expansion, 8 * width, stride=2)
        self.embedding = nn.Linear(channels, embedding) if embedding else nn.Identity()
        self.reset_classifier(num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(images)))
        return self.layer4(self.layer3(self.layer2(self.layer1(out))))

    def forward_head(self, feature_map: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.embedding(feature_map.mean(dim=(2, 3)))
        return features if pre_logits else self.get_classifier()(features)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], parts: Parts, depth: int, in_channels: int, width: int, stride: int
) -> nn.Sequential:
    first = block(parts, in_channels, width, stride)
    return nn.Sequential(first, *(block(parts, block.expansion * width, width, 1) for _ in range(depth - 1)))


_RESNET18: dict[str, Any] = {"block": BasicBlock, "depths": (2, 2, 2, 2)}
_RESNET50: dict[str, Any] = {"block": Bottleneck, "depths": (3, 4, 6, 3)}
_HAAS: dict[str, Any] = {"l2_head": True, "negative_slope": 0.01, "pooled_shortcut": True, "spectral_norm": 3.0}
_RNA: dict[str, Any] = {"bn_affine": False}


@register_model
def haas_resnet18(pretrained: bool = False, **kwargs: Any) -> OodResNet:
    """ResNet-18 of Haas et al., the network of DDU with an L2 head; 512 features."""
    return build_model_with_cfg(OodResNet, "haas_resnet18", pretrained, **{**_RESNET18, **_HAAS, **kwargs})


@register_model
def haas_resnet50(pretrained: bool = False, **kwargs: Any) -> OodResNet:
    """ResNet-50 of Haas et al., the network of DDU with an L2 head; 2,048 features."""
    return build_model_with_cfg(OodResNet, "haas_resnet50", pretrained, **{**_RESNET50, **_HAAS, **kwargs})


@register_model
def rna_resnet18(pretrained: bool = False, **kwargs: Any) -> OodResNet:
    """ResNet-18 of RNA, BatchNorm without scale and offset; 512 features."""
    return build_model_with_cfg(OodResNet, "rna_resnet18", pretrained, **{**_RESNET18, **_RNA, **kwargs})


@register_model
def rna_resnet50(pretrained: bool = False, **kwargs: Any) -> OodResNet:
    """ResNet-50 of RNA, BatchNorm without scale and offset; 2,048 features."""
    return build_model_with_cfg(OodResNet, "rna_resnet50", pretrained, **{**_RESNET50, **_RNA, **kwargs})
