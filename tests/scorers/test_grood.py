"""grood against the gradient that autograd computes row by row, and against a search in plain float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ood_scores import FeatureSet, create_scorer, load_scorer, score
from ood_scores.errors import BadInput
from ood_scores.scorers.numerics.nearest import nearest_neighbors

CLASSES, WIDTH = 4, 6


def made(count: int, seed: int, spread: float = 0.7) -> FeatureSet:
    """Features around class means; the logits are wrong for some rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    means = 2 * torch.eye(CLASSES, WIDTH, dtype=torch.float64) + 1
    features = means[labels] + spread * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return FeatureSet(features, features @ (means - means.mean(dim=0)).T, labels)


FIT, ROWS = made(60, seed=0), made(25, seed=1, spread=1.5)


def prototypes(ood: Tensor | None = None) -> Tensor:
    means = torch.stack([FIT.features[FIT.labels == c].mean(dim=0) for c in range(CLASSES)])
    return torch.cat([means, (means.mean(dim=0) if ood is None else ood)[None]])


def gradients(feats: FeatureSet, known: Tensor) -> Tensor:
    """Gradients of the loss of each row with respect to the last prototype."""
    found = []
    for row, logits in zip(feats.features, feats.logits, strict=True):  # type: ignore[arg-type]
        ood = known[-1].clone().requires_grad_()
        distances = torch.stack([(row - each).norm() for each in (*known[:-1], ood)])
        cross_entropy(-distances[None], logits.argmax()[None]).backward()
        assert ood.grad is not None
        found.append(ood.grad)
    return torch.stack(found)


@pytest.mark.parametrize("given", [None, [0.5, -1.0, 2.0, 0.0, 0.3, 1.0]])
def test_grood_is_the_norm_of_the_gradient(given: list[float] | None) -> None:
    known = prototypes(None if given is None else torch.tensor(given, dtype=torch.float64))
    expected = -gradients(ROWS, known).abs().sum(dim=1).log()
    torch.testing.assert_close(
        score("grood", ROWS, fit=FIT, by="norm", prototype=given), expected, rtol=1e-9, atol=1e-12
    )


def test_grood_is_the_distance_to_the_nearest_gradient_of_a_correct_row() -> None:
    assert FIT.logits is not None
    assert FIT.labels is not None
    right = FIT.logits.argmax(dim=1) == FIT.labels
    assert 0 < right.sum() < len(FIT)
    bank, found = gradients(FIT, prototypes())[right], gradients(ROWS, prototypes())
    expected = -(found[:, None] - bank).norm(dim=2).amin(dim=1)
    torch.testing.assert_close(score("grood", ROWS, fit=FIT), expected, rtol=1e-5, atol=1e-8)


def test_the_prototype_is_the_mean_of_a_cache_of_validation_ood_images(tmp_path: Path) -> None:
    """The authors' configuration: ``use_grad_norm: False, use_val_ood: True``."""
    seen = made(37, seed=2, spread=3.0)
    file = str(tmp_path / "val_ood.h5")
    seen.save(file)
    known = prototypes(seen.features.mean(dim=0))
    right = FIT.logits.argmax(dim=1) == FIT.labels  # type: ignore[union-attr]
    bank, found = gradients(FIT, known)[right], gradients(ROWS, known)
    expected = -(found[:, None] - bank).norm(dim=2).amin(dim=1)
    scorer = create_scorer("grood", prototype=file).fit(FIT)
    torch.testing.assert_close(scorer.score(ROWS), expected, rtol=1e-5, atol=1e-8)
    scorer.save(tmp_path / "scorer")
    Path(file).unlink()
    assert torch.equal(load_scorer(tmp_path / "scorer").score(ROWS), scorer.score(ROWS))


def test_a_prototype_of_another_width_is_refused(tmp_path: Path) -> None:
    FeatureSet(torch.ones(3, WIDTH + 1)).save(tmp_path / "narrow.h5")
    with pytest.raises(BadInput, match="prototype must have 6 numbers, one for each feature, got 7"):
        create_scorer("grood", prototype=str(tmp_path / "narrow.h5")).fit(FIT)


def test_rows_near_a_prototype_keep_their_order() -> None:
    """Gradients of 1e-400 cannot be represented."""
    far = FeatureSet(1000 * torch.eye(2, 3, dtype=torch.float64), labels=torch.tensor([0, 1]))
    steps = torch.tensor([[1.0], [0.9], [0.8], [0.7]], dtype=torch.float64)
    rows = FeatureSet(steps * far.features[:1])
    found = score("grood", rows, fit=far, by="norm", prototype=[0.0, 0.0, 0.0])
    assert (found.diff() < 0).all()
    np.testing.assert_allclose(found[0], 1000.0, rtol=1e-9)


def test_a_row_at_the_prototype_has_no_direction() -> None:
    known = prototypes()
    found = score("grood", FeatureSet(known[-1:].clone()), fit=FIT, by="norm")
    distances = (known[-1] - known).norm(dim=1)
    assert found.item() == pytest.approx(-math.log(torch.softmax(-distances, dim=0)[-1].item()))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"by": "length"}, "by must be 'nearest' or 'norm'"),
        ({"prototype": [math.nan] * WIDTH}, "prototype must be finite"),
        ({"prototype": [1.0] * 3}, "prototype must have 6 numbers, one for each feature, got 3"),
    ],
)
def test_bad_parameters_of_grood(params: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        create_scorer("grood", **params).fit(FIT)


def test_grood_refuses_a_fit_set_without_correct_rows() -> None:
    assert FIT.labels is not None
    wrong = FeatureSet(FIT.features, torch.eye(CLASSES)[(FIT.labels + 1) % CLASSES], FIT.labels)
    with pytest.raises(BadInput, match="no row of the fit set is predicted correctly"):
        create_scorer("grood", by="nearest").fit(wrong)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-20])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-9])
def test_the_nearest_gradient_is_exact_where_float32_does_not_decide(scale: float, spread: float) -> None:
    """A bank around one direction, of lengths over six orders of magnitude; the last rows of the bank are equal."""
    generator = torch.Generator().manual_seed(0)
    center = torch.nn.functional.normalize(torch.randn(1, 24, generator=generator, dtype=torch.float64), dim=1)
    bank = (center + spread * torch.randn(300, 24, generator=generator, dtype=torch.float64)) / 30
    bank[:100] *= torch.logspace(-6, 0, 100, dtype=torch.float64)[:, None]
    bank[-20:] = bank[-20]
    rows = scale * (center + spread * torch.randn(40, 24, generator=generator, dtype=torch.float64)) / 20
    rows[0] = 0
    bank, doubts = (scale * bank).float(), []

    def happens(doubtful: Tensor) -> bool:
        doubts.append(int(doubtful.sum()))
        return bool(doubtful.any())

    numbers = nearest_neighbors(rows, bank, bank.double().norm(dim=1), happens)
    distances = (rows[:, None] - bank).norm(dim=2)
    torch.testing.assert_close(distances.gather(1, numbers[:, None])[:, 0], distances.amin(dim=1), rtol=1e-7, atol=0)
    assert (doubts[0] < 20) == (spread == 1.0 and scale > 1e-20)
