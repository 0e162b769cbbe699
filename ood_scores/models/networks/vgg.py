"""VGG-16 with BatchNorm for 32x32 images, in the form of DDU, trained by Haas et al. (2024)."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .classifier import cifar_cfg
from .l2_head import PooledL2Classifier
from .ood_resnet import Parts

__all__ = ["OodVgg"]

default_cfgs = generate_default_cfgs(
    {
        "haas_vgg16": {
            **cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), classifier="classifier"),
            "first_conv": "features.0",
        }
    }
)

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 3x3 convolutions between max-poolings: configuration D."""


class OodVgg(PooledL2Classifier):
    """3x3 convolutions, each with BatchNorm and activation, 2x2 max-pooling after every stage; one linear classifier.

    Images ``[N, in_chans, 32, 32]`` become a map ``[N, 512, 1, 1]``; larger maps are averaged.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015),
    configuration D. One classifier on 512 features replaces the three fully connected layers, and convolutions have no
    bias, as in the network of DDU (Mukhoti et al. 2021), whose layer names this class uses.

    Args:
        stages: Output channels of the convolutions in each stage.
        l2_head: Whether the classifier is an ``L2Head``, which sees z/‖z‖ in training.
        normalize_eval: Whether the ``L2Head`` also normalizes in eval mode.
        negative_slope: Slope of the LeakyReLU for negative inputs; 0 is ReLU. DDU uses 0.01.
        spectral_norm: Bound on the spectral norm of each convolution, see ``SpectralConv2d``; 0 is none. DDU uses 3.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...] = VGG16,
        num_classes: int = 10,
        in_chans: int = 3,
        l2_head: bool = False,
        normalize_eval: bool = False,
        negative_slope: float = 0.0,
        spectral_norm: float = 0.0,
    ) -> None:
        super().__init__(in_chans, stages[-1][-1], l2_head, normalize_eval)
        parts = Parts(negative_slope, pooled_shortcut=False, spectral_norm=spectral_norm, bn_affine=True)
        self.features = nn.Sequential(*_layers(parts, stages, in_chans))
        ends = [i for i, module in enumerate(self.features) if isinstance(module, nn.MaxPool2d)]
        self.feature_info = [
            {"num_chs": stage[-1], "reduction": 2 ** (i + 1), "module": f"features.{end}"}
            for i, (stage, end) in enumerate(zip(stages, ends, strict=True))
        ]
        self.reset_classifier(num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.features(images)


def _layers(parts: Parts, stages: tuple[tuple[int, ...], ...], in_channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in stages:
        for out_channels in stage:
            layers += [parts.conv(in_channels, out_channels, 3), parts.norm(out_channels), parts.activation()]
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return layers


@register_model
def haas_vgg16(pretrained: bool = False, **kwargs: Any) -> OodVgg:
    """VGG-16 of Haas et al. with an L2 head: 512 features, 14,724,042 parameters with 10 classes.

    Source: Haas, Yolland & Rabus (TMLR 2024), A.1. It uses spectral normalization and LeakyReLU in "all ResNet models"
    and describes only the training of VGG, so they are off here. DDU's own VGG-16 has both:
    ``spectral_norm=3.0, negative_slope=0.01``.
    """
    return build_model_with_cfg(OodVgg, "haas_vgg16", pretrained, **{"l2_head": True, **kwargs})
