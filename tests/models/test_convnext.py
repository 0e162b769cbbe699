"""ConvNeXt-Tiny compared with torchvision, and the changes of Haas et al."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from networks import create, images, parameter_count, settle, small
from torch import nn


def test_convnext_matches_torchvision_with_the_changes_of_the_paper() -> None:
    """With all weights copied in order of definition, and the LayerNorm in both, the logits are equal."""
    sizes, depths = (8, 12, 16, 24), (1, 1, 2, 1)
    settings = [
        torchvision.models.convnext.CNBlockConfig(size, following, depth)
        for size, following, depth in zip(sizes, (*sizes[1:], None), depths, strict=True)
    ]
    reference = torchvision.models.ConvNeXt(settings, num_classes=10)
    reference.features[0][0] = nn.Conv2d(3, 8, kernel_size=3, stride=2)
    for block in reference.modules():
        if isinstance(block, torchvision.models.convnext.CNBlock):
            width = block.block[0].in_channels
            block.block[0] = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
    model = small("haas_convnext_tiny", head_norm=True, num_classes=10)
    settle(model)
    assert parameter_count(model) == parameter_count(reference)
    with torch.no_grad():
        for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours.reshape(theirs.shape))
        torch.testing.assert_close(model(images()), reference.eval()(images()), rtol=1e-4, atol=1e-5)


def test_convnext_stochastic_depth_matches_torchvision() -> None:
    model = create("haas_convnext_tiny", dims=(4, 4, 4, 4))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 17 for i in range(18)])


def test_convnext_stem_padding() -> None:
    with torch.no_grad():
        assert small("haas_convnext_tiny").stem(images(1)).shape[-1] == 15
        padded = small("haas_convnext_tiny", stem_padding=1)
        assert padded.stem(images(1)).shape[-1] == 16
        assert padded.forward_features(images(1)).shape[-1] == 2
    assert [stage["reduction"] for stage in padded.feature_info] == [2, 4, 8, 16]


def test_convnext_feature_norm_varies_only_without_the_layer_norm() -> None:
    def spread(model: Any) -> float:
        settle(model)
        if isinstance(model.head.norm, nn.LayerNorm):
            nn.init.ones_(model.head.norm.weight)
            nn.init.zeros_(model.head.norm.bias)
        with torch.no_grad():
            x = images() * torch.tensor([0.1, 1, 3, 10]).reshape(4, 1, 1, 1)
            norms = model.forward_head(model.forward_features(x), pre_logits=True).norm(dim=1)
        return (norms.std() / norms.mean()).item()

    assert spread(small("haas_convnext_tiny")) > 0.01
    assert spread(small("haas_convnext_tiny", head_norm=True)) < 1e-4
