"""The ResNets of Haas et al. and Shin et al.: each argument compared with its definition."""

from __future__ import annotations

import pytest
import torch
from networks import create, images
from torch import nn

from ood_scores.models.networks.ood_resnet import PooledShortcut


def test_bn_affine_off_leaves_no_batchnorm_parameters() -> None:
    model = create("rna_resnet18")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.weight is None and norm.bias is None for norm in norms)
    assert not any("bn" in name or "shortcut.1" in name for name, _ in model.named_parameters())


def test_shortcut_affine_adds_scale_and_offset_only_to_shortcuts() -> None:
    model = create("rna_resnet18", shortcut_affine=True)
    scaled = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
    assert scaled == [f"layer{stage}.0.shortcut.1" for stage in (2, 3, 4)]
    assert set(create("rna_resnet18", bn_affine=True, shortcut_affine=True).state_dict()) == set(
        create("rna_resnet18", bn_affine=True).state_dict()
    )


def test_pooled_shortcut_averages_pads_and_adds_no_parameters() -> None:
    shortcut = PooledShortcut(3, 5, stride=2)
    x = images(2, size=4)
    out = shortcut(x)
    assert out.shape == (2, 5, 2, 2)
    torch.testing.assert_close(out[:, :3], x.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5)))
    assert not out[:, 3:].any()
    assert not any("shortcut" in key for key in create("haas_resnet18").state_dict())


def test_pooled_shortcut_accepts_odd_image_sizes() -> None:
    with torch.no_grad():
        assert create("haas_resnet18").eval()(images(1, size=28)).shape == (1, 10)


def test_negative_slope_sets_the_activation() -> None:
    x = torch.tensor([-2.0, 3.0])
    assert create("haas_resnet18").act(x).tolist() == pytest.approx([-0.02, 3.0])
    assert create("rna_resnet18").act(x).tolist() == [0.0, 3.0]
