"""Representation norm amplification: the loss, its ablations, and the effect of OoD images."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.evaluation.metrics import auroc
from ood_scores.models.networks import OodResNet
from ood_scores.models.networks.classifier import PooledClassifier, linear_classifier
from ood_scores.models.networks.ood_resnet import BasicBlock
from ood_scores.training.objectives.amplification import RNA, mean_log_norm, rna_loss, without_ood_gradient
from ood_scores.training.objectives.classification import LogitAdjustment
from ood_scores.training.step import TrainingStep, pre_logits, train_step

COUNTS = [70, 20, 9, 1]


class SmallNet(PooledClassifier):
    """Convolutions with BatchNorm, the second with a shortcut."""

    def __init__(self) -> None:
        super().__init__(in_chans=1, num_features=6)
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.reset_classifier(4)

    def forward_features(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(out)) + out)


def example() -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(2)
    head = nn.Linear(6, 4).double()
    return torch.randn(5, 6).double() * 3, head, torch.tensor([0, 3, 1, 2, 2]), torch.randn(3, 6).double() * 3


def network(seed: int = 0) -> tuple[SmallNet, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return SmallNet().double().train(), torch.randn(5, 1, 4, 4).double(), example()[2], torch.randn(7, 1, 4, 4).double()


def step(net: SmallNet, objective: RNA, images: Tensor, labels: Tensor, ood: Tensor, strict: bool = False) -> Tensor:
    """Return the loss of one forward pass of ID and OoD images together."""
    with without_ood_gradient(net, len(images)) if strict else nullcontext():
        features = net.forward_head(net.forward_features(torch.cat([images, ood])), pre_logits=True)
    return objective(features[: len(images)], net.get_classifier(), labels, features[len(images) :])


# ---- formulas


def test_rna_loss_matches_its_formula() -> None:
    h = example()[0]
    expected = np.log(1 + np.sqrt((h.numpy() ** 2).sum(axis=1))).mean()
    assert mean_log_norm(h).item() == pytest.approx(expected, rel=1e-12)
    assert rna_loss(h).item() == pytest.approx(-expected, rel=1e-12)


def test_rna_loss_gradient_decreases_with_the_norm() -> None:
    h = example()[0].requires_grad_()
    rna_loss(h).backward()
    assert h.grad is not None
    lengths = h.detach().norm(dim=1)
    torch.testing.assert_close(h.grad, -h.detach() / (5 * lengths * (1 + lengths))[:, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("projector", ["mlp", "linear", "none"])
@pytest.mark.parametrize(("amplify", "attenuate"), [(True, False), (False, True), (True, True)])
def test_rna_is_the_sum_of_logit_adjustment_and_its_terms(projector: str, amplify: bool, attenuate: bool) -> None:
    features, head, labels, ood = example()
    objective = RNA(COUNTS, 6, projector=projector, amplify=amplify, attenuate=attenuate).double()

    def projected(z: Tensor) -> np.ndarray:
        layers = [(p.detach().numpy()) for p in objective.projector.parameters()]
        h = z.numpy()
        if projector == "mlp":
            h = np.maximum(h @ layers[0].T + layers[1], 0)
        return h if projector == "none" else h @ layers[-2].T + layers[-1]

    expected = LogitAdjustment(COUNTS)(features, head, labels).item()
    if amplify:
        expected -= 0.5 * np.log(1 + np.linalg.norm(projected(features), axis=1)).mean()
    if attenuate:
        expected += 0.5 * np.log(1 + np.linalg.norm(projected(ood), axis=1)).mean()
    assert objective(features, head, labels, ood).item() == pytest.approx(expected, rel=1e-12)
    assert projected(features).shape == (5, 6 if projector == "none" else 128)


def test_rna_without_auxiliary_images_needs_no_ood_features() -> None:
    features, head, labels, ood = example()
    objective = RNA(COUNTS, 6, auxiliary=False).double()
    assert not objective.auxiliary
    assert objective(features, head, labels).item() == objective(features, head, labels, ood).item()


@pytest.mark.parametrize("projector", ["mlp", "linear", "none"])
def test_gradients_of_rna(projector: str) -> None:
    features, head, labels, ood = example()
    objective = RNA(COUNTS, 6, projector=projector, attenuate=True, width=3).double()
    assert torch.autograd.gradcheck(
        lambda z, o: objective(z, head, labels, o), (features.requires_grad_(), ood.requires_grad_())
    )


# ---- OoD images in BatchNorm


def test_ood_images_change_running_statistics_and_the_loss_of_id_images() -> None:
    def after(shift: float) -> tuple[Tensor, Tensor]:
        net, images, labels, ood = network()
        torch.manual_seed(9)
        loss = step(net, RNA(COUNTS, 6).double(), images, labels, ood + shift)
        assert isinstance(net.bn2.running_mean, Tensor)
        return net.bn2.running_mean, loss

    (mean, loss), (shifted_mean, shifted_loss) = after(0.0), after(3.0)
    assert (mean - shifted_mean).abs().max() > 1e-3
    assert abs(loss.item() - shifted_loss.item()) > 1e-3


def test_ood_features_have_no_gradient() -> None:
    features, head, labels, ood = example()
    objective = RNA(COUNTS, 6).double()
    (gradient,) = torch.autograd.grad(
        objective(features, head, labels, ood.requires_grad_()), ood, allow_unused=True, materialize_grads=True
    )
    assert not gradient.any()


def test_ood_pixels_have_a_gradient_only_through_batch_statistics() -> None:
    net, images, labels, ood = network()
    objective = RNA(COUNTS, 6).double()
    (through_batch,) = torch.autograd.grad(step(net, objective, images, labels, ood.requires_grad_()), ood)
    assert through_batch.abs().max() > 1e-6
    net.eval()
    (through_running,) = torch.autograd.grad(step(net, objective, images, labels, ood), ood)
    assert not through_running.any()


def test_without_ood_gradient_keeps_values_and_stops_gradients_of_ood_images() -> None:
    def run(strict: bool) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        net, images, labels, ood = network()
        torch.manual_seed(9)
        loss = step(net, RNA(COUNTS, 6).double(), images, labels, ood.requires_grad_(), strict)
        pixels, kernel = torch.autograd.grad(loss, [ood, net.conv1.weight])
        return loss, pixels, dict(net.named_buffers()), kernel

    (loss, _, buffers, kernel), (strict_loss, strict_pixels, strict_buffers, strict_kernel) = run(False), run(True)
    torch.testing.assert_close(strict_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(strict_buffers, buffers, rtol=0, atol=0)
    assert not strict_pixels.any()
    assert (strict_kernel - kernel).abs().max() > 1e-6


def test_without_ood_gradient_removes_its_hooks() -> None:
    net, images, labels, ood = network()
    objective = RNA(COUNTS, 6).double()
    step(net, objective, images, labels, ood, strict=True)
    (gradient,) = torch.autograd.grad(step(net, objective, images, labels, ood.requires_grad_()), ood)
    assert gradient.any()


def test_rna_owns_the_parameters_of_its_projector() -> None:
    shapes = [tuple(parameter.shape) for parameter in RNA(COUNTS, 6).parameters()]
    assert shapes == [(6, 6), (6,), (128, 6), (128,)]
    assert list(RNA(COUNTS, 6).state_dict()) == [
        "projector.0.weight",
        "projector.0.bias",
        "projector.2.weight",
        "projector.2.bias",
    ]


# ---- Algorithm 1 and its effect


def transcribed_steps(net: Any, projection: list[Tensor], batches: list[Any], weight: float, lr: float) -> None:
    """Algorithm 1 of the paper with SGD, as plain tensor operations on the parameters of the network and projection.

    One pass of ID and OoD images through the network, the logit-adjusted cross-entropy and the norm of the projection
    of the ID images alone, and a step against the gradient.
    """
    prior = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    parameters = [*net.parameters(), *projection]
    for images, labels, ood in batches:
        z = net.forward_features(torch.cat([images, ood])).mean(dim=(2, 3))[: len(images)]
        logits = z @ net.fc.weight.T + net.fc.bias + prior.log()
        picked = logits[torch.arange(len(labels)), labels]
        adjusted = (logits.exp().sum(dim=1).log() - picked).mean()
        first, first_bias, second, second_bias = projection
        h = (z @ first.T + first_bias).clamp_min(0) @ second.T + second_bias
        loss = adjusted - weight * (1 + h.square().sum(dim=1).sqrt()).log().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient


def test_steps_equal_a_transcription_of_algorithm_1() -> None:
    """After 8 steps, all weights and all BatchNorm statistics agree in float64."""
    torch.manual_seed(0)
    net = OodResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, width=4, bn_affine=False).double().train()
    objective = RNA(COUNTS, 32, width=16).double()
    other, projection = deepcopy(net), [each.detach().clone().requires_grad_() for each in objective.parameters()]
    labels = torch.tensor([0, 0, 1, 2, 0, 3])
    batches = [
        (torch.rand(6, 3, 8, 8).double(), labels[torch.randperm(6)], torch.rand(5, 3, 8, 8).double()) for _ in range(8)
    ]
    transcribed_steps(other, projection, batches, weight=0.5, lr=0.1)
    training = TrainingStep(net, objective)
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    for images, labels, ood in batches:
        train_step(training, linear_classifier(net), optimizer, images, labels, ood)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(list(objective.parameters()), projection, rtol=1e-9, atol=1e-11)


def test_rna_separates_the_images_that_it_trains_on() -> None:
    """Fixed ID and OoD images end with AUROC above 99 of the norm, and OoD norms below half of those of ID images."""
    torch.manual_seed(0)
    net = OodResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, width=8, bn_affine=False).train()
    training = TrainingStep(net, RNA([64] * 4, 64))
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-3, weight_decay=5e-4)
    labels = torch.arange(512) % 4
    patterns = F.interpolate(torch.rand(4, 3, 4, 4), size=16)
    images = 0.6 * patterns[labels] + 0.4 * torch.rand(512, 3, 16, 16)
    ood = 0.6 * F.interpolate(torch.rand(512, 3, 4, 4), size=16) + 0.4 * torch.rand(512, 3, 16, 16)
    for _ in range(150):
        rows = torch.randperm(512)[:64]
        train_step(training, linear_classifier(net), optimizer, images[rows], labels[rows], ood[rows])
    with torch.no_grad():
        norms = [pre_logits(net.eval(), each).norm(dim=1) for each in (images, ood)]
    assert auroc(*norms) > 0.99
    assert norms[1].mean() < 0.5 * norms[0].mean()
