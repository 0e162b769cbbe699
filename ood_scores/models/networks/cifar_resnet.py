"""ResNet-20 and ResNet-56 for CIFAR (He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", 2016)."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import PooledClassifier, cifar_cfg, init_he

__all__ = ["BasicBlock", "CifarResNet"]

_CFG = cifar_cfg(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier="linear")
default_cfgs = generate_default_cfgs({"cifar_resnet20": _CFG, "cifar_resnet56": _CFG})


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: ``[N, in, H, W]`` to ``[N, out, H/stride, W/stride]``.

    The shortcut keeps every stride-th pixel and adds channels of zeros (the paper's option A), half of them before and
    half after the existing ones. The paper does not state their position; this is that of published checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def shortcut(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, self.padding, self.padding)) if self.padding else subsampled

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(PooledClassifier):
    """CIFAR ResNet of 6n+2 layers: three stages of n basic blocks with 16, 32 and 64 channels; 64 features."""

    classifier_name = "linear"

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__(in_chans, num_features=64)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.reset_classifier(num_classes)
        init_he(self)

    def forward_features(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(out)))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR: 269,722 parameters with 10 classes."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, blocks=3, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR: 853,018 parameters with 10 classes."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet56", pretrained, blocks=9, **kwargs)
