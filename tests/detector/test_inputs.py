"""Inputs of a detector: images in every form, batches of columns, and errors."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from detecting import PIXELS, Plain, Rows, extracted, network, same
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import Detector, calibrate
from ood_scores.errors import BadInput, EmptyInput, MissingData, NotFinite, OodScoresError, ShapeMismatch
from ood_scores.models.opening import preprocessing


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def detector(model: nn.Module) -> Detector:
    return calibrate("energy", model, id=extracted(model, 199, 2))


def forms(folder: Path) -> Iterator[tuple[str, Any]]:
    """Return batches of the same five images in every form."""
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    encoded = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    paths = [folder / f"{number}.png" for number in range(5)]
    yield "PIL", pictures
    yield "a generator", (picture for picture in pictures)
    yield "RGBA", [picture.convert("RGBA") for picture in pictures]
    yield "paths", paths
    yield "strings", [str(path) for path in paths]
    yield "bytes", encoded
    yield "Hugging Face's", [{"bytes": content, "path": None} for content in encoded]
    yield "Hugging Face's paths", [{"bytes": None, "path": str(path)} for path in paths]
    yield "arrays", list(PIXELS)
    yield "one array", PIXELS
    yield "an array of objects", np.array([*pictures, None], dtype=object)[:5]
    yield "tensors", [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in PIXELS]
    yield "one tensor", torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    yield "several kinds", [pictures[0], paths[1], encoded[2], PIXELS[3], torch.from_numpy(PIXELS[4]).movedim(2, 0)]


def test_an_image_is_the_same_in_every_form(tmp_path: Path, model: nn.Module, detector: Detector) -> None:
    transform = preprocessing(model)
    inputs = torch.stack([transform(Image.fromarray(pixels)) for pixels in PIXELS])
    expected = detector.predict(inputs)
    for form, images in (*forms(tmp_path), ("floats", inputs.numpy()), ("float64", inputs.double())):
        assert same(detector.predict(images), expected), form
    assert same(detector.predict(inputs.tolist()), expected)
    assert same(detector.predict({"pixel_values": inputs, "labels": [0] * 5}), expected)
    assert same(detector.predict({"bytes": None, "path": tmp_path / "3.png"}), detector.predict(tmp_path / "3.png"))
    assert detector.predict(tmp_path / "3.png").score == pytest.approx(expected.score[3], rel=1e-5)


def test_gray_images_and_long_lists(detector: Detector) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), dtype=np.uint8)
    found = detector.predict(grey)
    assert len(found) == 150
    assert same(found, detector.predict([Image.fromarray(pixels[:, :, 0]) for pixels in grey]))
    assert same(found, detector.predict([pixels[:, :, 0] for pixels in grey]))
    assert np.array_equal(found.score[64:128], detector.predict(grey[64:128]).score)


LOADER = DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4)), 2)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 8, 8), EmptyInput, "no image"),
        ([], EmptyInput, "no image"),
        (torch.zeros(3, 8, 8), ShapeMismatch, r"\[3, 8, 8\]: pass a single image as a batch, images\[None\]"),
        (torch.zeros(2, 8), ShapeMismatch, r"\[B, C, H, W\], got \[2, 8\]"),
        (torch.zeros(2, 1, 8, 8), BadInput, r"cannot take a batch of shape \[2, 1, 8, 8\] .*3 channels"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), BadInput, "int64, pixels must be uint8"),
        (np.zeros((2, 8, 8, 3), dtype=np.int32), BadInput, "int32, pixels must be uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ShapeMismatch, "channels first"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), ShapeMismatch, "channels last"),
        (np.zeros((8, 8, 3), dtype=np.uint8), ShapeMismatch, "put a single one in a list"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], ShapeMismatch, "different shapes"),
        ([torch.zeros(8, 8)], ShapeMismatch, r"an image in a list must be \[C, H, W\], got \[8, 8\]"),
        ([[[1.0, 2.0], [3.0]]], BadInput, "lists of different lengths"),
        (LOADER, BadInput, r"a list of several values: .*predict\(x\); .*detector\.decide\("),
        (LOADER.dataset, BadInput, r"of type TensorDataset: .*detector\.decide\(.*, a DataLoader over it"),
        ([LOADER.dataset[0]], BadInput, r"a tuple of several values: .*predict\(x\); .*detector\.decide\("),
        (
            [{"image": torch.zeros(2, 3, 8, 8)}],
            BadInput,
            r"type dict: for the batches of a loader, call detector",
        ),
        (DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8)), 2), ShapeMismatch, r"got the batch \[1, 2, 3, 8, 8\]"),
        (next(iter(LOADER)), ShapeMismatch, r"got the batch \[2, 3, 8, 8\]: .*predict\(x\); .*detector\.decide\("),
        (
            [torch.full((3, 8, 8), 1.0), torch.full((3, 8, 8), torch.nan)],
            NotFinite,
            "pixels hold NaN or infinite values, first in image 1",
        ),
        (torch.full((2, 3, 8, 8), torch.inf), NotFinite, "pixels hold NaN or infinite values, first in image 0"),
        (torch.full((1, 3, 8, 8), 3e38), NotFinite, "hold NaN or infinite values, first in row 0"),
        ("missing.png", MissingData, "there is no image missing.png"),
        ([b"no image"], BadInput, "cannot read the image from bytes"),
        ([3], BadInput, "an image cannot be of type int"),
        (3, BadInput, "a batch of images cannot be of type int"),
        ({"image": []}, EmptyInput, "no image"),
        ({"picture": []}, BadInput, "no inputs in a batch with the keys picture: use one of pixel_values"),
    ],
)
def test_errors_of_batches_of_images(
    images: Any, error: type[OodScoresError], message: str, detector: Detector
) -> None:
    with pytest.raises(error, match=message):
        detector.predict(images)
    assert len(detector.predict(torch.zeros(1, 3, 8, 8))) == 1


def test_a_truncated_file_is_named(tmp_path: Path, detector: Detector) -> None:
    whole = io.BytesIO()
    Image.fromarray(PIXELS[0]).resize((200, 200)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:500])
    with pytest.raises(BadInput, match=r"cut\.png"):
        detector.predict([tmp_path / "cut.png"])
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(BadInput, match=r"cut\.png"):
        detector.predict([lazy])


def test_models_that_are_not_from_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Plain().eval()
    feats = extracted(plain, 100, 2)
    detector = calibrate("energy", plain, id=feats)
    assert same(detector.predict(Rows(64, 3).inputs), detector.decide(extracted(plain, 64, 3)))
    with pytest.raises(BadInput, match="the preprocessing of images for this model is unknown"):
        detector.predict(PIXELS)
    entries: dict[str, Any] = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    inputs = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    with pytest.warns(UserWarning, match="not from timm, so the crop_mode, crop_pct, interpolation of its training"):
        detector = calibrate("energy", plain, id=feats, preprocessing=entries)
    assert np.allclose(detector.predict(PIXELS).score, detector.predict(inputs).score, rtol=1e-5)
    detector.save(tmp_path / "detector")
    detector = Detector.load(tmp_path / "detector", plain)
    assert np.allclose(detector.predict(PIXELS).score, detector.predict(inputs).score, rtol=1e-5)
    with pytest.raises(BadInput, match="so images must be 8 x 8 pixels, got 9 x 8: calibrate with these entries"):
        detector.predict([np.zeros((8, 9, 3), dtype=np.uint8)])
    entries |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
    detector = calibrate("energy", plain, id=feats, preprocessing=entries)
    assert np.allclose(detector.predict(PIXELS).score, detector.predict(inputs).score, rtol=1e-5)
    with pytest.raises(BadInput, match="interpolation, std of its training are unknown"):
        calibrate("energy", plain, id=feats, preprocessing={"input_size": (3, 8, 8), "mean": (0.5,)})
    with pytest.raises(BadInput, match=r"preprocessing has no size: choose from input_size"):
        calibrate("energy", plain, id=feats, preprocessing={"size": 8})


def test_models_whose_inputs_are_not_images() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    table, audio = torch.randn(60, 12, generator=generator), torch.randn(60, 2, 40, generator=generator)
    tokens = torch.randint(30, (60, 7), generator=generator)
    to_logits = (nn.ReLU(), nn.Linear(6, 4))
    for inputs, model in (
        (table, nn.Sequential(nn.Linear(12, 6), *to_logits)),
        (audio, nn.Sequential(nn.Conv1d(2, 6, 5), nn.AdaptiveMaxPool1d(1), nn.Flatten(), *to_logits)),
        (tokens, nn.Sequential(nn.EmbeddingBag(30, 6), *to_logits)),
    ):
        feats = ood_scores.extract(model.eval(), [inputs], progress=False)
        detector = calibrate("energy", model, id=feats)
        assert same(detector.predict(inputs), detector.decide(feats))
        assert same(detector.predict({"x": inputs, "y": None}), detector.decide(feats))


class Masked(nn.Module):
    """A model of patches and a mask of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Any:
        weights = pixel_mask[..., None].float()
        return self.fc((pixel_values * weights).sum(1) / weights.sum(1))


def test_models_with_several_inputs() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    batch = {"pixel_values": torch.randn(60, 5, 6), "pixel_mask": (torch.rand(60, 5) < 0.5).long()}
    batch["pixel_mask"][:, 0] = 1
    feats = ood_scores.extract(model, [batch], progress=False)
    detector = calibrate("energy", model, id=feats)
    assert same(
        detector.predict(batch | {"labels": torch.zeros(60).long(), "size": torch.tensor(5)}), detector.decide(feats)
    )
    assert np.array_equal(detector(batch)["score"], detector.decide(feats).score)
    lists = {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"][:9]}
    with pytest.raises(BadInput, match=r"'pixel_mask' of a batch has shape \[9, 5\], but there are 60 inputs"):
        detector.predict(lists)


# ---- batches of columns


def test_a_batch_of_columns(model: nn.Module, detector: Detector) -> None:
    expected = detector.predict(PIXELS)
    new = ["predicted_label", "probability", "score", "p_value", "is_ood"]
    batch = {"image": list(PIXELS), "label": [9] * 5}
    found = detector(batch)
    assert list(found) == ["image", "label", *new]
    assert found["label"] == [9] * 5
    assert list(batch) == ["image", "label"]
    assert np.array_equal(found["predicted_label"], expected.label)
    assert np.array_equal(found["is_ood"], expected.is_ood)
    lazy = detector(MappingProxyType({"pixel_values": preprocessed(model), "image": None}))
    assert list(lazy) == new
    assert np.array_equal(lazy["score"], expected.score)
    frame = detector(pd.DataFrame({"image": list(PIXELS), "row": range(5)}))
    assert list(frame) == ["image", "row", *new]
    assert np.array_equal(frame["p_value"], expected.p_value)
    assert np.array_equal(detector(PIXELS)["score"], expected.score)
    with pytest.raises(BadInput, match="the keys picture: use one of pixel_values, image"):
        detector({"picture": PIXELS})


def preprocessed(model: nn.Module) -> Tensor:
    transform = preprocessing(model)
    return torch.stack([transform(Image.fromarray(pixels)) for pixels in PIXELS])


def test_predictions_for_files_have_their_names(model: nn.Module, detector: Detector, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}\udcff.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(PIXELS[number]).save(file)
    files[1].write_bytes(b"damaged")
    found = detector.predict(files, on_error="skip")
    assert found.id is not None
    assert found.id.tolist() == list(map(str, files))
    assert found.is_read.tolist() == [True, False, True]
    assert found.to_pandas()["id"].tolist() == found.id.tolist()
    alone = detector.predict(str(files[0]))
    assert alone.id is not None
    assert alone.id.tolist() == [str(files[0])]
    assert detector.predict([PIXELS[0]]).id is None
    assert "id" not in detector({"image": files[:1]})
    feats = extracted(model, 8, 2)
    decided = detector.decide(
        ood_scores.FeatureSet(feats.features, feats.logits, head=feats.head, ids=list("abcdefgh"))
    )
    assert decided.id is not None
    assert decided.id.tolist() == list("abcdefgh")


class WithNumbers(nn.Module):
    """A classifier of images and two numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(5, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.fc(torch.cat([image.mean(dim=(2, 3)), numbers], dim=1))


def scaled(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.filterwarnings("ignore:2 of 70 images:ood_scores.errors.RowsLeftOut")
def test_further_inputs_stay_with_their_images() -> None:
    rows = Rows(100, 1)
    numbers = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    id = [{"image": rows.inputs, "numbers": numbers, "labels": rows.labels}]
    detector = calibrate("energy", WithNumbers(), id=id, preprocessing=scaled, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    images: list[Any] = [Image.fromarray(each) for each in pixels]
    expected = detector.predict({"image": images, "numbers": numbers[:70]})
    inputs = torch.stack(list(map(scaled, images)))
    with torch.no_grad():
        logits = detector.model(inputs, numbers[:70])
    np.testing.assert_allclose(expected.score, logits.logsumexp(dim=1), rtol=1e-5)
    images[3] = images[66] = b"damaged"
    found = detector.predict({"image": images, "numbers": numbers[:70]})
    assert list(found.errors) == [3, 66]
    np.testing.assert_allclose(found.score[found.is_read], np.delete(expected.score, [3, 66]), rtol=1e-6)
    with pytest.raises(BadInput, match=r"'numbers' of a batch has shape \[69, 2\], but there are 70 inputs"):
        detector.predict({"image": images, "numbers": numbers[:69]})
