"""Probes: extras compared with direct computations, their caches, and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import FeatureSet, load
from ood_scores.errors import (
    BadInput,
    NotFinite,
    ProbeDoesNotApply,
    ShapeMismatch,
    StaleCache,
    UnknownName,
    UnreadableRow,
)
from ood_scores.extraction.probes import PROBES, as_probes, register_probe
from ood_scores.probes import FGSM, ODIN, ActiveShares, GramSums, LayerNorms, Pass, PooledLayers, Probe

ROWS = 20
INPUTS = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % 5
LAYERS = ("stem", "body")


class Classifier(nn.Module):
    """A classifier with maps of two sizes, batch norm, and dropout that records the number of inputs of each pass."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            norm = nn.BatchNorm2d(6)
            self.body = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), norm)
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(6, 5)
            self.unused = nn.Linear(6, 6)
            nn.init.normal_(norm.bias)
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        return self.fc(self.drop(self.body(self.stem(x).relu()).relu().mean((2, 3))))


class MeanMap(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


def loader(batch: int = 8, inputs: Tensor = INPUTS, labels: Tensor | None = LABELS) -> DataLoader:
    return DataLoader(TensorDataset(inputs) if labels is None else TensorDataset(inputs, labels), batch_size=batch)


def extract(model: nn.Module | None = None, data: Any = None, **options: Any) -> FeatureSet:
    return ood_scores.extract(
        model or Classifier(), loader() if data is None else data, **{"progress": False} | options
    )


def outputs(inputs: Tensor = INPUTS, model: Classifier | None = None) -> dict[str, Tensor]:
    """Return the outputs of the layers, computed by the model's own parts."""
    model = (model or Classifier()).eval()
    with torch.no_grad():
        stem = model.stem(inputs)
        body = model.body(stem.relu())
        return {"stem": stem, "body": body, "logits": model(inputs)}


def perturbed(model: nn.Module, sign: float, epsilon: float, temperature: float, targets: Tensor) -> Tensor:
    """Return inputs moved along the sign of the gradient, one by one."""
    moved = []
    for image, target in zip(INPUTS, targets, strict=True):
        x = image[None].clone().requires_grad_()
        loss = cross_entropy(model(x) / temperature, target[None])
        (gradient,) = torch.autograd.grad(loss, x)
        moved.append(x.detach() + sign * epsilon * gradient.sign())
    return torch.cat(moved)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- extras ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8, 20])
def test_pooled_layers(batch: int) -> None:
    feats = extract(data=loader(batch), layers=LAYERS)
    assert list(feats.extras) == ["layers.stem", "layers.body"]
    for name in LAYERS:
        assert_close(feats.extras[f"layers.{name}"], outputs()[name].mean((2, 3)))


def test_layers_change_nothing_else() -> None:
    plain, more = extract(), extract(layers=LAYERS)
    assert more.features.equal(plain.features)
    assert more.logits.equal(plain.logits)  # type: ignore[union-attr, arg-type]
    assert more.labels.equal(plain.labels)  # type: ignore[union-attr, arg-type]
    assert more.head.weight.equal(plain.head.weight)  # type: ignore[union-attr]


def test_layer_norms() -> None:
    feats = extract(probes=[LayerNorms(layers=LAYERS)])
    for name in LAYERS:
        maps = outputs()[name].double().relu()
        expected = [sum(float(channel.square().sum()) ** 0.5 for channel in row) / len(row) for row in maps]
        assert_close(feats.extras[f"norms.{name}"], torch.tensor(expected))


def test_active_shares_count_the_positions_of_the_map_before_pooling() -> None:
    feats = extract(probes=[ActiveShares(layers=LAYERS)])
    for name in LAYERS:
        maps = outputs()[name]
        expected = [int((row > 0).sum()) / row.numel() for row in maps]
        assert_close(feats.extras[f"activations.{name}"], torch.tensor(expected))
    shares = feats.extras[f"activations.{LAYERS[-1]}"].double()
    assert torch.equal(ood_scores.score("activation_ratio", feats), shares)
    assert torch.equal(ood_scores.score("activation_ratio", feats, of="map"), shares)
    pooled = ood_scores.score("activation_ratio", feats, of="features")
    assert torch.equal(pooled, (feats.features > 0).double().mean(dim=1))


def test_extremes_of_the_inputs_of_activations() -> None:
    parts = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3), nn.GELU(), MeanMap(), nn.Linear(6, 5)]
    model = nn.Sequential(*parts)
    found = extract(model.eval(), probes=["extremes"]).extras["extremes"]
    with torch.no_grad():
        first = model[0](INPUTS)
        maps = [values.flatten(1) for values in (first, model[2](first.relu()))]
    ends = [end for values in maps for end in (-values.amin(dim=1), values.amax(dim=1))]
    assert_close(found, torch.stack(ends, dim=1))


def test_extremes_of_a_model_without_activation_modules() -> None:
    with pytest.raises(ProbeDoesNotApply, match="no activation module ran in the model"):
        extract(probes=["extremes"])


def gram_by_matrices(maps: Tensor, orders: Sequence[int]) -> Tensor:
    rows = []
    for row in maps.double().flatten(2):
        sums = [(row**order @ (row**order).T).sum(dim=1) for order in orders]
        rows.append(torch.stack([s.sign() * s.abs() ** (1 / order) for s, order in zip(sums, orders, strict=True)]))
    return torch.stack(rows)


def test_gram_sums() -> None:
    feats = extract(probes=[GramSums(layers=LAYERS)])
    for name, channels in (("stem", 4), ("body", 6)):
        found = feats.extras[f"gram.{name}"]
        assert found.shape == (ROWS, 10, channels)
        assert_close(found, gram_by_matrices(outputs()[name], range(1, 11)).float())


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e12])
def test_gram_sums_of_high_orders_do_not_overflow(scale: float) -> None:
    maps = scale * torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(1)).add(0.1)
    orders = (1, 2, 10, 24)
    found = GramSums(orders=orders).reduce(maps)
    expected = gram_by_matrices(maps / scale, orders) * scale**2  # the same in a range that float64 has
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=0.0)


def test_gram_sums_of_zeros_are_zero() -> None:
    assert GramSums().reduce(torch.zeros(2, 3, 4)).eq(0).all()


@pytest.mark.parametrize("std", [None, (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin(std: tuple[float, ...] | None, temperature: float) -> None:
    model = Classifier().eval()
    feats = extract(probes=[ODIN(epsilon=0.1, temperature=temperature, std=std)])
    targets = outputs()["logits"].argmax(dim=1)
    moved = perturbed(model, -1.0, 0.1, temperature, targets)
    if std:
        moved = INPUTS + (moved - INPUTS) / torch.tensor(std).view(1, 3, 1, 1)
    assert_close(feats.extras["odin"], outputs(moved)["logits"])
    assert feats.logits is not None
    confidence = [values.softmax(dim=1).gather(1, targets[:, None]) for values in (feats.extras["odin"], feats.logits)]
    assert (confidence[0] > confidence[1]).all()


@pytest.mark.parametrize("labelled", [True, False])
def test_fgsm(labelled: bool) -> None:
    targets = LABELS if labelled else outputs()["logits"].argmax(dim=1)
    moved = perturbed(Classifier().eval(), 1.0, 0.05, 1.0, targets)
    feats = extract(data=loader(labels=LABELS if labelled else None), layers=LAYERS, probes=[FGSM(layers=LAYERS)])
    for name in LAYERS:
        assert_close(feats.extras[f"fgsm.{name}"], outputs(moved)[name].mean((2, 3)))
        assert_close(feats.extras[f"layers.{name}"], outputs()[name].mean((2, 3)))  # of the ordinary pass still
    assert_close(feats.features, outputs()["body"].relu().mean((2, 3)))


@pytest.mark.parametrize("label", [-100, -1, 5, 999])
def test_fgsm_uses_the_prediction_if_the_label_is_not_a_class(label: int) -> None:
    labels = LABELS.clone()
    labels[3] = label
    targets = labels.clone()
    targets[3] = outputs()["logits"][3].argmax()
    moved = perturbed(Classifier().eval(), 1.0, 0.05, 1.0, targets)
    feats = extract(data=loader(labels=labels), probes=[FGSM(layers=LAYERS)])
    assert_close(feats.extras["fgsm.body"], outputs(moved)["body"].mean((2, 3)))


def test_odin_without_a_step_equals_the_logits_without_another_pass() -> None:
    model = Classifier()
    feats = extract(model, probes=[ODIN(epsilon=0.0)])
    assert model.passes == [8, 8, 4]
    assert feats.extras["odin"].equal(feats.logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [8, 8, 4]),
        ({"layers": LAYERS}, [8, 8, 4]),
        ({"layers": "stages"}, [1, 8, 8, 4]),
        ({"layers": LAYERS, "probes": [LayerNorms(layers=LAYERS), GramSums(layers=LAYERS)]}, [8, 8, 4]),
        ({"probes": ["odin"]}, [8] * 3 + [8] * 3 + [4] * 3),
        ({"probes": [FGSM(layers=LAYERS), ODIN()]}, [8] * 5 + [8] * 5 + [4] * 5),
    ],
    ids=["nothing", "layers", "stages", "norms and gram", "odin", "fgsm and odin"],
)
def test_passes(options: dict[str, Any], passes: list[int]) -> None:
    model = Classifier()
    extract(model, **options)
    assert model.passes == passes


def test_stages() -> None:
    feats = extract(layers="stages")
    assert list(feats.extras) == ["layers.stem", "layers.body"]
    assert feats.provenance is not None
    assert list(feats.provenance.probe_texts) == ["PooledLayers(name='layers', layers='stages')"]


def test_a_layer_that_returns_a_tuple_of_tokens() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attend = nn.MultiheadAttention(3, 1, batch_first=True)
            self.fc = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            return self.fc(self.attend(tokens, tokens, tokens)[0].mean(dim=1))

    feats = extract(Attending(), layers=["attend"])
    assert_close(feats.extras["layers.attend"], feats.features)


@dataclass(frozen=True)
class Halves(Probe):
    """Two extras per input, of different shapes."""

    name: str = "halves"

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{self.name}.upper": done.inputs[:, :, :4], f"{self.name}.number": done.inputs.sum((1, 2, 3))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_custom_probe(dtype: torch.dtype) -> None:
    feats = extract(probes=[Halves()], dtype=str(dtype).removeprefix("torch."))
    assert feats.extras["halves.upper"].equal(INPUTS[:, :, :4].to(dtype))
    assert feats.extras["halves.number"].shape == (ROWS,)
    assert feats.has("halves")


# --- caches -----------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "layers": "stages",
    "probes": ["odin", FGSM(layers=LAYERS), GramSums(layers=LAYERS, orders=(1, 3)), "norms", Halves()],
}
EXTRAS = [
    *("layers.stem", "layers.body", "odin", "fgsm.stem", "fgsm.body", "gram.stem", "gram.body"),
    *("norms.stem", "norms.body", "halves.upper", "halves.number"),
]


def assert_same(one: FeatureSet, other: FeatureSet) -> None:
    assert sorted(one.extras) == sorted(other.extras)
    assert one.features.equal(other.features)
    assert one.logits.equal(other.logits)  # type: ignore[union-attr, arg-type]
    for name in one.extras:
        assert one.extras[name].dtype == other.extras[name].dtype
        assert one.extras[name].equal(other.extras[name]), name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_extras_on_disk_equal_those_in_memory(dtype: str, tmp_path: Path) -> None:
    memory = extract(**EVERYTHING, dtype=dtype)
    assert list(memory.extras) == EXTRAS
    disk = extract(**EVERYTHING, dtype=dtype, cache=tmp_path / "feats.h5")
    assert disk.file == tmp_path / "feats.h5"
    assert_same(memory, disk)
    assert_same(memory, load(tmp_path / "feats.h5"))
    assert_same(memory[5:11], disk[5:11])


class Interrupted:
    """A loader that yields some batches, then fails, a number of times."""

    def __init__(self, batches: int, times: int = 1) -> None:
        self.batches, self.times = batches, times
        self.dataset = TensorDataset(INPUTS, LABELS)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(DataLoader(self.dataset, batch_size=8)):
            if number == self.batches and self.times > 0:
                self.times -= 1
                raise OSError("the network went away")
            yield batch


@pytest.mark.parametrize("batches", [1, 2])
def test_an_interrupted_extraction_is_continued(batches: int, tmp_path: Path) -> None:
    path, data = tmp_path / "feats.h5", Interrupted(batches)
    with pytest.raises(UnreadableRow, match="went away"):
        extract(data=data, **EVERYTHING, cache=path, name="data")
    started = path.exists()
    model = Classifier()
    resumed = extract(model, data=data, **EVERYTHING, cache=path, name="data")
    whole = Classifier()
    assert_same(extract(whole, data=Interrupted(9), **EVERYTHING), resumed)
    assert started is (batches == 2)  # the first 16 rows are looked at before anything is written
    assert (len(model.passes) < len(whole.passes)) is started


def test_an_interrupted_extraction_is_not_continued_with_other_probes(tmp_path: Path) -> None:
    data = Interrupted(2)
    with pytest.raises(UnreadableRow, match="went away"):
        extract(data=data, probes=["odin"], cache=tmp_path / "feats.h5", name="data")
    with pytest.raises(StaleCache, match="layers and probes"):
        extract(data=data, probes=[ODIN(epsilon=0.5)], cache=tmp_path / "feats.h5", name="data")


def test_the_same_call_does_not_run_the_model(tmp_path: Path) -> None:
    first = extract(**EVERYTHING, cache=tmp_path / "feats.h5")
    model = Classifier()
    assert_same(first, extract(model, **EVERYTHING, cache=tmp_path / "feats.h5"))
    assert model.passes == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layers": ["stem"]},
        {"layers": "stages"},
        {"layers": LAYERS},
        {"layers": LAYERS, "probes": [ODIN(epsilon=0.002)]},
        {"layers": LAYERS, "probes": [ODIN(std=(1.0, 1.0, 1.0))]},
        {"layers": LAYERS, "probes": [ODIN(name="other")]},
        {"layers": LAYERS, "probes": ["odin", "norms"]},
    ],
    ids=str,
)
def test_a_cache_with_other_probes_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    extract(layers=LAYERS, probes=["odin"], cache=tmp_path / "feats.h5")
    with pytest.raises(StaleCache) as caught:
        extract(**change, cache=tmp_path / "feats.h5")
    (line,) = [line for line in str(caught.value).splitlines() if "layers and probes" in line]
    before, after = line.split(", now ")
    assert "PooledLayers(name='layers', layers=('stem', 'body'))" in before
    assert "ODIN(name='odin', epsilon=0.0014" in before
    assert all(repr(probe) in after for probe in as_probes(change.get("layers"), change.get("probes", ())))
    again = extract(**change, cache=tmp_path / "feats.h5", overwrite=True)
    assert_same(again, extract(**change))


def test_a_list_and_a_tuple_of_layers_are_the_same(tmp_path: Path) -> None:
    extract(layers=list(LAYERS), cache=tmp_path / "feats.h5")
    model = Classifier()
    extract(model, layers=LAYERS, cache=tmp_path / "feats.h5")
    assert model.passes == []


def test_a_cache_from_before_there_were_probes(tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    first = extract(cache=path)

    def forget(name: str, item: Any = None) -> None:
        holder = h5 if item is None else item
        if "probes" in holder.attrs:
            forgotten.append(name)
            del holder.attrs["probes"]

    forgotten: list[str] = []
    with h5py.File(path, "r+") as h5:
        forget("/")
        h5.visititems(forget)
    assert len(forgotten) == 1
    old = load(path)
    assert old.provenance is not None
    assert list(old.provenance.probes) == []
    assert_same(first, old)
    model = Classifier()
    assert_same(first, extract(model, cache=path))
    assert model.passes == []
    with pytest.raises(StaleCache, match="layers and probes"):
        extract(layers=LAYERS, cache=path)


# --- errors -------------------------------------------------------------------------------------------------


def test_an_unknown_probe() -> None:
    with pytest.raises(
        UnknownName,
        match=r"there is no probe 'godin' \(did you mean 'odin'\?\).*fgsm, .*gram, .*layers, .*odin",
    ):
        extract(probes=["godin"])


def test_name_belongs_to_one_probe() -> None:
    with pytest.raises(BadInput, match=r"the probe 'odin' exists already: ood_scores\..*\.ODIN"):

        @register_probe
        @dataclass(frozen=True)
        class Other(ODIN):
            pass

    assert PROBES["odin"] is ODIN


@pytest.mark.parametrize("probes", ["odin", ODIN()])
def test_a_probe_instead_of_a_list(probes: Any) -> None:
    with pytest.raises(
        BadInput, match=r"probes must be a list of names or Probe objects, got .*: write probes=\['odin'\]"
    ):
        extract(probes=probes)


def test_two_probes_with_the_same_name() -> None:
    with pytest.raises(BadInput, match=r"two probes are named 'odin': give one of them another name, ODIN\(name=...\)"):
        extract(layers=LAYERS, probes=["odin", ODIN(epsilon=0.1)])
    with pytest.raises(BadInput, match=r"two probes are named 'layers'"):
        extract(layers=LAYERS, probes=[PooledLayers(layers=["fc"])])
    feats = extract(probes=["odin", ODIN(name="odin_far", epsilon=0.1)])
    assert list(feats.extras) == ["odin", "odin_far"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODIN(name=""), "the name of a probe must be a text without '/', got ''"),
        (lambda: ODIN(name="a/b"), "got 'a/b'"),
        (lambda: ODIN(epsilon=-0.1), "epsilon must be at least 0 and temperature positive"),
        (lambda: ODIN(temperature=0.0), "epsilon must be at least 0 and temperature positive"),
        (lambda: PooledLayers(layers="body"), "layers must be a list of module names or 'stages', got 'body'"),
    ],
)
def test_wrong_parameters(make: Callable[[], Probe], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize("options", [{"layers": ["bdy"]}, {"probes": [FGSM(layers=["bdy"])]}], ids=str)
def test_a_layer_that_does_not_exist(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"the model has no layer 'bdy'; its children are stem, body, drop, fc, unused"):
        extract(**options, cache=tmp_path / "feats.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"layers": ["unused"]}, {"probes": [FGSM(layers=["unused"])]}], ids=str)
def test_a_layer_that_does_not_run(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="the layer 'unused' did not run in the forward pass: choose another"):
        extract(**options)


@pytest.mark.parametrize("std", [(1.0,), (1.0, 1.0)])
def test_std_for_another_number_of_channels(std: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match=rf"std has {len(std)} values for inputs of shape \(8, 3, 8, 8\)"):
        extract(probes=[ODIN(std=std)])


def test_inputs_without_gradients() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 5))
    data = [torch.arange(12).reshape(4, 3) % 10]
    extract(model, data)
    with pytest.raises(BadInput, match=r"a probe that differentiates needs floating-point inputs, got torch\.int64"):
        extract(model, data, probes=["odin"])


@dataclass(frozen=True)
class Shaped(Probe):
    """An extra computed by a function of the number of the batch's first row."""

    name: str = "shaped"
    make: Callable[[int, int], dict[str, Tensor]] = lambda rows, start: {}

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.make(len(done.inputs), done.start)


@pytest.mark.parametrize("row", [0, 7, 8, 19])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_extras_that_are_not_finite_name_the_row(row: int, value: float) -> None:
    def make(rows: int, start: int) -> dict[str, Tensor]:
        columns = torch.zeros(rows, 2)
        columns[torch.arange(start, start + rows) == row] = value
        return {"shaped": columns}

    with pytest.raises(NotFinite, match=f"shaped hold NaN or infinite values, first in row {row}"):
        extract(probes=[Shaped(make=make)])


def test_batches_with_extras_of_other_shapes() -> None:
    with pytest.raises(ShapeMismatch, match=r"shaped have shape \(8, 3\) at row 8, but \(8, 2\) before"):
        extract(probes=[Shaped(make=lambda rows, start: {"shaped": torch.zeros(rows, 2 + (start > 0))})])
    with pytest.raises(
        ShapeMismatch, match=r"the batch at row 8 has different extras than the first batch: extras/shaped\.8"
    ):
        extract(probes=[Shaped(make=lambda rows, start: {f"shaped.{start}": torch.zeros(rows) for _ in range(start)})])


def test_extras_with_another_number_of_rows() -> None:
    with pytest.raises(ShapeMismatch, match="8 inputs resulted in 7 rows of extras/shaped"):
        extract(probes=[Shaped(make=lambda rows, start: {"shaped": torch.zeros(rows - 1)})])


def test_images_of_other_sizes_have_the_same_extras() -> None:
    sizes = [INPUTS[:4], INPUTS[4:8, :, :6, :6]]
    feats = extract(data=sizes, layers=LAYERS, probes=[GramSums(layers=LAYERS), "odin"])
    assert feats.extras["layers.stem"].shape == (8, 4)
    assert_close(feats.extras["layers.stem"][4:], outputs(sizes[1])["stem"].mean((2, 3)))


# --- the model is left as it was --------------------------------------------------------------------------------------


class Failing(Classifier):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        if len(self.passes) == self.at:
            raise RuntimeError("out of luck")
        return super().forward(x)


@pytest.mark.parametrize("fails_at", [None, 0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_not_changed(fails_at: int | None, grad: bool) -> None:
    model = (Classifier() if fails_at is None else Failing(fails_at)).train()
    model.body[1].eval()
    model.stem.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: values.clone() for name, values in model.state_dict().items()}
    with torch.set_grad_enabled(grad):
        if fails_at is None:
            extract(model, **EVERYTHING)
        else:
            with pytest.raises(BadInput, match=r"cannot take a batch of shape .*out of luck"):
                extract(model, **EVERYTHING)
        assert torch.is_grad_enabled() is grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(values.equal(state[name]) for name, values in model.state_dict().items())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_existing_gradients_are_kept() -> None:
    model = Classifier()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    extract(model, probes=["odin"])
    assert model.fc.weight.grad.eq(1).all()


def test_extras_have_no_graph_and_inputs_are_not_changed() -> None:
    inputs = INPUTS.clone()
    feats = extract(data=loader(inputs=inputs), **EVERYTHING)
    assert not any(values.requires_grad for values in feats.extras.values())
    assert inputs.equal(INPUTS)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_model_has_gradients_of_its_inputs(frozen: bool) -> None:
    model = Classifier().requires_grad_(not frozen)
    assert_same(extract(model, probes=["odin"]), extract(probes=["odin"]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_disabled_gradients_around_the_call(context: Callable[[], Any]) -> None:
    model, expected = Classifier(), extract(**EVERYTHING)
    with context():
        found = extract(model, **EVERYTHING)
    assert_same(found, expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp: str) -> None:
    feats, exact = (extract(**EVERYTHING, amp=mode) for mode in (amp, None))
    for name in EXTRAS:
        assert feats.extras[name].dtype == torch.float32
        if not name.startswith(("gram", "halves")):
            torch.testing.assert_close(feats.extras[name], exact.extras[name], rtol=0.1, atol=0.1)
    assert not feats.extras["odin"].equal(feats.logits)  # type: ignore[arg-type]


def test_the_temperature_does_not_make_gradients_underflow_in_fp16() -> None:
    """Small gradients underflow in half precision, and a step along zero does nothing."""
    probe = ODIN(epsilon=0.05, temperature=1e6)
    feats, exact = (extract(probes=[probe], amp=amp) for amp in ("fp16", None))
    torch.testing.assert_close(feats.extras["odin"], exact.extras["odin"], rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_gpu_results_match_the_cpu() -> None:
    model = Classifier()
    feats = extract(model, device="cuda", **EVERYTHING)
    expected = extract(device="cpu", **EVERYTHING)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for name in EXTRAS:
        assert feats.extras[name].device.type == "cpu"
        torch.testing.assert_close(feats.extras[name], expected.extras[name], rtol=0.02, atol=0.02)


def test_parameters_distinguish_probes() -> None:
    assert ODIN() == ODIN(epsilon=0.0014)
    assert ODIN() != replace(ODIN(), epsilon=0.1)
    assert eval(repr(FGSM(layers=["a", "b"]))) == FGSM(layers=("a", "b"))
