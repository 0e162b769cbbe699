"""Networks for 8x8 images, registered with timm, that train in a second; and recipes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ood_scores.models.networks.classifier import PooledClassifier, cifar_cfg
from ood_scores.models.networks.l2_head import L2Head

__all__ = ["TinyNet"]

_CFG = {**cifar_cfg(mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4)), "input_size": (3, 8, 8)}
default_cfgs = generate_default_cfgs({"tiny_net": _CFG, "tiny_plain": _CFG})


class TinyNet(PooledClassifier):
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        norm: bool = True,
        l2_head: bool = False,
        drop: float = 0.0,
        norm_pooled: bool = False,
    ) -> None:
        super().__init__(in_chans, num_features=16)
        self.l2_head = l2_head
        self.conv1 = nn.Conv2d(in_chans, 8, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.drop = nn.Dropout(drop)
        self.norm_pooled = nn.BatchNorm1d(16) if norm_pooled else nn.Identity()
        self.reset_classifier(num_classes)

    def make_head(self, num_classes: int) -> nn.Linear:
        return L2Head(16, num_classes) if self.l2_head else nn.Linear(16, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.drop(self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(images)))))))

    def forward_head(self, feature_map: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.norm_pooled(feature_map.mean(dim=(2, 3)))
        return features if pre_logits else self.get_classifier()(features)


@register_model
def tiny_net(pretrained: bool = False, **kwargs: Any) -> TinyNet:
    return build_model_with_cfg(TinyNet, "tiny_net", pretrained, **kwargs)


@register_model
def tiny_plain(pretrained: bool = False, **kwargs: Any) -> TinyNet:
    """Create a network without BatchNorm, for which the gradient of a batch is the mean over its parts."""
    return build_model_with_cfg(TinyNet, "tiny_plain", pretrained, **{"norm": False, **kwargs})


TABLES: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 64,
    "model": {"name": "tiny_net"},
    "data": {"train": "digits?classes=0-6"},
    "optimizer": {"lr": 0.05, "weight_decay": 5e-4},
}


def tables(**changes: Any) -> dict[str, Any]:
    """Return the tables of a small recipe; a dictionary such as ``data={...}`` updates that table."""
    merged = dict(TABLES)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def write_toml(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as a TOML file."""
    lines = [f"{key} = {_value(value)}" for key, value in recipe.items() if not isinstance(value, dict)]
    for table, entries in recipe.items():
        if isinstance(entries, dict):
            lines += [f"[{table}]", *(f"{key} = {_value(value)}" for key, value in entries.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _value(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
