"""Models with several inputs, which dict batches pass by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

import ood_scores
from ood_scores.errors import BadInput, StaleCache

ROWS = 12
PIXELS = torch.randn(ROWS, 4, 6, generator=torch.Generator().manual_seed(0))
MASK = (torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(1)) > 0.4).long().index_fill_(1, torch.tensor(0), 1)
LABELS = torch.arange(ROWS) % 3


class WithMask(nn.Module):
    """A model whose first parameter is not the image, and which divides its logits by 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)

    def pooled(self, pixel_values: Tensor, mask: Tensor) -> Tensor:
        weights = mask[..., None].to(pixel_values)
        return (pixel_values.tanh() * weights).sum(1) / weights.sum(1)

    def forward(self, mask: Tensor, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        return self.fc(self.pooled(pixel_values, mask)) / 2


def batches(mask: Tensor = MASK, size: int = 5, **further: Any) -> list[dict[str, Any]]:
    parts = zip(PIXELS.split(size), mask.split(size), LABELS.split(size), strict=True)
    return [{"pixel_values": x, "mask": m, "labels": y, "path": ["?"] * len(x), **further} for x, m, y in parts]


def extract(data: Any, **options: Any) -> ood_scores.FeatureSet:
    return ood_scores.extract(WithMask(), data, **{"progress": False} | options)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_further_inputs_are_passed_by_name(size: int) -> None:
    feats, model = extract(batches(size=size)), WithMask()
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model.pooled(PIXELS, MASK))
        torch.testing.assert_close(feats.logits, model(MASK, PIXELS))
    assert feats.head is not None
    torch.testing.assert_close(feats.head.weight, model.fc.weight.detach() / 2)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)


class Towers(nn.Module):
    """A model that takes texts or images, whichever it is given by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        assert input_ids is None
        assert pixel_values is not None
        return self.fc(pixel_values.mean(1).tanh())


class Wrapper(WithMask):
    """A model whose ``forward`` takes whatever it is given by name."""

    def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(**batch)


def test_the_input_is_passed_by_its_name() -> None:
    data = [{"pixel_values": PIXELS, "labels": LABELS}]
    feats = ood_scores.extract(Towers(), data, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, Towers()(pixel_values=PIXELS))


def test_a_wrapper_receives_all_entries_by_name() -> None:
    feats = ood_scores.extract(Wrapper(), batches(), progress=False)
    assert feats.logits is not None
    assert feats.logits.equal(extract(batches()).logits)  # type: ignore[arg-type]


def test_probes_receive_them() -> None:
    feats, model = extract(batches(), probes=["odin", "gradnorm"]), WithMask()
    for row in range(ROWS):
        x = PIXELS[row : row + 1].clone().requires_grad_()
        logits = model(MASK[row : row + 1], x)
        (norm,) = torch.autograd.grad(-log_softmax(logits, 1).mean(), [model.fc.weight], retain_graph=True)
        (bias,) = torch.autograd.grad(-log_softmax(logits, 1).mean(), [model.fc.bias], retain_graph=True)
        expected = float(norm.abs().sum() + bias.abs().sum())
        assert float(feats.extras["gradnorm.all"][row]) == pytest.approx(expected, rel=1e-5)
        (gradient,) = torch.autograd.grad(-log_softmax(logits / 1000, 1).amax(), x)
        with torch.no_grad():
            moved = model(MASK[row : row + 1], x - 0.0014 * gradient.sign())
        torch.testing.assert_close(feats.extras["odin"][row : row + 1], moved)


def test_they_are_part_of_the_identity_of_a_cache(tmp_path: Path) -> None:
    extract(batches(), cache=tmp_path / "c.h5")
    extract(batches(), cache=tmp_path / "c.h5")
    with pytest.raises(StaleCache, match="first inputs and labels"):
        extract(batches(mask=MASK.flip(1).index_fill(1, torch.tensor(0), 1)), cache=tmp_path / "c.h5")


def test_errors_say_what_is_passed() -> None:
    with pytest.raises(BadInput, match=r"'pixel_values'\. Besides the images, the model receives"):
        extract([PIXELS])
    with pytest.raises(BadInput, match=r"'mask' of a batch has shape \[3, 4\], but there are 12 inputs"):
        extract([{"pixel_values": PIXELS, "mask": MASK[:3]}])
    with pytest.raises(BadInput, match="compile=True is for models with one input"):
        extract(batches(), compile=True)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"class": LABELS}, "class"),
        ({"class": LABELS.tolist(), "coarse": LABELS.numpy()}, "class, coarse"),
        ({"class": LABELS, "y": LABELS}, None),
        ({"path": ["?"] * ROWS, "id": LABELS, "box": MASK, "weight": LABELS / 2}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*same id")
def test_labels_under_another_key_are_named_once(entries: dict[str, Any], named: str | None) -> None:
    whole = {"pixel_values": PIXELS, "mask": MASK, **entries}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feats = extract([whole, whole])
    texts = [str(each.message) for each in caught if "no labels" in str(each.message)]
    assert (feats.labels is None) == ("y" not in entries)
    assert texts == [
        f"the batches have no labels under labels, label, targets, target, or y, and nothing reads {name}: if those "
        "are the labels, rename their key to label."
        for name in [named]
        if name
    ]


def test_what_a_wrapper_takes_is_no_label_that_nothing_reads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ood_scores.extract(Wrapper(), [{"pixel_values": PIXELS, "mask": MASK}], progress=False)


def test_a_text_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(20, (ROWS, 4), generator=torch.Generator().manual_seed(0))
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": MASK, "labels": LABELS})
    feats = ood_scores.extract(model, [batch], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, model(input_ids=ids, attention_mask=MASK).logits)
        torch.testing.assert_close(feats.features, model.bert(ids, MASK).pooler_output)


NUMBERS = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2))


class Pair(nn.Module):
    """A model of images and of numbers, whose parameters are named like nothing else, or like labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(10, 3)

    def forward(self, left: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.cat([left.mean(1).tanh(), y], dim=1))


class Items(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Any:
        return (PIXELS[row], NUMBERS[row]), int(LABELS[row])


@pytest.mark.parametrize(
    "data",
    [
        [((PIXELS, NUMBERS), LABELS)],
        [({"left": PIXELS, "y": NUMBERS}, LABELS)],
        [({"left": PIXELS, "y": NUMBERS.numpy()}, LABELS)],
        [{"left": PIXELS, "y": NUMBERS, "labels": LABELS}],
        torch.utils.data.DataLoader(Items(), 5),
    ],
)
def test_several_inputs_in_other_forms(data: Any) -> None:
    feats, model = ood_scores.extract(Pair(), data, progress=False), Pair()
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, model(PIXELS, NUMBERS))
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)


def test_several_inputs_without_labels() -> None:
    for batch in (((PIXELS, NUMBERS),), {"left": PIXELS, "y": NUMBERS}, ({"left": PIXELS, "y": NUMBERS},)):
        feats = ood_scores.extract(Pair(), [batch], progress=False)
        assert feats.labels is None
        with torch.no_grad():
            torch.testing.assert_close(feats.logits, Pair()(PIXELS, NUMBERS))


def test_more_inputs_than_parameters() -> None:
    with pytest.raises(BadInput, match="a batch has 3 inputs, but forward of Pair has the parameters left, y: pass a"):
        ood_scores.extract(Pair(), [((PIXELS, NUMBERS, NUMBERS), LABELS)], progress=False)


def test_detectors_of_several_inputs() -> None:
    loader = torch.utils.data.DataLoader(Items(), 5)
    detector = ood_scores.calibrate("energy", Pair(), id=loader)
    expected = detector.decide(ood_scores.extract(Pair(), loader, progress=False))
    for numbers in (NUMBERS, NUMBERS.numpy()):
        found = detector.predict({"left": PIXELS, "y": numbers})
        torch.testing.assert_close(torch.from_numpy(found.score), torch.from_numpy(expected.score))
    with pytest.raises(BadInput, match=r"'y' of a batch has shape \[5, 4\], but there are 12 inputs"):
        detector.predict({"left": PIXELS, "y": NUMBERS[:5]})
    towers = ood_scores.calibrate("energy", Towers(), id=[{"pixel_values": PIXELS}])
    assert len(towers.predict({"pixel_values": PIXELS})) == ROWS
