"""Linear probes agree with scikit-learn, choose their penalty on held-out rows, and make every score run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.errors import BadInput, BadLabels, MissingInput
from ood_scores.features import FeatureSet
from ood_scores.features.accuracy import accuracy_of
from ood_scores.features.linear_probe import L2, linear_probe

CLASSES, WIDTH = 3, 6


def clusters(rows: int, seed: int, spread: float = 1.5) -> FeatureSet:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(rows) % CLASSES
    means = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    features = (means[labels] + spread * rng.normal(size=(rows, WIDTH))) * np.array([1, 10, 0.1, 1, 1, 1]) + 3
    return FeatureSet(features.astype(np.float32), labels=labels)


def standardized(feats: FeatureSet) -> np.ndarray:
    features = feats.features.double().numpy()
    return (features - features.mean(0)) / features.std(0)


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_it_is_multinomial_logistic_regression_on_standardized_features(l2: float) -> None:
    feats = clusters(240, 0)
    probed = ood_scores.fit_linear_probe(feats, l2=l2)
    assert feats.labels is not None
    assert probed.logits is not None
    reference = LogisticRegression(C=1 / (l2 * len(feats)), tol=1e-9, max_iter=2000)
    reference.fit(standardized(feats), feats.labels.numpy())
    expected = reference.predict_log_proba(standardized(feats))
    np.testing.assert_allclose(probed.logits.double().log_softmax(1).numpy(), expected, atol=1e-4)
    in_blocks = ood_scores.fit_linear_probe(feats.in_blocks(17), l2=l2)
    assert in_blocks.head is not None
    assert probed.head is not None
    torch.testing.assert_close(in_blocks.head.weight, probed.head.weight, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_chosen_on_a_tenth_of_each_class() -> None:
    feats = clusters(300, 1)
    found = linear_probe(feats, seed=3)
    assert set(found.losses) == set(L2)
    assert found.losses[found.l2] == min(found.losses.values())
    again = linear_probe(feats, l2=found.l2)
    torch.testing.assert_close(found.head.weight, again.head.weight, rtol=1e-3, atol=1e-4)
    assert found.accuracy is not None
    assert (found.accuracy * 30) % 1 == pytest.approx(0, abs=1e-9)  # 10 rows of each of 3 classes
    new = clusters(900, 2).with_head(found.head)
    assert new.logits is not None
    assert new.labels is not None
    accuracy = float((new.logits.argmax(1) == new.labels).double().mean())
    assert accuracy > 0.6
    assert abs(accuracy - found.accuracy) < 0.2


def test_a_constant_feature_changes_nothing() -> None:
    feats = clusters(90, 4)
    wider = FeatureSet(torch.cat([feats.features, torch.full((90, 1), 7.0)], 1), labels=feats.labels)
    one, other = linear_probe(feats, l2=0.1), linear_probe(wider, l2=0.1)
    torch.testing.assert_close(one.head(feats.features), other.head(wider.features), rtol=1e-4, atol=1e-4)


def test_errors() -> None:
    feats = clusters(30, 0)
    with pytest.raises(BadLabels, match="has no labels"):
        ood_scores.fit_linear_probe(FeatureSet(feats.features))
    with pytest.raises(BadLabels, match="all rows have the same label"):
        ood_scores.fit_linear_probe(FeatureSet(feats.features, labels=np.zeros(30, int)))
    with pytest.raises(BadLabels, match="rows of 2 classes, but class 1 has none, and labels run to 2"):
        ood_scores.fit_linear_probe(FeatureSet(feats.features, labels=np.arange(30) % 2 * 2))
    with pytest.raises(BadInput, match="l2 must be at least 0 and finite, got -1"):
        ood_scores.fit_linear_probe(feats, l2=-1)
    with pytest.raises(BadInput, match="no class has two rows"):
        ood_scores.fit_linear_probe(FeatureSet(feats.features[:5], labels=np.arange(5)))


def test_scorers_that_need_logits_say_how_a_linear_probe_gives_them() -> None:
    feats = clusters(60, 0)
    with pytest.raises(MissingInput, match=r"needs logits .*linear probe, ood_scores\.fit_linear_probe") as caught:
        ood_scores.score("energy", feats)
    assert "ood-scores linear-probe" in caught.value.command
    with pytest.raises(MissingInput, match=r"head of a linear probe, ood_scores\.fit_linear_probe"):
        ood_scores.score("react", feats, feats)


def test_every_score_of_features_and_logits_runs_on_an_encoder() -> None:
    probed = ood_scores.fit_linear_probe(clusters(240, 0), l2=0.01)
    assert probed.head is not None
    id, ood = clusters(60, 5).with_head(probed.head), clusters(60, 6, spread=8).with_head(probed.head)
    names = ["energy", "gradnorm", "vim", "react", "mahalanobis", "neco", "msp"]
    table = ood_scores.evaluate(names, id=id, ood={"far": ood}, fit=probed)
    assert set(table["scorer"]) == set(names)
    assert table.set_index("scorer")["auroc"]["mahalanobis"] > 0.9
    assert table.attrs["id_accuracy"] == pytest.approx(accuracy_of(id))


def test_command_line(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("val", 1)):
        clusters(120, seed).save(tmp_path / f"{name}.h5")
    command = ["linear-probe", str(tmp_path / "train.h5"), str(tmp_path / "val.h5"), "--out", str(tmp_path / "probed")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    head = linear_probe(clusters(120, 0)).head
    val = ood_scores.load(tmp_path / "probed" / "val.h5")
    assert val.logits is not None
    torch.testing.assert_close(val.logits, head(clusters(120, 1).features))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "exists: choose another --out, or pass --overwrite" in " ".join(again.output.split())
    inside = CliRunner().invoke(app, [*command[:-1], str(tmp_path), "--overwrite"])
    assert inside.exit_code == 1
    assert ood_scores.load(tmp_path / "val.h5").logits is None
