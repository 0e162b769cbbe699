"""Ensembles: the outputs of several models for the same data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import ood_scores
from ood_scores import FeatureSet, Head, ensemble
from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.features import Provenance

ROWS, CLASSES = 40, 3


def member(seed: int, width: int = 5, **changes: Any) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, width, generator=generator)
    head = Head(torch.randn(CLASSES, width, generator=generator), torch.randn(CLASSES, generator=generator))
    labels = torch.arange(ROWS) % CLASSES
    parts: dict[str, Any] = {"features": features, "logits": head(features), "labels": labels, "head": head}
    return FeatureSet(**(parts | changes))


MEMBERS = [member(0), member(1, 7), member(2)]
JOINT = ensemble(MEMBERS)


def test_features_and_head_reproduce_the_mean_logits() -> None:
    expected = torch.stack([feats.logits for feats in MEMBERS]).double().mean(0)  # type: ignore[misc]
    assert torch.equal(JOINT.features, torch.cat([feats.features for feats in MEMBERS], dim=1))
    torch.testing.assert_close(JOINT.logits, expected)
    assert JOINT.head is not None
    torch.testing.assert_close(JOINT.head(JOINT.features).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(JOINT.labels, torch.arange(ROWS) % CLASSES)  # type: ignore[arg-type]


def test_the_predictive_distribution_is_the_mean_of_the_members() -> None:
    softmaxes = torch.stack([feats.logits for feats in MEMBERS]).double().softmax(2)  # type: ignore[misc]
    torch.testing.assert_close(JOINT.extras["ensemble.mean"], softmaxes.mean(0))
    entropies = torch.special.entr(softmaxes).sum(2)
    torch.testing.assert_close(JOINT.extras["ensemble.entropy"], entropies.mean(0))


@pytest.mark.parametrize("name", ["energy", "gradnorm", "mahalanobis", "vim"])
def test_a_list_is_scored_as_the_joint_model(name: str) -> None:
    assert JOINT.head is not None
    whole = FeatureSet(JOINT.features, JOINT.logits, JOINT.labels, JOINT.head)
    found = ood_scores.score(name, MEMBERS, fit=MEMBERS)
    assert torch.equal(found, ood_scores.score(name, whole, fit=whole))


def test_a_list_is_evaluated_as_the_joint_model() -> None:
    other = [member(seed, width, head=MEMBERS[seed - 3].head) for seed, width in ((3, 5), (4, 7), (5, 5))]
    table = ood_scores.evaluate(["energy", "mahalanobis"], id=MEMBERS, ood={"other": other}, fit=MEMBERS)
    expected = ood_scores.evaluate(["energy", "mahalanobis"], id=JOINT, ood={"other": ensemble(other)}, fit=JOINT)
    assert table.equals(expected)
    assert table.attrs["id_accuracy"] == expected.attrs["id_accuracy"] is not None


def test_members_on_disk_stay_there(tmp_path: Path) -> None:
    for i, feats in enumerate(MEMBERS):
        feats.save(tmp_path / f"{i}.h5")
    on_disk = [ood_scores.load(tmp_path / f"{i}.h5") for i in range(3)]
    joint = ensemble(on_disk)
    assert torch.equal(joint.features, JOINT.features)
    assert torch.equal(joint[5:20].logits, JOINT.logits[5:20])  # type: ignore[index,arg-type]
    assert torch.equal(joint[[7, 3]].extras["ensemble.mean"], JOINT.extras["ensemble.mean"][[7, 3]])
    joint.save(tmp_path / "joint.h5")
    assert torch.equal(ood_scores.load(tmp_path / "joint.h5").features, JOINT.features)
    assert torch.equal(ood_scores.score("energy", on_disk), ood_scores.score("energy", JOINT))


def test_without_logits_or_heads() -> None:
    bare = ensemble([member(0, logits=None, head=None), member(1, head=None)])
    assert bare.logits is None
    assert bare.head is None
    assert not bare.has("ensemble")


PROVENANCE = Provenance(
    architecture="a", weights_sha256="0" * 64, head="found", head_modules="fc", dataset="val", data_sha256="1" * 64,
    dataset_rows=ROWS, labelled=True, shuffled=False, batch_size=8, preprocessing="", device="cpu",
    model_dtype="float32", amp=None, channels_last=False, compiled=False, dtype="float32",
    versions={}, created="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([], EmptyInput, "at least one"),
        (["nowhere.h5"], FileNotFoundError, "there is no file nowhere.h5"),
        ([MEMBERS[0], MEMBERS[1][:30]], BadInput, "sets of the same data, got a set .40., a set .30."),
        ([MEMBERS[0], member(1, labels=torch.zeros(ROWS, dtype=torch.int64))], BadInput, "different labels"),
        ([MEMBERS[0], member(1, logits=torch.zeros(ROWS, 4), head=None)], ShapeMismatch, "3, 4 classes"),
        (
            [
                member(0, provenance=PROVENANCE),
                member(1, provenance=dataclasses.replace(PROVENANCE, dataset="train")),
            ],
            BadInput,
            "got val .40., train .40.",
        ),
        ([member(0, provenance=dataclasses.replace(PROVENANCE, shuffled=True))], BadInput, "random order"),
    ],
)
def test_invalid_ensembles(members: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ensemble(members)
