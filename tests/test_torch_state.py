"""Numbers do not depend on what the caller has set in torch, and these settings are as before after a call."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from detecting import PIXELS, loader, network, same
from torch import Tensor, nn

import ood_scores
from ood_scores.evaluation.neural_collapse import neural_collapse
from ood_scores.runtime import NEW_PRECISION_API, default_torch_state, tf32_is_allowed
from ood_scores.testing.problem import problem, unusual_torch_state


def state() -> dict[str, Any]:
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
    }


DEFAULTS = {
    "autocast": False,
    "inference": False,
    "gradients": True,
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "precision": "highest",
}


def test_every_setting_is_at_its_default_and_restored():
    with unusual_torch_state():
        before = state()
        with default_torch_state():
            assert state() == DEFAULTS
            with default_torch_state(), torch.no_grad():
                assert state() == DEFAULTS | {"gradients": False}
            assert state() == DEFAULTS
        assert state() == before
        with pytest.raises(ValueError, match="inside"), default_torch_state():
            raise ValueError("inside")
        assert state() == before
    assert state() == DEFAULTS


def test_gradients_are_enabled_where_the_caller_disabled_them():
    with torch.no_grad():
        with default_torch_state():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_of_matrix_products(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        with default_torch_state():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not NEW_PRECISION_API, reason="this torch has one interface to the precision")
def test_precision_set_for_one_backend():
    backends: Any = torch.backends
    try:
        for backend, value in ((backends.cuda.matmul, "tf32"), (backends.mkldnn.matmul, "bf16")):
            backend.fp32_precision = value
            with default_torch_state():
                assert backend.fp32_precision == "ieee"
                assert torch.get_float32_matmul_precision() == "highest"
            assert backend.fp32_precision == value
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not NEW_PRECISION_API, reason="this torch has one interface to the precision")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_of_convolutions_is_known_when_set_for_them_alone(precision):
    backends: Any = torch.backends
    before = backends.cudnn.conv.fp32_precision
    backends.cudnn.conv.fp32_precision = precision
    try:
        assert tf32_is_allowed() == (False, precision == "tf32")
    finally:
        backends.cudnn.conv.fp32_precision = before


def test_tf32_as_the_older_flags_set_it():
    before = torch.backends.cudnn.allow_tf32
    try:
        for matmul, conv in ((True, False), (False, True)):
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
            assert tf32_is_allowed() == (matmul, conv)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, before


def test_deterministic_algorithms_stay_requested_but_refuse_nothing():
    torch.use_deterministic_algorithms(True)
    try:
        with default_torch_state():
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_that_overlap_restore_the_default_dtype():
    inside, leaving, seen = Barrier(2), Barrier(2), []

    def first() -> None:
        with default_torch_state():
            inside.wait(10)
        leaving.wait(10)

    def second() -> None:
        with default_torch_state():
            inside.wait(10)
            leaving.wait(10)  # the first thread has left
            seen.append(torch.get_default_dtype())

    torch.set_default_dtype(torch.float64)
    try:
        threads = [Thread(target=run) for run in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [{}, {"channels_last": True, "probes": ["odin"]}])
def test_extraction(options):
    model = network()
    expected = ood_scores.extract(model, loader(40, 1), progress=False, **options)
    batches = list(loader(40, 1))
    with unusual_torch_state():
        found = ood_scores.extract(model, batches, progress=False, **options)
    assert found.columns.keys() == expected.columns.keys()
    for name, values in found.columns.items():
        assert isinstance(values, Tensor)
        assert not values.is_inference(), name
        assert torch.equal(values, expected.columns[name]), name
    assert found.head is not None
    assert not found.head.weight.is_inference()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()(batches[0][0]).sum().backward()


def test_a_model_keeps_the_default_device_of_the_caller():
    class Recording(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            devices.add(torch.get_default_device().type)
            return super().forward(inputs)

    devices: set[str] = set()
    model = Recording(nn.Flatten(), nn.Linear(192, 4))
    batches = list(loader(40, 1))
    with torch.device("meta"):
        ood_scores.extract(model, batches, progress=False)
    assert devices == {"meta"}


@pytest.mark.parametrize("scorer", ["energy", "vim", "relative_mahalanobis", "cf_ood"])
def test_detector(scorer):
    model, fit, id = network(), list(loader(200, 1)), list(loader(100, 2))
    options = {"preprocessing": {"input_size": (3, 8, 8)}}
    detector = ood_scores.calibrate(scorer, model, fit=fit, id=id, **options)
    expected = detector.predict(PIXELS)
    with unusual_torch_state():
        found = detector.predict(PIXELS)
        again = ood_scores.calibrate(scorer, model, fit=fit, id=id, **options)
        found_again = again.predict(PIXELS)
    assert same(found, expected)
    assert same(found_again, expected)
    assert np.array_equal(again.calibration.scores, detector.calibration.scores)


def test_neural_collapse_and_evaluation():
    train, id, ood = (problem(rows, seed, {}, ood=seed == 2) for seed, rows in enumerate((120, 50, 50)))
    expected = neural_collapse(train), ood_scores.evaluate(["vim"], id=id, ood={"ood": ood}, fit=train)
    with unusual_torch_state():
        found = neural_collapse(train), ood_scores.evaluate(["vim"], id=id, ood={"ood": ood}, fit=train)
    assert found[0] == expected[0]
    assert found[1].equals(expected[1])
