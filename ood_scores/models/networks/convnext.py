"""ConvNeXt-Tiny for 32x32 images, as modified by Haas et al. (2024)."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from torch import nn

from .classifier import cifar_cfg
from .l2_head import with_l2_head

__all__ = ["OodConvNeXt"]

default_cfgs = generate_default_cfgs(
    {
        "haas_convnext_tiny": {
            **cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), classifier="head.fc"),
            "first_conv": "stem.0",
        }
    }
)


class OodConvNeXt(ConvNeXt):
    """timm's ConvNeXt (Liu et al. 2022) with a 3x3 stem of stride 2 and 3x3 depthwise convolutions.

    Images ``[N, in_chans, H, W]`` become a map of 1/16 of their size (``forward_features``), features ``[N, 768]`` and
    logits. Depths, widths, stochastic depth, layer scale and initialization are those of ConvNeXt-Tiny.

    Source: Haas, Yolland & Rabus (TMLR 2024), A.1: in PyTorch's default implementation "the kernel size of the first
    layer was lowered from 4 to 3, the stride was lowered from 4 to 2. All other kernel sizes were lowered from 7 to
    3". The 2x2 convolutions between the stages stay. The first layer has no padding in that implementation, and the
    paper mentions none, so maps of 32x32 images are 15, 7, 3 and 1 wide.

    Departure: ConvNeXt has a LayerNorm between the pooled map and the classifier. It removes the norm of its input, so
    ‖z‖ of its output is nearly constant, and its input is not the input of a linear head. The paper does not state
    which z it uses. This network has no such LayerNorm, and its classifier, plain or ``L2Head``, reads the pooled map
    directly: the z normalized in training is the one that extraction stores, and logits are affine in it.
    ``head_norm=True`` restores the LayerNorm; features are then its outputs.

    Args:
        num_classes: Number of classes; with 0 the model returns the features.
        in_chans: Number of channels of the images.
        l2_head: Whether the classifier is an ``L2Head``, which sees z/‖z‖ in training.
        normalize_eval: Whether the ``L2Head`` also normalizes in eval mode.
        head_norm: Whether to keep ConvNeXt's LayerNorm before the classifier.
        stem_padding: Padding of the first convolution; 1 makes maps of 32x32 images 16, 8, 4 and 2 wide.
        kwargs: Arguments of timm's ConvNeXt, such as ``drop_path_rate``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        l2_head: bool = False,
        normalize_eval: bool = False,
        head_norm: bool = False,
        stem_padding: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, kernel_sizes=3, **kwargs)
        self.l2_head = l2_head
        self.normalize_eval = normalize_eval
        stages: list[Any] = self.feature_info
        self.stem[0] = _first_conv(in_chans, width=stages[0]["num_chs"], padding=stem_padding)
        self.feature_info = [{**stage, "reduction": stage["reduction"] // 2} for stage in stages]
        if not head_norm:
            self.head.norm = nn.Identity()
        self._wrap_head()

    def _wrap_head(self) -> None:
        if self.l2_head and self.num_classes:
            with_l2_head(self, self.normalize_eval)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replace the classifier by a new one, or by the identity if there are no classes."""
        super().reset_classifier(num_classes, *args, **kwargs)
        self._wrap_head()


def _first_conv(in_chans: int, width: int, padding: int) -> nn.Conv2d:
    """Return a convolution whose kernel exceeds its stride, unlike that of timm's patch stem."""
    conv = nn.Conv2d(in_chans, width, 3, stride=2, padding=padding)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


@register_model
def haas_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> OodConvNeXt:
    """ConvNeXt-Tiny of Haas et al. with an L2 head: 768 features, 27,559,306 parameters with 10 classes."""
    settings = {"l2_head": True, "drop_path_rate": 0.1, **kwargs}
    return build_model_with_cfg(OodConvNeXt, "haas_convnext_tiny", pretrained, **settings)
