"""gram against the formulas written out as loops."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
from layered import CLASSES, FAR, ROWS, TRAIN, WIDTHS, without

from ood_scores import FeatureSet, create_scorer
from ood_scores.errors import BadInput, NotFinite
from ood_scores.scorers.gram import deviation, two_smallest


def gram_deviation(row: np.ndarray, others: np.ndarray) -> float:
    """Sum over orders and channels of how far the row is outside the range of the others."""
    total = 0.0
    for order in range(row.shape[0]):
        for channel in range(row.shape[1]):
            value, usual = row[order, channel], others[:, order, channel]
            if value < usual.min():
                total += (usual.min() - value) / max(abs(usual.min()), 1e-6)
            elif value > usual.max():
                total += (value - usual.max()) / max(abs(usual.max()), 1e-6)
    return total


def gram_by_loops(feats: FeatureSet, fit: FeatureSet, confidence: bool = True) -> np.ndarray:
    assert fit.logits is not None
    assert feats.logits is not None
    fit_predicted, predicted = fit.logits.argmax(1).numpy(), feats.logits.argmax(1).numpy()

    def divisor(of: FeatureSet) -> np.ndarray:
        assert of.logits is not None
        logits = of.logits.double().numpy()
        likely = np.exp(logits.max(axis=1)) / np.exp(logits).sum(axis=1)
        return likely if confidence else np.ones(len(of))

    score = np.zeros(len(feats))
    for name in WIDTHS:
        values, rows = (of.extras[f"gram.{name}"].double().numpy() for of in (fit, feats))
        usual = []
        for i, row in enumerate(values):
            others = (fit_predicted == fit_predicted[i]) & (np.arange(len(fit)) != i)
            if others.any():
                usual.append(gram_deviation(row, values[others]) / divisor(fit)[i])
        for i, row in enumerate(rows):
            same = fit_predicted == predicted[i]
            found = gram_deviation(row, values[same] if same.any() else values) / divisor(feats)[i]
            score[i] -= found / (np.mean(usual) + 1e-7)
    return score


@pytest.mark.parametrize("confidence", [True, False])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_gram_by_loops(confidence: bool, block: int) -> None:
    found = create_scorer("gram", confidence=confidence).fit(TRAIN, block_rows=block).score(FAR, block_rows=block)
    np.testing.assert_allclose(found, gram_by_loops(FAR, TRAIN, confidence), rtol=1e-9)


def test_equal_extremes_are_in_the_range_without_one_of_them() -> None:
    """If a value occurs twice, one of them stays when the other is left out."""
    coarse = {name: (2 * TRAIN.extras[name]).round() for name in TRAIN.extras if name.startswith("gram")}
    fit = without(TRAIN, "gram", **coarse)
    np.testing.assert_allclose(create_scorer("gram").fit(fit).score(FAR), gram_by_loops(FAR, fit), rtol=1e-9)


def test_fit_rows_do_not_deviate() -> None:
    assert (create_scorer("gram").fit(TRAIN).score(TRAIN) == 0).all()


def test_classes_that_are_never_or_once_predicted() -> None:
    assert TRAIN.logits is not None
    predicted = TRAIN.logits.argmax(1)
    first = int((predicted == 1).nonzero()[0])
    fit = TRAIN[(predicted == 0) | (torch.arange(ROWS) == first)]
    scorer = create_scorer("gram")
    with pytest.warns(UserWarning, match="gram: 1 of 3 classes are never predicted in the fit set and get"):
        scorer.fit(fit)
    np.testing.assert_allclose(scorer.score(FAR), gram_by_loops(FAR, fit), rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_scorer("gram").fit(TRAIN)


def test_no_two_rows_of_a_class() -> None:
    assert TRAIN.logits is not None
    firsts = [int((TRAIN.logits.argmax(1) == c).nonzero()[0]) for c in range(CLASSES)]
    with pytest.raises(BadInput, match="no two rows of the fit set are predicted as the same class"):
        create_scorer("gram").fit(TRAIN[firsts])


def test_bounds_at_zero() -> None:
    zero = torch.zeros(1, 1, 1)
    assert float(deviation(torch.full((1, 1, 1), 2e-6), zero, zero)) == pytest.approx(2.0)
    assert float(deviation(torch.full((1, 1, 1), -3e-6), zero, zero)) == pytest.approx(3.0)
    assert float(deviation(torch.tensor([[[1.0]]]), zero - 2e-6, zero - 1e-6)) == pytest.approx(1e6, rel=1e-5)
    assert math.isfinite(float(deviation(torch.tensor([[[1e300]]]).float().clamp_max(3e38), zero, zero)))


def test_a_gram_that_is_not_finite_is_named() -> None:
    values = TRAIN.extras["gram.stem"].clone()
    values[17, 1, 2] = torch.inf
    broken = without(TRAIN, "gram.stem", **{"gram.stem": values})
    message = re.escape("gram.stem hold NaN or infinite values, first in row 17")
    with pytest.raises(NotFinite, match=message):
        create_scorer("gram").fit(broken)
    with pytest.raises(NotFinite, match=message):
        create_scorer("gram").fit(TRAIN).score(broken)


def test_two_smallest_values_of_each_class_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, (40, 2, 3), generator=generator).double()
    classes = torch.randint(4, (40,), generator=generator)
    classes[classes == 2] = 1  # class 2 has no row
    found = torch.full((4, 2, 2, 3), torch.inf, dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 11), slice(11, 40)):
        found = two_smallest(rows[part], classes[part], found)
    for c in (0, 1, 3):
        torch.testing.assert_close(found[c], rows[classes == c].sort(dim=0).values[:2], rtol=0, atol=0)
    assert found[2].isinf().all()
