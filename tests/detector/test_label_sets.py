"""Sets of labels: nonconformity by hand, coverage in simulations of 1,000 calibrations, and input that is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import ood_scores
from ood_scores.detector import Detector
from ood_scores.detector.conformal import threshold
from ood_scores.detector.label_sets import LabelSets, Method, calibrate_sets, nonconformity
from ood_scores.errors import BadInput, BadLabels, EmptyInput, NotFinite, ShapeMismatch, UnknownName

METHODS: tuple[Method, ...] = ("lac", "aps", "raps", "saps")
P = np.array([[0.1, 0.5, 0.15, 0.25]])


def simulated(rng: np.random.Generator, rows: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits of an overconfident classifier, rounded so that many are equal, and labels."""
    logits = rng.normal(0, 1.5, (rows, classes)).round(1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((rows, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return 3 * logits, labels


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lac", [0.9, 0.5, 0.85, 0.75]),
        ("aps", [1.0, 0.5, 0.9, 0.75]),
        ("raps", [1.0, 0.5, 0.9, 0.75]),
        ("saps", [1.1, 0.5, 0.9, 0.7]),
    ],
)
def test_nonconformity_by_hand(method: Method, expected: list[float]) -> None:
    assert nonconformity(np.log(P), method)[0] == pytest.approx(expected)
    assert nonconformity(torch.from_numpy(np.log(P)) + 7, method)[0] == pytest.approx(expected)


def test_raps_adds_a_penalty_from_the_sixth_label_on() -> None:
    logits = np.arange(8.0)[None, ::-1]
    added = nonconformity(logits, "raps") - nonconformity(logits, "aps")
    assert added[0] == pytest.approx([0, 0, 0, 0, 0, 0.01, 0.02, 0.03])


def test_the_limit_is_the_quantile_of_split_conformal_prediction() -> None:
    logits, labels = simulated(np.random.default_rng(0), 37)
    of_label = np.sort(nonconformity(logits, "aps")[np.arange(37), labels])
    rule = calibrate_sets(logits, labels, "aps", alpha=0.1)
    assert rule.limits == pytest.approx(of_label[34])  # ceil(38 * 0.9) = 35
    assert rule(logits).tolist() == (nonconformity(logits, "aps") <= of_label[34]).tolist()
    assert rule.guarantee == (
        "the set contains the label of at least 90.00% of rows on average over calibration sets of 37 rows"
    )


def test_by_class_each_label_has_the_limit_of_its_rows() -> None:
    logits, labels = simulated(np.random.default_rng(1), 200)
    rule = calibrate_sets(logits, labels, "lac", alpha=0.2, among="class")
    for label in range(4):
        rows = labels == label
        assert rule.limits[label] == calibrate_sets(logits[rows], labels[rows], "lac", alpha=0.2).limits[0]


def covered(rule: LabelSets, rng: np.random.Generator, rows: int = 30) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = simulated(rng, rows, len(rule.limits))
    return rule(logits)[np.arange(rows), labels], labels


@pytest.mark.parametrize(("method", "n"), [*((method, 20) for method in METHODS), ("lac", 100), ("aps", 1000)])
def test_sets_cover_the_label_as_promised(method: Method, n: int) -> None:
    """Mean coverage over 1,000 calibrations: at least 1 - alpha, and at most 1 / (n + 1) more but for ties."""
    rng = np.random.default_rng(n)
    found = [covered(calibrate_sets(*simulated(rng, n), method), rng)[0].mean() for _ in range(1000)]
    error = np.std(found) / 1000**0.5
    assert np.mean(found) > 0.9 - 3 * error
    assert np.mean(found) < 0.9 + 1 / (n + 1) + 3 * error + 0.02


def test_sets_by_cluster_cover_each_cluster_over_1000_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard and easy classes; the guarantee holds for any clusters, so that one start of k-means is enough."""
    monkeypatch.setattr("sklearn.cluster.KMeans", lambda number, **given: KMeans(number, **given | {"n_init": 1}))
    rng, hardness = np.random.default_rng(5), np.where(np.arange(8) < 4, 0, 1.5)

    def drawn(rows: int) -> tuple[np.ndarray, np.ndarray]:
        logits, labels = simulated(rng, rows, classes=8)
        return logits + hardness * rng.normal(size=logits.shape).round(1), labels

    coverage, clusters = np.empty((1000, 2)), np.empty(1000)
    for run in range(1000):
        rule = calibrate_sets(*drawn(400), "lac", alpha=0.2, among="cluster")
        logits, labels = drawn(150)
        inside = rule(logits)[np.arange(150), labels]
        coverage[run] = [inside[rule.limits[labels] == rule.limits[label]].mean() for label in (0, 7)]
        clusters[run] = len(np.unique(rule.limits))
    assert clusters.mean() > 1.5
    error = coverage.std(axis=0) / 1000**0.5
    assert (coverage.mean(axis=0) > 0.8 - 3 * error).all()
    assert (coverage.mean(axis=0) < 0.8 + 0.02).all()


@pytest.mark.parametrize("n", [60, 300])
def test_sets_by_class_cover_each_class_over_1000_calibrations(n: int) -> None:
    rng = np.random.default_rng(n)
    hits, rows = np.zeros((1000, 4)), np.zeros((1000, 4))
    for run in range(1000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes with fewer than 9 rows, which are in every set
            rule = calibrate_sets(*simulated(rng, n), "lac", among="class")
        inside, labels = covered(rule, rng, 100)
        hits[run], rows[run] = np.bincount(labels[inside], minlength=4), np.bincount(labels, minlength=4)
    for label in range(4):
        shares = hits[:, label] / rows[:, label]
        assert shares.mean() > 0.9 - 3 * shares.std() / 1000**0.5
        assert shares.mean() < 0.9 + 4 / n + 0.05


def test_kept_and_in_the_set_holds_jointly() -> None:
    """With a threshold that keeps 95% and sets at alpha = 0.1, at least 85% of ID rows are kept with their label."""
    rng, found = np.random.default_rng(9), []
    for _ in range(1000):
        logits, labels = simulated(rng, 60)
        limit = threshold(logits.max(axis=1), keep=0.95).value
        new, of_new = simulated(rng, 30)
        inside = calibrate_sets(logits, labels, "lac")(new)[np.arange(30), of_new]
        found.append((inside & (new.max(axis=1) >= limit)).mean())
    assert np.mean(found) > 0.85 - 3 * np.std(found) / 1000**0.5


def test_classes_that_behave_alike_share_a_cluster() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 20, 1200)
    logits = np.zeros((1200, 20))
    logits[np.arange(1200), labels] = rng.normal(np.where(labels < 10, 1.0, 5.0), 0.3)
    rule = calibrate_sets(logits, labels, "lac", among="cluster")
    hard, easy = np.unique(rule.limits[:10]), np.unique(rule.limits[10:])
    assert hard.min() > easy.max()
    assert len(hard) + len(easy) < 20


def test_too_few_rows_put_every_label_into_the_set() -> None:
    logits, labels = simulated(np.random.default_rng(2), 8)
    with pytest.warns(UserWarning, match="4 of 4 labels are in every set.*at least 9 are needed"):
        rule = calibrate_sets(logits, labels)
    assert rule(logits).all()
    with pytest.warns(UserWarning, match="1 of 2 labels.*at least 9 are needed for each class"):
        calibrate_sets(np.zeros((12, 2)), [0] * 11 + [1], among="class")


def test_input_that_cannot_be_right_is_refused() -> None:
    logits, labels = simulated(np.random.default_rng(4), 30)
    rule = calibrate_sets(logits, labels)
    with pytest.raises(BadInput, match=r"alpha must be in \(0, 1\), got 1"):
        calibrate_sets(logits, labels, alpha=1)
    with pytest.raises(BadLabels, match="labels must be class indices in 0"):
        calibrate_sets(logits, labels + 1)
    with pytest.raises(ShapeMismatch, match="pass one each"):
        calibrate_sets(logits, labels[1:])
    with pytest.raises(ShapeMismatch, match=r"pass \[rows, 4\]"):
        rule(logits[:, :3])
    with pytest.raises(NotFinite, match="a logit is NaN"):
        rule(np.full((1, 4), np.nan))
    with pytest.raises(EmptyInput, match="there are no logits"):
        rule(np.empty((0, 4)))
    with pytest.raises(UnknownName, match="there is no kind of label sets 'asp'"):
        nonconformity(logits, "asp")  # type: ignore[arg-type]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()


def labeled_inputs(model: nn.Module, rows: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(rows, 4, generator=generator)
    with torch.no_grad():
        labels = torch.multinomial(model(inputs).softmax(dim=1), 1, generator=generator)[:, 0]
    return list(zip(inputs.split(50), labels.split(50), strict=True))


def test_a_detector_predicts_sets_and_keeps_them_on_disk(tmp_path: Path) -> None:
    model = small_model()
    batches = labeled_inputs(model, 300, seed=1)
    logits = torch.cat([model(inputs) for inputs, _ in batches]).detach()
    detector = ood_scores.calibrate("energy", model, id=batches, sets="aps", alpha=0.2, classes=["a", "b", "c"])
    rule = calibrate_sets(logits, torch.cat([labels for _, labels in batches]), "aps", alpha=0.2)
    found = detector.predict(batches[0][0])
    assert found.label_set is not None
    inside = rule(logits[:50])
    for row, labels in enumerate(found.label_set):
        assert set(labels) == {"abc"[label] for label in np.flatnonzero(inside[row])}
        if labels:
            assert labels[0] == found.class_name[row]  # type: ignore[index]
    detector.save(tmp_path / "detector")
    again = Detector.load(tmp_path / "detector", model)
    assert again.predict(batches[0][0]).label_set.tolist() == found.label_set.tolist()  # type: ignore[union-attr]
    assert again.label_sets is not None
    assert again.label_sets.guarantee.startswith("the set contains the label of at least 80.00% of rows")
    assert Detector.load(tmp_path / "detector", model).predict(batches[0][0]).to_pandas()["label_set"][0]


def test_a_detector_without_sets_has_none() -> None:
    model = small_model()
    batches = labeled_inputs(model, 100, seed=2)
    assert ood_scores.calibrate("energy", model, id=batches).predict(batches[0][0]).label_set is None
    with pytest.raises(UnknownName, match="there is no group of rows 'classes'"):
        ood_scores.calibrate("energy", model, id=batches, sets="aps", sets_among="classes")  # type: ignore[arg-type]
    with pytest.raises(BadLabels):
        ood_scores.calibrate("energy", model, id=[inputs for inputs, _ in batches], sets="aps")
