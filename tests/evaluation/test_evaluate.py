"""Tests of ``evaluate``: values, passes over the sets, and errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ood_scores import FeatureSet, Head, Scorer, create_scorer, evaluate, list_scorers, load, metrics, score
from ood_scores.errors import (
    BadInput,
    BadLabels,
    EmptyInput,
    MissingInput,
    NotFinite,
    NotFitted,
    ShapeMismatch,
    UnknownName,
)
from ood_scores.features import Block, Provenance
from ood_scores.features.accuracy import near_chance

COLUMNS = ["scorer", "ood", "auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood", "n_id", "n_ood"]
HEAD = Head(torch.randn(4, 6, generator=torch.Generator().manual_seed(9)))


def feature_set(seed: int, rows: int = 60, scale: float = 1.0, **changes: Any) -> FeatureSet:
    features = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).relu()
    parts: dict[str, Any] = {
        "features": features,
        "logits": HEAD(features),
        "labels": torch.arange(rows) % 4,
        "head": HEAD,
    }
    return FeatureSet(**(parts | changes))


FIT, ID = feature_set(0, rows=200), feature_set(1)
OOD = {"near": feature_set(2, rows=40, scale=0.7), "far": feature_set(3, rows=55, scale=0.2)}
SCORERS = ["msp", "energy", "gradnorm", "mahalanobis", "gmm", "prior_msp"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[FeatureSet]:
    """Record each pass over the blocks of a set; reading a whole column fails."""
    passes: list[FeatureSet] = []
    blocks = FeatureSet.blocks

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        passes.append(self)
        return blocks(self, *args, **kwargs)

    def whole(self: FeatureSet) -> None:
        raise AssertionError("a whole column was read")

    monkeypatch.setattr(FeatureSet, "blocks", counted)
    monkeypatch.setattr(FeatureSet, "features", property(whole))
    monkeypatch.setattr(FeatureSet, "logits", property(whole))
    return passes


def test_evaluate_returns_a_tidy_frame() -> None:
    table = evaluate(SCORERS, id=ID, ood=OOD, fit=FIT)
    assert table.columns.tolist() == COLUMNS
    assert list(zip(table["scorer"], table["ood"], strict=True)) == [(s, o) for s in SCORERS for o in OOD]
    assert table.dtypes[["n_id", "n_ood"]].eq("int64").all()
    assert table.drop(columns=["scorer", "ood", "n_id", "n_ood"]).dtypes.eq("float64").all()
    assert list(table.attrs) == ["id_accuracy", "id", "left_out", "decided", "overlap", "warnings"]
    assert table.attrs["left_out"] == {}
    assert table.attrs["overlap"] == []


def test_evaluate_equals_score_and_metrics() -> None:
    table = evaluate(SCORERS, id=ID, ood=OOD, fit=FIT)
    cells = {(row["scorer"], row["ood"]): row for row in table.to_dict("records")}
    for name in SCORERS:
        id_scores = score(name, ID, fit=FIT)
        for label, feats in OOD.items():
            row, ood_scores = cells[name, label], score(name, feats, fit=FIT)
            assert (row["n_id"], row["n_ood"]) == (len(ID), len(feats))
            for metric in ("auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood"):
                assert row[metric] == getattr(metrics, metric)(id_scores, ood_scores)


def test_evaluate_reads_each_set_once_for_all_scorers(reads: list[FeatureSet]) -> None:
    fit = feature_set(0, rows=200)
    names: list[str | Scorer] = [
        *SCORERS,
        "knn",
        create_scorer("gmm", space="logits"),
        create_scorer("gmm", normalize=True),
    ]
    table = evaluate(names, id=ID, ood=OOD, fit=fit)
    assert table.attrs["id_accuracy"] is not None
    assert [id(feats) for feats in reads] == [id(fit), id(ID), id(OOD["near"]), id(OOD["far"])]
    evaluate(names, id=ID, ood=OOD, fit=fit)
    assert len(reads) == 4 + 3  # the statistics of the fit set are known


def test_evaluate_reads_a_set_on_disk_once(tmp_path: Path, reads: list[FeatureSet]) -> None:
    ID.save(tmp_path / "id.h5")
    feats = load(tmp_path / "id.h5")
    found = evaluate(["energy", "feature_norm"], id=feats, ood=OOD)
    assert reads.count(feats) == 1
    pd.testing.assert_frame_equal(found, evaluate(["energy", "feature_norm"], id=ID, ood=OOD))


def test_id_accuracy_of_evaluate() -> None:
    assert ID.logits is not None
    assert ID.labels is not None
    expected = float((ID.logits.argmax(dim=1) == ID.labels).double().mean())
    assert 0 < expected < 1
    assert evaluate(["msp"], id=ID, ood=OOD).attrs["id_accuracy"] == expected
    assert evaluate(["msp"], id=feature_set(1, labels=None), ood=OOD).attrs["id_accuracy"] is None
    assert evaluate(["feature_norm"], id=feature_set(1, logits=None), ood=OOD).attrs["id_accuracy"] is None


def test_evaluate_returns_the_name_of_the_id_dataset() -> None:
    blank: dict[str, Any] = {each.name: "" for each in fields(Provenance)}
    provenance = replace(Provenance(**blank), dataset="cifar10-test")
    assert evaluate(["msp"], id=feature_set(1, provenance=provenance), ood=OOD).attrs["id"] == "cifar10-test"
    assert evaluate(["msp"], id=ID, ood=OOD).attrs["id"] is None


def test_evaluate_shows_the_names_of_a_mapping() -> None:
    table = evaluate({"T=1": "energy", "T=10": create_scorer("energy", temperature=10.0)}, id=ID, ood=OOD)
    assert table["scorer"].unique().tolist() == ["T=1", "T=10"]
    expected = metrics.auroc(score("energy", ID, temperature=10.0), score("energy", OOD["near"], temperature=10.0))
    assert table.set_index(["scorer", "ood"]).loc[("T=10", "near"), "auroc"] == expected


def test_evaluate_shows_the_parameters_of_a_scorer_with_several_settings() -> None:
    scorers = [
        create_scorer("energy"),
        create_scorer("energy", temperature=10.0),
        create_scorer("msp", temperature=2.0),
    ]
    table = evaluate(scorers, id=ID, ood=OOD)
    assert table["scorer"].unique().tolist() == ["Energy(temperature=1.0)", "Energy(temperature=10.0)", "msp"]


def test_evaluate_requires_names_for_a_scorer_that_is_listed_twice() -> None:
    two = [create_scorer("mahalanobis").fit(FIT), create_scorer("mahalanobis").fit(ID)]
    with pytest.raises(BadInput, match="listed twice"):
        evaluate(two, id=ID, ood=OOD)
    table = evaluate({"train": two[0], "test": two[1]}, id=ID, ood=OOD)
    assert table["auroc"].nunique() == 4


def test_evaluate_refits_fitted_scorers_only_with_a_fit_set() -> None:
    scorer = create_scorer("mahalanobis").fit(FIT)
    as_it_is = evaluate([scorer], id=ID, ood=OOD)
    pd.testing.assert_frame_equal(as_it_is, evaluate(["mahalanobis"], id=ID, ood=OOD, fit=FIT))
    refitted = evaluate([scorer], id=ID, ood=OOD, fit=ID)
    pd.testing.assert_frame_equal(refitted, evaluate(["mahalanobis"], id=ID, ood=OOD, fit=ID))
    assert not as_it_is["auroc"].equals(refitted["auroc"])


@pytest.mark.parametrize("labels", [None, torch.full((60,), 999), torch.full((60,), -1)])
def test_evaluate_ignores_labels_of_ood_sets(labels: Any) -> None:
    expected = evaluate(SCORERS, id=ID, ood={"ood": feature_set(2)}, fit=FIT)
    pd.testing.assert_frame_equal(
        evaluate(SCORERS, id=ID, ood={"ood": feature_set(2, labels=labels)}, fit=FIT), expected
    )


@pytest.mark.parametrize("label", [-1, 4])
def test_evaluate_checks_labels_of_the_id_set(label: int) -> None:
    labels = torch.arange(60) % 4
    labels[7] = label
    with pytest.raises(BadLabels, match=r"class indices must be in 0 \.\. 3"):
        evaluate(["msp"], id=feature_set(1, labels=labels), ood=OOD)


@pytest.mark.parametrize("scorers", ["msp", create_scorer("msp")])
def test_evaluate_requires_a_list_of_scorers(scorers: Any) -> None:
    with pytest.raises(BadInput, match="scorers must be a list or a mapping of names or Scorer objects"):
        evaluate(scorers, id=ID, ood=OOD)


def test_evaluate_requires_scorers_and_ood_sets() -> None:
    with pytest.raises(EmptyInput, match="no OoD set"):
        evaluate(["msp"], id=ID, ood={})
    with pytest.raises(EmptyInput, match="no scorer"):
        evaluate([], id=ID, ood=OOD)
    with pytest.raises(BadInput, match="ood must map names to feature sets"):
        evaluate(["msp"], id=ID, ood=OOD["near"])  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", ["id", "ood", "fit"])
def test_evaluate_refuses_a_set_without_rows(empty: str) -> None:
    sets: dict[str, Any] = {"id": ID, "ood": OOD["near"], "fit": FIT}
    sets[empty] = sets[empty][:0]
    with pytest.raises(EmptyInput, match="no rows"):
        evaluate(["mahalanobis"], id=sets["id"], ood={"ood": sets["ood"]}, fit=sets["fit"])


def test_evaluate_checks_requirements_before_reading(reads: list[FeatureSet]) -> None:
    with pytest.raises(NotFitted, match="'mahalanobis' is fitted on in-distribution features: pass fit="):
        evaluate(["msp", "mahalanobis"], id=ID, ood=OOD)
    with pytest.raises(MissingInput, match="'msp' needs logits"):
        evaluate(["msp"], id=ID, ood={"ood": feature_set(2, logits=None)})
    with pytest.raises(MissingInput, match="'mahalanobis' needs labels to be fitted on"):
        evaluate(["mahalanobis"], id=ID, ood=OOD, fit=feature_set(0, labels=None))
    with pytest.raises(UnknownName, match="there is no scorer 'mps'"):
        evaluate(["mps"], id=ID, ood=OOD)
    assert not reads


@pytest.mark.parametrize("scorers", [["energy"], ["feature_norm"], ["mahalanobis"], ["gmm", "msp"]])
def test_evaluate_refuses_sets_of_different_models(scorers: list[str]) -> None:
    """This includes scorers that can score any width, since numbers of two models must not be compared."""
    wide = FeatureSet(torch.ones(30, 7), torch.ones(30, 4), torch.arange(30) % 4)
    more = FeatureSet(torch.ones(30, 6), torch.ones(30, 5), torch.arange(30) % 4)
    with pytest.raises(ShapeMismatch, match="the OoD set 'other' has num_features = 7, the ID set has 6"):
        evaluate(scorers, id=ID, ood=OOD | {"other": wide}, fit=FIT)
    with pytest.raises(ShapeMismatch, match="the OoD set 'other' has num_classes = 5, the ID set has 4"):
        evaluate(scorers, id=ID, ood=OOD | {"other": more}, fit=FIT)
    with pytest.raises(ShapeMismatch, match="the fit set has num_features = 7, the ID set has 6"):
        evaluate(scorers, id=ID, ood=OOD, fit=wide)


def test_evaluate_accepts_a_set_with_unknown_classes() -> None:
    bare = {"bare": FeatureSet(OOD["near"].features)}
    assert len(evaluate(["feature_norm"], id=ID, ood=bare)) == 1


def test_evaluate_names_rows_that_are_not_finite() -> None:
    features = ID.features.clone()
    features[11, 0] = float("nan")
    with pytest.raises(NotFinite, match="first in row 11"):
        evaluate(["energy", "activation_ratio"], id=ID, ood={"broken": feature_set(1, features=features)})
    with pytest.raises(NotFinite, match="first in row 11"):
        evaluate(["mahalanobis"], id=ID, ood=OOD, fit=feature_set(1, features=features))


def test_evaluate_does_not_change_its_inputs() -> None:
    before = ID.features.clone()
    evaluate(SCORERS, id=ID, ood=OOD, fit=FIT)
    assert torch.equal(ID.features, before)


def shared(rows: int, seed: int = 7) -> FeatureSet:
    """100 rows, of which the first ``rows`` are the first rows of the ID set."""
    own = feature_set(seed, rows=100 - rows)
    features = torch.cat([ID.features[:rows], own.features])
    return feature_set(0, rows=100, features=features, logits=HEAD(features))


def test_fit_set_that_shares_rows_with_the_id_set_is_named() -> None:
    with pytest.warns(UserWarning, match=r"the fit set shares 43 of 60 rows with the ID set \(identical features\)"):
        table = evaluate(["knn"], id=ID, ood=OOD, fit=shared(43))
    assert table.attrs["overlap"] == [{"set": "fit set", "other": "ID set", "rows": 43, "of": 60}]
    assert "the fit set shares 43 of 60 rows" in table.attrs["warnings"][0]


def test_fit_set_that_shares_rows_with_an_ood_set_is_named() -> None:
    with pytest.warns(UserWarning, match=r"the fit set shares 40 of 40 rows with the OoD set 'near'"):
        table = evaluate(["feature_norm", "mahalanobis"], id=ID, ood=OOD, fit=OOD["near"])
    assert table.attrs["overlap"] == [{"set": "fit set", "other": "OoD set 'near'", "rows": 40, "of": 40}]


def test_one_set_as_id_and_ood_is_named_even_if_scorers_read_no_features() -> None:
    with pytest.warns(UserWarning, match=r"the ID set shares 60 of 60 rows with the OoD set 'same'"):
        table = evaluate(["energy"], id=ID, ood={"same": feature_set(1), **OOD})
    assert table.attrs["overlap"] == [{"set": "ID set", "other": "OoD set 'same'", "rows": 60, "of": 60}]


def test_one_ood_set_under_two_names_is_named() -> None:
    with pytest.warns(UserWarning, match=r"the OoD set 'far' shares 55 of 55 rows with the OoD set 'again'"):
        evaluate(["energy"], id=ID, ood={**OOD, "again": feature_set(3, rows=55, scale=0.2)})


def test_fit_set_is_not_compared_if_nothing_is_fitted() -> None:
    assert evaluate(["energy"], id=ID, ood=OOD, fit=ID).attrs["overlap"] == []


def test_copies_of_one_row_are_no_overlap() -> None:
    blank = torch.zeros(10, 6)
    id, fit = (torch.cat([blank, feature_set(seed).features]) for seed in (1, 0))
    table = evaluate(["knn"], id=FeatureSet(id), ood={"far": FeatureSet(OOD["far"].features)}, fit=FeatureSet(fit))
    assert table.attrs["overlap"] == []


def test_overlap_is_found_on_disk_and_in_half_precision(tmp_path: Path) -> None:
    half: dict[str, Any] = {"features": ID.features.half(), "logits": HEAD(ID.features.half().float())}
    feature_set(1, **half).save(tmp_path / "id.h5")
    for _ in range(2):  # the second time from the stored hashes
        with pytest.warns(UserWarning, match="the fit set shares 60 of 60 rows with the ID set"):
            evaluate(["knn"], id=load(tmp_path / "id.h5"), ood=OOD, fit=feature_set(1, **half))


def test_score_names_rows_of_the_fit_set() -> None:
    with pytest.warns(UserWarning, match="the fit set shares 43 of 60 rows with the set to score"):
        score("knn", ID, fit=shared(43))


def test_all_leaves_out_what_cannot_run_and_says_why() -> None:
    small = feature_set(0, rows=20)
    table = evaluate("all", id=ID, ood=OOD, fit=small)
    left_out = table.attrs["left_out"]
    assert set(list_scorers()) == {*table["scorer"], *left_out}
    assert left_out["odin"] == (
        "scoring needs 'odin', which was not extracted: extract it with extract(..., probes=['odin'])"
    )
    assert "lower k" in left_out["knn"]  # its fit fails
    pd.testing.assert_frame_equal(
        table[table["scorer"] == "mahalanobis"].reset_index(drop=True),
        evaluate(["mahalanobis"], id=ID, ood=OOD, fit=small),
    )


def test_all_without_a_fit_set_runs_scorers_that_need_none() -> None:
    bare = {"bare": FeatureSet(OOD["far"].features)}
    table = evaluate("all", id=ID, ood=bare)
    assert "feature_norm" in set(table["scorer"])
    assert "needs 'logits'" in table.attrs["left_out"]["energy"]
    assert table.attrs["left_out"]["vim"].startswith("it needs a fit set: pass fit=train_feats")


def test_accuracy_near_chance_is_named() -> None:
    known = feature_set(1)
    assert known.logits is not None
    right = known.logits.argmax(dim=1)
    for labels, expected in ((right, []), ((right + 1) % 4, [0.0])):
        table = evaluate(["energy"], id=feature_set(1, labels=labels), ood=OOD)
        found = [text for text in table.attrs["warnings"] if "near chance for 4 classes" in text]
        assert len(found) == len(expected)
    assert found[0].startswith("the accuracy on the ID set is 0.00%")


@pytest.mark.parametrize(
    ("accuracy", "rows", "classes", "near"),
    [
        (0.002, 5000, 1000, True),
        (0.0021, 5000, 1000, False),
        (0.2, 60, 10, True),
        (0.21, 60, 10, False),
        (0.6, 60, 2, True),
        (0.61, 60, 2, False),
        (0.0, 49, 10, False),
        (None, 60, 10, False),
    ],
)
def test_near_chance(accuracy: float | None, rows: int, classes: int, near: bool) -> None:
    assert (near_chance(accuracy, rows, classes, "ID set") is not None) == near


def test_activation_ratio_reads_the_map_only_if_all_sets_have_it() -> None:
    """Shares before and after pooling are never compared with each other, and the table says which were read."""

    def with_map(feats: FeatureSet, share: float) -> FeatureSet:
        extras = {"activations.last": torch.full((len(feats),), share)}
        return FeatureSet(feats.features, feats.logits, feats.labels, HEAD, extras=extras)

    inside, outside = with_map(ID, 0.6), with_map(OOD["far"], 0.1)
    both = evaluate("all", id=inside, ood={"far": outside})
    assert both.attrs["decided"] == {"activation_ratio": "of='map'"}
    assert both.set_index("scorer")["auroc"]["activation_ratio"] == 1.0
    one = evaluate(["activation_ratio"], id=inside, ood={"far": outside, "near": OOD["near"]})
    assert one.attrs["decided"] == {"activation_ratio": "of='features'"}
    pooled = evaluate([create_scorer("activation_ratio", of="features")], id=ID, ood=OOD)
    assert pooled.attrs["decided"] == {}
    assert one["auroc"].tolist() == pooled["auroc"].tolist()[::-1]
