"""Every scorer with a graph: onnxruntime and a traced graph have its scores and, on real images, its decisions."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import FeatureSet, Scorer, create_scorer
from ood_scores.data.kinds.digits import digits_split
from ood_scores.detector.export import export_onnx, export_program, run_onnx
from ood_scores.detector.graph import DetectorGraph, exportable
from ood_scores.features import Block
from ood_scores.scorers.numerics.cholesky import all_solved_squares, block_rows, inverted_diagonal, solved_squares
from ood_scores.scorers.registry import scorer_class
from ood_scores.scorers.shapers.pruning import largest

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="pip install 'ood_scores[export]'")

DATA = os.environ.get("OOD_SCORES_DATA")

VARIANTS = [
    create_scorer("msp", temperature=2.0, double=True),
    create_scorer("gradnorm", p=3.0, target="predicted", bias=True),
    create_scorer("feature_norm", p=float("inf")),
    create_scorer("gmm", space="logits", output="entropy", prior="empirical"),
    create_scorer("knn", k=1, normalize=False),
    create_scorer("ash_s", percentile=0.99, base="gradnorm"),
    create_scorer("react", base=create_scorer("knn", k=3)),
    create_scorer("dice", base=create_scorer("ash_p", base="gen")),
]

ISSUE = {
    *("msp", "max_logit", "energy", "entropy", "kl_uniform", "gen", "scaled_msp", "prior_msp", "prior_energy"),
    *("gradnorm", "feature_norm", "logit_norm", "activation_ratio", "mahalanobis", "mahalanobis_pp"),
    *("relative_mahalanobis", "gmm", "vim", "react", "ash_p", "ash_b", "ash_s", "scale", "dice", "knn"),
}
"""Scorers that are documented to have a graph."""


@dataclass
class Together(Scorer):
    """The scores of several scorers, ``[B, S]``, so that one graph is created for all."""

    scorers: list[Scorer]
    needs = ("features", "logits", "head")

    def score_block(self, block):
        return torch.stack([scorer.score_block(block).double() for scorer in self.scorers], dim=1)


@cache
def problem():
    """A network trained on some digits, their feature set, and images of other digits."""
    torch.manual_seed(0)
    split, model = digits_split(), tiny.tiny_net()
    train, test = (
        torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) / 255
        for images in (split.train_images, split.test_images)
    )
    labels = torch.from_numpy(split.train_labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[rows]), labels[rows]).backward()
            optimizer.step()
    loader = DataLoader(TensorDataset(train, labels), 128)
    return model.eval(), ood_scores.extract(model, loader, device="cpu", progress=False), test[:200]


def with_small_extras(fit, scorer):
    extras = {name: make(fit.features, fit.logits) for name, make in scorer.tags.small_extras.items()}
    return FeatureSet(fit.features, fit.logits, fit.labels, fit.head, extras) if extras else fit


@pytest.fixture
def one_thread():
    """Convolutions that round alike: on some processors, two threads divide those of a traced network otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_every_scorer_in_onnxruntime_and_traced(tmp_path):
    model, fit, batch = problem()
    scorers = [create_scorer(name, **scorer_class(name).tags.small_parameters) for name in exportable()] + VARIANTS
    for scorer in scorers:
        assert scorer.why_no_graph() is None
        scorer.fit(with_small_extras(fit, scorer))
    graph = DetectorGraph(model, Together(scorers), 0.0, batch)
    with torch.no_grad():
        expected = graph(batch)[1]
        traced = export_program(graph, batch).module()(batch)[1]
    export_onnx(graph, batch, tmp_path / "all.onnx")
    found = torch.from_numpy(run_onnx(tmp_path / "all.onnx", batch)["score"])
    for number, scorer in enumerate(scorers):
        column = expected[:, number]
        assert column.isfinite().all()
        close = {"rtol": 0, "msg": lambda text, scorer=scorer: f"{scorer}: {text}"}
        size = float(column.abs().max())
        torch.testing.assert_close(traced[:, number], column, atol=1e-6 * size, **close)
        torch.testing.assert_close(found[:, number], column, atol=1e-5 * size, **close)


def test_documented_scorers_have_a_graph():
    assert set(exportable()) >= ISSUE
    assert not [name for name in exportable() if scorer_class(name).tags.no_graph]


def test_the_docs_name_exactly_the_scorers_with_a_graph():
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    _, _, rest = page.partition("<!-- exportable -->")
    named, _, _ = rest.partition("<!-- /exportable -->")
    assert [name.strip("` \n") for name in named.replace(".", "").split(",")] == exportable()
    for name, tags in ((name, scorer_class(name).tags) for name in ood_scores.list_scorers()):
        assert not tags.no_graph or f"| `{name}` | {tags.no_graph} |" in page


class Largest(nn.Module):
    def forward(self, values):
        return largest(values, 0.3)


def test_a_traced_graph_keeps_the_first_of_equal_activations():
    values = torch.randint(0, 4, (50, 20), generator=torch.Generator().manual_seed(0)).float()
    program = torch.export.export(Largest(), (values,))
    expected = largest(values, 0.3)
    assert (expected.sum(dim=1) == 6).all()
    assert torch.equal(program.module()(values), expected)


def test_a_mixture_of_wide_features_is_solved_for_block_by_block():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(3, 300, 300, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(square @ square.mT / 300 + 0.01 * torch.eye(300, dtype=torch.float64))
    columns = torch.randn(3, 300, 7, generator=generator, dtype=torch.float64)
    inverses = inverted_diagonal(factors)
    assert inverses.shape[1] == 3
    found = all_solved_squares(factors, inverses, columns)
    exact = torch.linalg.solve_triangular(factors, columns, upper=False).square().sum(dim=1)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)
    parts = zip(map(block_rows, factors, inverses), columns.clone(), strict=True)
    each = [solved_squares(rows, column) for rows, column in parts]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-12, atol=0)


def test_tracing_a_mixture_that_never_scored_caches_numbers():
    model, fit, batch = problem()
    scorer = create_scorer("gmm").fit(fit)
    expected = create_scorer("gmm").fit(fit).score_block(Block(fit.features[:5]))
    export_program(DetectorGraph(model, scorer, 0.0, batch), batch)
    assert torch.equal(scorer.score_block(Block(fit.features[:5])), expected)


@pytest.mark.skipif(DATA is None, reason="OOD_SCORES_DATA does not name a folder of real images")
def test_the_same_decisions_on_2000_real_images(tmp_path):
    from test_real_data import load_images, real_model

    model = real_model("cifar_resnet20", "cifar10_resnet20", 10).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def tensors(name, rows):
        images, labels = load_images(name)
        pixels = torch.from_numpy(images[:rows]).permute(0, 3, 1, 2).float() / 255
        return (pixels - mean) / std, torch.from_numpy(labels[:rows]).long()

    def extract(images, labels):
        return ood_scores.extract(model, DataLoader(TensorDataset(images, labels), 100), device="cpu", progress=False)

    fit = extract(*tensors("cifar10_train", 1000))
    calibration = tensors("cifar10_test", 1000)
    held_out = extract(*calibration)
    images = torch.cat([calibration[0], tensors("cifar100_test", 1000)[0]])  # the calibration rows are the hard ones
    feats = extract(images, torch.zeros(2000).long())
    for name in ("energy", "mahalanobis", "ash_s", "knn"):
        detector = ood_scores.calibrate(name, model, fit=fit, id=held_out, device="cpu")
        expected = detector.decide(feats)
        detector.export_onnx(tmp_path / "det.onnx", images[:16])
        found = run_onnx(tmp_path / "det.onnx", images)
        np.testing.assert_array_equal(found["is_ood"], expected.is_ood, err_msg=name)
        largest_score = np.abs(expected.score).max()
        np.testing.assert_allclose(found["score"], expected.score, rtol=1e-4, atol=1e-5 * largest_score, err_msg=name)
        assert 50 <= expected.is_ood.sum() < 1000
