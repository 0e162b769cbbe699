"""Sets of labels against those that TorchCP 1.2.1 and MAPIE 1.6.0 returned for the same logits.

TorchCP without randomization: ``LAC()``, ``APS(randomized=False)``, ``RAPS(randomized=False, penalty=0.01, kreg=5)``,
``SAPS(randomized=False, weight=0.2)``, by ``SplitPredictor`` and ``ClassConditionalPredictor``. MAPIE's APS and RAPS
have a random part, so that only its LAC is the same.
"""

from __future__ import annotations

import numpy as np
import pytest

from ood_scores.detector.label_sets import Method, calibrate_sets

RNG = np.random.default_rng(2026)
LABELS = RNG.integers(0, 12, 1500)
LOGITS = RNG.normal(size=(1500, 12))
LOGITS[np.arange(1500), LABELS] += 1.5
LOGITS *= 1.7
OLD, NEW = slice(0, 900), slice(900, 1500)

OF_ALL: dict[Method, tuple[float, int, int]] = {
    "lac": (0.970474985783055, 3077, 544),
    "aps": (0.9600296821665782, 3408, 550),
    "raps": (0.969350188521271, 3331, 547),
    "saps": (1.4881906900407356, 3173, 538),
}
"""The threshold, the number of labels in the sets of the new rows, and how many sets contain the label."""

OF_CLASSES: dict[Method, tuple[float, float, int, int]] = {
    "lac": (0.9317846298217773, 0.9895549416542053, 3168, 542),
    "aps": (0.9070767760276794, 0.9793933033943176, 3644, 555),
    "raps": (0.9114155769348145, 0.9973113536834717, 3532, 553),
    "saps": (1.137648105621338, 1.8087046146392822, 3415, 545),
}
"""The smallest and the largest threshold of the classes, which TorchCP keeps in float32, and the same numbers."""


@pytest.mark.parametrize("method", OF_ALL)
def test_sets_are_those_of_torchcp(method: Method) -> None:
    limit, size, hits = OF_ALL[method]
    rule = calibrate_sets(LOGITS[OLD], LABELS[OLD], method, alpha=0.1)
    inside = rule(LOGITS[NEW])
    assert rule.limits == pytest.approx(limit, abs=1e-7 if method == "saps" else 1e-12)  # SAPS has float32 weights
    assert (inside.sum(), inside[np.arange(600), LABELS[NEW]].sum()) == (size, hits)


@pytest.mark.parametrize("method", OF_CLASSES)
def test_sets_by_class_are_those_of_torchcp(method: Method) -> None:
    lowest, highest, size, hits = OF_CLASSES[method]
    rule = calibrate_sets(LOGITS[OLD], LABELS[OLD], method, alpha=0.1, among="class")
    inside = rule(LOGITS[NEW])
    assert (rule.limits.min(), rule.limits.max()) == pytest.approx((lowest, highest), abs=1e-6)
    assert (inside.sum(), inside[np.arange(600), LABELS[NEW]].sum()) == (size, hits)


@pytest.mark.parametrize(
    ("alpha", "limit", "size"), [(0.1, 0.9170931078919343, 1344), (0.05, 0.9666674044933492, 1794)]
)
def test_sets_are_those_of_mapie(alpha: float, limit: float, size: int) -> None:
    rng = np.random.default_rng(2026)
    labels, logits = rng.integers(0, 5, 900), rng.normal(size=(900, 5))
    logits[np.arange(900), labels] += 1.5
    rule = calibrate_sets(1.7 * logits[:300], labels[:300], "lac", alpha)
    assert rule.limits == pytest.approx(limit, abs=1e-12)
    assert rule(1.7 * logits[300:]).sum() == size
