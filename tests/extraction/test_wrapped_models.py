"""Models in wrappers, compiled models, and models that run no hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ood_scores
from ood_scores.errors import BadInput
from ood_scores.models.running import unwrapped, weights_sha256

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class Holder(nn.Module):
    """A model with another one as its part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "two": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


def extract(model, **options):
    return ood_scores.extract(model, [X], progress=False, **options)


def test_a_wrapped_model_has_the_weights_and_features_of_the_original(wrap):
    bare, wrapped = extract(network()), extract(wrap(network()))
    assert wrapped.provenance.weights_sha256 == bare.provenance.weights_sha256
    assert wrapped.provenance.architecture == "Sequential"
    assert torch.equal(wrapped.features, bare.features)
    assert torch.equal(wrapped.head.weight, bare.head.weight)


def test_the_cache_of_a_wrapped_model_is_that_of_the_original(wrap, tmp_path):
    extract(wrap(network()), cache=tmp_path / "c.h5")
    written = (tmp_path / "c.h5").stat().st_mtime_ns
    extract(network(), cache=tmp_path / "c.h5")
    assert (tmp_path / "c.h5").stat().st_mtime_ns == written


def test_a_detector_accepts_and_returns_to_a_wrapped_model(wrap, tmp_path):
    feats = extract(network())
    detector = ood_scores.calibrate("energy", wrap(network()), id=feats)
    detector.save(tmp_path / "detector")
    again = ood_scores.Detector.load(tmp_path / "detector", wrap(network()))
    assert torch.equal(torch.as_tensor(again.predict(X).score), torch.as_tensor(detector.predict(X).score))
    assert type(again.model) is nn.Sequential


@pytest.mark.parametrize("kind", ["in place", "part", "part in place"])
def test_the_original_of_a_compiled_model_runs(kind):
    expected = extract(network())
    model = network()
    if kind == "part":
        model = Holder(torch.compile(model, backend="eager"))
    elif kind == "part in place":
        model.compile(backend="eager")
        model = Holder(model)
    else:
        model.compile(backend="eager")
    model.eval()
    with torch.inference_mode():
        model(X)
    compiled = [module._compiled_call_impl for module in model.modules()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    feats = extract(model)
    assert torch.equal(feats.features, expected.features)
    assert feats.head is not None
    assert [module._compiled_call_impl for module in model.modules()] == compiled
    assert [vars(module).get("forward") for module in model.modules()] == forwards


def test_a_detector_works_after_its_model_was_compiled_in_place():
    model = network()
    detector = ood_scores.calibrate("energy", model, id=extract(model))
    before = detector.predict(X).score
    model.compile(backend="eager")
    model(X.to(model[4].weight.device))
    assert (detector.predict(X).score == before).all()


def test_weights_of_compiled_parts_are_the_same():
    assert weights_sha256(Holder(torch.compile(network(), backend="eager"))) == weights_sha256(Holder(network()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model, X),
        lambda model: torch.export.export(model, (X,)),
        lambda model: torch.export.export(model, (X,)).module(),
    ],
    ids=["script", "trace", "export", "exported module"],
)
def test_models_without_hooks_are_refused(change):
    with pytest.raises(BadInput, match=r"runs no hooks.*pass the original nn\.Module"):
        extract(change(network()))


@pytest.mark.parametrize("model", ["resnet18", {"weight": X}], ids=["a name", "weights"])
def test_something_else_than_a_module_is_refused(model):
    with pytest.raises(BadInput, match=r"must be a torch\.nn\.Module, got (str|dict)"):
        unwrapped(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", ["offloaded", "lazy", "quantized"])
def test_models_whose_weights_cannot_be_read_are_refused(spoil, tmp_path):
    model, message = network(), "'4.weight' is on the device 'meta', since the weights are offloaded"
    if spoil == "offloaded":
        model[4].to("meta")
    elif spoil == "lazy":
        model[4], message = nn.LazyLinear(5), r"'4.weight' is not initialized.*run the model once, model\(inputs\)"
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        message = r"'4' is quantized \(Linear\).*pass the model before quantization"
    feats = extract(network())
    for call in (
        lambda: extract(model),
        lambda: ood_scores.calibrate("energy", model, id=feats),
        lambda: (
            ood_scores.calibrate("energy", network(), id=feats).save(tmp_path / "detector")
            or ood_scores.Detector.load(tmp_path / "detector", model)
        ),
    ):
        with pytest.raises(BadInput, match=message):
            call()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_those_of_the_dense_model():
    dense, model = network(), network()
    dense[4].weight = nn.Parameter(dense[4].weight.detach().relu())
    model[4].weight = nn.Parameter(dense[4].weight.detach().to_sparse_csr())
    expected, feats = extract(dense, device="cpu"), extract(model, device="cpu")
    assert feats.provenance.weights_sha256 == expected.provenance.weights_sha256
    assert torch.equal(feats.head.weight, expected.head.weight)
    torch.testing.assert_close(feats.logits, expected.logits)


class Halves(torch.Tensor):
    """A weight that is stored as one half of it, as quantized weights are stored as parts."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half = half

    def __tensor_flatten__(self):
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, shape, stride):
        return Halves(parts["half"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].half)
        dense = [2 * arg.half if isinstance(arg, Halves) else arg for arg in args]
        return func(*dense, **kwargs or {})


def test_weights_made_of_parts_are_identified_and_the_head_is_found():
    model, other = network(), network()
    weight = model[4].weight.detach()
    model[4].weight = nn.Parameter(Halves(weight / 2), requires_grad=False)
    other[4].weight = nn.Parameter(Halves(weight / 4), requires_grad=False)
    feats = extract(model, device="cpu")  # where its parts are
    torch.testing.assert_close(feats.head.weight, weight)
    torch.testing.assert_close(feats.logits, extract(network(), device="cpu").logits)
    assert weights_sha256(model) != weights_sha256(other)
