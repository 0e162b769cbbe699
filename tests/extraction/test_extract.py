"""``extract``: one forward pass that does not change the model, with all kinds of loaders and errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores.errors import BadInput, BadLabels, EmptyInput, HeadNotFound, NotFinite, ShapeMismatch
from ood_scores.models.running import architecture, weights_sha256

ROWS = 20
INPUTS = torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % 5


class Classifier(nn.Module):
    """A classifier with convolution, batch norm, dropout, and pooling that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(6, 5)
            nn.init.normal_(self.norm.bias)
        self.batches: list[int] = []
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.modes.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def loader(batch: int = 8, inputs: Tensor = INPUTS, labels: Tensor | None = LABELS) -> DataLoader:
    return DataLoader(TensorDataset(inputs) if labels is None else TensorDataset(inputs, labels), batch_size=batch)


def extract(model: nn.Module | None = None, data: Iterable[Any] | None = None, **options: Any) -> ood_scores.FeatureSet:
    return ood_scores.extract(
        model or Classifier(), loader() if data is None else data, **{"progress": False} | options
    )


def expected(model: Classifier | None = None) -> tuple[Tensor, Tensor]:
    """Return features and logits, computed by the model's own layers."""
    model = (model or Classifier()).eval()
    with torch.no_grad():
        features = model.norm(model.conv(INPUTS)).relu().mean((2, 3))
        return features, model.fc(features)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- results --------------------------------------------------------------------------------------------------


def test_features_logits_labels_and_head() -> None:
    model = Classifier()
    feats = extract(model)
    features, logits = expected()
    torch.testing.assert_close(feats.features, features)
    torch.testing.assert_close(feats.logits, logits)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)
    assert feats.head is not None
    assert feats.head.weight.equal(model.fc.weight)
    assert feats.head.bias.equal(model.fc.bias)


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 20, 64])
@pytest.mark.parametrize("to_disk", [True, False])
def test_one_forward_pass(batch: int, to_disk: bool, tmp_path: Path) -> None:
    model = Classifier()
    extract(model, loader(batch), cache=tmp_path / "feats.h5" if to_disk else None)
    assert len(model.batches) == math.ceil(ROWS / batch)
    assert sum(model.batches) == ROWS


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter(loader()),
        lambda: (batch for batch in loader()),
        lambda: list(loader()),
        lambda: ({"pixel_values": x, "labels": y} for x, y in loader()),
        lambda: ([x, y.tolist(), "path"] for x, y in loader()),
        lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8, num_workers=2),
        lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_sampler=[[*range(13)], [*range(13, 20)]]),
    ],
    ids=["iterator", "generator", "list", "dicts", "lists", "workers", "batch sampler"],
)
@pytest.mark.parametrize("to_disk", [True, False])
def test_kinds_of_loader(make: Callable[[], Iterable[Any]], to_disk: bool, tmp_path: Path) -> None:
    feats = extract(data=make(), cache=tmp_path / "feats.h5" if to_disk else None)
    features, logits = expected()
    torch.testing.assert_close(feats.features, features)
    torch.testing.assert_close(feats.logits, logits)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)


@pytest.mark.parametrize("data", [loader(labels=None), iter([INPUTS[:8], INPUTS[8:]]), [(INPUTS,)]])
@pytest.mark.parametrize("to_disk", [True, False])
def test_labels_are_optional(data: Iterable[Any], to_disk: bool, tmp_path: Path) -> None:
    feats = extract(
        data=data if isinstance(data, (DataLoader, list)) else [INPUTS[:8], INPUTS[8:]],
        cache=tmp_path / "feats.h5" if to_disk else None,
    )
    assert feats.labels is None
    assert feats.features.shape == (ROWS, 6)


def test_labels_of_another_label_space_are_stored() -> None:
    labels = LABELS + 1000
    found = extract(data=loader(labels=labels)).labels
    assert found is not None
    assert found.equal(labels)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", torch.float16), ("float64", torch.float64)])
@pytest.mark.parametrize("to_disk", [True, False])
def test_storage_types(dtype: str, bits: torch.dtype, to_disk: bool, tmp_path: Path) -> None:
    feats = extract(dtype=dtype, cache=tmp_path / "feats.h5" if to_disk else None)
    features, logits = expected()
    assert feats.features.dtype == bits
    torch.testing.assert_close(feats.features, features.to(bits))
    torch.testing.assert_close(feats.logits, logits.to(bits))
    assert feats.provenance is not None
    assert feats.provenance.precision == f"model float32, autocast off, stored {dtype}"


def test_float64_model_keeps_its_precision() -> None:
    model = Classifier().double()
    feats = extract(model, loader(inputs=INPUTS.double()), dtype="float64")
    with torch.no_grad():
        logits = model.eval()(INPUTS.double())
    torch.testing.assert_close(feats.logits, logits, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_used_and_recorded(amp: str) -> None:
    feats, exact = extract(amp=amp), extract()
    assert feats.provenance is not None
    assert feats.provenance.precision == f"model float32, autocast {amp}, stored float32"
    assert feats.logits is not None
    assert exact.logits is not None
    assert feats.logits.dtype == torch.float32
    assert not feats.logits.equal(exact.logits)
    torch.testing.assert_close(feats.logits, exact.logits, rtol=0.05, atol=0.05)
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert feats.logits.to(kept).float().equal(feats.logits)


def test_autocast_around_the_call_does_not_change_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        feats = extract()
    assert feats.logits is not None
    torch.testing.assert_close(feats.logits, expected()[1])


def test_head_false_stores_logits_and_features_without_a_head() -> None:
    feats = extract(head=False)
    assert feats.head is None
    torch.testing.assert_close(feats.features, expected()[0])


@pytest.mark.parametrize("name_it", [lambda model: "fc", lambda model: model.fc])
def test_named_head(name_it: Callable[[Classifier], Any]) -> None:
    model = Classifier()
    feats = extract(model, head=name_it(model))
    assert feats.provenance is not None
    assert (feats.provenance.head, feats.provenance.head_modules) == ("fc", "fc")


def test_name_of_the_dataset() -> None:
    assert extract(name="id").provenance.dataset == "id"  # type: ignore[union-attr]
    assert extract().provenance.dataset == "TensorDataset"  # type: ignore[union-attr]


def test_progress_is_shown_on_standard_error_only(capfd: pytest.CaptureFixture[str]) -> None:
    extract(progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "TensorDataset" in shown.err
    extract(progress=False)
    assert capfd.readouterr() == ("", "")


# --- the model is left as it was --------------------------------------------------------------------------------------


class Failing(Classifier):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        if len(self.batches) == self.at:
            raise RuntimeError("out of luck")
        return super().forward(x)


@pytest.mark.parametrize("make", [Classifier, lambda: Failing(0), lambda: Failing(1)], ids=["whole", "first", "second"])
@pytest.mark.parametrize("grad", [True, False])
def test_modes_gradients_and_hooks_are_restored(make: Callable[[], Classifier], grad: bool) -> None:
    model = make().train()
    model.norm.eval()  # frozen
    model.conv.weight.requires_grad_(False)
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before = {name: module.training for name, module in model.named_modules()}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.set_grad_enabled(grad):
        if isinstance(model, Failing):
            with pytest.raises(BadInput, match=r"cannot take a batch of shape .*out of luck"):
                extract(model)
        else:
            extract(model)
            assert len(calls) == 3
        assert torch.is_grad_enabled() is grad
    assert not torch.is_inference_mode_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert before == {"": True, "conv": True, "norm": False, "drop": True, "fc": True}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert hooks(model) == 1
    assert set(model.modes) <= {(False, False, True)}


def test_modes_of_a_module_in_two_places_are_restored() -> None:
    shared = nn.Sequential(nn.Dropout(0.5))
    frozen = nn.Sequential(shared)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.Flatten(), frozen), nn.Linear(48, 5)).train()
    frozen.training = False
    shared.training = True
    before = [module.training for module in model.modules()]
    extract(model)
    assert [module.training for module in model.modules()] == before
    assert before.count(False) == 1


def test_training_mode_of_the_model_does_not_change_results() -> None:
    assert extract(Classifier().train()).features.equal(extract(Classifier().eval()).features)


def test_model_can_be_trained_afterwards() -> None:
    model = Classifier().train()
    extract(model)
    model(INPUTS).sum().backward()
    assert model.fc.weight.grad is not None
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_values_cached_for_evaluation_are_discarded_when_training_continues() -> None:
    class Remembering(Classifier):
        """A layer that caches a product of its weights in eval mode and discards it in ``train``, like timm's LeViT."""

        remembered: Tensor | None = None

        def train(self, mode: bool = True) -> Remembering:
            super().train(mode)
            if mode:
                self.remembered = None
            return self

        def forward(self, x: Tensor) -> Tensor:
            if self.training or self.remembered is None:
                self.remembered = 2 * self.norm.bias
            return super().forward(x + self.remembered[0])

    model = Remembering().train()
    model.norm.eval()
    extract(model)
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert not model.norm.training
    fresh = Remembering()
    fresh.load_state_dict(model.state_dict())
    assert extract(model.eval()).features.equal(extract(fresh).features)


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_results_can_be_differentiated_through(to_disk: bool, known: bool, tmp_path: Path) -> None:
    feats = extract(data=loader() if known else iter(loader()), cache=tmp_path / "feats.h5" if to_disk else None)
    assert feats.head is not None
    features = feats.features.requires_grad_()
    feats.head(features).logsumexp(1).sum().backward()
    expected_gradient = feats.logits.softmax(1) @ feats.head.weight  # type: ignore[union-attr]
    torch.testing.assert_close(features.grad, expected_gradient)
    weight = feats.head.weight.clone().requires_grad_()
    (features.detach() @ weight.T).sum().backward()
    torch.testing.assert_close(weight.grad, features.detach().sum(0).expand(5, 6))
    assert not feats.features.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
def test_device_is_restored(fails: bool) -> None:
    model = Failing(1) if fails else Classifier()
    parameters = list(model.parameters())
    if fails:
        with pytest.raises(BadInput, match=r"cannot take a batch of shape .*out of luck"):
            extract(model, device="cuda")
    else:
        feats = extract(model, device="cuda")
        assert feats.features.device.type == "cpu"
        assert feats.provenance is not None
        assert feats.provenance.device == torch.cuda.get_device_name(0)
        torch.testing.assert_close(feats.features, expected()[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(extract(model).features, feats.features)  # "auto" takes the GPU
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype must be 'float16', 'float32' or 'float64', got 'bfloat16'"),
        ({"dtype": torch.float32}, "got torch.float32"),
        ({"amp": "int8"}, "amp must be None, 'bf16' or 'fp16', got 'int8'"),
        ({"amp": True}, "got True"),
        ({"device": "abacus"}, "the device 'abacus' is not available"),
        ({"device": "meta"}, "the device 'meta' is not available"),
        ({"device": 1.5}, "the device '1.5' is not available"),
        ({"device": "cuda:63"}, "the device 'cuda:63' is not available"),
        ({"head": "classifier"}, "no module 'classifier'; its last modules with weights: conv, norm, fc"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [True, False])
def test_wrong_arguments(options: dict[str, Any], message: str, cached: bool, tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    if cached:
        extract(cache=path)
    with pytest.raises(BadInput, match=message):
        extract(cache=path, **options)


def test_dataset_instead_of_a_loader() -> None:
    with pytest.raises(BadInput, match=r"pass DataLoader\(dataset, batch_size=...\)"):
        extract(data=TensorDataset(INPUTS, LABELS))  # type: ignore[arg-type]


@pytest.mark.parametrize("to_disk", [True, False])
def test_empty_loader_leaves_nothing(to_disk: bool, tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match="yields no batch"):
        extract(data=[], cache=tmp_path / "feats.h5" if to_disk else None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batches", "row"),
    [([(INPUTS[:16], LABELS[:16]), INPUTS[16:]], 16), ([INPUTS[:8], (INPUTS[8:], LABELS[8:])], 8)],
)
def test_labels_in_some_batches_only(batches: list[Any], row: int) -> None:
    with pytest.raises(BadLabels, match=f"some batches have labels and others have none, first at row {row}"):
        extract(data=batches)


def test_labels_that_are_not_indices() -> None:
    with pytest.raises(BadLabels, match=r"got torch\.float32"):
        extract(data=loader(labels=LABELS.float()))


class Flattening(nn.Module):
    """A model whose features are as wide as its inputs, with five logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] if x.shape[1] > 4 else self.fc(x)


def test_inputs_of_different_widths() -> None:
    narrow = torch.randn(8, 4)
    with pytest.raises(HeadNotFound, match="the head did not receive one feature vector"):
        extract(
            Flattening(), [narrow, narrow, torch.randn(8, 6)]
        )  # the head's input of the batch before must not count
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 5))
    feats = extract(model, [torch.randn(8, 4), torch.randn(8, 6)])  # the model takes both
    assert feats.features.shape == (16, 4)


class Widening(nn.Module):
    """A model that returns one more class for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        logits = self.fc(x)
        return logits if self.batches == 1 else torch.cat([logits, logits[:, :1]], dim=1)


def test_logits_of_different_widths() -> None:
    with pytest.raises(ShapeMismatch, match=r"logits have shape \(8, 6\) at row 8, but \(8, 5\) before"):
        extract(Widening(), [torch.randn(8, 4), torch.randn(8, 4)])


def test_model_that_mixes_its_inputs() -> None:
    class Mixing(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[::2])

    with pytest.raises(ShapeMismatch, match="the model mixes its inputs: 8 inputs resulted in 4 rows of features"):
        extract(Mixing())


@pytest.mark.parametrize("row", [3, 11, 19])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_input_that_is_not_finite(row: int, value: float) -> None:
    inputs = INPUTS.clone()
    inputs[row, 0, 2, 2] = value
    with pytest.raises(NotFinite, match=f"hold NaN or infinite values, first in row {row}: look at that input"):
        extract(data=loader(inputs=inputs))


@pytest.mark.parametrize("row", [3, 11])
def test_overflow_of_float16_storage(row: int) -> None:
    inputs = INPUTS.clone()
    inputs[row] *= 1e6
    assert extract(data=loader(inputs=inputs)).features.isfinite().all()
    with pytest.raises(NotFinite, match=rf"features hold .*row {row}:.*fp16 overflows above 65,504.*dtype='float32'"):
        extract(data=loader(inputs=inputs), dtype="float16")


def test_weights_that_are_not_finite() -> None:
    model = Classifier()
    with torch.no_grad():
        model.fc.weight[2, 3] = torch.nan
    with pytest.raises(NotFinite, match=r"logits hold .*first in row 0:"):
        extract(model)


# --- identity of a model ----------------------------------------------------------------------------------------------


class WithBuffer(nn.Module):
    mean: Tensor

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.arange(6.0).reshape(2, 3))
            self.fc.bias.zero_()
        self.register_buffer("mean", torch.zeros(3), persistent=persistent)


def _changed(change: Callable[[WithBuffer], Any], persistent: bool = True) -> str:
    model = WithBuffer(persistent)
    with torch.no_grad():
        change(model)
    return weights_sha256(model)


def _used(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    norm(torch.arange(6.0).reshape(2, 3))  # moves its running statistics
    return norm


def test_weights_checksum_detects_every_change() -> None:
    different = [
        _changed(lambda model: None),
        _changed(lambda model: model.fc.weight[1, 2].add_(1e-6)),
        _changed(lambda model: model.fc.bias[0].add_(1e-30)),
        _changed(lambda model: model.mean.add_(1)),
        _changed(lambda model: model.mean.add_(1e-9), persistent=False),
        _changed(lambda model: model.double()),
        _changed(lambda model: model.half()),
        _changed(lambda model: setattr(model.fc, "weight", nn.Parameter(model.fc.weight.reshape(3, 2)))),
        _changed(lambda model: setattr(model, "other", model.__dict__["_modules"].pop("fc"))),
        _changed(lambda model: model.register_buffer("std", torch.ones(()))),
        _changed(lambda model: model.add_module("norm", nn.BatchNorm1d(3))),
        _changed(lambda model: model.add_module("norm", nn.BatchNorm1d(3).requires_grad_(False).train(False).double())),
        _changed(lambda model: model.add_module("norm", _used(nn.BatchNorm1d(3)))),
    ]
    assert len(set(different)) == len(different)
    assert _changed(lambda model: None) == different[0]


def test_weights_checksum_does_not_depend_on_order_mode_or_layout() -> None:
    one, other = nn.Module(), nn.Module()
    layers = {"a": nn.Linear(3, 2), "b": nn.Conv2d(3, 4, 2)}
    for name in ("a", "b"):
        one.add_module(name, layers[name])
    for name in ("b", "a"):
        other.add_module(name, layers[name])
    whole = weights_sha256(one)
    assert weights_sha256(other.train()) == whole
    assert weights_sha256(other.eval().to(memory_format=torch.channels_last)) == whole
    assert weights_sha256(nn.Module()) != whole


@pytest.mark.gpu
def test_weights_checksum_does_not_depend_on_the_device() -> None:
    assert weights_sha256(Classifier().cuda()) == weights_sha256(Classifier())


def test_architecture_is_timms_name_or_the_class() -> None:
    import timm

    assert architecture(timm.create_model("resnet10t")) == "resnet10t"
    assert architecture(Classifier()) == "Classifier"


def test_weights_checksum_is_that_of_the_present_weights() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for change in (lambda: None, lambda: model[0].weight.data.add_(1), lambda: model[1].running_mean.numpy().fill(3)):
        change()
        assert weights_sha256(model) == weights_sha256(model) == weights_sha256(copy.deepcopy(model))
    before = weights_sha256(model)
    assert weights_sha256(model.half()) != before


def test_a_list_of_batches_has_a_known_length(tmp_path: Path) -> None:
    first, last = torch.randn(4, 3), torch.randn(2, 3)
    model, batches = nn.Linear(3, 2), [first, None, last]
    for name, loader in (("list", batches), ("iterator", iter(batches))):
        feats = ood_scores.extract(model, loader, tmp_path / name, progress=False)
        assert len(feats) == 6
        assert feats.provenance is not None
        assert feats.provenance.dataset_rows is None
        with h5py.File(tmp_path / name) as h5:
            assert h5.attrs["growing"] == (name == "iterator")
    in_memory = ood_scores.extract(model, batches, progress=False)
    assert torch.equal(in_memory.features, torch.cat([first, last]))
