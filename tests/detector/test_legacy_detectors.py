"""Detectors that an earlier version wrote: the same thresholds and predictions, and they can be saved again."""

from pathlib import Path

import legacy_files as legacy
import numpy as np
import pytest
import torch
from detecting import same
from torch import nn

from ood_scores import Detector

FACTS = legacy.FACTS["detectors"]


def network(name: str) -> nn.Module:
    model = legacy.network(FACTS[name]["network"])
    return model.to(memory_format=torch.channels_last) if name == "channels_last" else model


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
    tolerance = 1e-2 if options.amp else 1e-5  # another processor rounds in another way
    given = {
        "tensors": legacy.inputs("ood")[:8],
        "held_out": legacy.inputs("id")[:8],
        "pixels": legacy.pixels("ood")[:5],
    }
    for kind, images in given.items():
        if f"detectors/{name}/{kind}/score" not in legacy.ARRAYS:
            continue
        for column, values in detector.predict(images).columns().items():
            expected = legacy.ARRAYS[f"detectors/{name}/{kind}/{column}"]
            assert values.dtype == expected.dtype
            if values.dtype.kind == "f":
                rank = 1 / (facts["rows"] + 1) if column == "p_value" and kind == "held_out" else 0.0
                # the held-out images are those of the calibration, and rounding decides each one's tie with itself
                assert np.allclose(values, expected, rtol=tolerance, atol=tolerance + rank)
            else:
                assert np.array_equal(values, expected)
    detector.save(tmp_path / "again", with_model=facts["has_model"])
    again = Detector.load(tmp_path / "again", None if facts["has_model"] else model, device="cpu")
    assert same(again.predict(given["tensors"]), detector.predict(given["tensors"]))
    assert again.forward.options == options
