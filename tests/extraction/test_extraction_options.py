"""The options of an extraction: the same in Python, on the command line, and from a provenance."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.errors import BadInput, UnknownName
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.probes import ODIN, GramSums, LayerNorms, PooledLayers

NAMES = [each.name for each in fields(ExtractionOptions)]


@pytest.mark.parametrize("function", [ood_scores.extract, ood_scores.calibrate])
def test_every_option_is_an_argument_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in NAMES} == {
        each.name: each.default for each in fields(ExtractionOptions)
    }
    with pytest.raises(UnknownName, match="extract has no argument 'precision': choose from model, loader, cache"):
        ood_scores.extract(nn.Linear(2, 3), [torch.zeros(4, 2)], precision="high", progress=False)


def test_misspelled_arguments_are_named() -> None:
    model, data, misspelled = nn.Linear(2, 3), [torch.zeros(4, 2)], dict[str, Any]
    for name, meant in (("progres", "progress"), ("overwrit", "overwrite"), ("prob", "probes")):
        with pytest.raises(UnknownName, match=rf"extract has no argument '{name}' \(did you mean '{meant}'\?\)"):
            ood_scores.extract(model, data, **misspelled({name: True}))
    with pytest.raises(UnknownName, match=r"calibrate has no argument 'preprocess' \(did you mean 'preprocessing'\?\)"):
        ood_scores.calibrate("msp", model, id="gone.h5", preprocess=None)


@pytest.mark.parametrize("command", ["extract", "calibrate"])
def test_every_option_is_an_option_of_the_command(command: str) -> None:
    output = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for name in NAMES:
        flag = "--probe" if name == "probes" else f"--{name.replace('_', '-')}"
        assert f"{flag} " in output, name


def test_probes_by_name_with_parameters_and_as_objects() -> None:
    options = ExtractionOptions(layers=["fc"], probes=["odin:epsilon=0.1", "norms", GramSums(orders=(1,))])
    assert options.all_probes == (PooledLayers(layers=("fc",)), ODIN(epsilon=0.1), LayerNorms(), GramSums(orders=(1,)))
    assert ExtractionOptions(probes=(name for name in ["norms"])).all_probes == (LayerNorms(),)
    with pytest.raises(UnknownName, match="there is no probe 'nrms'"):
        ExtractionOptions(probes=["nrms"])
    with pytest.raises(BadInput, match="two probes are named 'odin'"):
        ExtractionOptions(probes=["odin", "odin:epsilon=1"])


def test_options_of_a_feature_set_are_those_it_was_extracted_with() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    given: dict[str, Any] = {"amp": "bf16", "channels_last": True, "dtype": "float16", "head": "4"}
    probes = [ODIN(epsilon=0.5, std=(1.0, 2.0, 4.0)), LayerNorms(layers=["0"])]
    feats = ood_scores.extract(model, [torch.rand(6, 3, 8, 8)], layers=["1"], probes=probes, progress=False, **given)
    assert feats.provenance is not None
    assert ExtractionOptions.of(feats.provenance) == ExtractionOptions(**given)
    assert ExtractionOptions.of(feats.provenance, ["norms"]) == ExtractionOptions(**given, probes=probes[1:])
    layers = ExtractionOptions.of(feats.provenance, ["layers"])
    assert layers.all_probes == (PooledLayers(layers=("1",)),)
