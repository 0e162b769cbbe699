"""The classification objectives against their formulas, and the small trainer that minimises them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores.models.networks
from ood_scores.errors import BadInput, BadLabels, EmptyInput, HeadNotFound, NotFinite, ShapeMismatch
from ood_scores.training.fit import fit
from ood_scores.training.objectives import (
    CrossEntropy,
    L2Norm,
    LogitAdjustment,
    LogitNorm,
    Objective,
    cross_entropy,
    l2_norm,
    logit_adjustment,
    logit_norm,
)

COUNTS = [70, 20, 9, 1]


def example() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 6, dtype=torch.float64) * 3, nn.Linear(6, 4).double(), torch.tensor([0, 3, 1, 2, 2])


def numpy_cross_entropy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].mean())


# ---- formulas


def test_cross_entropy_is_its_formula() -> None:
    z, head, labels = example()
    logits = head(z).detach()
    expected = numpy_cross_entropy(logits.numpy(), labels.numpy())
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert CrossEntropy()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_l2_norm_is_its_formula_with_one_norm_per_sample() -> None:
    z, head, labels = example()
    unit = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    logits = unit @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    expected = numpy_cross_entropy(logits, labels.numpy())
    assert l2_norm(z, head.weight, head.bias, labels).item() == pytest.approx(expected, rel=1e-12)
    assert L2Norm()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_l2_norm_ignores_the_length_of_each_feature() -> None:
    z, head, labels = example()
    lengths = torch.tensor([[0.1], [2.0], [30.0], [1.0], [5.0]], dtype=torch.float64)
    torch.testing.assert_close(L2Norm()(z * lengths, head, labels), L2Norm()(z, head, labels), rtol=1e-12, atol=0)


def test_l2_norm_gradient_is_orthogonal_to_the_feature() -> None:
    z, head, labels = example()
    z.requires_grad_()
    L2Norm()(z, head, labels).backward()
    assert z.grad is not None
    assert z.grad.norm(dim=1).min() > 1e-3
    assert (z.grad * z).sum(dim=1).abs().max() < 1e-15


def test_l2_norm_of_tiny_features_divides_by_eps() -> None:
    z, head, labels = example()
    tiny = z * 1e-3
    expected = cross_entropy(tiny @ head.weight.T / 0.5 + head.bias, labels)
    torch.testing.assert_close(L2Norm(eps=0.5)(tiny, head, labels), expected)
    zeros = torch.zeros_like(z)
    torch.testing.assert_close(L2Norm()(zeros, head, labels), cross_entropy(head(zeros), labels))


def test_l2_norm_equals_cross_entropy_of_an_l2_head_in_training() -> None:
    z, head, labels = example()
    l2_head = ood_scores.models.networks.L2Head(6, 4).double()
    l2_head.load_state_dict(head.state_dict())
    torch.testing.assert_close(CrossEntropy()(z, l2_head.train(), labels), L2Norm()(z, head, labels))
    torch.testing.assert_close(CrossEntropy()(z, l2_head.eval(), labels), CrossEntropy()(z, head, labels))


def test_logit_norm_is_its_formula() -> None:
    z, head, labels = example()
    logits = head(z).detach().numpy()
    lengths = np.sqrt((logits**2).sum(axis=1, keepdims=True)) + 1e-7
    expected = numpy_cross_entropy(logits / lengths / 0.04, labels.numpy())
    assert logit_norm(head(z), labels).item() == pytest.approx(expected, rel=1e-12)
    assert LogitNorm()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)
    assert LogitNorm(temperature=1.0)(z, head, labels).item() == pytest.approx(
        numpy_cross_entropy(logits / lengths, labels.numpy()), rel=1e-12
    )


def test_logit_norm_ignores_the_length_of_the_logits() -> None:
    z, head, labels = example()
    logits = head(z)
    for factor in (0.1, 100.0):
        torch.testing.assert_close(logit_norm(logits * factor, labels), logit_norm(logits, labels), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            logit_norm(logits * factor, labels, eps=0.0), logit_norm(logits, labels, eps=0.0), rtol=1e-12, atol=0
        )


def test_logit_norm_of_zero_logits_is_finite() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    loss = logit_norm(zeros, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3))
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_logit_adjustment_is_its_formula(tau: float) -> None:
    z, head, labels = example()
    prior = np.array(COUNTS) / 100
    expected = numpy_cross_entropy(head(z).detach().numpy() + tau * np.log(prior), labels.numpy())
    log_prior = torch.from_numpy(np.log(prior))
    assert logit_adjustment(head(z), labels, log_prior, tau).item() == pytest.approx(expected, rel=1e-12)
    assert LogitAdjustment(COUNTS, tau)(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_logit_adjustment_with_equal_counts_is_cross_entropy() -> None:
    z, head, labels = example()
    plain = CrossEntropy()(z, head, labels)
    torch.testing.assert_close(LogitAdjustment([7, 7, 7, 7])(z, head, labels), plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(LogitAdjustment(COUNTS, tau=0.0)(z, head, labels), plain, rtol=0, atol=0)


def test_logit_adjustment_takes_counts_of_any_kind_and_precision() -> None:
    z, head, labels = example()
    expected = LogitAdjustment(COUNTS)(z, head, labels)
    others: list[Any] = [np.array(COUNTS), torch.tensor(COUNTS, dtype=torch.int32), tuple(COUNTS)]
    for counts in others:
        torch.testing.assert_close(LogitAdjustment(counts)(z, head, labels), expected, rtol=0, atol=0)
    half = LogitAdjustment([60_000, 60_000, 9, 1]).half()
    assert half(z.half(), head.half(), labels).isfinite()


@pytest.mark.parametrize("counts", [[3], [3, 0, 2, 1], [1.0, 2.0, 3.0, 4.0], [[1, 2], [3, 4]], [True, True]])
def test_counts_that_are_no_prior_are_refused(counts: Any) -> None:
    with pytest.raises(BadInput):
        LogitAdjustment(counts)


def test_counts_of_another_number_of_classes_are_refused() -> None:
    z, head, labels = example()
    with pytest.raises(ShapeMismatch, match="3 classes; the head has 4"):
        LogitAdjustment([1, 2, 3])(z, head, labels)


@pytest.mark.parametrize("objective", [CrossEntropy(), L2Norm(), LogitNorm(1.0), LogitAdjustment(COUNTS)])
def test_gradients(objective: Objective) -> None:
    z, head, labels = example()
    assert torch.autograd.gradcheck(lambda features: objective(features, head, labels), z.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda weight: objective(z.detach(), _with(head, weight), labels), head.weight.detach().requires_grad_()
    )


def _with(head: nn.Linear, weight: Tensor) -> nn.Linear:
    """The head with another weight, which keeps its graph."""
    other = nn.Linear(head.in_features, head.out_features).double()
    del other.weight
    other.weight = weight
    other.bias = nn.Parameter(head.bias.detach())
    return other


# ---- the trainer


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images[:512], torch.from_numpy(labels).long()[:512]


def small_model(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", in_chans=1, **kwargs)


SETTINGS: dict[str, Any] = {"epochs": 1, "lr": 0.1, "batch_size": 128, "progress": False}


@pytest.mark.parametrize(("objective", "fall"), [(CrossEntropy(), 0.5), (L2Norm(), 0.8)])
def test_the_objective_falls(objective: Objective, fall: float, digits: tuple[Tensor, Tensor]) -> None:
    model = small_model()
    history = fit(model, digits, objective=objective, **{**SETTINGS, "epochs": 8})
    assert history[0]["loss"] > 1.5
    assert history[-1]["loss"] < fall * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.8
    assert not model.training


def test_the_record_of_an_epoch(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:100], digits[1][:100]
    model = small_model().train()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model.get_classifier()(features)
    (record,) = fit(small_model(), (images, labels), **SETTINGS)
    assert record["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert record["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert record["feature_norm"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-5)
    assert record["lr"] == 0.1


def test_means_are_over_samples_not_batches(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:100], digits[1][:100]
    loader = [(images[:90], labels[:90]), (images[90:], labels[90:])]
    still: dict[str, Any] = {**SETTINGS, "lr": 0.0, "weight_decay": 0.0}
    whole = fit(small_model(), loader, **still)[0]
    parts = [fit(small_model(), [batch], **still)[0] for batch in loader]
    assert whole["loss"] == pytest.approx(0.9 * parts[0]["loss"] + 0.1 * parts[1]["loss"], rel=1e-5)


def test_milestones(digits: tuple[Tensor, Tensor]) -> None:
    data = (digits[0][:16], digits[1][:16])
    history = fit(small_model(), data, **{**SETTINGS, "epochs": 4, "milestones": (1, 3)})
    assert [record["lr"] for record in history] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_equal_seeds_give_equal_weights(digits: tuple[Tensor, Tensor]) -> None:
    def weights(seed: int) -> Tensor:
        model = small_model()
        fit(model, digits, seed=seed, **SETTINGS)
        return model.conv1.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_global_random_state_is_left_alone(digits: tuple[Tensor, Tensor]) -> None:
    model = small_model()
    state = torch.get_rng_state()
    fit(model, (digits[0][:16], digits[1][:16]), **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shuffling_loader_is_seeded_too(digits: tuple[Tensor, Tensor]) -> None:
    loader = DataLoader(TensorDataset(*digits), batch_size=128, shuffle=True)
    histories = [fit(small_model(), loader, seed=5, **SETTINGS) for _ in range(2)]
    assert histories[0] == histories[1]


def test_errors_say_what_is_wrong(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    with pytest.raises(EmptyInput):
        fit(small_model(), (images[:0], labels[:0]), **SETTINGS)
    with pytest.raises(EmptyInput):
        fit(small_model(), [], **SETTINGS)
    with pytest.raises(ShapeMismatch, match="8 images but 7 labels"):
        fit(small_model(), (images, labels[:7]), **SETTINGS)
    with pytest.raises(BadLabels, match="classes 0 to 4"):
        fit(small_model(num_classes=5), (images, labels), **SETTINGS)
    with pytest.raises(BadLabels, match="float32"):
        fit(small_model(), (images, labels.float()), **SETTINGS)
    with pytest.raises(NotFinite):
        fit(small_model(), (images * float("nan"), labels), **SETTINGS)
    with pytest.raises(HeadNotFound):
        fit(small_model(num_classes=0), (images, labels), **SETTINGS)
