"""Benchmark specs: reading them, and reporting mistakes with their place."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_features import random_set

from ood_scores import FeatureSet, list_scorers
from ood_scores.benchmark import load_spec
from ood_scores.benchmark.checks import check
from ood_scores.benchmark.measures import MEASURES, MeasuredSets, measured
from ood_scores.benchmark.planning import plan
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Preprocessing, Published, ScorerTable, Search, Spec
from ood_scores.benchmark.unit import described
from ood_scores.errors import BadInput, OodScoresError, UnknownName
from ood_scores.evaluation.neural_collapse import neural_collapse
from ood_scores.extraction.options import ExtractionOptions

SMALL = """
title = "Small"
id = "test"
near = ["cousins"]
far = ["noise"]
[sets]
test = "digits?classes=0-6"
cousins = "digits?classes=7-9"
noise = "noise:uniform"
fits = "npz:train.npz"
[[model]]
name = "cifar_resnet20"
"""


def toml(folder: Path, text: str = SMALL, name: str = "small") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def part(path: Path, *overrides: str) -> Part:
    (only,) = load_spec(path, overrides).parts
    return only


def refused(path: Path, *overrides: str, error: type[OodScoresError] = BadInput) -> str:
    with pytest.raises(error) as caught:
        load_spec(path, overrides)
    assert type(caught.value) is error
    return str(caught.value)


def test_spec_without_parts_is_one_part(tmp_path: Path) -> None:
    spec = load_spec(toml(tmp_path))
    assert (spec.name, spec.title) == ("small", "Small")
    (only,) = spec.parts
    assert only == Part(
        title="Small",
        models=(ModelTable("cifar_resnet20"),),
        sets={
            "test": "digits?classes=0-6",
            "cousins": "digits?classes=7-9",
            "noise": "noise:uniform",
            "fits": "npz:train.npz",
        },
        id="test",
        near=("cousins",),
        far=("noise",),
    )
    assert only.ood == ("cousins", "noise")


def test_spec_with_every_table(tmp_path: Path) -> None:
    only = part(
        toml(
            tmp_path,
            'fit = "fits"\nmeasures = ["long_tail"]\nrelabel = true\nnotes = "so"\n'
            + SMALL
            + """
checkpoint = ["a.pt", "b.pt"]
num_classes = 7
in_chans = 1
[[model]]
label = "trained"
name = "resnet18"
recipe = "mine"
seeds = [0, 3]
[scorers]
msp = {}
"GradNorm T=2" = { name = "gradnorm", temperature = 2.0 }
"ReAct → GradNorm" = { name = "react", base = { name = "gradnorm", temperature = 3.0 } }
[ensembles]
both = ["cifar_resnet20", "trained"]
[preprocessing]
input_size = [8, 8]
crop_pct = 1
[extraction]
layers = ["stage1"]
probes = ["odin:epsilon=0.01"]
rows = 50
[search]
id = "fits"
ood = ["aside"]
metric = "fpr95_ood"
[search.grid."GradNorm T=2"]
temperature = [1, 2]
"""
            + '[[part]]\ntitle = "P"\n[part.sets]\naside = "noise:gaussian"\n',
        )
    )
    assert only.models == (
        ModelTable("cifar_resnet20", checkpoint=("a.pt", "b.pt"), num_classes=7, arguments={"in_chans": 1}),
        ModelTable("resnet18", "trained", recipe="mine", seeds=(0, 3)),
    )
    nested = {"name": "gradnorm", "temperature": 3.0}
    assert only.scorers == (
        ScorerTable("msp", "msp"),
        ScorerTable("GradNorm T=2", "gradnorm", {"temperature": 2.0}),
        ScorerTable("ReAct → GradNorm", "react", {"base": nested}),
    )
    assert only.scorers[2].create()._inner.temperature == 3.0  # type: ignore[attr-defined]
    assert described(only.scorers[2].create())["base"]["name"] == "gradnorm"
    assert only.ensembles == {"both": ("cifar_resnet20", "trained")}
    assert only.preprocessing == Preprocessing(input_size=(8, 8), crop_pct=1.0)
    assert only.extraction == Extraction(layers=("stage1",), probes=("odin:epsilon=0.01",), rows=50)
    assert only.search == Search("fits", ("aside",), "fpr95_ood", {"GradNorm T=2": {"temperature": (1, 2)}})
    assert (only.fit, only.measures, only.relabel, only.notes) == ("fits", ("long_tail",), True, "so")


def test_spec_with_published_numbers(tmp_path: Path) -> None:
    more = """
[[published]]
source = "Table 1"
model = "cifar_resnet20"
metrics = ["fpr95_id", "auroc"]
ood = ["cousins", "mean"]
[published.values]
msp = [[63, 87.5], ["-", 79.2]]
[[published]]
source = "Table 2"
model = "cifar_resnet20"
metrics = ["auroc"]
ood = ["near", "noise"]
[published.values]
msp = [1, "-"]
[[published]]
source = "Text"
model = "cifar_resnet20"
metrics = ["accuracy", "nc1"]
[published.values]
model = [92.6, 0.5]
"""
    assert part(toml(tmp_path, SMALL + more)).published == (
        Published("cifar_resnet20", "msp", "cousins", "fpr95_id", 63.0, "Table 1"),
        Published("cifar_resnet20", "msp", "cousins", "auroc", 87.5, "Table 1"),
        Published("cifar_resnet20", "msp", "mean", "auroc", 79.2, "Table 1"),
        Published("cifar_resnet20", "msp", "near", "auroc", 1.0, "Table 2"),
        Published("cifar_resnet20", None, None, "accuracy", 92.6, "Text"),
        Published("cifar_resnet20", None, None, "nc1", 0.5, "Text"),
    )


def test_spec_parts_override_the_keys_above_them(tmp_path: Path) -> None:
    more = """
[scorers]
msp = {}
[extraction]
layers = "stages"
rows = 9
[[part]]
title = "First"
[[part]]
title = "Second"
near = []
[part.scorers]
energy = {}
[part.extraction]
rows = 5
[[part.model]]
name = "resnet18"
[part.sets]
noise = "noise:gaussian"
"""
    first, second = load_spec(toml(tmp_path, SMALL + more), ["part.2.extraction.batch_size=7", "fit=fits"]).parts
    assert (first.title, second.title) == ("First", "Second")
    assert (first.near, second.near) == (("cousins",), ())
    assert (first.fit, second.fit) == ("fits", "fits")
    assert [table.label for table in first.scorers] == ["msp"]  # type: ignore[union-attr]
    assert [table.label for table in second.scorers] == ["energy"]  # type: ignore[union-attr]
    assert first.extraction == Extraction(layers="stages", rows=9)
    assert second.extraction == Extraction(layers="stages", rows=5, batch_size=7)
    assert second.models == (ModelTable("resnet18"),)
    assert (first.sets["noise"], second.sets["noise"]) == ("noise:uniform", "noise:gaussian")


def test_spec_extends_another_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    toml(tmp_path / "base", SMALL + '[scorers]\nmsp = {}\nA = { name = "gradnorm", temperature = 2 }\n', "all")
    child = 'extends = "base/all.toml"\ntitle = "Child"\nfar = []\n[scorers]\nA = { name = "knn", k = 3 }\n'
    spec = load_spec(toml(tmp_path, child, "child"))
    (only,) = spec.parts
    assert (spec.name, spec.title, only.near, only.far) == ("child", "Child", ("cousins",), ())
    assert only.scorers == (ScorerTable("msp", "msp"), ScorerTable("A", "knn", {"k": 3}))


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        ("[extraction]\nbatchsize = 3", 15, "[extraction] has no 'batchsize' (did you mean 'batch_size'?)"),
        ("[[part]]\ntitle = 'a'\nfitt = 'x'", 16, "[part] has no 'fitt' (did you mean 'fit'?)"),
        ("[[part]]\ntitle = 'a'\nood = ['x']", 16, "[part] has no 'ood' (did you mean 'near' or 'far'?): choose from"),
        ("[serch]\nid = 'x'", 14, "a spec has no 'serch' (did you mean 'search'?)"),
        ("[scorers]\nmsp = {}\ngradnrm = {}", 16, "there is no scorer 'gradnrm' (did you mean 'gradnorm',"),
        ("[scorers]\nG = { name = 'gradnorm', heat = 2 }", 15, "scorer 'gradnorm' has no parameter 'heat'"),
        ("[scorers]\nR = { name = 'react', base = 'ensrgy' }", 15, "there is no scorer 'ensrgy'"),
        ("[extraction]\nprobes = ['odn']", 15, "there is no probe 'odn' (did you mean 'odin'?)"),
        ("[ensembles]\nE = ['cifar_resnet']", 15, "no model 'cifar_resnet' (did you mean 'cifar_resnet20'?)"),
        ("[search]\nid = 'fitz'\nood = ['fits']", 15, "there is no dataset 'fitz' (did you mean 'fits'?)"),
        ("[search]\nid = 'fits'\nood = ['fits']\n[search.grid.kn]\nk = [1]", 17, "there is no scorer 'kn'"),
        ("[[part]]\ntitle = 'a'\n[[part]]\ntitle = 'b'\nnear = ['cosins']", 18, "no dataset 'cosins' (did you mean"),
        ("[[part]]\ntitle = 'a'\nsets.noise = 'foldr:x'", 16, "'foldr' (did you mean 'folder'?)"),
        ("[[model]]\nlabel = 'b'\nname = 'cifar_resnt20'", 16, "timm has no model 'cifar_resnt20' (did you mean"),
    ],
)  # fmt: skip
def test_unknown_names_in_a_spec_are_reported(tmp_path: Path, wrong: str, line: int, words: str) -> None:
    message = refused(toml(tmp_path, f"{SMALL}\n{wrong}\n"), error=UnknownName)
    assert message.startswith(f"{tmp_path}/small.toml, line {line}: ")
    assert words in message


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        ("dtype = 'float23'", 16, "dtype must be 'float16', 'float32' or 'float64', got 'float23'"),
        ("amp = 'bf8'", 16, "amp must be None, 'bf16' or 'fp16', got 'bf8'"),
        ("probes = ['odin', 'odin']", 16, "two probes are named 'odin'"),
        ("compile = true\nprobes = ['odin']", 17, "compile=True cannot be combined with layers or probes"),
        ("compile = true\nfit_probes = ['odin']", 17, "compile=True cannot be combined with layers or probes"),
        ("channels_last = 1", 16, "extraction.channels_last is 1: give true or false"),
        ("layers = 3", 16, "extraction.layers is 3: give a string in quotes or a list, each a string in quotes"),
    ],
)
def test_invalid_extraction_options_are_reported_with_their_line(
    tmp_path: Path, wrong: str, line: int, words: str
) -> None:
    message = refused(toml(tmp_path, f"{SMALL}\n[extraction]\nrows = 3\n{wrong}\n"))
    assert message.startswith(f"{tmp_path}/small.toml, line {line}: ")
    assert words in message


def test_options_of_extract_are_keys_of_a_spec(tmp_path: Path) -> None:
    keys = {"amp": "bf16", "channels_last": True, "compile": True, "dtype": "float16"}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    assert part(toml(tmp_path, f"{SMALL}\n[extraction]\n{lines}\n")).extraction == Extraction(**keys)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r"\[extraction\] has no 'head'") as error:
        load_spec(toml(tmp_path, f"{SMALL}\n[extraction]\nhead = 'fc'\n"))
    for option in fields(ExtractionOptions):
        assert option.name == "head" or f" {option.name}," in str(error.value) or f" {option.name}." in str(error.value)


def test_mistake_in_an_extended_spec_is_reported_there(tmp_path: Path) -> None:
    toml(tmp_path, SMALL.replace('far = ["noise"]', 'far = ["nose"]'), "base")
    child = toml(tmp_path, 'extends = "base.toml"\ntitle = "c"\n', "child")
    assert refused(child, error=UnknownName).startswith(f"{tmp_path}/base.toml, line 5: there is no dataset 'nose'")
    assert refused(child, "far=[]", "fit=fitz", error=UnknownName).startswith(f"{child}: there is no dataset 'fitz'")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("[extraction]\nrows = 'all'", "extraction.rows is 'all': give a whole number"),
        ("[extraction]\nrows = 0", "rows = 0 is out of range: give at least 1"),
        ("scorers = 3", "scorers is 3: give a string in quotes or a list, each a string in quotes, or a table"),
        ("[[published]]\nsource = 's'\nmodel = 'm'", "[[published]] has no metrics"),
        (
            "[[published]]\nsource = 's'\nmodel = 'm'\nmetrics = ['auroc']\nood = ['noise']\nvalues = {msp = [1, 2]}",
            "published.values.msp (s) is [[1], [2]]: give 1 lists of 1 numbers",
        ),
        ("[[part]]\nid = 'test'", "[[part]] number 1 has no title"),
        ("[[part]]\ntitle = 'a'\n[[part]]\ntitle = 'a'", "two parts are called 'a'"),
        ("[[model]]\nname = 'cifar_resnet20'", "the model 'cifar_resnet20' is listed 2 times"),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\nrecipe = 'r'\ncheckpoint = 'c'", "checkpoint or a recipe"),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\ncache_dir = '.'", "line 16: 'cache_dir' is not an"),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\nact_layer = '/x'", "line 16: the argument 'act_layer' of"),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\npretrained_cfg_overlay.url = 'http://x'", "is not an argument"),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\nchekpoint = 'a.pt'",
         "line 16: [[model]] has no key 'chekpoint' (did you mean 'checkpoint'?): correct it."),
        ("[[model]]\nlabel = 'a'\nname = 'resnet18'\nseeds = [1]", "seeds belong to a recipe"),
        ("measures = ['long_tail']", "long_tail needs a fit set"),
        ("[search]\nid = 'fits'\nood = ['cousins']", "'cousins' is reported as 'cousins'"),
        ("[search]\nid = 'again'\nood = ['fits']\n[[part]]\ntitle = 'a'\nsets = {again = 'digits?classes=0-6'}",
         "'again' is reported as 'test'"),
        ("[search]\nid = 'fits'\nood = ['a', 'a']\n[[part]]\ntitle = 'a'\nsets = {a = 'noise?rows=9'}",
         "the OoD dataset 'a' is listed 2 times: list it once"),
        ("covariate = ['noise']", "'noise' is both in-distribution and OoD"),
        ("covariate = ['test']", "'test' is the ID dataset, and is in covariate, too: remove it there"),
        ("covariate = ['fits', 'fits']", "the dataset 'fits' is listed 2 times: list it once"),
        ("ensembles = {both = ['cifar_resnet20', 'cifar_resnet20']}", "the model 'cifar_resnet20' is listed 2 times"),
    ],
)  # fmt: skip
def test_contradictions_in_a_spec_are_reported(tmp_path: Path, wrong: str, words: str) -> None:
    text = SMALL + wrong if wrong.startswith("[") else f"{wrong}\n{SMALL}"
    message = refused(toml(tmp_path, text))
    assert message.startswith(f"{tmp_path}/small.toml")
    assert words in message


def test_scorers_without_an_ood_dataset_are_refused(tmp_path: Path) -> None:
    text = SMALL.replace('near = ["cousins"]\nfar = ["noise"]\n', "")
    without = "the scorers have no OoD dataset to compare with: list some in near or far, or write scorers = []."
    assert refused(toml(tmp_path, text)).endswith(without)
    assert refused(toml(tmp_path, f'scorers = ["msp"]\n{text}')) == f"{tmp_path}/small.toml, line 1: {without}"
    assert part(toml(tmp_path, f"scorers = []\n{text}")).ood == ()


def test_published_numbers_of_unknown_things_are_reported(tmp_path: Path) -> None:
    def with_table(**changes: Any) -> Path:
        table = {"model": "cifar_resnet20", "metrics": ["auroc"], "ood": ["noise"], "scorer": "msp"} | changes
        head = "\n".join(f"{key} = {table[key]!r}" for key in ("model", "metrics", "ood"))
        return toml(
            tmp_path, f"{SMALL}[[published]]\nsource = 's'\n{head}\n[published.values]\n{table['scorer']} = [1]\n"
        )

    assert len(part(with_table()).published) == 1
    assert "no model 'm'" in refused(with_table(model="m"), error=UnknownName)
    assert "no metric 'aurok' (did you mean 'auroc'?)" in refused(with_table(metrics=["aurok"]), error=UnknownName)
    assert "no OoD dataset 'nois' (did you mean 'noise'?)" in refused(with_table(ood=["nois"]), error=UnknownName)
    assert "no scorer 'MSP'" in refused(with_table(scorer="MSP"), error=UnknownName)


def test_missing_and_invalid_spec_files_are_reported(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml") == f"there is no spec {tmp_path}/none.toml."
    assert "cannot read the spec" in refused(toml(tmp_path, "a = = 3"))
    assert "has no id: write id = " in refused(toml(tmp_path, SMALL.replace('id = "test"', "")))
    assert "has no model: write [[model]]" in refused(toml(tmp_path, SMALL.split("[[model]]")[0]))
    assert "[[model]] has no name" in refused(toml(tmp_path, SMALL.replace('name = "cifar_resnet20"', 'label = "a"')))


def test_spec_created_in_python_is_checked() -> None:
    made = Part("P", (ModelTable("cifar_resnet20"),), {"test": "digits"}, "test", near=("tset",))
    with pytest.raises(UnknownName, match=r"P: there is no dataset 'tset' \(did you mean 'test'\?\)"):
        check(Spec("s", "S", (made,)))


# ---- options of measures


def test_options_of_a_measure_are_read_and_used(tmp_path: Path) -> None:
    options = "\n[measures.neural_collapse]\nnormalize = true\nnc1_over_classes = false\n"
    only = part(toml(tmp_path, 'fit = "fits"\n' + SMALL + options))
    feats = random_set(4, 6)
    ((name, figures, reason),) = measured(only, MeasuredSets(feats, feats))
    assert (name, reason) == ("neural_collapse", "")
    expected = asdict(neural_collapse(feats, normalize=True, nc1_over_classes=False))
    assert {each["measure"]: each["value"] for each in figures} == expected


def test_unknown_option_of_a_measure_is_named(tmp_path: Path) -> None:
    path = toml(tmp_path, 'fit = "fits"\n' + SMALL + "\n[measures.neural_collapse]\nnormalise = true\n")
    message = refused(path, error=UnknownName)
    assert "there is no option of neural_collapse 'normalise' (did you mean 'normalize'?)" in message


def test_representation_measures_norms_and_activations_of_id_and_ood_sets() -> None:
    """The mean over OoD sets weighs them equally; the share of the map replaces that of the features if all have it."""
    sets = [random_set(4, 6, rows=rows, seed=rows) for rows in (20, 30, 50)]
    figures = MEASURES["representation"].figures(MeasuredSets(sets[0], ood={"a": sets[1], "b": sets[2]}))
    norms = [float(feats.features.norm(dim=1).mean()) for feats in sets]
    shares = [float((feats.features > 0).double().mean()) for feats in sets]
    assert figures == pytest.approx(
        {
            "representation_norm_id": norms[0],
            "representation_norm_ood": (norms[1] + norms[2]) / 2,
            "representation_norm_sd": float(sets[0].features.norm(dim=1).std()),
            "pooled_activation_ratio_id": shares[0],
            "pooled_activation_ratio_ood": (shares[1] + shares[2]) / 2,
        }
    )
    maps = [
        FeatureSet(
            each.features, each.logits, each.labels, each.head, extras={"activations.a": np.full(len(each), 0.25)}
        )
        for each in sets
    ]
    assert (
        MEASURES["representation"].figures(MeasuredSets(maps[0], ood={"a": maps[1], "b": maps[2]}))[
            "activation_ratio_ood"
        ]
        == 0.25
    )


# ---- scorers that are left out


def test_scorers_that_are_left_out_are_not_run_and_reported_with_the_reason(tmp_path: Path) -> None:
    text = '\n[left_out]\n"each class has one image" = ["mahalanobis", "gmm"]\n"it is an ensemble" = ["ensemble"]\n'
    path = toml(tmp_path, SMALL + text)
    spec = load_spec(path)
    (only,) = spec.parts
    names = {table.name for table in only.scorer_tables}
    assert names == set(list_scorers()) - {"mahalanobis", "gmm", "ensemble"}
    assert [(each.what, each.reason, each.remedy) for each in plan(spec, tmp_path, tmp_path).not_run[:3]] == [
        ("mahalanobis", "each class has one image", ""),
        ("gmm", "each class has one image", ""),
        ("ensemble", "it is an ensemble", ""),
    ]
    misspelled = toml(tmp_path, SMALL + text.replace("gmm", "gmn"))
    assert "did you mean 'gmm' or 'gen'?" in refused(misspelled, error=UnknownName)
    both = SMALL.replace("[sets]", 'scorers = ["msp", "gmm"]\n[sets]', 1) + text
    assert "'gmm' is also in scorers" in refused(toml(tmp_path, both))
