"""fdbd against a plain float64 reference and pytorch-ood."""

from __future__ import annotations

import numpy as np
from classified import (
    BIAS,
    CLASSES,
    FIT,
    LOGITS,
    ROWS,
    WEIGHT,
    WIDTH,
    Array,
    float32,
    layer,
    ours,
    same,
)
from pytorch_ood import detector as peer

from ood_scores import FeatureSet, Head


def fdbd(weight: Array, logits: Array) -> list[float]:
    found, center = [], FIT.mean(axis=0)
    for z, f in zip(ROWS, logits, strict=True):
        best = f.argmax()
        apart = [c for c in range(len(f)) if np.linalg.norm(weight[best] - weight[c]) > 1e-12]
        gaps = [abs(f[best] - f[c]) / np.linalg.norm(weight[best] - weight[c]) for c in apart]
        found.append(float(np.mean(gaps or [0.0]) / np.linalg.norm(z - center)))
    return found


def test_fdbd() -> None:
    np.testing.assert_allclose(ours("fdbd"), fdbd(WEIGHT, LOGITS), rtol=1e-9)
    same(ours("fdbd"), float32(peer.fDBD(None, layer())), rtol=1e-4)  # pytorch-ood computes in float32


def test_fdbd_leaves_out_classes_with_equal_weights() -> None:
    """pytorch-ood divides by their distance of 0."""
    weight = WEIGHT.copy()
    weight[3] = weight[1]
    logits = ROWS @ weight.T + BIAS
    head = Head(weight, BIAS)
    found = ours("fdbd", FeatureSet(ROWS, logits), FeatureSet(FIT, head=head))
    np.testing.assert_allclose(found, fdbd(weight, logits), rtol=1e-9)
    level = Head(np.ones((CLASSES, WIDTH)), BIAS)
    assert (ours("fdbd", FeatureSet(ROWS, ROWS @ level.weight.numpy().T), FeatureSet(FIT, head=level)) == 0).all()


def test_fdbd_of_a_single_logit() -> None:
    weight, bias = np.stack([0 * WEIGHT[0], WEIGHT[0]]), np.array([0.0, BIAS[0]])
    logits = ROWS @ weight.T + bias
    found = ours("fdbd", FeatureSet(ROWS, logits[:, 1:]), FeatureSet(FIT, head=Head(WEIGHT[:1], BIAS[:1])))
    np.testing.assert_allclose(found, fdbd(weight, logits), rtol=1e-9)
