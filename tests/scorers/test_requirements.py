"""Requirements of scorers and their remedies: following a remedy yields what was missing."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ood_scores import FeatureSet, create_scorer, extract, list_scorers
from ood_scores.errors import BadInput, MissingInput, NotFitted
from ood_scores.extraction.probes import probe_from
from ood_scores.extraction.probes.gradients import LayerGradients, ParameterGradients
from ood_scores.scorers.requirements import FIT_SET, Requirement, probes_for, requirements, unmet


def has(*names: str) -> Any:
    return FeatureSet(
        torch.ones(2, 3),
        torch.ones(2, 4) if "logits" in names else None,
        torch.tensor([0, 1]) if "labels" in names else None,
        extras={name: torch.ones(2) for name in names if name not in ("logits", "labels")},
    ).has


@pytest.mark.parametrize(
    ("requirement", "python", "command_line", "benchmark"),
    [
        (
            Requirement("labels"),
            "extract from a loader that yields (images, labels), or pass labels=... to FeatureSet",
            "extract from a dataset with labels",
            "use a dataset with labels",
        ),
        (
            Requirement("odin"),
            "extract it with extract(..., probes=['odin'])",
            "extract it with --probe odin",
            '[extraction] probes = ["odin"]',
        ),
        (
            Requirement("gradients.noise", fitting=True),
            "extract it with extract(..., probes=[LayerGradients(noise=True)])",
            "extract it with --probe gradients:noise=true",
            '[extraction] fit_probes = ["gradients:noise=true"]',
        ),
        (
            Requirement("gradnorm.fc"),
            "extract it with extract(..., probes=[ParameterGradients(groups=('fc',))])",
            "extract it with --probe 'gradnorm:groups=(\"fc\",)'",
            "[extraction] probes = ['gradnorm:groups=(\"fc\",)']",
        ),
        (
            Requirement("layers"),
            "extract it with extract(..., layers='stages')",
            "extract it with --layers stages",
            '[extraction] layers = "stages"',
        ),
        (
            Requirement("layers.a", together=("layers.a", "layers.b")),
            "extract it with extract(..., layers=('a', 'b'))",
            "extract it with --layers a,b",
            '[extraction] layers = ["a", "b"]',
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Requirement) else "",
)
def test_remedies(requirement: Requirement, python: str, command_line: str, benchmark: str) -> None:
    assert requirement.how_to_get("python") == python
    assert requirement.how_to_get("command line") == command_line
    assert requirement.how_to_get("benchmark") == benchmark


def test_the_remedy_for_one_extra_yields_all_extras_of_the_probe() -> None:
    inputs, noise = requirements(create_scorer("gradient_classifier"), fitting=True)
    assert inputs.name == "gradients.inputs"
    assert inputs.how_to_get("command line") == noise.how_to_get("command line")


@pytest.mark.parametrize("name", sorted({*list_scorers()} - {"mahalanobis_odin", "mfs"}))  # read files
@pytest.mark.parametrize("fitting", [False, True])
def test_the_probe_in_a_remedy_is_parsed_as_the_probe_that_computes_the_extra(name: str, fitting: bool) -> None:
    needed = requirements(create_scorer(name), fitting)
    texts = [re.search(r"--probe (.*)", requirement.how_to_get("command line")) for requirement in needed]
    read = {probe.name: probe for text in texts if text for probe in map(probe_from, shlex.split(text[1]))}
    names = [requirement.name for requirement in needed if not requirement.name.startswith("ensemble.")]
    assert read == {probe.name: probe for probe in probes_for(names) if probe.name != "layers"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gradnorm_params", {"group": "3"}),
        ("gradient_classifier", {}),
        ("block_norm", {"layer": "1"}),
        ("mahalanobis_layers", {}),
        ("gram", {}),
        ("mc_dropout", {"output": "mutual_information"}),
    ],
)
def test_the_probes_in_remedies_compute_the_missing_extras(name: str, parameters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).eval()
    data = DataLoader(TensorDataset(torch.randn(30, 5), torch.arange(30) % 3), batch_size=10)
    scorer = create_scorer(name, **parameters)
    layers: Any = {"layers": ("0", "1")}
    probes = [
        replace(probe, **layers) if getattr(probe, "layers", ()) == "stages" else probe
        for probe in probes_for([*scorer.fit_needs, *scorer.needs])
    ]
    feats = extract(model, data, probes=probes, progress=False)
    assert unmet(scorer, feats.has, [feats.has]) is None


def test_unmet_returns_the_first_unmet_requirement() -> None:
    mahalanobis = create_scorer("mahalanobis")
    assert unmet(mahalanobis, None, [has()]) == FIT_SET
    assert unmet(mahalanobis, has("labels"), [has()]) is None
    missing = unmet(mahalanobis, has(), [has()])
    assert missing is not None
    assert (missing.name, missing.fitting) == ("labels", True)
    assert missing.reason == "fitting needs 'labels', which the dataset does not have"
    missing = unmet(create_scorer("odin"), None, [has("odin"), has("logits")])
    assert missing is not None
    assert missing.reason == "scoring needs 'odin', which was not extracted"
    missing = unmet(create_scorer("energy"), None, [has("logits"), has()])
    assert missing is not None
    assert missing.reason == "scoring needs 'logits', which the model does not have"


def test_errors_of_scorers_contain_the_remedy() -> None:
    feats = FeatureSet(torch.ones(2, 3))
    remedy = re.escape(Requirement("labels").how_to_get("python"))
    with pytest.raises(MissingInput, match=f"'mahalanobis' needs labels to be fitted on this feature set: {remedy}"):
        create_scorer("mahalanobis").fit(feats)
    with pytest.raises(NotFitted, match=re.escape(FIT_SET.how_to_get("python"))):
        create_scorer("mahalanobis").score(feats)


def test_the_remedy_for_an_extra_without_a_probe() -> None:
    assert Requirement("mine.a").how_to_get("python").endswith("no registered probe computes it")
    with pytest.raises(BadInput, match="'mine', which no registered probe computes: choose"):
        probes_for(["logits", "mine.a"])


def test_probes_for_creates_one_probe_for_several_extras() -> None:
    assert probes_for(["logits", "gradnorm.fc", "gradnorm.all", "gradients.inputs", "gradients.noise"]) == [
        ParameterGradients(groups=("fc", "all")),
        LayerGradients(noise=True),
    ]
