"""GradNorm against the gradient of the last layer, computed sample by sample by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ood_scores import FeatureSet, Head, score
from ood_scores.errors import BadInput

RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
ORDERS = [0.3, 0.5, 1, 2, 3, float("inf")]


def example(dtype: torch.dtype, rows: int = 12, width: int = 7, classes: int = 5) -> tuple[nn.Linear, FeatureSet]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(width, classes, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, width, generator=generator) / 2)
        layer.bias.copy_(torch.randn(classes, generator=generator))
    features = torch.rand(rows, width, generator=generator).to(dtype)
    features[:, 2] = 0  # a unit that is never active
    features[3:6] *= 2  # confident rows, but not so confident that float32 autograd cancels in softmax - onehot
    return layer, FeatureSet(features, layer(features), head=Head(layer.weight, layer.bias))


def loss(logits: Tensor, target: str, temperature: float) -> Tensor:
    """KL(uniform || softmax) up to a constant, or the cross-entropy with the predicted class, of one sample."""
    if target == "uniform":
        return -log_softmax(logits / temperature, dim=0).mean()
    return cross_entropy(logits / temperature, logits.argmax())


def gradients(
    layer: nn.Linear, features: Tensor, target: str, temperature: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gradients of the weight (flattened) and of the bias for each sample."""
    found = []
    for sample in features:
        weight, bias = torch.autograd.grad(loss(layer(sample), target, temperature), [layer.weight, layer.bias])
        found.append((weight.double().numpy().ravel(), bias.double().numpy()))
    return found


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("target", ["uniform", "predicted"])
@pytest.mark.parametrize("temperature", [0.5, 1, 4])
@pytest.mark.parametrize("p", ORDERS)
def test_equals_autograd(dtype: torch.dtype, target: str, temperature: float, p: float) -> None:
    layer, feats = example(dtype)
    grads = gradients(layer, feats.features, target, temperature)
    sign = {"uniform": 1, "predicted": -1}[target]
    for bias in (False, True):
        expected = [sign * np.linalg.norm(np.append(w, b) if bias else w, ord=p) for w, b in grads]
        found = score("gradnorm", feats, p=p, temperature=temperature, target=target, bias=bias)
        np.testing.assert_allclose(found.numpy(), expected, rtol=RTOL[dtype])


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("temperature", [0.5, 1, 4])
def test_parts(p: float, temperature: float) -> None:
    """U = ||z||_p; V = ||1 - C softmax(f/T)||_p, or -||softmax(f/T) - onehot||_p; no constant factors."""
    _, feats = example(torch.float64)
    assert feats.logits is not None
    z, softmax = feats.features.numpy(), torch.softmax(feats.logits / temperature, dim=1).numpy()
    onehot = np.eye(softmax.shape[1])[softmax.argmax(axis=1)]
    u = np.linalg.norm(z, ord=p, axis=1)
    u_with_bias = np.linalg.norm(np.column_stack([z, np.ones(len(z))]), ord=p, axis=1)
    v = {
        "uniform": np.linalg.norm(1 - softmax.shape[1] * softmax, ord=p, axis=1),
        "predicted": -np.linalg.norm(softmax - onehot, ord=p, axis=1),
    }
    settings: dict[str, Any] = {"p": p, "temperature": temperature}
    np.testing.assert_allclose(score("gradnorm", feats, part="U", **settings), u, rtol=1e-12)
    np.testing.assert_allclose(score("gradnorm", feats, part="U", bias=True, **settings), u_with_bias, rtol=1e-12)
    for target, expected in v.items():
        np.testing.assert_allclose(score("gradnorm", feats, part="V", target=target, **settings), expected, rtol=1e-12)


def test_predicted_target_does_not_saturate() -> None:
    """1 - p is computed as the sum of the other probabilities and stays correct where p rounds to 1."""
    logits = torch.tensor([[60.0, 0.0, 0.0], [80.0, 0.0, 0.0]], dtype=torch.float64)
    feats = FeatureSet(torch.ones(2, 1, dtype=torch.float64), logits)
    expected = -4 * np.exp([-60.0, -80.0])
    np.testing.assert_allclose(score("gradnorm", feats, target="predicted"), expected, rtol=1e-12)


def test_each_part_needs_only_what_it_reads() -> None:
    _, feats = example(torch.float64)
    without_logits = FeatureSet(feats.features)
    assert torch.equal(score("gradnorm", without_logits, part="U"), score("gradnorm", feats, part="U"))
    other_features = FeatureSet(torch.ones(len(feats), 1), feats.logits)
    assert torch.equal(score("gradnorm", other_features, part="V"), score("gradnorm", feats, part="V"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"p": 0}, "p must be in"),
        ({"p": -1}, "p must be in"),
        ({"p": float("nan")}, "p must be in"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"temperature": -1}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive"),
        ({"target": "labels"}, "target must be 'uniform' or 'predicted'"),
        ({"part": "W"}, "part must be 'UV' or 'U' or 'V'"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    _, feats = example(torch.float64)
    with pytest.raises(BadInput, match=f"gradnorm: {message}"):
        score("gradnorm", feats, **params)
