"""Exported detectors: onnxruntime and torch.export have the outputs of the Python detector."""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import tiny
import torch
from timm.models.resnetv2 import ResNetV2
from torch import nn

import ood_scores
from ood_scores import Scorer, create_scorer, list_scorers
from ood_scores.detector import Fusion
from ood_scores.detector.export import export_onnx, export_program, noise, run_onnx
from ood_scores.detector.graph import DetectorGraph, exportable
from ood_scores.errors import BadInput, CacheWriteFailed, MissingInput, NotFitted
from ood_scores.scorers.neighbors import GRAPH_ROWS

onnx = pytest.importorskip("onnx", reason="pip install 'ood_scores[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'ood_scores[export]'")
pytest.importorskip("onnxscript", reason="pip install 'ood_scores[export]'")


def images(count: int = 12, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return tiny.tiny_net().eval()


def here(graph: DetectorGraph, batch: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return dict(zip(("logits", "score", "is_ood"), (part.numpy() for part in graph(batch)), strict=True))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ("logits", "score"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["is_ood"], expected["is_ood"])


@pytest.fixture(scope="module")
def energy_file(tmp_path_factory):
    """A graph whose threshold is the score of one of the images, and its ONNX file."""
    model = tiny_model()
    scores = here(DetectorGraph(model, create_scorer("energy"), 0.0, images()), images())["score"]
    graph = DetectorGraph(model, create_scorer("energy"), float(np.sort(scores)[4]), images())
    path = tmp_path_factory.mktemp("onnx") / "energy.onnx"
    export_onnx(graph, images(), path, {"weights_sha256": "abc"})
    return graph, path


def test_the_file_has_the_decisions_of_the_detector_for_any_batch_size_and_at_the_threshold(energy_file):
    graph, path = energy_file
    expected = here(graph, images())
    assert expected["is_ood"].sum() == 4
    assert (expected["score"] == graph.threshold.item()).sum() == 1
    for count in (1, 2, 12):
        found = run_onnx(path, images()[:count])
        assert_same(found, {name: values[:count] for name, values in expected.items()})
    assert found["score"].dtype == np.float64
    assert found["logits"].dtype == np.float32
    assert found["is_ood"].dtype == bool


def test_metadata_of_the_file(energy_file):
    graph, path = energy_file
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits", "score", "is_ood"]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["ood_scores_format"] == "1"
    assert about["scorer"] == "Energy(temperature=1.0)"
    assert about["weights_sha256"] == "abc"
    assert json.loads(about["threshold"]) == graph.threshold.item()
    assert 0 <= float(about["margin"]) < 1e-5
    assert [file.name for file in path.parent.iterdir()] == ["energy.onnx"]  # no separate weights, no temporary file


def test_the_margin_is_not_merged_with_another_constant(tmp_path):
    graph = DetectorGraph(tiny_model(), create_scorer("doctor"), -0.5, images())  # has constants 0 and 1
    export_onnx(graph, images(), tmp_path / "det.onnx")
    assert_same(run_onnx(tmp_path / "det.onnx", images()), here(graph, images()))


def test_a_row_whose_score_is_nan_is_ood(energy_file):
    graph, path = energy_file
    batch = images(3)
    batch[1] = float("nan")
    assert run_onnx(path, batch)["is_ood"][1]
    assert here(graph, batch)["is_ood"][1]


def test_a_threshold_for_each_predicted_class(tmp_path):
    model = tiny_model()
    free = here(DetectorGraph(model, create_scorer("max_logit"), 0.0, images()), images())
    predicted = free["logits"].argmax(axis=1)
    limits = torch.full((10,), float("inf"))
    limits[predicted[0]] = float("-inf")
    graph = DetectorGraph(model, create_scorer("max_logit"), limits, images())
    export_onnx(graph, images(), tmp_path / "det.onnx")
    expected = predicted != predicted[0]
    np.testing.assert_array_equal(run_onnx(tmp_path / "det.onnx", images())["is_ood"], expected)
    np.testing.assert_array_equal(here(graph, images())["is_ood"], expected)


def test_torch_export_survives_saving_and_loading(tmp_path):
    scorer = create_scorer("react", q=0.5)
    model = tiny_model()
    scorer.fit(ood_scores.extract(model, [(images(64), torch.zeros(64).long())], device="cpu", progress=False))
    graph = DetectorGraph(model, scorer, 1.2, images())
    torch.export.save(export_program(graph, images()), tmp_path / "det.pt2")
    run = torch.export.load(tmp_path / "det.pt2").module()
    for count in (1, 5):
        found = dict(zip(("logits", "score", "is_ood"), (part.numpy() for part in run(images(count))), strict=True))
        assert_same(found, here(graph, images(count)))


@pytest.mark.parametrize(
    ("model", "size", "heads"),
    [
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=32, depth=1),
            32,
            ["head", "head_dist"],
        ),
        (
            lambda: ResNetV2(layers=[1, 1], channels=(8, 16), stem_chs=8, num_classes=7, norm_layer=nn.BatchNorm2d),
            32,
            ["head.fc"],
        ),
    ],
    ids=["two heads averaged", "1x1 convolution"],
)
def test_other_kinds_of_heads(tmp_path, model, size, heads):
    torch.manual_seed(0)
    model, batch = model().eval(), images(4, size)
    feats = ood_scores.extract(model, [batch], device="cpu", progress=False)
    for module in model.modules():
        assert not module._forward_pre_hooks
    scorer = create_scorer("knn", k=2).fit(feats)
    scores = scorer.score(feats).numpy()
    graph = DetectorGraph(model, scorer, float(np.sort(scores)[2]), batch)
    assert graph.found.names == heads
    export_onnx(graph, batch, tmp_path / "det.onnx")
    found = run_onnx(tmp_path / "det.onnx", batch)
    np.testing.assert_allclose(found["score"], scores, rtol=1e-4)
    assert found["is_ood"].sum() == 2
    np.testing.assert_allclose(found["logits"], feats.logits.numpy(), rtol=1e-4, atol=1e-6)


def test_the_model_is_not_changed_by_export(tmp_path):
    model = tiny_model().train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    graph = DetectorGraph(model, create_scorer("energy"), 0.0, images())
    export_program(graph, images())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


@pytest.mark.parametrize("name", [name for name in list_scorers() if create_scorer(name).why_no_graph()])
def test_scorers_without_a_graph_are_refused_by_name_and_reason(name):
    assert name not in exportable()
    scorer = create_scorer(name)
    scorer.fitted_widths = {}
    with pytest.raises(BadInput, match=rf"^cannot export '{name}', because its? .*: choose one of activation_ratio, "):
        DetectorGraph(tiny_model(), scorer, 0.0, images())


def test_whether_there_is_a_graph_may_depend_on_parameters_and_fit():
    assert create_scorer("knn").why_no_graph() is None
    assert "HNSW32" in create_scorer("knn", index="HNSW32").why_no_graph()
    assert create_scorer("feature_norm").why_no_graph() is None
    assert "layers.a" in create_scorer("feature_norm", space="layers.a").why_no_graph()
    assert create_scorer("react", base="gmm").why_no_graph() is None
    assert "sorted lists" in create_scorer("react", base="cf_ood").why_no_graph()
    assert "edges of bins" in create_scorer("optfs", base="msp").why_no_graph()
    assert "sorted lists" in Fusion(["energy", "msp"]).why_no_graph()
    packed = create_scorer("gmm")
    packed.packed_ = torch.zeros(1)
    assert "too large" in packed.why_no_graph()
    for rows, refused in ((GRAPH_ROWS, False), (GRAPH_ROWS + 1, True)):
        scorer = create_scorer("nnguide")
        scorer.bank_ = torch.zeros(rows, 1)
        assert ("50,001 rows" in (scorer.why_no_graph() or "")) == refused


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(NotFitted, match="'knn' is not fitted"):
        DetectorGraph(tiny_model(), create_scorer("knn"), 0.0, images())
    with pytest.raises(MissingInput, match="'scaled_msp' needs the head's weights"):
        DetectorGraph(tiny_model(), create_scorer("scaled_msp"), 0.0, images(), head=False)
    with pytest.raises(BadInput, match="pass some as images="):
        noise(None)
    assert noise(lambda image: torch.zeros(3, 5, 4)).shape[1:] == (3, 5, 4)


@dataclass
class Branching(Scorer):
    """A custom scorer that branches on values."""

    needs = ("logits",)

    def score_block(self, block):
        return block.logits64().amax(dim=1) if block.logits.sum() > 0 else block.logits64().amin(dim=1)


@dataclass
class SortsStably(Scorer):
    """A custom scorer for which ONNX has no operation."""

    needs = ("logits",)

    def score_block(self, block):
        return block.logits64().sort(dim=1, stable=True).values[:, 0]


@dataclass
class Unlike(Scorer):
    """A custom scorer with different results when traced."""

    needs = ("logits",)

    def score_block(self, block):
        return block.logits64().amax(dim=1) * (1.001 if torch.compiler.is_compiling() else 1)


def test_custom_scorers_are_exported_or_refused_by_name(tmp_path):
    path = tmp_path / "det.onnx"
    path.write_bytes(b"before")
    for scorer, message in (
        (Branching(), "torch.export cannot trace TinyNet with 'Branching'"),
        (SortsStably(), "cannot convert TinyNet with 'SortsStably' to ONNX: .*aten.sort"),
        (Unlike(), "TinyNet with 'Unlike' was not exported: its values of score in onnxruntime differ by"),
    ):
        graph = DetectorGraph(tiny_model(), scorer, 0.0, images())
        with pytest.raises(BadInput, match=message):
            export_onnx(graph, images(), path)
    assert path.read_bytes() == b"before"
    with pytest.raises(BadInput, match=r"its values of score in torch\.export differ by"):
        export_program(DetectorGraph(tiny_model(), Unlike(), 0.0, images()), images())


def test_a_model_that_mixes_its_batch_is_refused(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, batch):
            return self.fc(batch.reshape(len(batch), -1))

    graph = DetectorGraph(Fixed(), create_scorer("energy"), 0.0, images())
    with pytest.raises(BadInput, match=r"cannot trace Fixed with 'energy': .*batch"):
        export_program(graph, images())


def test_without_onnxruntime_the_message_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graph = DetectorGraph(tiny_model(), create_scorer("energy"), 0.0, images())
    with pytest.raises(
        MissingInput, match=r'needs onnxruntime, which is not installed: pip install "ood_scores\[export\]"'
    ):
        export_onnx(graph, images(), tmp_path / "det.onnx")


def test_a_full_disk_leaves_the_old_file(tmp_path, energy_file, monkeypatch):
    graph, _ = energy_file
    path = tmp_path / "det.onnx"
    path.write_bytes(b"before")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CacheWriteFailed, match="No space left"):
        export_onnx(graph, images(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("det.onnx", b"before")]


@pytest.mark.parametrize("given", [(), (16,)])
def test_a_whole_detector(tmp_path, given):
    model = tiny_model()
    feats = ood_scores.extract(model, [(-images(64), torch.arange(64) % 10)], device="cpu", progress=False)
    held_out = ood_scores.extract(model, [images(64)], device="cpu", progress=False)
    detector = ood_scores.calibrate("mahalanobis", model, fit=feats, id=held_out, keep=0.8, device="cpu")
    some = [images(rows) for rows in given]
    detector.export_onnx(tmp_path / "det.onnx", *some)
    expected, found = detector.predict(images(64)), run_onnx(tmp_path / "det.onnx", images(64))
    np.testing.assert_array_equal(found["is_ood"], expected.is_ood)
    np.testing.assert_allclose(found["score"], expected.score, rtol=1e-4)
    assert 0 < expected.is_ood.sum() < 64
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "det.onnx").metadata_props}
    assert (about["architecture"], about["weights_sha256"]) == (detector.data.architecture, detector.weights)
    assert json.loads(about["preprocessing"])["input_size"] == [3, 8, 8]
    _, score, is_ood = detector.export(*some).module()(images(64))
    np.testing.assert_array_equal(is_ood.numpy(), expected.is_ood)
    np.testing.assert_allclose(score.numpy(), expected.score, rtol=1e-4)
