"""excel against a plain reference that follows the authors' code one row and one rank at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from many_classes import CLASSES, FEATS, FIT, FIT_LOGITS, LOGITS, ROWS, TRAIN, Array

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.scorers import class_ranks
from ood_scores.scorers.class_ranks import RankLevels


def excel(fit: Array, logits: Array, alpha: float, upper: float, reward: float, top: int) -> list[float]:
    orders = [sorted(range(CLASSES), key=lambda c: -f[c]) for f in fit]
    found = []
    for f in logits:
        order = sorted(range(CLASSES), key=lambda c: -f[c])
        alike = [other for other in orders if other[0] == order[0]]
        total = 0.0
        for rank in range(1, top):
            share = np.mean([other[rank] == order[rank] for other in alike]) if alike else 0.0
            if share > upper / CLASSES:
                total += reward / CLASSES
            elif share > 1 / CLASSES:
                total += 1 / CLASSES
            elif share > 0:
                total -= 1 / CLASSES
            else:
                total -= reward / CLASSES
        found.append(alpha * total + (1 - alpha) * max(f))
    return found


@pytest.mark.parametrize(
    ("alpha", "upper", "reward", "top"), [(0.8, 5, 10, None), (1.0, 2, 3, 4), (0.3, 1, 7, 1), (0.5, 6.5, 10, 99)]
)
def test_excel(alpha: float, upper: float, reward: float, top: int | None) -> None:
    found = score("excel", FEATS, fit=TRAIN, alpha=alpha, upper=upper, reward=reward, ranks=top)
    expected = excel(FIT_LOGITS, LOGITS, alpha, upper, reward, min(top or CLASSES, CLASSES))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_excel_defaults_are_those_of_the_authors() -> None:
    np.testing.assert_allclose(score("excel", FEATS, fit=TRAIN), excel(FIT_LOGITS, LOGITS, 0.8, 5, 10, CLASSES))


def test_all_levels_occur() -> None:
    levels = collect(TRAIN, [RankLevels(5.0)])[RankLevels(5.0)]
    assert levels.unique().tolist() == [0, 1, 2, 3]
    assert levels.dtype == torch.int8


def test_excel_where_a_class_is_never_predicted_and_on_many_rows() -> None:
    """From 32,768 rows predicted as one class on, counts need more than 16 bits."""
    kept = FIT_LOGITS[FIT_LOGITS.argmax(axis=1) != 3]
    expected = excel(kept, LOGITS, 0.8, 5, 10, CLASSES)
    np.testing.assert_allclose(score("excel", FEATS, fit=FeatureSet(kept, kept)), expected, rtol=1e-12)
    many = np.tile(kept, (2500, 1)).astype(np.float32)
    assert np.bincount(many.argmax(axis=1)).max() > 2**15
    feats = FeatureSet(np.ones((len(many), 1), dtype=np.float32), many)
    np.testing.assert_allclose(score("excel", FeatureSet(ROWS[:, :1], LOGITS), fit=feats), expected, rtol=1e-12)


def test_a_share_at_the_threshold_is_not_above_it() -> None:
    """Of ten rows predicted as class 0 of 5, class 1 is second for five, class 2 for two, and class 3 for three."""
    second = [1] * 5 + [2] * 2 + [3] * 3
    logits = np.array([[10.0, *(9.0 if c == s else -c for c in range(1, 5))] for s in second])
    levels = collect(FeatureSet(logits, logits), [RankLevels(2.5)])[RankLevels(2.5)]
    assert levels[0, 1].tolist() == [0, 2, 1, 2, 0]


def test_equal_logits_are_ranked_by_class() -> None:
    level = FeatureSet(np.ones((3, 2)), np.zeros((3, 4)))
    found = score("excel", level, fit=level, alpha=1.0, upper=3.0)
    np.testing.assert_allclose(found, np.full(3, 3 * 10 / 4))


def test_bad_parameters_of_excel_are_named() -> None:
    for params in ({"alpha": 1.5}, {"upper": 0.5}, {"reward": 0.0}, {"ranks": 0}):
        with pytest.raises(BadInput, match=next(iter(params))):
            create_scorer("excel", **params)


def test_the_size_of_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score("excel", FEATS, fit=TRAIN)
    monkeypatch.setattr(class_ranks, "PIECE", 500)
    assert torch.equal(score("excel", FEATS, fit=FeatureSet(FIT, FIT_LOGITS)), whole)
