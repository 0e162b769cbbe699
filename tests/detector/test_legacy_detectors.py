"""Detectors that an earlier version wrote: the same thresholds and predictions, and they can be saved again."""

from pathlib import Path

import legacy_files as legacy
import numpy as np
import pytest
import torch
from detecting import same
from torch import nn

from ood_scores import Detector
from ood_scores.detector.calibration import Calibration

Columns = dict[str, np.ndarray]
FACTS = legacy.FACTS["detectors"]


def network(name: str) -> nn.Module:
    model = legacy.network(FACTS[name]["network"])
    return model.to(memory_format=torch.channels_last) if name == "channels_last" else model


def assert_equal_predictions(found: Columns, expected: Columns, calibration: Calibration, tolerance: float) -> None:
    """Compare predictions, and ask that p-values and decisions lie between those of scores moved by the tolerance.

    The held-out images are those of the calibration, and rounding decides the tie of each one with itself.
    """
    for column, values in expected.items():
        assert found[column].dtype == values.dtype
        if column in ("score", "probability"):
            np.testing.assert_allclose(found[column], values, rtol=tolerance, atol=tolerance)
        elif column not in ("p_value", "is_ood"):
            assert np.array_equal(found[column], values)
    classes, margin = expected["label"], tolerance * (1 + np.abs(expected["score"]))
    low, high = expected["score"] - margin, expected["score"] + margin
    for columns in (expected, found):
        assert np.all(calibration.p_values(low, classes) <= columns["p_value"])
        assert np.all(columns["p_value"] <= calibration.p_values(high, classes))
        assert np.all(calibration.rejects(high, classes) <= columns["is_ood"])
        assert np.all(columns["is_ood"] <= calibration.rejects(low, classes))


@pytest.mark.filterwarnings("ignore:the model is not saved with the detector")
@pytest.mark.parametrize("name", FACTS)
def test_predictions_and_description_are_what_they_were(name: str, tmp_path: Path) -> None:
    facts, model = FACTS[name], network(name)
    detector = Detector.load(legacy.FOLDER / "detectors" / name, None if facts["has_model"] else model, device="cpu")
    calibration, options = detector.calibration, detector.forward.options
    assert [str(each.value) for each in calibration.thresholds] == facts["thresholds"]
    assert (calibration.keep, calibration.delta, len(calibration.scores)) == (
        facts["keep"],
        facts["delta"],
        facts["rows"],
    )
    described = (legacy.without_new_parameters(repr(each)) for each in (detector, detector.scorer))
    assert (*described, detector.passes) == (
        facts["repr"],
        facts["scorer_repr"],
        facts["passes"],
    )
    assert (options.amp, options.dtype, options.head) == (facts["amp"], facts["dtype"], facts["head"])
    assert [repr(probe) for probe in options.all_probes] == facts["probes"]
    assert (options.channels_last, options.compile) == (None, False)  # it does not state a format
    assert detector.data is not None
    assert detector.data.precision == facts["precision"]
    tolerance = 1e-2 if options.amp else 1e-4  # processors round in other ways, and the logits reach 650
    given = {
        "tensors": legacy.inputs("ood")[:8],
        "held_out": legacy.inputs("id")[:8],
        "pixels": legacy.pixels("ood")[:5],
    }
    for kind, images in given.items():
        if f"detectors/{name}/{kind}/score" not in legacy.ARRAYS:
            continue
        found = detector.predict(images).columns()
        expected = {column: legacy.ARRAYS[f"detectors/{name}/{kind}/{column}"] for column in found}
        assert_equal_predictions(found, expected, calibration, tolerance)
    detector.save(tmp_path / "again", with_model=facts["has_model"])
    again = Detector.load(tmp_path / "again", None if facts["has_model"] else model, device="cpu")
    assert same(again.predict(given["tensors"]), detector.predict(given["tensors"]))
    assert again.forward.options == options
