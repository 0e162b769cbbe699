"""A detector whose model is on a CUDA device: the decisions of the CPU, and one wait of the host for each batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from detecting import Rows, extracted, network
from gpu_waits import waits_of

import ood_scores
from ood_scores.detector import Detector
from ood_scores.errors import NotFinite

pytestmark = pytest.mark.gpu

INPUTS = Rows(64, seed=5).inputs


def detector(scorer: str, device: str, per_class: bool = False) -> Detector:
    model = network()
    with torch.no_grad():
        for values in model.get_submodule("fc").parameters():
            values.mul_(20)  # clear decisions: rows whose softmax is nearly uniform are scored with waits
    fit, id = extracted(model, 200, 0), extracted(model, 300, 1)
    found = ood_scores.calibrate(scorer, model, fit=fit, id=id, sets="aps", per_class=per_class)
    assert isinstance(found, Detector)
    return found.to(device)


@pytest.mark.parametrize(
    ("scorer", "per_class"), [("energy", False), ("mahalanobis", False), ("knn", False), ("msp", True)]
)
def test_the_host_waits_once_for_a_batch_with_label_sets(scorer: str, per_class: bool) -> None:
    expected = detector(scorer, "cpu", per_class).predict(INPUTS)
    there = detector(scorer, "cuda", per_class)
    found = there.predict(INPUTS)
    assert waits_of(partial(there.predict, INPUTS)) == 1
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-5, atol=1e-5 * np.abs(expected.score).max())
    assert found.is_ood.tolist() == expected.is_ood.tolist()
    assert found.label_set is not None
    assert found.label_set.tolist() == expected.label_set.tolist()  # type: ignore[union-attr]


def test_a_row_that_is_not_finite_is_named_by_its_number() -> None:
    there = detector("energy", "cuda")
    there.predict(INPUTS)
    with pytest.raises(NotFinite, match="features hold NaN or infinite values, first in row 67"):
        there.predict([*INPUTS, *INPUTS[:3], torch.full((3, 8, 8), 3e38)])
