"""Names of scorers in other packages are understood wherever a scorer is named, and a warning translates them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_ood import detector as peer
from typer.testing import CliRunner

from ood_scores import (
    FeatureSet,
    Head,
    calibrate,
    create_scorer,
    evaluate,
    extract,
    list_scorers,
    register_scorer,
    score,
    sweep,
)
from ood_scores.benchmark.spec_file import load_spec
from ood_scores.cli import app
from ood_scores.errors import UnknownName
from ood_scores.features import Block
from ood_scores.scorers import Scorer
from ood_scores.scorers.registry import registered_name, scorer_class, tell_alias


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    """An alias is translated once in a process."""
    tell_alias.cache_clear()
    yield
    tell_alias.cache_clear()


def feature_set(seed: int) -> FeatureSet:
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
    head = Head(torch.eye(4, 6))
    return FeatureSet(features, head(features), torch.arange(30) % 4, head)


FIT, ID, OOD = feature_set(0), feature_set(1), feature_set(2)
ALIASES = [(alias, name) for name in list_scorers() for alias in scorer_class(name).tags.aliases]


def test_aliases_are_unique_and_no_registered_names() -> None:
    aliases = [alias for alias, _ in ALIASES]
    assert len(set(aliases)) == len(aliases) >= 20
    assert not set(aliases) & set(list_scorers())
    assert [alias for alias in aliases if alias != alias.lower() or "-" in alias] == []


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ebo", "energy"),
        ("mls", "max_logit"),
        ("mds", "mahalanobis"),
        ("mds_ensemble", "mahalanobis_layers"),
        ("rmds", "relative_mahalanobis"),
        ("klm", "kl_matching"),
        ("mcd", "mc_dropout"),
        ("dropout", "mc_dropout"),
        ("temp_scaling", "temperature"),
        ("Mahalanobis++", "mahalanobis_pp"),
        ("ViM", "vim"),
        ("max-logit", "max_logit"),
    ],
)
def test_an_alias_is_translated(alias: str, name: str) -> None:
    with pytest.warns(UserWarning, match=f"^{alias.replace('+', '.')} is {name} here.$"):
        assert create_scorer(alias) == create_scorer(name)


def test_classes_of_pytorch_ood_are_found_by_their_names() -> None:
    without = {"ASH", "GradUncertainty", "MCM", "MahalanobisODIN", "NACUE"}  # ASH is three scorers here
    theirs = {name for name in dir(peer) if name[0].isupper()}
    assert theirs - without == {name for name in theirs - without if registered_name(name)}


def test_an_alias_is_translated_once() -> None:
    with pytest.warns(UserWarning, match="ebo is energy here"):
        found = score("ebo", ID)
    assert torch.equal(found, score("energy", ID))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(score("ebo", ID, temperature=2.0), score("energy", ID, temperature=2.0))


def test_tables_have_the_registered_names() -> None:
    with pytest.warns(UserWarning, match="mds is mahalanobis here"):
        table = evaluate(["ebo", "mds"], id=ID, ood={"far": OOD}, fit=FIT)
    assert table["scorer"].tolist() == ["energy", "mahalanobis"]
    assert sweep("ebo", {"temperature": [1.0]}, id=ID, ood={"far": OOD})["scorer"].tolist() == ["energy"]


def test_a_base_may_be_an_alias() -> None:
    with pytest.warns(UserWarning, match="mls is max_logit here"):
        found = score("react", ID, fit=FIT, base="mls")
    assert torch.equal(found, score("react", ID, fit=FIT, base="max_logit"))


def test_members_of_a_fusion_and_scorers_at_a_layer_may_be_aliases() -> None:
    with pytest.warns(UserWarning, match="ebo is energy here"):
        found = score("fusion", ID, fit=FIT, scorers=["ebo", "msp"])
    assert torch.equal(found, score("fusion", ID, fit=FIT, scorers=["energy", "msp"]))
    fit, feats = (FeatureSet(each.features, each.logits, each.labels, extras=layer(each)) for each in (FIT, ID))
    expected = score("mahalanobis", feats, fit=fit, space="layers.a")
    with pytest.warns(UserWarning, match="mds is mahalanobis here"):
        assert torch.equal(score("mds", feats, fit=fit, space="layers.a"), expected)
    tell_alias.cache_clear()
    with pytest.warns(UserWarning, match="mds is mahalanobis here"):
        assert torch.equal(score("layers", feats, fit=fit, base="mds"), expected)


def layer(feats: FeatureSet) -> dict[str, Any]:
    return {"layers.a": feats.features[:, :3].square()}


def test_the_scorer_of_a_detector_may_be_an_alias() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 4)).eval()
    feats = extract(model, [torch.randn(40, 3, 2, 2)], progress=False)
    with pytest.warns(UserWarning, match="ebo is energy here"):
        assert calibrate("ebo", model, id=feats, keep=0.9).scorer == create_scorer("energy")


def test_a_registered_scorer_takes_precedence(registered_scorers: dict[str, type[Scorer]]) -> None:
    @register_scorer("ebo")
    class Own(Scorer):
        needs = ("logits",)

        def score_block(self, block: Block) -> Any:
            return block.logits[:, 0]

    assert scorer_class("ebo") is Own


def test_a_name_that_is_no_alias_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"there is no scorer 'ebbo'"):
        create_scorer("ebbo")


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_on_the_command_line(tmp_path: Path) -> None:
    ID.save(tmp_path / "id.h5")
    OOD.save(tmp_path / "ood.h5")
    for name in ("ebo", "energy"):
        output = call("score", name, tmp_path / "id.h5", "--param", "temperature=2", "--out", tmp_path / f"{name}.csv")
        assert ("ebo is energy here" in output) == (name == "ebo")
    assert (tmp_path / "ebo.csv").read_text() == (tmp_path / "energy.csv").read_text()
    table = call("evaluate", "--id", tmp_path / "id.h5", "--ood", tmp_path / "ood.h5", "--scorer", "mls")
    assert "mls is max_logit here" in table
    assert call("list", "ebo") == call("list", "energy")
    assert "Elsewhere: ebo, energybased, energy_based." in " ".join(call("list", "ebo").split())


def test_in_a_benchmark_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(
        'scorers = ["ebo", "msp"]\nid = "a"\nfar = ["b"]\n[sets]\na = "noise:uniform"\nb = "noise:gaussian"\n'
        '[[model]]\nname = "resnet18"\n'
    )
    with pytest.warns(UserWarning, match="ebo is energy here"):
        (part,) = load_spec(file).parts
    assert [table.create() for table in part.scorer_tables] == [create_scorer("energy"), create_scorer("msp")]
    text = file.read_text().replace('scorers = ["ebo", "msp"]\n', "")
    file.write_text(f'{text}[scorers]\na = {{name = "react", base = "mls"}}\nb = {{name = "rmds"}}\n')
    with pytest.warns(UserWarning, match="mls is max_logit here"):
        (part,) = load_spec(file).parts
    expected = [create_scorer("react", base="max_logit"), create_scorer("relative_mahalanobis")]
    found = [table.create() for table in part.scorer_tables]
    assert torch.equal(found[0].fit(FIT).score(ID), expected[0].fit(FIT).score(ID))
    assert found[1] == expected[1]
