"""Every call of Python that a message or a remedy prints is run; a message with a new call fails until it is.

Calls in the blocks of the documentation have the arguments that the functions take.
"""

from __future__ import annotations

import ast
import dataclasses
import glob
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import torchvision
from PIL import Image
from printed import ROOT, messages
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import ood_scores
from ood_scores.benchmark.spec import Spec
from ood_scores.data.sources import open_dataset
from ood_scores.errors import EmptyInput
from ood_scores.evaluation.feature_norms import norm_bins
from ood_scores.evaluation.neural_collapse import neural_collapse
from ood_scores.extraction.probes import PROBES
from ood_scores.scorers.base import fitted
from ood_scores.scorers.registry import register_scorer

CALL = re.compile(r"(?<![\w.])[@.]?[A-Za-z_][\w.]*\((?:[^()]|\([^()]*\))*\)")
FORMULA = "s(x) = "

AS_PRINTED = (
    "FeatureSet(features, logits)",
    "FeatureSet(logits, logits)",
    "Head(layer.weight, layer.bias)",
    "Head(weight, bias)",
    "content.state_dict()",
    "detector.decide(ood_scores.extract(detector.model, loader))",
    "detector.predict(x)",
    "extract(model, loader)",
    "feats.with_head(probed.head)",
    "fitted()",
    "glob.glob('*.npy')",
    "load(path)",
    "logits.argmax(dim=1)",
    "model(inputs)",
    "model.named_modules()",
    "model.named_parameters()",
    "model.state_dict()",
    "neural_collapse(feats)",
    "norm_bins(feats)",
    "np.load('labels.npy')",
    "np.savez(f[:-4], images=np.load(f), labels=y)",
    "np.savez('300K_random_images.npz', images=np.load('300K_random_images.npy'))",
    "ood_scores.extract(model, loader)",
    "ood_scores.load(path, verify=False)",
    "timm.list_models()",
    "timm.list_pretrained()",
    "torch.nn.Sequential(model, layer)",
    "torch.nn.functional.normalize(model(x))",
    "transforms.Normalize(mean, std)",
    "transforms.ToTensor()",
    "weights.transforms()",
)
WITH_VALUES = {
    ".fit(train_feats)": "ood_scores.create_scorer('knn', k=3).fit(train_feats)",
    ".state_dict()": "content.state_dict()",
    ".save(X)": "load(path, verify=False).save(path)",
    '@register_scorer("a_name")': 'register_scorer("a_name")',
    "DataLoader(dataset, batch_size=...)": "DataLoader(dataset, batch_size=8)",
    "Detector.load(path, model)": "Detector.load('detector', model)",
    "Detector.load(path, preprocessing=...)": "Detector.load('detector', preprocessing=preprocessing)",
    "X(name=...)": "probes['odin'](name='mine')",
    "X.get_classifier()": "model.get_classifier()",
    "block.logits.max(dim=1)": "next(feats.blocks()).logits.max(dim=1)",
    "dataclasses.replace(spec, ...)": "dataclasses.replace(spec, title='other')",
    "extract()": "extract(model, loader)",
    "extract(...)": "extract(model, loader)",
    "extract(..., layers=X)": "extract(model, loader, layers=['conv1'])",
    "extract(..., probes=[MahalanobisODIN(fit='train.h5')])": "extracted(probes['mahalanobis_odin'](fit='train.h5'))",
    "extract(..., probes=[Mixup(proxy='folder:photos')])": "extracted(probes['mixup'](proxy='folder:photos'))",
    "extract(..., probes=[X])": "extracted(probes['norms']())",
    "ood_scores.create_scorer(X, X)": "ood_scores.create_scorer('knn', k=5)",
    "ood_scores.extract(..., probes=[X])": "extracted(probes['odin']())",
    "ood_scores.load(X, verify=False)": "ood_scores.load(path, verify=False)",
    "open_clip.get_tokenizer(NAME)": "pytest.importorskip('open_clip').get_tokenizer('ViT-B-32')",
    "open_dataset(X)": "open_dataset('folder:photos')",
    "save(..., with_model=False)": "detector.save('alone', with_model=False)",
    "save(..., arguments={...})": "detector.save('detector', arguments={'drop': 0.0})",
    "to_json()": "detector.monitor().to_json()",
    "torch.load(X, weights_only=False)": "torch.load('whole.pt', weights_only=False)",
    "torch.save(weights, X)": "torch.save(content.state_dict(), 'weights.pth')",
    "transformers.AutoTokenizer.from_pretrained(NAME)": "saved_tokenizer().from_pretrained('tokenizer')",
}
"""Calls with "...", values that are formatted in, or names of the user; and what is run for each."""

ELSEWHERE = {
    'ood_scores.Detector.from_pretrained("{repository}"{passed})': "detector/test_hub.py",
    'detector.predict(["photo.jpg"])': "detector/test_hub.py",
    "load_dataset(X)": "data/test_hub_datasets.py",
    "ood_scores.fit_linear_probe(train_feats)": "features/test_linear_probe.py",
    "ood_scores.models.class_names.in_models_order(dataset, model)": "models/test_class_names.py",
    "ood_scores.user_code.import_code(X)": "cli/test_user_code.py",
    "transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)": "extraction/test_encoders.py",
    "zero_shot_classifier(..., negatives=...)": "models/test_zero_shot.py",
    "zero_shot_classifier(model, classes, negatives=NegativeWords(nouns, adjectives))": "models/test_zero_shot.py",
}
"""Calls that need models of their own, and the tests that make them."""


def printed() -> set[str]:
    return {call for _, text in messages() if not text.startswith(FORMULA) for call in CALL.findall(text)}


def test_every_call_in_a_message_is_known() -> None:
    assert printed() - {*AS_PRINTED, *WITH_VALUES, *ELSEWHERE} == set()


def test_calls_made_elsewhere_are_made_there() -> None:
    for call, where in ELSEWHERE.items():
        name = call.partition("(")[0].rpartition(".")[2]
        assert re.search(rf"\b{name}\b", (ROOT / "tests" / where).read_text(encoding="utf-8")), call


def saved_tokenizer() -> Any:
    """Save the tokenizer of the small CLIP of other tests, and return the class that opens it."""
    import transformers
    from vision_language import tokenizer

    tokenizer().save_pretrained("tokenizer")
    return transformers.AutoTokenizer


def names() -> dict[str, Any]:
    """What the names in calls stand for; what calls read is in the working folder."""
    torch.manual_seed(0)
    model = tiny.tiny_net(num_classes=3).eval()
    labels = torch.arange(48) % 3
    images = torch.rand(48, 3, 8, 8) + labels[:, None, None, None] / 3
    dataset = TensorDataset(images, labels)
    loader = DataLoader(dataset, batch_size=16)
    Path("photos").mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(f"photos/{number}.png")
    for name in ("labels", "corrupted", "300K_random_images"):
        np.save(f"{name}.npy", np.zeros(4, np.uint8))
    torch.save(model, "whole.pt")
    feats = ood_scores.extract(model, loader, "train.h5", progress=False)
    feats.save("old.h5")
    preprocessing = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    detector = ood_scores.calibrate("energy", model, id=feats, keep=0.9, preprocessing=preprocessing)
    detector.save("detector")
    return {
        **{name: getattr(ood_scores, name) for name in ("Detector", "FeatureSet", "Head", "extract", "load")},
        "ood_scores": ood_scores,
        "np": np,
        "torch": torch,
        "timm": timm,
        "glob": glob,
        "pytest": pytest,
        "dataclasses": dataclasses,
        "transforms": transforms,
        "DataLoader": DataLoader,
        "open_dataset": open_dataset,
        "neural_collapse": neural_collapse,
        "norm_bins": norm_bins,
        "saved_tokenizer": saved_tokenizer,
        "fitted": fitted,
        "register_scorer": register_scorer,
        "model": model,
        "content": model,
        "dataset": dataset,
        "loader": loader,
        "x": images.to(model.fc.weight.device),
        "inputs": images.to(model.fc.weight.device),
        "y": np.zeros(4),
        "f": "corrupted.npy",
        "probed": SimpleNamespace(head=feats.head),
        "feats": feats,
        "train_feats": feats,
        "features": feats.features,
        "logits": feats.logits,
        "layer": torch.nn.Linear(3, 2),
        "weight": model.fc.weight,
        "bias": model.fc.bias,
        "detector": detector,
        "preprocessing": preprocessing,
        "path": "old.h5",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "spec": Spec("small", "Small", ()),
        "weights": torchvision.models.ResNet18_Weights.DEFAULT,
        "probes": {probe.name: probe for probe in PROBES.values()},
        "extracted": lambda probe: ood_scores.extract(model, loader, probes=[probe]),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calls_in_messages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known, failed = names(), {}
    for call in (*AS_PRINTED, *WITH_VALUES):
        try:
            eval(WITH_VALUES.get(call, call), known)
        except Exception as error:
            failed[call] = error
    assert failed == {}


BLOCK = re.compile(r"^([ *-]*)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def documented() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield the page, the name, and the call of every public function in the blocks of the documentation."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for _, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ood_scores."):
                    yield page.name, ast.unparse(node.func).removeprefix("ood_scores."), node


def test_calls_in_the_documentation_have_arguments_that_exist() -> None:
    found = list(documented())
    assert len(found) > 50
    for page, name, call in found:
        if "." in name or any(isinstance(each, ast.Starred) for each in call.args):
            continue
        named = {each.arg: None for each in call.keywords if each.arg}
        signature = inspect.signature(getattr(ood_scores, name))
        bind = signature.bind if all(each.arg for each in call.keywords) else signature.bind_partial
        try:
            bind(*call.args, **named)
        except TypeError as error:
            pytest.fail(f"{page}: {ast.unparse(call)}: {error}")


def test_evaluate_takes_the_scorers_of_the_documentation() -> None:
    calls = [call for _, name, call in documented() if name == "evaluate"]
    assert len(calls) > 5
    known = {"ood_scores": ood_scores, "knn": ood_scores.create_scorer("knn")}
    for call in calls:
        scorers = eval(ast.unparse(call.args[0]), known)
        with pytest.raises(EmptyInput, match="no OoD set"):
            ood_scores.evaluate(scorers, id=ood_scores.FeatureSet(torch.zeros(1, 2)), ood={})
