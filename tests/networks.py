"""Networks of the package, some of them small, with images for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
import ood_scores.models.networks

SMALL: dict[str, dict[str, Any]] = {
    "haas_vgg16": {"stages": ((8, 8), (12,), (16,), (16,), (24,))},
    "haas_cct7_3x1": {"dim": 32, "depth": 2, "attn_drop_rate": 0.0, "drop_path_rate": 0.0},
    "haas_convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "drop_path_rate": 0.0},
}
"""Arguments that make large networks small enough to train in a second."""


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def small(name: str, **kwargs: Any) -> Any:
    return create(name, **SMALL[name], **kwargs)


def images(count: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def labels(count: int, classes: int = 5) -> Tensor:
    return torch.arange(count) % classes


def settle(model: Any, size: int = 32, channels: int = 3) -> None:
    """Move BatchNorm statistics, biases, and layer scales away from their initial values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.1
                )
        model.train()(images(size=size, channels=channels))
    model.eval()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Return the loss on one batch before every step."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images(10)), labels(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def head_call(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output of the classifier."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_classifier().register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def assert_extracted(model: Any, classifier: nn.Linear, size: int = 32) -> ood_scores.FeatureSet:
    """Assert that features are the classifier's inputs, and the head is the classifier and returns the logits."""
    data = DataLoader(TensorDataset(images(5, size), labels(5)), batch_size=3)
    feats = ood_scores.extract(model, data, progress=False)
    assert feats.head is not None
    assert feats.logits is not None
    assert feats.head.weight.equal(classifier.weight)
    assert feats.head.bias.equal(classifier.bias)
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images(5, size)), pre_logits=True)
        torch.testing.assert_close(feats.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feats.logits, model(images(5, size)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feats.head(feats.features), feats.logits, rtol=1e-4, atol=1e-5)
    return feats


def resnet(**settings: Any) -> nn.Module:
    """Return a network whose statistics and weights are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Write the same weights of 7 classes in every supported form."""
    state = resnet(num_classes=7).state_dict()
    wrapped = {
        "plain.pth": state,
        "timm.pth": {"state_dict": state, "args": argparse.Namespace(lr=0.1, model="resnet10t")},
        "state_dict.pth": {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        "model.pt": {"model": state, "optimizer": {"lr": 0.1}},
        "ema.bin": {"model": {name: torch.zeros_like(value) for name, value in state.items()}, "model_ema": state},
    }
    save_file(state, folder / "weights.safetensors")
    for name, content in wrapped.items():
        torch.save(content, folder / name)
    return {path.name: path for path in folder.iterdir()}
