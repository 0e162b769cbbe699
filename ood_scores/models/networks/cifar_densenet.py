"""DenseNet-BC for CIFAR (Huang, Liu, van der Maaten & Weinberger, "Densely Connected Convolutional Networks", 2017)."""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import PooledClassifier, cifar_cfg, init_he

__all__ = ["Bottleneck", "CifarDenseNet", "DenseBlock", "Transition"]

default_cfgs = generate_default_cfgs(
    {"cifar_densenet100": cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))}
)


class Bottleneck(nn.Module):
    """BN-ReLU-1x1 convolution, BN-ReLU-3x3 convolution, concatenated: ``[N, in, H, W]`` to ``[N, in+growth, H, W]``."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], dim=1)


class DenseBlock(nn.Module):
    """A sequence of bottlenecks, each of which receives the outputs of all previous ones."""

    def __init__(self, bottlenecks: int, in_channels: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(Bottleneck(in_channels + i * growth, growth) for i in range(bottlenecks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transition(nn.Module):
    """BN-ReLU-1x1 convolution to half the channels, then 2x2 average pooling."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class CifarDenseNet(PooledClassifier):
    """DenseNet-BC with three dense blocks, reduction 0.5, with depth ``6 * bottlenecks + 4``."""

    def __init__(self, bottlenecks: int, growth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        stem = 2 * growth
        width1 = stem + bottlenecks * growth
        width2 = width1 // 2 + bottlenecks * growth
        width3 = width2 // 2 + bottlenecks * growth
        super().__init__(in_chans, num_features=width3)
        self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        self.block1 = DenseBlock(bottlenecks, stem, growth)
        self.trans1 = Transition(width1)
        self.block2 = DenseBlock(bottlenecks, width1 // 2, growth)
        self.trans2 = Transition(width2)
        self.block3 = DenseBlock(bottlenecks, width2 // 2, growth)
        self.bn1 = nn.BatchNorm2d(width3)
        self.reset_classifier(num_classes)
        init_he(self)

    def forward_features(self, images: Tensor) -> Tensor:
        out = self.trans1(self.block1(self.conv1(images)))
        out = self.trans2(self.block2(out))
        return F.relu(self.bn1(self.block3(out)))


@register_model
def cifar_densenet100(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """DenseNet-BC-100 with growth 12: 342 features, 769,162 parameters with 10 classes."""
    return build_model_with_cfg(CifarDenseNet, "cifar_densenet100", pretrained, bottlenecks=16, growth=12, **kwargs)
