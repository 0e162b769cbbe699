"""Shared parts of networks: timm's classifier methods, the default configuration, and He initialization."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ood_scores.errors import HeadNotFound


class PooledClassifier(nn.Module, ABC):
    """Feature map, global average pooling, and linear classifier, with the methods that timm expects.

    Images ``[N, in_chans, H, W]`` become a map ``[N, num_features, h, w]`` (``forward_features``), features
    ``[N, num_features]`` (``forward_head(..., pre_logits=True)``) and logits ``[N, num_classes]``.

    A subclass names its classifier attribute, defines ``forward_features``, and ends its constructor with
    ``reset_classifier(num_classes)``. With 0 classes the model returns the features.
    """

    classifier_name: ClassVar[str] = "fc"

    def __init__(self, in_chans: int, num_features: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = num_features
        self.head_hidden_size = num_features

    def make_head(self, num_classes: int) -> nn.Linear:
        return nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one, or by the identity if there are no classes."""
        self.num_classes = num_classes
        head = self.make_head(num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier_name, head)

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature map ``[N, num_features, h, w]`` of images ``[N, in_chans, H, W]``."""

    def forward_head(self, feature_map: Tensor, pre_logits: bool = False) -> Tensor:
        features = feature_map.mean(dim=(2, 3))
        return features if pre_logits else self.get_classifier()(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


CLASSIFIER = "ood_scores_classifier"
"""The attribute of a model that is not timm-style with the name of its linear classifier."""


def linear_classifier(model: nn.Module) -> nn.Linear:
    """Return the linear classifier of a timm-style model, or of another one that has the attribute ``CLASSIFIER``.

    Raises:
        HeadNotFound: if the model has none, or several.
    """
    name = getattr(model, CLASSIFIER, None)
    head = getattr(model, "get_classifier", lambda: None)() if name is None else model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise HeadNotFound(
            f"{type(model).__name__}.get_classifier() returns {type(head).__name__}, not an nn.Linear: use a "
            "timm-style model with one linear classifier."
        )
    return head


def penultimate(model: Any, images: Tensor) -> Tensor:
    """Return what the linear classifier of a model receives for images, the penultimate features ``[N, D]``."""
    if getattr(model, CLASSIFIER, None) is None:
        return model.forward_head(model.forward_features(images), pre_logits=True)
    received: list[Tensor] = []
    hook = linear_classifier(model).register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return received[-1]


def batchnorms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def cifar_cfg(mean: tuple[float, ...], std: tuple[float, ...], classifier: str = "fc") -> dict[str, Any]:
    """Return timm's pretrained configuration for uncropped 32x32 images and 10 classes."""
    return {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": "conv1",
        "classifier": classifier,
    }


def init_he(model: nn.Module) -> None:
    """Apply He normal initialization (2015), fan-out, to every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
