"""Detectors: every column compared with its definition, the model not changed, and errors."""

import importlib.util
import json
import os
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detecting import PIXELS, Rows, extracted, loader, network, same
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import ood_scores
from ood_scores import calibrate
from ood_scores.data.images import ImageArrays
from ood_scores.detector import Fusion
from ood_scores.detector.conformal import class_thresholds, p_values, threshold
from ood_scores.errors import (
    BadInput,
    EmptyInput,
    MissingData,
    MissingInput,
    NotFitted,
    OtherModel,
    RowsLeftOut,
    UnknownName,
    UnreadableImage,
)
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes.base import probe_of, record_of
from ood_scores.features import FeatureSet
from ood_scores.features.provenance import ProbeRecord
from ood_scores.models.opening import preprocessing
from ood_scores.probes import ODIN, PROBES, ParameterGradients
from ood_scores.scorers import create_scorer


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def sets(model: nn.Module) -> dict[str, FeatureSet]:
    """Feature sets, extracted in the memory format in which a detector runs the model, on a GPU too."""
    probes = ["odin", "rankfeat", "fgsm", "gram", "norms", ParameterGradients(groups=("fc",))]
    return {
        name: extracted(model, rows, seed, layers="stages", probes=probes, channels_last=False)
        for name, rows, seed in (("fit", 200, 1), ("id", 199, 2), ("new", 64, 3))
    }


SCORERS: dict[str, Any] = {
    "energy": "energy",
    "gradnorm": "gradnorm",
    "mahalanobis": "mahalanobis",
    "react": "react",
    "vim": "vim",
    "knn": "knn",
    "pnml": "pnml",
    "block_norm": "block_norm",
    "gram": "gram",
    "mahalanobis_layers": "mahalanobis_layers",
    "odin": "odin",
    "rankfeat": "rankfeat",
    "gradnorm_params": create_scorer("gradnorm_params", group="fc"),
    "fusion": Fusion(["energy", "mahalanobis"]),
}


# ---- predictions


@pytest.mark.parametrize("name", SCORERS)
def test_predict_is_extract_score_and_compare(name: str, model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    detector = calibrate(SCORERS[name], model, fit=sets["fit"], id=sets["id"])
    logits = sets["new"].logits
    assert logits is not None
    scorer = ood_scores.create_scorer(name, **({"group": "fc"} if name == "gradnorm_params" else {}))
    if name == "fusion":
        scorer = Fusion(["energy", "mahalanobis"])
    scores = ood_scores.score(scorer, sets["new"], fit=sets["fit"]).numpy()
    calibration = scorer.score(sets["id"]).numpy()

    found = detector.predict(Rows(64, 3).inputs)
    assert np.array_equal(found.score, scores)
    assert np.array_equal(found.label, logits.argmax(dim=1).numpy())
    assert np.allclose(found.probability, logits.double().softmax(dim=1).amax(dim=1).numpy(), rtol=1e-6)
    assert np.array_equal(found.p_value, [(1 + (calibration <= score).sum()) / 200 for score in scores])
    assert np.array_equal(found.is_ood, scores < threshold(calibration, 0.95).value)
    assert np.array_equal(found.is_ood, found.p_value <= 10 / 200)
    assert same(found, detector.decide(sets["new"]))
    assert [values.dtype for values in found.columns().values()] == [np.int64, *[np.float64] * 3, np.bool_]


def test_loaders_and_feature_sets_result_in_the_same_detector(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    from_sets = calibrate("mahalanobis", model, fit=sets["fit"], id=sets["id"])
    from_loaders = calibrate("mahalanobis", model, fit=loader(200, 1), id=loader(199, 2), channels_last=False)
    inputs = Rows(64, 3).inputs
    assert same(from_sets.predict(inputs), from_loaders.predict(inputs))


def test_the_requested_shares_are_used(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    scores = ood_scores.score("energy", sets["id"])
    for keep, delta in ((0.8, None), (0.9, 0.05)):
        found = calibrate("energy", model, id=sets["id"], keep=keep, delta=delta).calibration.thresholds
        assert found == (threshold(scores, keep, delta=delta),)


def test_each_predicted_class_has_its_own_threshold_and_p_values(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    detector = calibrate("energy", model, id=sets["id"], keep=0.8, per_class=True)
    scores = ood_scores.score("energy", sets["id"]).numpy()
    assert sets["id"].logits is not None
    predicted = sets["id"].logits.argmax(dim=1).numpy()
    limits = class_thresholds(scores, predicted, 4, 0.8)
    assert detector.calibration.thresholds == limits
    assert len({limit.value for limit in limits}) > 1
    found = detector.predict(Rows(64, 3).inputs)
    for row in range(64):
        label, score = found.label[row], found.score[row]
        assert found.is_ood[row] == (score < limits[label].value)
        assert found.p_value[row] == p_values(scores[predicted == label], [score])[0]


def test_a_class_without_calibration_rows_has_p_values_of_1(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    assert sets["id"].logits is not None
    predicted = sets["id"].logits.argmax(dim=1)
    missing = int(predicted[0])
    with pytest.warns(UserWarning, match="1 of 4 classes"):
        detector = calibrate("energy", model, id=sets["id"][predicted != missing], keep=0.5, per_class=True)
    found = detector.decide(sets["id"][predicted == missing])
    assert (found.p_value == 1).all()
    assert not found.is_ood.any()


def test_names_of_classes(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    detector = calibrate("energy", model, id=sets["id"], classes=["ant", "bee", "cow", "dog"])
    frame = detector.decide(sets["new"]).to_pandas()
    assert list(frame) == ["label", "probability", "score", "p_value", "is_ood", "class_name"]
    assert list(frame["class_name"]) == [["ant", "bee", "cow", "dog"][label] for label in frame["label"]]
    with pytest.raises(BadInput, match="4 classes, but there are 1 names"):
        calibrate("energy", model, id=sets["id"], classes=["ant"])


def test_precision_is_that_of_the_calibration_set(model: nn.Module) -> None:
    halves = extracted(model, 199, 2, amp="bf16", dtype="float16")
    detector = calibrate("energy", model, id=halves)
    assert (detector.forward.options.amp, detector.forward.options.dtype) == ("bf16", "float16")
    new = extracted(model, 64, 3, amp="bf16", dtype="float16")
    assert same(detector.predict(Rows(64, 3).inputs), detector.decide(new))


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [weight.stride() for weight in model.parameters()]


def test_channels_last_is_applied_as_in_extraction(tmp_path: Path) -> None:
    model = network()
    seen: list[bool] = []
    model.get_submodule("conv2").register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    options: Any = {"channels_last": True, "dtype": "float16"}
    from_set = calibrate("energy", model, id=extracted(model, 199, 2, **options))
    from_loader = calibrate("energy", model, id=loader(199, 2), **options)
    new, before = extracted(model, 64, 3, **options), strides(model)
    assert all(seen)
    from_set.save(tmp_path / "detector")
    described = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert (described["run"]["channels_last"], described["run"]["compile"]) == (True, False)
    for detector in (from_set, from_loader, ood_scores.Detector.load(tmp_path / "detector", model)):
        assert detector.forward.options == ExtractionOptions(channels_last=True, dtype="float16")
        seen.clear()
        assert same(detector.predict(Rows(64, 3).inputs), detector.decide(new))
        assert seen == [True]
    assert strides(model) == before


def test_compile_is_applied_as_in_extraction(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def compiled(model: nn.Module) -> Any:
        made.append(model)
        return original(model, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    model = network()
    detector = calibrate("energy", model, id=extracted(model, 199, 2, compile=True, channels_last=False))
    made.clear()
    again = pickle.loads(pickle.dumps(detector))
    assert len(made) == 1
    for rows in (64, 5, 64):
        expected = detector.decide(extracted(model, rows, 3, channels_last=False))
        assert same(detector.predict(Rows(rows, 3).inputs), expected)
        assert same(again.predict(Rows(rows, 3).inputs), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "parameters"), [("gradient_classifier", {}), ("gradnorm_params", {"group": "fc"})])
def test_loaders_are_run_with_the_probes_that_the_scorer_needs(
    name: str, parameters: dict[str, Any], model: nn.Module
) -> None:
    scorer = create_scorer(name, **parameters)
    detector = calibrate(scorer, model, fit=loader(80, 1) if scorer.fit_needs else None, id=loader(60, 2))
    assert np.isfinite(detector.predict(Rows(5, 3).inputs).score).all()


def test_options_require_loaders(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    with pytest.raises(BadInput, match="amp apply to loaders, but there are only feature sets"):
        calibrate("mahalanobis", model, fit=sets["fit"], id=sets["id"], amp="bf16")
    found = calibrate("odin", model, id=loader(150, 2), probes=[ODIN(epsilon=0.2)], amp="bf16")
    assert found.forward.options == ExtractionOptions(amp="bf16", probes=[ODIN(epsilon=0.2)])
    assert calibrate("odin", model, id=loader(150, 2)).forward.options.probes == (ODIN(),)


def test_parameters_of_the_scorer_are_no_options(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    message = r"no parameters of the scorer 'knn', such as k: pass .* ood_scores\.create_scorer\('knn', k=5\)"
    for fit, held_out in ((sets["fit"], sets["id"]), (loader(80, 1), loader(60, 2))):
        with pytest.raises(UnknownName, match=message):
            calibrate("knn", model, fit=fit, id=held_out, k=5)
    with pytest.raises(UnknownName, match=r"calibrate has no argument 'kep' \(did you mean 'keep'\?\)"):
        calibrate("energy", model, id=sets["id"], kep=0.9)


def test_a_model_that_mixes_its_inputs_is_refused() -> None:
    class Halving(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return super().forward(x[: len(x) // 2] if self.halves else x)

    model = Halving(nn.Flatten(), nn.Linear(192, 4)).eval()
    model.halves = False  # type: ignore[assignment]
    detector = calibrate("energy", model, id=loader(100, 2))
    model.halves = True  # type: ignore[assignment]
    with pytest.raises(BadInput, match="the model mixes its inputs: 8 inputs resulted in 4 rows of features"):
        detector.predict(Rows(8, 3).inputs)


def test_probes_are_those_of_the_calibration_set(model: nn.Module) -> None:
    probe = ODIN(epsilon=0.2, temperature=7.0, std=(0.1, 0.2, 0.3))
    detector = calibrate("odin", model, id=extracted(model, 150, 2, probes=[probe]))
    assert detector.forward.options.probes == (probe,)
    by_hand = FeatureSet(torch.rand(30, 3), torch.rand(30, 4), extras={"odin": torch.rand(30, 4)})
    with pytest.raises(BadInput, match="contains odin, but its provenance does not describe how it was computed"):
        calibrate("odin", model, id=by_hand)


def test_activation_ratio_reads_what_the_calibration_set_has(model: nn.Module) -> None:
    mapped, pooled = extracted(model, 150, 2, probes=["activations"]), extracted(model, 150, 2)
    for id, of, probes in ((mapped, "map", ["activations"]), (pooled, "features", [])):
        detector = calibrate("activation_ratio", model, id=id)
        assert detector.scorer == ood_scores.create_scorer("activation_ratio", of=of)
        assert [probe.name for probe in detector.forward.options.all_probes] == probes
        expected = ood_scores.score("activation_ratio", id, of=of).numpy()
        np.testing.assert_allclose(detector.predict(Rows(150, 2).inputs).score, expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(name for name, probe in PROBES.items() if not probe.reads_a_file))
def test_every_probe_is_restored_from_its_description(name: str) -> None:
    assert probe_of(record_of(PROBES[name]())) == PROBES[name]()


def test_a_description_of_a_probe_runs_no_code() -> None:
    record = ProbeRecord("ParameterGradients", {"p": {"float": "inf"}})
    assert probe_of(record) == ParameterGradients(p=float("inf"))
    for kind, parameters in (
        ("__import__", {}),
        ("ODIN", {"epsilon": {"repr": "__import__('os')"}}),
        ("Missing", {"name": "x"}),
        ("ODIN", {"wrong": 1}),
    ):
        with pytest.raises(BadInput, match=r"cannot create the probe .* again"):
            probe_of(ProbeRecord(kind, parameters))


def test_passes_name_the_cost_of_a_scorer(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    passes = {
        name: calibrate(name, model, fit=sets["fit"], id=sets["id"]).passes for name in ("energy", "gram", "rankfeat")
    }
    assert passes["energy"] == passes["gram"] == "one forward pass"
    assert passes["rankfeat"] == "one forward pass, and further forward passes for rankfeat"
    detector = calibrate("odin", model, id=sets["id"])
    assert repr(detector).endswith("after 199 rows; one forward pass, and backward passes for odin)")
    assert repr(detector).startswith("Detector(odin on tiny_net: keeps 0.95 of ID data by score >= ")


# ---- the model


def test_the_model_is_left_as_it_was(sets: dict[str, FeatureSet]) -> None:
    model = network()
    model.train()
    model.get_submodule("bn1").eval()
    modes = [module.training for module in model.modules()]
    state = {name: values.clone() for name, values in model.state_dict().items()}
    detector = calibrate("odin", model, id=sets["id"], device="cpu")
    generator = torch.get_rng_state()
    expected = calibrate("odin", network(), id=sets["id"], device="cpu").predict(Rows(8, 3).inputs)
    assert same(detector.predict(Rows(8, 3).inputs), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], values) for name, values in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_scorer_is_copied(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    scorer = create_scorer("mahalanobis")
    detector = calibrate(scorer, model, fit=sets["fit"], id=sets["id"])
    assert not scorer.is_fitted
    expected = detector.decide(sets["new"])
    fitted = create_scorer("mahalanobis").fit(sets["fit"])
    detector = calibrate(fitted, model, id=sets["id"])
    fitted.fit(sets["new"])
    assert same(detector.decide(sets["new"]), expected)


def test_threads_wait_for_each_other(sets: dict[str, FeatureSet]) -> None:
    model = network()
    model.get_submodule("fc").register_forward_hook(lambda *_: time.sleep(0.001))  # others come between
    detectors = [calibrate(name, model, fit=sets["fit"], id=sets["id"]) for name in ("mahalanobis", "gradnorm")]
    calls = [(detector, Rows(16, seed).inputs) for seed in range(12) for detector in detectors]
    expected = [detector.predict(inputs) for detector, inputs in calls]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda call: call[0].predict(call[1]), calls)
        assert all(map(same, found, expected))


def test_copies_are_independent(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    detector = calibrate("mahalanobis", model, fit=sets["fit"], id=sets["id"])
    expected = detector.predict(Rows(16, 3).inputs)
    copy = pickle.loads(pickle.dumps(detector))
    assert copy.forward.model is copy.model is not model
    assert same(copy.predict(Rows(16, 3).inputs), expected)


def test_refuses_other_weights(sets: dict[str, FeatureSet]) -> None:
    other = network(1)
    with pytest.raises(OtherModel, match="id was extracted with tiny_net with weights"):
        calibrate("energy", other, id=sets["id"])
    with pytest.raises(OtherModel, match="fit was extracted with tiny_net"):
        calibrate("mahalanobis", other, fit=sets["fit"], id=loader(150, 2))
    with pytest.raises(OtherModel, match="was fitted on"):
        calibrate(create_scorer("mahalanobis").fit(sets["fit"]), other, id=loader(150, 2))
    detector = calibrate("energy", other, id=loader(150, 2))
    with pytest.raises(OtherModel, match="this set"):
        detector.decide(sets["new"])


def test_errors_of_calibrate(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    with pytest.raises(NotFitted, match="pass fit="):
        calibrate("mahalanobis", model, id=sets["id"])
    with pytest.raises(BadInput, match="'ensemble', which no registered probe computes"):
        calibrate("ensemble", model, id=sets["id"])
    with pytest.raises(
        MissingInput, match="a threshold per class needs predicted classes, but the sets have no logits"
    ):
        calibrate("feature_norm", model, id=FeatureSet(torch.rand(30, 16)), per_class=True)
    with pytest.raises(BadInput, match="keep"):
        calibrate("energy", model, id=sets["id"], keep=1.0)
    with pytest.warns(UserWarning, match="at least 99 are needed"):
        detector = calibrate("energy", model, id=sets["id"][:50], keep=0.99)
    assert not detector.decide(sets["new"]).is_ood.any()


def test_warns_of_calibrating_on_rows_of_the_fit_set(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    fit = sets["fit"]
    rows = len(fit) - 100
    for part, id, shared in ((fit, fit, f"{len(fit)} of {len(fit)}"), (fit[:150], fit[100:], f"50 of {rows}")):
        with pytest.warns(UserWarning, match=f"on {shared} rows that 'mahalanobis' was fitted on"):
            calibrate("mahalanobis", model, fit=part, id=id)
    bare = FeatureSet(fit.features, fit.logits, fit.labels, fit.head)  # known by the features alone
    with pytest.warns(UserWarning, match=f"on 50 of {rows} rows that 'mahalanobis' was fitted on"):
        calibrate("mahalanobis", model, fit=bare[:150], id=bare[100:])
    with pytest.warns(UserWarning, match="was fitted on"):
        calibrate(create_scorer("mahalanobis").fit(fit), model, id=fit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate("mahalanobis", model, fit=fit[:100], id=fit[100:])
        calibrate("energy", model, fit=fit, id=fit)


def test_warns_of_labels_that_are_not_the_classes(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    found = sets["id"]
    assert found.logits is not None
    right = found.logits.argmax(dim=1)
    classes = found.logits.shape[1]
    for labels, message in (
        (right + 1, f"labels run from . to {classes}, but class indices must be in 0 .. {classes - 1}"),
        ((right + 1) % classes, f"the accuracy on the ID set is 0.00%, near chance for {classes} classes"),
    ):
        with pytest.warns(UserWarning, match=message):
            calibrate("energy", model, id=FeatureSet(found.features, found.logits, labels, found.head))


def test_preprocessing_that_differs_from_that_of_the_calibration_set(model: nn.Module) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    own = DataLoader(ImageArrays(pixels, transform=preprocessing(model)), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate("energy", model, id=own)
    with pytest.raises(BadInput, match=r"of 8 of its images, \d have another label, and features differ by \d+\.\d%"):
        calibrate("energy", model, id=own, preprocessing={"mean": (0.1, 0.1, 0.1)})
    feats = ood_scores.extract(model, own, progress=False)  # the images of which are unknown
    with pytest.warns(
        UserWarning, match=r"preprocessing of the calibration images was Compose.* passed to predict is Compose"
    ):
        detector = calibrate("energy", model, id=feats, preprocessing={"mean": (0.1, 0.1, 0.1)})
    inputs = torch.stack([preprocessing(model, mean=(0.1, 0.1, 0.1))(Image.fromarray(image)) for image in PIXELS])
    assert same(detector.predict(PIXELS), detector.predict(inputs))


# ---- a stream, a graph


def test_monitor(model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    detector = calibrate("energy", model, id=sets["id"])
    monitor = detector.monitor()
    found = detector.predict(Rows(64, 3).inputs)
    monitor.update(found.score)
    assert monitor.rejection_rate == found.is_ood.mean()
    assert monitor.expected_rate == 10 / 200
    assert not monitor.drifted()
    monitor.update(np.full(100, detector.calibration.scores[0]))
    assert monitor.drifted()


def test_graph(tmp_path: Path, model: nn.Module, sets: dict[str, FeatureSet]) -> None:
    pytest.importorskip("onnxruntime")
    from ood_scores.detector.export import run_onnx

    detector = calibrate("gradnorm", model, id=sets["id"], keep=0.7, per_class=True, device="cpu")
    inputs = Rows(64, 3).inputs
    detector.export_onnx(tmp_path / "detector.onnx", inputs)
    expected = detector.predict(inputs)
    assert np.array_equal(run_onnx(tmp_path / "detector.onnx", inputs)["is_ood"], expected.is_ood)
    assert 0 < expected.is_ood.sum() < 64
    _, score, _ = detector.export(inputs).module()(inputs)
    assert np.allclose(score.numpy(), expected.score, rtol=1e-6)
    half = calibrate("gradnorm", model, id=extracted(model, 100, 2, amp="bf16"))
    with pytest.raises(BadInput, match="mixed precision"):
        half.export(inputs)


# ---- real images


def real_sets(model: nn.Module, folder: Path) -> dict[str, FeatureSet]:
    spec = importlib.util.spec_from_file_location("real_images", folder / "load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    transform = preprocessing(model)
    sets = {}
    for name, rows in (("cifar10_train", 2000), ("cifar10_test", 2000)):
        images, labels = module.load(name)
        dataset = ImageArrays(images[:rows], labels[:rows], transform, name)
        sets[name] = ood_scores.extract(
            model, DataLoader(dataset, 250), layers="stages", probes=["gram", "norms"], progress=False
        )
    return sets


@pytest.mark.skipif("OOD_SCORES_DATA" not in os.environ, reason="OOD_SCORES_DATA does not name a folder of real images")
def test_kept_share_of_held_out_images_for_every_scorer() -> None:
    folder = Path(os.environ["OOD_SCORES_DATA"])
    model = ood_scores.models.opening.load_model(
        "cifar_resnet20", folder / "checkpoints" / "cifar10_resnet20.safetensors"
    )
    sets = real_sets(model, folder)
    fit, id, held = sets["cifar10_train"], sets["cifar10_test"][:1000], sets["cifar10_test"][1000:]
    level = 1 - 50 / 1001
    error = (level * (1 - level) * (1 / 1002 + 1 / 1000)) ** 0.5  # of a beta-binomial share
    kept = {}
    for name in ood_scores.list_scorers():
        scorer = create_scorer(name)
        if not all(held.has(need) and fit.has(need) for need in {*scorer.needs, *scorer.fit_needs} - {"labels"}):
            continue
        detector = calibrate(scorer, model, fit=fit, id=id)
        found = detector.decide(held)
        limit = detector.calibration.thresholds[0].value
        kept[name] = (1 - found.is_ood.mean(), (found.score > limit).mean())  # rows tied with the threshold are kept
    assert len(kept) > 45
    assert min(share for share, _ in kept.values()) > level - 4 * error, kept
    assert max(share for _, share in kept.values()) < level + 4 * error, kept


def test_images_that_cannot_be_read_have_rows_without_scores(tmp_path: Path) -> None:
    model = network()
    detector = calibrate("energy", model, id=loader(64, 2))
    images: list[Any] = [Image.fromarray(pixels) for pixels in PIXELS]
    (tmp_path / "bad.png").write_bytes(b"damaged")
    mixed = [tmp_path / "bad.png", images[0], b"no image", *images[1:]]
    with pytest.warns(
        RowsLeftOut, match=r"2 of 7 images cannot be read \(image 0: .*bad\.png.*\): their scores are NaN"
    ):
        found = detector.predict(mixed)
    assert found.is_read.tolist() == [False, True, False, True, True, True, True]
    assert list(found.errors) == [0, 2]
    assert "bad.png" in found.errors[0]
    read = detector.predict(images)
    for name, values in found.columns().items():
        np.testing.assert_array_equal(values[found.is_read], read.columns()[name])
        assert values.dtype == read.columns()[name].dtype
    assert np.isnan([found.score[[0, 2]], found.p_value[[0, 2]], found.probability[[0, 2]]]).all()
    assert found.label[[0, 2]].tolist() == [-1, -1]
    assert found.is_ood[[0, 2]].all()
    frame = found.to_pandas()
    assert list(frame) == [*read.to_pandas(), "error"]
    assert frame["error"].notna().tolist() == frame["is_ood"].isna().tolist() == (~found.is_read).tolist()
    assert frame["label"].dropna().tolist() == read.label.tolist()
    assert read.is_read.all()
    assert detector.predict(images).errors == {}
    for stopped in (lambda: detector.predict(mixed, on_error="raise"), lambda: detector.predict(mixed[0]),
                    lambda: detector({"image": mixed})):  # fmt: skip
        with pytest.raises(UnreadableImage, match=r"bad\.png"):
            stopped()
    with pytest.raises(MissingData, match=r"there is no image .*none\.png"):
        detector.predict([*mixed, tmp_path / "none.png"])
    with pytest.raises(EmptyInput, match=r"none of the 2 images can be read, the first because: .*bad.png"):
        detector.predict([tmp_path / "bad.png", b""])
    with pytest.raises(BadInput, match="on_error must be 'skip' or 'raise', got 'ignore'"):
        detector.predict(images, on_error="ignore")  # type: ignore[arg-type]
