"""Heads that no single module computes, models without a head, and models with a single logit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, normalize
from torch.nn.utils import parametrizations

import ood_scores
from ood_scores import FeatureSet, Head
from ood_scores.detector.graph import DetectorGraph
from ood_scores.errors import BadInput, HeadMismatch, HeadNotFound
from ood_scores.scorers import create_scorer

WIDTH, CLASSES = 8, 5
X = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Step = Callable[["Net", Tensor], Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class LoRA(nn.Module):
    """A linear layer with an update of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, CLASSES)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 3 * self.lora_B(self.lora_A(x))


class Net(nn.Module):
    """A network of which the last step is given."""

    def __init__(self, last: Step, fc: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc: Any = fc or nn.Linear(WIDTH, CLASSES)
        self.more, self.pixels = nn.Linear(WIDTH, 2), nn.Linear(3, CLASSES)
        self.norm = nn.BatchNorm1d(CLASSES)
        self.norm.register_buffer("running_var", torch.linspace(1, 2, CLASSES))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self, x)


def extract(model: nn.Module, **options: Any) -> FeatureSet:
    return ood_scores.extract(model, [X[:7], X[7:]], device="cpu", **{"progress": False} | options)


def names(feats: FeatureSet) -> str:
    assert feats.provenance is not None
    return feats.provenance.head_modules


def require_head(feats: FeatureSet, model: Net, weight: Tensor, bias: Tensor) -> None:
    """Check the features, the logits, and the weight and bias of the head."""
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model.body(X))
        torch.testing.assert_close(feats.logits, model(X))
    assert feats.head is not None
    torch.testing.assert_close(feats.head.weight, weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(feats.head.bias, bias.detach(), rtol=1e-5, atol=1e-6)


# --- heads made of parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "fc"])
@pytest.mark.parametrize("parametrized", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_layer(parametrized: str, asked: str | None) -> None:
    layer = getattr(parametrizations, parametrized)(nn.Linear(WIDTH, CLASSES))
    model = Net(lambda net, x: net.fc(net.body(x)), layer)
    feats = extract(model, head=asked)
    assert names(feats) == "fc"
    require_head(feats, model, layer.weight, layer.bias)


@pytest.mark.parametrize("asked", [None, "fc", "fc.base_layer"])
@pytest.mark.parametrize("rows", [1, 12])
def test_a_layer_with_a_low_rank_update(asked: str | None, rows: int) -> None:
    lora = LoRA()
    model = Net(lambda net, x: net.fc(net.body(x)), lora)
    feats = ood_scores.extract(model, X.split(rows), head=asked, progress=False)
    assert names(feats) == "fc"
    require_head(
        feats, model, lora.base_layer.weight + 3 * lora.lora_B.weight @ lora.lora_A.weight, lora.base_layer.bias
    )


# --- affine maps that no module computes -------------------------------------------------------------------------


def chosen(values: Tensor) -> Tensor:
    return values[..., [0, 2, 4]]


PRIOR = torch.linspace(-1, 1, CLASSES)
LAST: dict[str, tuple[Step, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "temperature": (lambda net, x: net.fc(net.body(x)) / 1.5, lambda net: (net.fc.weight / 1.5, net.fc.bias / 1.5)),
    "subset": (
        lambda net, x: chosen(net.fc(net.body(x))),
        lambda net: (net.fc.weight[[0, 2, 4]], chosen(net.fc.bias)),
    ),
    "prior": (lambda net, x: net.fc(net.body(x)) - PRIOR, lambda net: (net.fc.weight, net.fc.bias - PRIOR)),
    "centered": (
        lambda net, x: (z := net.fc(net.body(x))) - z.mean(1, keepdim=True),
        lambda net: (net.fc.weight - net.fc.weight.mean(0), net.fc.bias - net.fc.bias.mean()),
    ),
    "side by side": (
        lambda net, x: torch.cat([net.fc(net.body(x)), net.more(net.body(x))], 1),
        lambda net: (torch.cat([net.fc.weight, net.more.weight]), torch.cat([net.fc.bias, net.more.bias])),
    ),
    "shared features": (
        lambda net, x: torch.cat([net.fc(h := net.body(x)), net.more(h)], 1),
        lambda net: (torch.cat([net.fc.weight, net.more.weight]), torch.cat([net.fc.bias, net.more.bias])),
    ),
    "function": (
        lambda net, x: linear(net.body(x), 2 * net.fc.weight, net.fc.bias),
        lambda net: (2 * net.fc.weight, net.fc.bias),
    ),
    "product": (
        lambda net, x: net.body(x) @ net.fc.weight.T,
        lambda net: (net.fc.weight, torch.zeros(CLASSES)),
    ),
    "keyword": (lambda net, x: net.fc(input=net.body(x)), lambda net: (net.fc.weight, net.fc.bias)),
    "chunks": (
        lambda net, x: torch.cat([net.fc(net.body(part)) for part in x.split(2)]),
        lambda net: (net.fc.weight, net.fc.bias),
    ),
    "scaled chunks": (
        lambda net, x: 2 * torch.cat([net.fc(net.body(part)) for part in x.split(2)]),
        lambda net: (2 * net.fc.weight, 2 * net.fc.bias),
    ),
    "batch norm": (
        lambda net, x: net.norm(net.fc(net.body(x))),
        lambda net: (
            net.fc.weight / (net.norm.running_var[:, None] + net.norm.eps).sqrt(),
            net.fc.bias / (net.norm.running_var + net.norm.eps).sqrt(),
        ),
    ),
}


@pytest.mark.parametrize("asked", [None, "fc"])
@pytest.mark.parametrize("kind", LAST)
def test_an_affine_map_that_no_module_computes(kind: str, asked: str | None) -> None:
    last, expected = LAST[kind]
    model = Net(last)
    feats = extract(model, head=asked)
    require_head(feats, model, *expected(model))
    without = extract(model, head=False)
    assert without.head is None
    assert torch.equal(without.features, feats.features)


def test_the_features_are_those_before_the_last_product() -> None:
    model = Net(lambda net, x: linear(net.more(net.body(x)), PRIOR[:, None].repeat(1, 2) + torch.eye(5, 2)))
    feats = extract(model)
    assert names(feats) == "output of more"
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model.more(model.body(X)))


@pytest.mark.parametrize("kind", ["temperature", "function", "chunks"])
def test_a_detector_and_a_graph_have_the_same_head(kind: str) -> None:
    model = Net(LAST[kind][0]).eval()
    feats = extract(model)
    detector = ood_scores.calibrate("scaled_msp", model, id=feats)
    found = torch.as_tensor(detector.predict(X).score)
    torch.testing.assert_close(found, ood_scores.score("scaled_msp", feats))
    graph = DetectorGraph(model, create_scorer("scaled_msp"), 0.0, X)
    with torch.no_grad():
        torch.testing.assert_close(graph(X)[1], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions(dtype: torch.dtype) -> None:
    feats = extract(Net(LAST["temperature"][0]).to(dtype))
    assert names(feats) == "fc"


@pytest.mark.parametrize(
    "last",
    [
        lambda net, x: net.fc(net.body(x)).relu(),
        lambda net, x: net.fc(net.body(x)) + x.mean((1, 2, 3))[:, None],
        lambda net, x: net.fc(net.body(x)) + net.body(x).amax(),
        lambda net, x: net.fc(h := net.body(x)) * h.mean(1, keepdim=True),
        lambda net, x: linear(normalize(net.body(x)), net.fc.weight),
    ],
    ids=["piecewise linear", "another path", "maximum of the batch", "gate", "cosine"],
)
@pytest.mark.parametrize("rows", [1, 12])
def test_maps_that_are_not_affine_are_refused(last: Step, rows: int) -> None:
    for head, error in ((None, HeadNotFound), ("fc", HeadMismatch)):
        with pytest.raises(error, match="Name the affine map"):
            ood_scores.extract(Net(last), X.split(rows), head=head, progress=False)


def test_another_module_is_not_taken_for_the_named_one() -> None:
    model = Net(lambda net, x: (net.more(2 * (h := net.body(x))), net.fc(h) / 2)[1])
    assert names(extract(model)) == "fc"
    with pytest.raises(HeadMismatch, match="the module 'more' is not an affine map"):
        extract(model, head="more")


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_named_module() -> None:
    model = Net(lambda net, x: log_softmax(net.fc(net.body(x)), 1)).eval()
    with pytest.raises(HeadNotFound, match="the log-softmax of what fc outputs: pass head='fc'"):
        extract(model)
    feats = extract(model, head="fc")
    with torch.no_grad():
        logits = model.fc(model.body(X))
    torch.testing.assert_close(feats.logits, logits)
    detector = ood_scores.calibrate("energy", model, id=feats)
    torch.testing.assert_close(torch.as_tensor(detector.predict(X).score), logits.double().logsumexp(1))
    with pytest.raises(BadInput, match="layers and probes need a model that returns logits"):
        extract(model, head="fc", probes=["odin"])


def test_probabilities_are_refused() -> None:
    with pytest.raises(HeadNotFound, match="the softmax of what fc outputs: wrap the model"):
        extract(Net(lambda net, x: net.fc(net.body(x)).softmax(1)))


# --- without a head ----------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A network without a classifier whose last layer is a gate on the channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, 2), nn.BatchNorm2d(WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH) if kind == "linear" else nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.conv(x))
        pooled = maps.mean((2, 3), keepdim=True)
        gate = self.gate(pooled.flatten(1))[:, :, None, None] if type(self.gate) is nn.Linear else self.gate(pooled)
        return (maps * gate.sigmoid()).mean((2, 3))


class Convolutional(nn.Module):
    """A network without a classifier that ends in 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu().mean((2, 3))


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("make", [lambda: Gate("linear"), lambda: Gate("convolution"), Convolutional])
def test_a_model_without_a_classifier_keeps_its_output(make: Callable[[], nn.Module], size: int) -> None:
    model, x = make().eval(), X[:, :, :size, :size]
    feats = ood_scores.extract(model, [x[:7], x[7:]], head=False, progress=False)
    assert names(feats) == "output of the model"
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model(x))


def test_an_encoder_of_timm_keeps_its_output() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    assert extract(model, head=False).features.shape == (12, 6)
    model.num_classes = 0  # type: ignore[assignment]
    feats = extract(model, head=False)
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model(X))


def test_features_of_a_head_that_is_not_affine() -> None:
    for last in (
        lambda net, x: linear(normalize(net.body(x)), net.fc.weight),
        lambda net, x: net.fc(net.body(x)).tanh(),
        lambda net, x: net.fc(net.body(x)) + 0.5 * net.pixels(x.flatten(2).mT).amax(1),
    ):
        model = Net(last).eval()
        feats = extract(model, head=False)
        assert feats.head is None
        with torch.no_grad():
            torch.testing.assert_close(feats.features, model.body(X))


# --- a single logit ----------------------------------------------------------------------------------------------


def sigmoid_model() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.Tanh(), nn.Linear(6, 1)).eval()


def test_a_single_logit_is_two_classes() -> None:
    model = sigmoid_model()
    feats = extract(model, probes=["odin"])
    with torch.no_grad():
        z = model(X)
    expected = torch.cat([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(feats.logits, expected)
    assert feats.head is not None
    torch.testing.assert_close(feats.head(feats.features), expected)
    assert feats.num_classes == 2
    assert feats.extras["odin"].shape == (12, 2)
    z64 = z[:, 0].double()
    torch.testing.assert_close(ood_scores.score("msp", feats), torch.maximum(z64.sigmoid(), (-z64).sigmoid()))
    detector = ood_scores.calibrate("msp", model, id=feats, classes=["cat", "dog"])
    assert torch.as_tensor(detector.predict(X).score).equal(ood_scores.score("msp", feats))


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_feature_set_of_single_logits_has_two_classes(on_disk: bool, tmp_path: Any) -> None:
    import h5py

    features, z, weight = torch.randn(6, 4), torch.randn(6, 1), torch.randn(1, 4)
    if on_disk:  # as caches of earlier versions are
        FeatureSet(features, torch.zeros(6, 2)).save(tmp_path / "plain.h5")
        with h5py.File(tmp_path / "z.h5", "w") as h5:
            h5["features"], h5["logits"] = features.numpy(), z.numpy()
            feats = FeatureSet(h5["features"], h5["logits"], head=Head(weight))
    else:
        feats = FeatureSet(features, z, head=Head(weight))
    assert feats.logits is not None
    assert feats.head is not None
    assert feats.logits.equal(torch.cat([torch.zeros(6, 1), z], 1))
    assert feats[2:4].logits.equal(feats.logits[2:4])  # type: ignore[union-attr]
    assert feats[[3, 1]].logits.equal(feats.logits[[3, 1]])  # type: ignore[union-attr]
    assert feats.head.weight.equal(torch.cat([torch.zeros(1, 4), weight]))
    feats.save(tmp_path / "saved.h5")
    assert ood_scores.load(tmp_path / "saved.h5").logits.equal(feats.logits)  # type: ignore[union-attr]


def test_a_layer_as_the_head_of_a_feature_set_is_refused() -> None:
    with pytest.raises(BadInput, match=r"head must be an ood_scores.Head, got Linear: pass Head\("):
        FeatureSet(torch.randn(6, 4), torch.randn(6, 3), head=nn.Linear(4, 3))  # type: ignore[arg-type]
