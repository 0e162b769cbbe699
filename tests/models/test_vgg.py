"""VGG-16 compared with torchvision, and its arguments."""

from __future__ import annotations

import torch
import torchvision
from networks import create, images, settle, small, train
from torch import nn

from ood_scores.models.networks import SpectralConv2d


def test_vgg_matches_torchvision_without_biases() -> None:
    model = create("haas_vgg16")
    reference = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    settle(model)
    missing, unexpected = reference.load_state_dict(model.features.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 13
    with torch.no_grad():
        for key in missing:
            reference.get_parameter(key).zero_()
        torch.testing.assert_close(model.forward_features(images()), reference.eval()(images()))


def test_vgg_arguments_select_activation_and_spectral_norm() -> None:
    model = create("haas_vgg16")
    assert not any(isinstance(module, (SpectralConv2d, nn.LeakyReLU)) for module in model.modules())
    ddu = create("haas_vgg16", spectral_norm=3.0, negative_slope=0.01, l2_head=False)
    activations = [module for module in ddu.modules() if isinstance(module, (nn.ReLU, nn.LeakyReLU))]
    assert [getattr(module, "negative_slope", None) for module in activations] == [0.01] * 13
    assert sum(isinstance(module, SpectralConv2d) for module in ddu.modules()) == 13
    assert {key for key in ddu.state_dict() if not key.endswith(".u")} == set(model.state_dict())


def test_vgg_spectral_norm_is_bounded_during_training() -> None:
    model = small("haas_vgg16", num_classes=5, spectral_norm=0.5, negative_slope=0.01)
    train(model, torch.optim.SGD(model.parameters(), lr=0.02), steps=20)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 6
    for conv in convs:
        assert isinstance(conv, SpectralConv2d)
        used, free = (
            torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2).item()
            for weight in (conv.constrained_weight(), conv.weight)
        )
        assert used < 0.51 < free  # one power iteration per step tracks the weights closely
