"""ConvNeXt-Tiny for 32x32 images, as Haas et al. (2024) modified it."""

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

    Images `[N, in_chans, H, W]` become a map of a sixteenth of their size (`forward_features`), features `[N, 768]`
    and logits. Depths, widths, stochastic depth, layer scale and initialisation are those of ConvNeXt-Tiny.

    Source: Haas, Yolland & Rabus (TMLR 2024), A.1: in PyTorch's default implementation "the kernel size of the first
    layer was lowered from 4 to 3, the stride was lowered from 4 to 2. All other kernel sizes were lowered from 7 to
    3". The 2x2 convolutions between the stages stay. The first layer has no padding there, and none is said to be
    added, so maps of 32x32 images are 15, 7, 3 and 1 wide.

    Departure: ConvNeXt has a LayerNorm between the pooled map and the classifier. It divides out the norm of what it
    gets, so after it ‖z‖ says almost nothing; and before it there is no head whose input z is. The paper does not say
    which z it took. Here there is none, and the classifier, plain or `L2Head`, reads the pooled map itself: the z that
    is normalised in training is the one that extraction keeps, and logits are affine in it. `head_norm=True` puts
    the LayerNorm back; features are then those after it.

    Args:
        num_classes: 0 makes the model return the features.
        in_chans: Channels of the images.
        l2_head: The classifier is an `L2Head`: while training it sees z/‖z‖.
        normalize_eval: The `L2Head` also normalises in eval mode.
        head_norm: Keep ConvNeXt's LayerNorm before the classifier.
        stem_padding: Of the first convolution; 1 makes maps of 32x32 images 16, 8, 4 and 2 wide.
        kwargs: timm's, as `drop_path_rate`.
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
        """Replace the classifier by a fresh one, or by the identity if there are no classes."""
        super().reset_classifier(num_classes, *args, **kwargs)
        self._wrap_head()


def _first_conv(in_chans: int, width: int, padding: int) -> nn.Conv2d:
    """timm's patch stem has its stride for a kernel; this one overlaps."""
    conv = nn.Conv2d(in_chans, width, 3, stride=2, padding=padding)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


@register_model
def haas_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> OodConvNeXt:
    """Haas's ConvNeXt-Tiny with an L2 head: 768 features, 27,559,306 parameters with 10 classes."""
    settings = {"l2_head": True, "drop_path_rate": 0.1, **kwargs}
    return build_model_with_cfg(OodConvNeXt, "haas_convnext_tiny", pretrained, **settings)
