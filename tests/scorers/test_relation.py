"""relation against a transcription of the authors' kernel and sum."""

from __future__ import annotations

import numpy as np
import pytest
from classified import FIT, FIT_LOGITS, LOGITS, ROWS, TRAIN, Array, ours
from scipy.special import softmax

from ood_scores import FeatureSet, create_scorer
from ood_scores.features.statistics.row_samples import drawn_numbers
from ood_scores.scorers import relation


def relations() -> Array:
    """Clamped cosines times inner products of probabilities, as in ``relation.py`` of snu-mllab, ``[M, N]``."""
    unit, unit_fit = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (ROWS, FIT))
    return np.maximum(unit @ unit_fit.T, 0) * (softmax(LOGITS, axis=1) @ softmax(FIT_LOGITS, axis=1).T)


@pytest.mark.parametrize(("power", "threshold"), [(1.0, 0.03), (4.0, 0.03), (1.0, 0.5)])
def test_relation(power: float, threshold: float) -> None:
    found = relations()
    expected = np.where(found > threshold, found**power, 0).sum(axis=1)
    np.testing.assert_allclose(ours("relation", power=power, threshold=threshold), expected, rtol=1e-6)


def test_relation_to_a_share_of_the_rows() -> None:
    found = relations()[:, drawn_numbers(len(FIT), 0.25, 3).numpy()]
    expected = np.where(found > 0.03, found, 0).sum(axis=1)
    np.testing.assert_allclose(ours("relation", share=0.25, seed=3), expected, rtol=1e-6)


def test_relation_in_pieces_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ours("relation")
    monkeypatch.setattr(relation, "BANK_PIECE", 64)
    np.testing.assert_allclose(ours("relation"), whole, rtol=1e-12)


def test_a_row_of_zeros_has_no_relations() -> None:
    zeros = FeatureSet(np.zeros((1, ROWS.shape[1])), LOGITS[:1])
    assert create_scorer("relation").fit(TRAIN).score(zeros).tolist() == [0.0]
