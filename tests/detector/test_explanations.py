"""Explanations of rejected images: maps against closed forms, neighbors and p-values by hand, and the page."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detecting import PIXELS, Plain, Rows, extracted, network
from networks import settle
from PIL import Image
from torch import Tensor, nn

from ood_scores import calibrate
from ood_scores.data.images import ImageArrays
from ood_scores.detector import Fusion
from ood_scores.detector.explanation_page import LOWERING, RAISING, picture_of, with_map
from ood_scores.detector.score_map import score_map, why_no_map
from ood_scores.errors import BadInput, OtherModel
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.positions import Positions, recording_maps
from ood_scores.features import FeatureSet
from ood_scores.scorers import create_scorer

CALIBRATED: dict[str, dict[str, Any]] = {"mahalanobis": {}, "knn": {"k": 3}, "energy": {}}


class Functional(nn.Module):
    """A network whose last activation and pooling are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name in ("functional", "plain"):
        return (Functional() if name == "functional" else Plain()).eval()
    if name == "tiny_net":
        return network()
    kind, *options = name.split()
    chosen: dict[str, Any] = {"global_pool": options[0]} if options else {}
    model: Any = timm.create_model(kind, num_classes=4, **chosen).eval()
    settle(model, 160)
    return model


def seen(model: nn.Module, size: int) -> tuple[Any, Positions | None]:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))
    forward = Forward(model)
    forward.feature_set(images)
    with recording_maps(model) as maps:
        feats = forward.feature_set(images)
    return feats, maps.find(feats.features)


def of_row(positions: Positions, row: int) -> Positions:
    return Positions(
        positions.vectors[row : row + 1], positions.grid, positions.pooled, positions.layers, positions.shape
    )


@pytest.mark.parametrize(
    ("name", "size", "grid", "layers"),
    [
        ("tiny_net", 8, (4, 4), False),
        ("plain", 8, (6, 6), False),
        ("functional", 16, (7, 7), False),
        ("test_resnet", 160, (5, 5), False),
        ("test_efficientnet", 160, (5, 5), False),
        ("test_convnext", 160, (5, 5), True),
        ("test_vit avg", 160, (10, 10), True),
    ],
)
def test_the_mean_of_a_map_is_the_score(name: str, size: int, grid: tuple[int, int], layers: bool) -> None:
    feats, positions = seen(made(name), size)
    assert positions is not None
    assert positions.grid == grid
    assert positions.pooled
    assert bool(positions.layers) == layers
    torch.testing.assert_close(positions.features(positions.vectors.mean(dim=1)), feats.features, rtol=1e-4, atol=1e-5)
    fit = FeatureSet(
        feats.features.repeat(20, 1) + 0.3 * torch.randn(60, feats.num_features), labels=torch.arange(60) % 4
    )
    fit = FeatureSet(fit.features, feats.head(fit.features), fit.labels, feats.head)
    for scorer in (create_scorer("energy"), create_scorer("gradnorm"), create_scorer("mahalanobis").fit(fit)):
        expected = scorer.score(FeatureSet(feats.features.double(), feats.logits, head=feats.head)).numpy()
        maps = [score_map(scorer, of_row(positions, row), feats.head) for row in range(3)]
        assert [found.mean() for found in maps] == pytest.approx(expected, rel=2e-4), scorer
        assert all(found.shape == grid and found.std() > 0 for found in maps)


def test_maps_equal_their_closed_forms() -> None:
    feats, positions = seen(network(), 8)
    assert positions is not None
    vectors, mean = positions.vectors[0].double(), positions.vectors[0].double().mean(dim=0)
    weight, bias = feats.head.weight.double(), feats.head.bias.double()
    at_positions, logits = vectors @ weight.T + bias, mean @ weight.T + bias
    torch.testing.assert_close(at_positions.mean(dim=0), logits, rtol=1e-12, atol=0)
    softmax = logits.softmax(dim=0)
    of_energy = at_positions @ softmax - (softmax * softmax.log()).sum()
    found = score_map(create_scorer("energy"), of_row(positions, 0), feats.head)
    assert found.ravel() == pytest.approx(of_energy.numpy(), rel=1e-5)
    assert found.mean() == pytest.approx(float(logits.logsumexp(dim=0)), rel=1e-6)
    of_norm = (vectors * mean.sign()).sum(dim=1)
    found = score_map(create_scorer("gradnorm", part="U"), of_row(positions, 0), None)
    assert found.ravel() == pytest.approx(of_norm.numpy(), rel=1e-6)
    fit = extracted(network(), 100, 1)
    scorer: Any = create_scorer("mahalanobis").fit(fit)
    whitened = (vectors - scorer.centre_) @ scorer.whitening_
    center = whitened.mean(dim=0)
    nearest = scorer.means_[(scorer.means_ - center).square().sum(dim=1).argmin()]
    of_distance = -((center - nearest) * (2 * whitened - center - nearest)).sum(dim=1)
    found = score_map(scorer, of_row(positions, 0), None)
    assert found.ravel() == pytest.approx(of_distance.numpy(), rel=1e-4)


def test_tokens_beside_a_class_token_have_the_scores_that_they_would_have_in_its_place() -> None:
    feats, positions = seen(made("test_vit"), 160)
    assert positions is not None
    assert not positions.pooled
    assert positions.grid == (10, 10)
    expected = (positions.vectors[1].double() @ feats.head.weight.double().T + feats.head.bias).logsumexp(dim=1)
    found = score_map(create_scorer("energy"), of_row(positions, 1), feats.head)
    assert found.ravel() == pytest.approx(expected.numpy(), rel=1e-6)
    assert not np.allclose(found.ravel(), found.mean())


def test_a_model_or_a_scorer_without_maps_is_told() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    assert seen(model, 8)[1] is None
    detector = calibrate("energy", model, id=[torch.randn(50, 3, 8, 8)], keep=0.5)
    found = detector.explain(torch.randn(10, 3, 8, 8))
    assert found.no_map == "the features of the model are not pooled from a map"
    assert all(each.score_map is None for each in found)
    assert why_no_map(create_scorer("odin"), None) == "'odin' reads odin, which have no positions"
    assert why_no_map(create_scorer("energy"), None) == "the model has no affine head, so that positions have no logits"


def detector_of(name: str, fit: FeatureSet, keep: float = 0.3) -> tuple[Any, FeatureSet]:
    model = network()
    id = extracted(model, 100, 2)
    return calibrate(create_scorer(name, **CALIBRATED[name]), model, fit=fit, id=id, keep=keep), id


@pytest.mark.parametrize("name", CALIBRATED)
def test_neighbors_are_those_by_the_vectors_of_the_scorer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_scores.features.block_size.BLOCK_ROWS", 7)
    fit: Any = extracted(network(), 60, 1)
    detector, _ = detector_of(name, fit)
    images = Rows(20, 9).inputs
    found = detector.explain(images, fit=fit, neighbors=4)
    expected = detector.predict(images)
    assert found.images == 20
    assert found.rejected == len(found) == expected.is_ood.sum() > 2
    assert [each.image for each in found] == np.flatnonzero(expected.is_ood)[
        np.argsort(expected.score[expected.is_ood])
    ].tolist()
    feats: Any = Forward(detector.model).feature_set(images)

    def vectors(of: Any) -> np.ndarray:
        values = of.features.double().cpu().numpy()
        if name == "energy":
            return of.logits.double().cpu().numpy()
        if name == "knn":
            return values / np.linalg.norm(values, axis=1, keepdims=True)
        return (values - detector.scorer.centre_.numpy()) @ detector.scorer.whitening_.numpy()

    for each in found:
        distances = np.linalg.norm(vectors(fit) - vectors(feats)[each.image], axis=1)
        assert [near.row for near in each.neighbors] == np.argsort(distances)[:4].tolist()
        assert [near.distance for near in each.neighbors] == pytest.approx(np.sort(distances)[:4], rel=1e-4)
        assert [near.label for near in each.neighbors] == [str(int(fit.labels[near.row])) for near in each.neighbors]
        assert each.score == expected.score[each.image]
        assert list(each.p_values.items()) == [(name, expected.p_value[each.image])]
        probabilities = feats.logits[each.image].double().softmax(dim=0).sort(descending=True)
        assert [name for name, _ in each.classes] == [str(int(label)) for label in probabilities.indices[:3]]
        assert [share for _, share in each.classes] == pytest.approx(probabilities.values[:3].tolist())
        assert each.score_map.shape == (4, 4)
    few = detector.explain(images, most=2)
    assert [each.image for each in few] == [each.image for each in found][:2]
    assert few.rejected == found.rejected


def test_p_values_of_other_scorers_and_of_members() -> None:
    model, fit = network(), extracted(network(), 60, 1)
    id = extracted(model, 100, 2)
    fusion = Fusion(["energy", create_scorer("knn", k=3).fit(fit)]).fit(id[:50])
    detector = calibrate(fusion, model, id=id[50:], keep=0.3)
    images = Rows(20, 9).inputs
    found = detector.explain(images, fit=fit, id=id, scorers=["msp", "mahalanobis"])
    assert len(found)
    feats = Forward(model).feature_set(images)
    for each in found:
        assert list(each.p_values) == ["fusion", "energy", "knn", "msp", "mahalanobis"]
        for name, scorer in (("msp", create_scorer("msp")), ("mahalanobis", create_scorer("mahalanobis").fit(fit))):
            score = float(scorer.score(feats)[each.image])
            assert each.p_values[name] == pytest.approx((1 + (scorer.score(id).numpy() <= score).sum()) / 101)
        energy = create_scorer("energy")
        below = (energy.score(id[:50]) <= energy.score(feats)[each.image]).sum()
        assert each.p_values["energy"] == pytest.approx((1 + int(below)) / 52)


def test_requests_that_cannot_be_met_are_refused() -> None:
    fit = extracted(network(), 60, 1)
    detector, id = detector_of("energy", fit)
    images = torch.randn(5, 3, 8, 8)
    with pytest.raises(BadInput, match="p-values of other scorers need calibration rows: pass id="):
        detector.explain(images, scorers=["msp"])
    with pytest.raises(BadInput, match="'knn' needs to be fitted on ID data: pass fit="):
        detector.explain(images, scorers=["knn"], id=id)
    with pytest.raises(BadInput, match="most must be at least 1"):
        detector.explain(images, most=0)
    with pytest.raises(OtherModel, match="the fit set"):
        detector.explain(images, fit=extracted(network(3), 20, 1))


def test_unreadable_images_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    fit = extracted(network(), 60, 1)
    detector, _ = detector_of("energy", fit, keep=0.05)
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for file, pixels in zip(files, PIXELS, strict=True):
        Image.fromarray(pixels).save(file)
    files[1].write_bytes(b"\x89PNG no more")
    with pytest.warns(UserWarning, match="1 of 5 images cannot be read"):
        found = detector.explain(files)
    assert len(found) >= 3
    assert all(each.id == str(files[each.image]) for each in found)
    assert 1 not in [each.image for each in found]


def test_the_page(tmp_path: Path) -> None:
    model = network()
    names = [f"<i>{number}</i>" for number in range(60)]
    data = ImageArrays(np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8), names=names)
    plain = extracted(model, 60, 1)
    fit = FeatureSet(plain.features, plain.logits, plain.labels, plain.head, provenance=plain.provenance, ids=names)
    detector, _ = detector_of("mahalanobis", fit, keep=0.02)
    found = detector.explain(list(PIXELS) * 3, fit=fit, pictures=data, neighbors=3)
    page = found.save(tmp_path / "why").read_text()
    assert page.count('<section class="row">') == len(found) > 0
    assert page.count("<img") == len(found) * 5
    assert "&lt;i&gt;" in page
    assert not any(name in page for name in names)
    assert "http" not in page.replace("http-equiv", "")
    assert found.save(tmp_path / "why") == tmp_path / "why" / "index.html"


def test_the_picture_is_that_of_the_image_and_the_map_is_drawn_where_it_is() -> None:
    pixels = PIXELS[0]
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
    inputs = (torch.from_numpy(pixels / 255).permute(2, 0, 1) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert (np.asarray(picture_of(inputs, {"mean": mean, "std": std})) == pixels).all()
    assert (np.asarray(picture_of(inputs, {"image_processor": {"image_mean": mean, "image_std": std}})) == pixels).all()
    assert picture_of(torch.zeros(5, 100), None) is None
    stretched = np.asarray(picture_of(inputs, None))
    assert stretched.min() == 0
    assert stretched.max() == 255
    gray = Image.new("RGB", (8, 8))
    drawn = np.asarray(with_map(gray, np.array([[1.0, -1.0], [0.0, 0.0]])), np.float64)
    assert drawn[0, 0] == pytest.approx(0.75 * np.array(RAISING), abs=1)
    assert drawn[0, -1] == pytest.approx(0.75 * np.array(LOWERING), abs=1)
    assert drawn[-1, 0] == pytest.approx(0, abs=1)


def test_images_pass_through_the_model_once() -> None:
    fit = extracted(network(), 60, 1)
    detector, _ = detector_of("energy", fit)
    images = torch.randn(20, 3, 8, 8)
    detector.predict(images)
    passes = []
    detector.model.conv1.register_forward_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = detector.explain(images, fit=fit)
    assert len(found)
    assert len(passes) == 1
