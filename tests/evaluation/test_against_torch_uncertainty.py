"""Metrics of whole systems and of calibration against values that torch-uncertainty 0.13.0 returned for the same rows.

It integrates curves by trapezoids from 1/N to 1 and divides by 1 - 1/N, which the tests convert exactly; its OoD cost
of 0.5 halves the SCOD losses. Its calibration errors are computed in float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from ood_scores.evaluation.calibration_error import classifier_calibration
from ood_scores.evaluation.metrics import fpr95_ood
from ood_scores.evaluation.selective import augrc_of, aurc_of
from ood_scores.evaluation.threshold_counts import roc_counts
from ood_scores.features import FeatureSet

AURC, AUGRC, SCOD_AURC, SCOD_AUGRC = 0.1710307933517439, 0.11468976071229829, 0.18404830874980743, 0.11691866866866868
ECE, ADAPTIVE_ECE, BRIER, NLL, FPR95 = (
    0.05014338344335556,
    0.06101258099079132,
    0.46451957524685594,
    0.8937025017212934,
    0.655,
)

RNG = np.random.default_rng(2026)
LABELS = RNG.integers(0, 5, 600)
LOGITS = RNG.normal(size=(600, 5))
LOGITS[np.arange(600), LABELS] += 1.5
LOGITS *= 1.7
KNOWN, UNKNOWN = (softmax(rows, axis=1).max(axis=1) for rows in (LOGITS, RNG.normal(size=(400, 5)) * 1.4))
CORRECT = LOGITS.argmax(axis=1) == LABELS


@pytest.mark.parametrize("ood", [False, True])
def test_areas_under_risk_coverage_curves(ood: bool) -> None:
    counts = roc_counts(KNOWN, UNKNOWN, CORRECT)
    scores, failed = (KNOWN, ~CORRECT) if not ood else (np.r_[KNOWN, UNKNOWN], np.r_[~CORRECT, np.ones(400, bool)])
    n, first, share = len(scores), float(failed[scores.argmax()]), failed.mean()
    aurc, augrc, cost = (SCOD_AURC, SCOD_AUGRC, 0.5) if ood else (AURC, AUGRC, 1.0)
    assert cost * (n * aurc_of(counts, ood) - (first + share) / 2) / (n - 1) == pytest.approx(aurc, rel=1e-12)
    assert cost * (n * augrc_of(counts, ood) - first / n / 2) / (n - 1) == pytest.approx(augrc, rel=1e-12)


def test_calibration_errors_and_proper_scores() -> None:
    found = classifier_calibration(FeatureSet(LOGITS, LOGITS, torch.from_numpy(LABELS)))
    assert found.brier == pytest.approx(BRIER, rel=1e-12)
    assert found.nll == pytest.approx(NLL, rel=1e-12)
    assert found.ece == pytest.approx(ECE, abs=1e-7)
    assert found.ece_equal_mass == pytest.approx(ADAPTIVE_ECE, abs=1e-7)


def test_false_positive_rate() -> None:
    assert fpr95_ood(KNOWN, UNKNOWN) == pytest.approx(FPR95, rel=1e-12)
