"""Norms of gradients of single inputs, compared with loops of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, InterruptedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores.errors import BadInput
from ood_scores.extraction.probes import LayerGradients, ParameterGradients, Pass, gradients
from ood_scores.extraction.probes.gradients import noise_like

ROWS, CLASSES = 13, 4
INPUTS = torch.randn(ROWS, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % CLASSES


class Classifier(nn.Module):
    """A network with two blocks with batch norm, dropout, in-place operations, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.block1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
            self.block2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(8, CLASSES)
            for norm in self.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.data.normal_()
                    norm.get_buffer("running_var").uniform_(0.5, 2)
        self.fc.weight.requires_grad_(False)

    def pooled(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pooled(x)))


class Writing(Classifier):
    """A network that writes its outputs into another tensor, which vmap does not support."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), CLASSES, device=x.device)
        logits += super().forward(x)
        return logits


class Branching(Classifier):
    """A network that branches on values, which vmap does not support."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > -100 else super().forward(-x)


def loader(batch: int = 5, inputs: Tensor = INPUTS) -> DataLoader:
    return DataLoader(TensorDataset(inputs, LABELS[: len(inputs)]), batch_size=batch)


def extract(*probes: Any, model: nn.Module | None = None, data: Any = None, **options: Any) -> ood_scores.FeatureSet:
    settings: dict[str, Any] = {"progress": False, "dtype": "float64"} | options
    return ood_scores.extract(model or Classifier(), loader() if data is None else data, probes=probes, **settings)


def kl_from_uniform(logits: Tensor, temperature: float = 1.0) -> Tensor:
    uniform = torch.full_like(logits, 1 / CLASSES)
    return nn.functional.kl_div((logits / temperature).log_softmax(1), uniform, reduction="sum")


def bce_with_ones(logits: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def by_backward(loss: Callable[[Tensor], Tensor], inputs: Tensor = INPUTS) -> list[dict[str, Tensor]]:
    """Return the gradient of every parameter for every input, by ``backward`` in a loop, in float64."""
    found = []
    for image in inputs.double():
        model = Classifier().eval().double().requires_grad_()
        loss(model(image[None])).backward()
        found.append({name: values.grad for name, values in model.named_parameters() if values.grad is not None})
    return found


def norms(found: list[dict[str, Tensor]], prefix: str, p: float = 1.0) -> Tensor:
    rows = [torch.cat([g.flatten() for name, g in each.items() if name.startswith(prefix)]) for each in found]
    return torch.stack([row.norm(p) for row in rows])


@pytest.mark.parametrize(("p", "temperature"), [(1.0, 1.0), (2.0, 3.0), (0.5, 1.0), (float("inf"), 1.0)])
def test_norms_of_groups(p: float, temperature: float) -> None:
    groups = ("block1", "block2", "block2.0.weight", "fc", "all")
    feats = extract(ParameterGradients(groups=groups, p=p, temperature=temperature))
    found = by_backward(lambda logits: kl_from_uniform(logits, temperature))
    assert list(feats.extras) == [f"gradnorm.{group}" for group in groups]
    for group in groups:
        expected = norms(found, "" if group == "all" else group, p)
        torch.testing.assert_close(feats.extras[f"gradnorm.{group}"], expected, rtol=2e-5, atol=0)


def test_the_last_layer_has_a_closed_form() -> None:
    for p in (1.0, 2.0, 0.3):
        feats = extract(ParameterGradients(groups=("fc.weight", "fc"), p=p, temperature=2.0))
        for group, bias in (("fc.weight", False), ("fc", True)):
            expected = ood_scores.score("gradnorm", feats, p=p, temperature=2.0, bias=bias)
            torch.testing.assert_close(feats.extras[f"gradnorm.{group}"], expected, rtol=1e-4, atol=0)
            assert torch.equal(
                ood_scores.score("gradnorm_params", feats, group=group), feats.extras[f"gradnorm.{group}"]
            )


def test_groups_by_name_and_by_stages() -> None:
    assert list(extract("gradnorm").extras) == ["gradnorm.all"]
    feats = extract(ParameterGradients(groups="stages"))
    assert list(feats.extras) == ["gradnorm.block1", "gradnorm.block2", "gradnorm.all"]
    torch.testing.assert_close(feats.extras["gradnorm.all"], extract("gradnorm").extras["gradnorm.all"])


def test_a_group_contains_parameters_below_its_name_but_not_longer_names() -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(6, 5))
    model.add_module("fc1", nn.Linear(5, CLASSES))
    data = [(INPUTS[:, 0, 0], LABELS)]
    feats = extract(ParameterGradients(groups=("fc", "fc.weight", "fc.bias", "all")), model=model, data=data)
    whole, weight, bias, everything = feats.extras.values()
    torch.testing.assert_close(whole, weight + bias)
    assert (everything > whole).all()


def test_stages_without_parameters_are_left_out() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=CLASSES)
    images = torch.randn(2, 3, 32, 32)
    feats = extract(ParameterGradients(groups="stages"), model=model, data=[(images, LABELS[:2])])
    assert list(feats.extras) == [f"gradnorm.{group}" for group in ("layer1", "layer2", "layer3", "layer4", "all")]


@pytest.mark.parametrize("biases", [True, False])
def test_norms_of_every_parameter(biases: bool) -> None:
    feats = extract(LayerGradients(biases=biases))
    names = [name for name, values in Classifier().named_parameters() if biases or values.ndim > 1]
    found = by_backward(bce_with_ones)
    expected = torch.stack([norms(found, name, 2.0) for name in names], dim=1)
    assert list(feats.extras) == ["gradients.inputs"]
    torch.testing.assert_close(feats.extras["gradients.inputs"], expected, rtol=2e-5, atol=0)


def test_noise() -> None:
    images = INPUTS * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + torch.tensor([0.0, -3.0, 2.0]).view(3, 1, 1)
    noise = noise_like(images, seed=3)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    assert noise.shape == images.shape
    for channel in range(3):
        values = (noise[:, channel] - low[channel]) / (high[channel] - low[channel])
        assert values.min() >= 0
        assert values.max() <= 1
        assert values.mean() == pytest.approx(0.5, abs=0.05)
        assert values.var() == pytest.approx(1 / 12, abs=0.01)
    assert torch.equal(noise, noise_like(images, seed=3))
    assert not torch.equal(noise, noise_like(images, seed=4))


def test_norms_of_noise() -> None:
    feats = extract(LayerGradients(noise=True, seed=7), data=loader(batch=ROWS))
    assert list(feats.extras) == ["gradients.inputs", "gradients.noise"]
    noise = noise_like(INPUTS, gradients.seed_of(7, 0))
    found = by_backward(bce_with_ones, noise)
    expected = torch.stack([norms(found, name, 2.0) for name, _ in Classifier().named_parameters()], dim=1)
    torch.testing.assert_close(feats.extras["gradients.noise"], expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(feats.extras["gradients.inputs"], extract("gradients").extras["gradients.inputs"])


@pytest.mark.parametrize("batch", [1, 4, ROWS])
def test_the_size_of_batches_does_not_matter(batch: int) -> None:
    expected = extract("gradnorm", "gradients")
    found = extract("gradnorm", "gradients", data=loader(batch))
    for name, values in expected.extras.items():
        torch.testing.assert_close(found.extras[name], values, rtol=1e-5, atol=0)


def norms_of(rows: int, names: list[str], most_bytes: int) -> Tensor:
    """Return the norms of the gradients of some parameters for the first inputs."""
    model, inputs = Classifier().eval(), INPUTS[:rows]
    with torch.no_grad():
        done = Pass(model, inputs, model(inputs), None, 0)
        return gradients.gradient_norms(done, inputs, names, bce_with_ones, 2.0, most_bytes)


@pytest.mark.parametrize("most_bytes", [1, 9_000])
def test_the_size_of_pieces_does_not_matter(most_bytes: int) -> None:
    names = [name for name, _ in Classifier().named_parameters()]
    torch.testing.assert_close(norms_of(ROWS, names, most_bytes), norms_of(ROWS, names, 2**28), rtol=1e-5, atol=0)


def test_pieces_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    together = gradients._norms_together

    def noting(model: Any, parameters: dict[str, Tensor], inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        sizes.append((len(inputs[""]), sum(values.nbytes for values in parameters.values())))
        return together(model, parameters, inputs, *rest)

    monkeypatch.setattr(gradients, "_norms_together", noting)
    weight = Classifier().fc.weight.nbytes
    norms_of(8, ["fc.weight"], 3 * weight + 1)
    norms_of(5, ["fc.weight"], 3 * weight + 1)
    assert sizes == [(3, weight), (3, weight), (2, weight), (3, weight), (2, weight)]


@pytest.mark.parametrize("kind", [Writing, Branching])
def test_a_model_that_vmap_does_not_support(kind: type[Classifier], monkeypatch: pytest.MonkeyPatch) -> None:
    single = []
    of_one = gradients._norms_of_one

    def noting(*given: Any) -> Tensor:
        single.append(1)
        return of_one(*given)

    monkeypatch.setattr(gradients, "_norms_of_one", noting)
    probes = ("gradnorm", LayerGradients(noise=True))
    expected = extract(*probes)
    assert not single
    found = extract(*probes, model=kind())
    assert len(single) == 3 * ROWS
    for name, values in expected.extras.items():
        torch.testing.assert_close(found.extras[name], values, rtol=1e-5, atol=0)


def test_an_unused_parameter_has_no_gradient() -> None:
    for kind in (Classifier, Writing):
        model = kind()
        model.unused = nn.Linear(2, 3)
        feats = extract(ParameterGradients(groups=("unused", "fc", "all")), model=model)
        assert (feats.extras["gradnorm.unused"] == 0).all()
        assert (feats.extras["gradnorm.fc"] > 0).all()


def test_running_out_of_memory_is_not_mistaken_for_missing_vmap_support(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(gradients, "_norms_together", full)
    with pytest.raises(torch.OutOfMemoryError):
        extract("gradnorm")


@pytest.mark.parametrize("kind", [Classifier, Writing])
def test_mixed_precision(kind: type[Classifier]) -> None:
    expected = extract("gradnorm", "gradients")
    found = extract("gradnorm", "gradients", model=kind(), amp="bf16")
    for name, values in expected.extras.items():
        assert not torch.equal(found.extras[name], values)
        torch.testing.assert_close(found.extras[name], values, rtol=0.3, atol=0.02 * float(values.max()))


def test_a_float64_model_keeps_its_digits() -> None:
    feats = extract("gradnorm", model=Classifier().double(), data=loader(inputs=INPUTS.double()))
    expected = norms(by_backward(kl_from_uniform), "")
    torch.testing.assert_close(feats.extras["gradnorm.all"], expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", [Classifier, Writing])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(kind: type[Classifier], training: bool) -> None:
    model = kind().train(training)
    model.block1.eval()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [values.requires_grad for values in model.parameters()]
    random = torch.get_rng_state()
    extract("gradnorm", LayerGradients(noise=True), model=model, data=InterruptedLoader(INPUTS, LABELS))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [values.requires_grad for values in model.parameters()] == wanted
    assert all(values.grad is None for values in model.parameters())
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(model.fc.weight) is nn.Parameter


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_and_continued(stop: int, tmp_path: Path) -> None:
    probes = ("gradnorm", LayerGradients(noise=True))
    whole = extract(*probes, data=InterruptedLoader(INPUTS, LABELS), cache=tmp_path / "whole.h5", name="data")
    with pytest.raises(Interrupted):
        extract(*probes, data=InterruptedLoader(INPUTS, LABELS, stop), cache=tmp_path / "parts.h5", name="data")
    parts = extract(*probes, data=InterruptedLoader(INPUTS, LABELS), cache=tmp_path / "parts.h5", name="data")
    memory = extract(*probes, data=InterruptedLoader(INPUTS, LABELS))
    for name, values in memory.extras.items():
        assert torch.equal(whole.extras[name], values)
        assert torch.equal(parts.extras[name], values)


def test_every_batch_has_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def noting(inputs: Tensor, seed: int) -> Tensor:
        seeds.append(seed)
        return noise_like(inputs, seed)

    monkeypatch.setattr(gradients, "noise_like", noting)
    extract(LayerGradients(noise=True, seed=5), data=InterruptedLoader(INPUTS, LABELS))
    assert seeds == [gradients.seed_of(5, start) for start in (0, 4, 8, 12)]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("kind", [Classifier, Writing])
def test_mixed_precision_does_not_cache_casts_per_input(kind: type[Classifier]) -> None:
    kept = []

    class Noting(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                kept.append(torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    extract("gradnorm", model=Noting(), data=[(INPUTS[:4], LABELS[:4])], amp="bf16")
    assert kept
    assert not any(kept)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    probes = (ParameterGradients(groups="stages"), LayerGradients(noise=True))
    expected, found = extract(*probes, device="cpu"), extract(*probes, device="cuda")
    for name, values in expected.extras.items():
        torch.testing.assert_close(found.extras[name], values, rtol=0.01, atol=0.01 * float(values.max()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterGradients(groups="blocks"), "groups must be a list of names .* got 'blocks'"),
        (lambda: ParameterGradients(groups=()), "needs at least one group"),
        (lambda: ParameterGradients(p=0), "p in"),
        (lambda: ParameterGradients(temperature=0), "a positive temperature"),
        (lambda: ParameterGradients(groups=("block3",)), "no parameters named 'block3' .* block1, block2, drop, fc"),
        (lambda: ParameterGradients(groups=("drop",)), "no parameters named 'drop'"),
    ],
)
def test_errors_name_what_is_wrong(make: Callable[[], ParameterGradients], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        extract(make())
