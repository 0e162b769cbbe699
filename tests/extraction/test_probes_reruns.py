"""Probes that rerun the model: without the rank-1 part of maps, compared with NumPy's SVD, and with dropout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import Interrupted, InterruptedLoader
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores.errors import BadInput
from ood_scores.extraction.probes import MCDropout, Probe, RankFeat
from ood_scores.extraction.probes.reruns import Dropping, first_eigenvectors, seed_of, seeded, without_rank_1

ROWS, CLASSES = 11, 4
INPUTS = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % CLASSES


class Classifier(nn.Module):
    """A network with three stages with batch norm, a little dropout in the first, and dropout before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stage1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout2d(0.2), nn.ReLU())
            self.stage2 = nn.Sequential(nn.Conv2d(6, 20, 3, stride=2, padding=1), nn.BatchNorm2d(20), nn.ReLU())
            self.stage3 = nn.Sequential(nn.Conv2d(20, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU())
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(10, CLASSES)
            for norm in self.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.data.normal_()
            nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.stage3(self.stage2(self.stage1(x))).mean((2, 3))))


class Functional(Classifier):
    """A network that calls a dropout function, as many timm models do."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stage3(self.stage2(self.stage1(x))).mean((2, 3))
        return self.fc(functional.dropout(pooled, p=0.5, training=self.training))


def loader(batch: int = 4, inputs: Tensor = INPUTS) -> DataLoader:
    return DataLoader(TensorDataset(inputs, LABELS), batch_size=batch)


def extract(*probes: Any, model: nn.Module | None = None, data: Any = None, **options: Any) -> ood_scores.FeatureSet:
    settings: dict[str, Any] = {"progress": False, "dtype": "float64"} | options
    return ood_scores.extract(model or Classifier(), loader() if data is None else data, probes=probes, **settings)


def removed(maps: Tensor) -> Tensor:
    """Return matrices without their rank-1 part, computed by NumPy."""
    u, s, v = np.linalg.svd(maps.double().numpy(), full_matrices=False)
    s[:, 0] = 0
    return torch.from_numpy(u * s[:, None] @ v).to(maps)


# --- rankfeat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 9), (5, 9, 3), (5, 7, 7), (2, 1, 4), (2, 4, 1)])
def test_without_rank_1(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(without_rank_1(maps), removed(maps), rtol=1e-9, atol=1e-12)
    assert without_rank_1(maps.float()).dtype == torch.float32


def test_first_eigenvectors_by_squaring() -> None:
    maps = torch.randn(5, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps[4] = 0
    gram = maps @ maps.mT
    first, expected = first_eigenvectors(gram), torch.linalg.eigh(gram).eigenvectors[:, :, -1:]
    torch.testing.assert_close(first[:4] @ first[:4].mT, expected[:4] @ expected[:4].mT, rtol=0, atol=1e-12)
    assert not first[4].any()


def test_maps_of_zeros_and_of_rank_1_become_zero() -> None:
    assert (without_rank_1(torch.zeros(2, 3, 4)) == 0).all()
    outer = torch.randn(2, 3, 1) @ torch.randn(2, 1, 4)
    assert without_rank_1(outer).abs().max() < 1e-6


def through(images: Tensor, layer: str) -> Tensor:
    """Return the logits with the maps of one stage replaced, step by step."""
    model = Classifier().eval()
    with torch.no_grad():
        x = images
        for name in ("stage1", "stage2", "stage3"):
            x = getattr(model, name)(x)
            if name == layer:
                x = removed(x.flatten(2)).view(x.shape)
        return model.fc(x.mean((2, 3))).double()


@pytest.mark.parametrize("batch", [1, 4, ROWS])
def test_rankfeat_is_the_mean_over_layers(batch: int) -> None:
    by_layer = {layer: through(INPUTS, layer) for layer in ("stage1", "stage2", "stage3")}
    chosen = (("stage3",), ("stage1", "stage3"), ("stage1", "stage2", "stage3"))
    for layers in chosen:
        found = extract(RankFeat(layers=layers), data=loader(batch)).extras["rankfeat"]
        expected = torch.stack([by_layer[layer] for layer in layers]).mean(dim=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    default = extract("rankfeat", data=loader(batch)).extras["rankfeat"]
    torch.testing.assert_close(default, (by_layer["stage2"] + by_layer["stage3"]) / 2, rtol=1e-4, atol=1e-5)


class Mixer(nn.Module):
    """A layer that returns tokens ``[B, T, C]``, channels-last maps ``[B, H, W, C]``, or a tuple with them."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.layer, self.fc = nn.Linear(3, 5), nn.Module(), nn.Linear(5, CLASSES)
        self.layout = layout
        self.layer.forward = self.shaped

    def shaped(self, tokens: Tensor) -> Any:
        maps = tokens.unflatten(1, (8, 8)) if "maps" in self.layout else tokens
        return (maps, "more") if "tuple" in self.layout else maps

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(self.embed(x.flatten(2).mT).relu())
        if isinstance(output, tuple):
            output, rest = output
            assert rest == "more"
        return self.fc(output.flatten(1, -2).square().mean(dim=1))


@pytest.mark.parametrize("layout", ["tokens", "maps", "tuple of tokens", "tuple of maps"])
def test_layouts(layout: str) -> None:
    model = Mixer(layout).eval()
    with torch.no_grad():
        tokens = model.embed(INPUTS.flatten(2).mT).relu()
        expected = model.fc(removed(tokens).square().mean(dim=1)).double()
    found = extract(RankFeat(layers=("layer",)), model=model).extras["rankfeat"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_changed_are_named() -> None:
    model = Classifier()
    model.unused = nn.Linear(2, 2)
    for layer, message in (
        ("unused", "'unused' did not run"),
        ("fc", "'fc' outputs vectors"),
        ("stage4", "no layer 'stage4'"),
    ):
        with pytest.raises(BadInput, match=message):
            extract(RankFeat(layers=(layer,)), model=model)
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(BadInput, match="at least one layer"):
        RankFeat(layers=())


# --- Monte Carlo dropout ----------------------------------------------------------------------------------------------


def passes(model: nn.Module, batch: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean softmax and mean entropy, in a loop, with only the dropout modules in training mode."""
    model.eval()
    for module in model.modules():
        module.training = isinstance(module, nn.modules.dropout._DropoutNd)
    means, entropies = [], []
    for start in range(0, ROWS, batch):
        torch.default_generator.manual_seed(seed_of(seed, start))
        with torch.no_grad():
            softmax = torch.stack([model(INPUTS[start : start + batch]).double().softmax(1) for _ in range(count)])
        means.append(softmax.mean(0))
        entropies.append(-(softmax * softmax.log()).sum(2).mean(0))
    return torch.cat(means), torch.cat(entropies)


@pytest.mark.parametrize(("batch", "count", "seed"), [(4, 16, 0), (11, 3, 5), (1, 1, 0)])
def test_mc_dropout(batch: int, count: int, seed: int) -> None:
    with torch.random.fork_rng():
        mean, entropy = passes(Classifier(), batch, count, seed)
    feats = extract(MCDropout(passes=count, seed=seed), data=loader(batch), device="cpu")
    assert list(feats.extras) == ["mc_dropout.mean", "mc_dropout.entropy"]
    torch.testing.assert_close(feats.extras["mc_dropout.mean"], mean)
    torch.testing.assert_close(feats.extras["mc_dropout.entropy"], entropy)
    without = extract(data=loader(batch), device="cpu").logits
    assert without is not None
    assert feats.logits is not None
    assert torch.equal(feats.logits, without)


def test_many_passes_differ_but_their_mean_agrees_between_batches() -> None:
    one, other = (extract(MCDropout(passes=2000), data=loader(batch)).extras["mc_dropout.mean"] for batch in (4, ROWS))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0, atol=0.06)


def test_dropout_functions_are_found() -> None:
    found, expected = (extract("mc_dropout", model=model) for model in (Functional(), Classifier()))
    assert torch.equal(found.extras["mc_dropout.mean"], expected.extras["mc_dropout.mean"])


@pytest.mark.parametrize(
    "name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_dropout_is_turned_on(name: str, training: bool) -> None:
    module = getattr(nn, name)(0.5).train(training)
    shape = {"Dropout1d": (4, 6, 5), "Dropout3d": (4, 6, 2, 2, 2)}.get(name, (4, 6, 3, 3))
    values = torch.ones(shape)
    with Dropping() as dropping:
        dropped = module(values)
    assert dropping.calls == 1
    assert not torch.equal(dropped, values)
    assert module.training is training


def test_dropout_in_place_and_of_encoder_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).eval()
    values = torch.randn(2, 5, 8)
    with torch.inference_mode():
        plain = layer(values)
        with Dropping() as dropping:
            assert not torch.equal(layer(values), plain)
        assert dropping.calls >= 3
        assert torch.equal(layer(values), plain)
        inplace = torch.ones(100)
        with Dropping():
            nn.Dropout(0.5, inplace=True).eval()(inplace)
    assert (inplace == 0).any()


def test_batch_norm_and_other_modules_stay_in_evaluation_mode() -> None:
    modes = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return x

    model = nn.Sequential(Noting(), Classifier(), Noting()).train()
    counts = model.get_buffer("1.stage1.1.num_batches_tracked").clone()
    extract(MCDropout(passes=3), model=model)
    assert not any(modes)
    assert torch.equal(model.get_buffer("1.stage1.1.num_batches_tracked"), counts)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_timm_models(drop_rate: float) -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "vit_tiny_patch16_224"):
        size = {"img_size": 32} if "vit" in name else {}
        model = timm.create_model(name, num_classes=CLASSES, drop_rate=drop_rate, **size)
        data = [(torch.randn(2, 3, 32, 32), LABELS[:2])]
        if drop_rate:
            feats = extract(MCDropout(passes=2), model=model, data=data)
            assert feats.extras["mc_dropout.mean"].shape == (2, CLASSES)
        else:
            with pytest.raises(BadInput, match=r"mc_dropout: no dropout ran in the model.*timm: drop_rate=0.2"):
                extract(MCDropout(passes=2), model=model, data=data)


def test_passes_are_counted() -> None:
    with pytest.raises(BadInput, match="passes must be at least 1, got 0"):
        MCDropout(passes=0)


def test_seeds() -> None:
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        with seeded(torch.device("cpu"), 5):
            one = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(10)
        with seeded(torch.device("cpu"), 5):
            assert torch.equal(torch.rand(3), one)
    seeds = {seed_of(seed, start) for seed in range(20) for start in range(0, 640, 32)}
    assert len(seeds) == 400
    assert max(seeds) < 2**32


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Classifier, Functional])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training)
    model.get_submodule("drop").eval()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    extract("rankfeat", "mc_dropout", model=model, data=InterruptedLoader(INPUTS, LABELS))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_and_continued(stop: int, tmp_path: Path) -> None:
    probes = ("rankfeat", "mc_dropout")
    whole = extract(*probes, data=InterruptedLoader(INPUTS, LABELS), cache=tmp_path / "whole.h5", name="data")
    with pytest.raises(Interrupted):
        extract(*probes, data=InterruptedLoader(INPUTS, LABELS, stop), cache=tmp_path / "parts.h5", name="data")
    torch.rand(7)
    parts = extract(*probes, data=InterruptedLoader(INPUTS, LABELS), cache=tmp_path / "parts.h5", name="data")
    for name, values in extract(*probes, data=InterruptedLoader(INPUTS, LABELS)).extras.items():
        assert torch.equal(whole.extras[name], values)
        assert torch.equal(parts.extras[name], values)


def test_together_with_a_probe_that_differentiates() -> None:
    alone, beside = extract("rankfeat", "mc_dropout"), extract("rankfeat", "mc_dropout", "odin", "gradnorm")
    for name, values in alone.extras.items():
        assert torch.equal(beside.extras[name], values)


def test_mixed_precision() -> None:
    expected, found = (extract("rankfeat", "mc_dropout", amp=amp) for amp in (None, "bf16"))
    for name, values in expected.extras.items():
        assert not torch.equal(found.extras[name], values)
        torch.testing.assert_close(found.extras[name], values, rtol=0.1, atol=0.05)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    expected, found = (extract("rankfeat", device=device).extras["rankfeat"] for device in ("cpu", "cuda"))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    batches = list(loader())  # a DataLoader draws a seed from the generator of the CPU
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    one, other = (extract("mc_dropout", data=batches, device="cuda").extras["mc_dropout.mean"] for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def test_extras_start_with_the_name_of_the_probe() -> None:
    probes: list[Probe] = [MCDropout(name="few", passes=2), RankFeat(name="last", layers=("stage3",))]
    assert list(extract(*probes).extras) == ["few.mean", "few.entropy", "last"]
