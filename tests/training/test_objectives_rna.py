"""Representation norm amplification: the loss, its ablations, and the effect of OoD images."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.models.networks.classifier import PooledClassifier
from ood_scores.training.objectives.amplification import RNA, mean_log_norm, rna_loss, without_ood_gradient
from ood_scores.training.objectives.classification import LogitAdjustment

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
