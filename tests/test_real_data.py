"""Published checkpoints on real images: the whole path from pixels to the table."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from torch.utils.data import DataLoader

import ood_scores
import ood_scores.models.networks
from ood_scores.data.images import ImageArrays

DATA = os.environ.get("OOD_SCORES_DATA")
SUITES = Path(__file__).parents[1] / "benchmarks" / "suites"
pytestmark = pytest.mark.skipif(DATA is None, reason="OOD_SCORES_DATA does not name a folder of real images")

# auroc and fpr95_id on CIFAR-100 and on Textures, ID: CIFAR-10's test images
REFERENCE = {
    "msp": (0.88438, 0.6486, 0.88686, 0.6367),
    "max_logit": (0.89780, 0.5101, 0.87545, 0.5458),
    "energy": (0.89765, 0.5074, 0.87471, 0.5483),
    "gradnorm": (0.79312, 0.6544, 0.85106, 0.4400),
    "feature_norm": (0.76753, 0.7452, 0.68511, 0.7125),
}


def load_images(name):
    spec = importlib.util.spec_from_file_location("real_images", Path(DATA) / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name)


def real_model(architecture, checkpoint, classes):
    path = Path(DATA) / "checkpoints" / f"{checkpoint}.safetensors"
    model = timm.create_model(architecture, num_classes=classes, checkpoint_path=path)
    return model.to(memory_format=torch.channels_last)


def extract_real(model, name, folder):
    config = timm.data.resolve_model_data_config(model)
    images, labels = load_images(name)
    dataset = ImageArrays(images, labels, timm.data.create_transform(**config, is_training=False), name=name)
    return ood_scores.extract(model, DataLoader(dataset, 16), folder / f"{name}.h5", progress=False)


def test_the_five_reference_figures_on_cifar10_densenet100(tmp_path):
    model = real_model("cifar_densenet100", "cifar10_densenet100", 10)
    sets = {name: extract_real(model, name, tmp_path) for name in ("cifar10_test", "cifar100_test", "textures")}
    table = ood_scores.evaluate(
        list(REFERENCE), id=sets["cifar10_test"], ood={name: sets[name] for name in ("cifar100_test", "textures")}
    )
    assert round(table.attrs["id_accuracy"], 4) == 0.9454
    found = table.pivot(index="scorer", columns="ood", values=["auroc", "fpr95_id"])
    expected = pd.DataFrame(REFERENCE, index=["near", "near fpr", "far", "far fpr"]).T
    columns = [
        ("auroc", "cifar100_test"),
        ("fpr95_id", "cifar100_test"),
        ("auroc", "textures"),
        ("fpr95_id", "textures"),
    ]
    difference = found[columns].loc[list(REFERENCE)].to_numpy() - expected.to_numpy()
    assert abs(difference).max() < 5e-5, difference  # equal to 4 decimals


@pytest.mark.parametrize(
    ("architecture", "checkpoint", "classes", "images", "accuracy"),
    [
        ("cifar_resnet20", "cifar10_resnet20", 10, "cifar10_test", 0.9173),
        ("cifar_densenet100", "cifar100_densenet100", 100, "cifar100_test", 0.7506),
    ],
)
def test_accuracy_of_the_other_checkpoints(tmp_path, architecture, checkpoint, classes, images, accuracy):
    model = real_model(architecture, checkpoint, classes)
    feats = extract_real(model, images, tmp_path)
    right = (feats.logits.argmax(dim=1) == feats.labels).double().mean()
    assert round(float(right), 4) == accuracy


def test_the_reference_figures_on_imagenet(tmp_path):
    """The suite's first part, with the scorers and numbers of the reference alone, agrees to 4 decimals of a share."""
    spec = ood_scores.benchmark.load_spec(SUITES / "imagenet_real.toml")
    part = spec.parts[0]
    published = {number.scorer for number in part.published}
    small = replace(
        part,
        scorers=tuple(table for table in part.scorer_tables if table.label in published),
        measures=(),
        left_out={},
        extraction=replace(part.extraction, probes=(), layers=None),
    )
    one = replace(spec, parts=(small,))
    results = ood_scores.benchmark.run(one, out=tmp_path, jobs=1, device="cpu", progress=False)
    assert len(results.comparison) == 6 * 2 * 2 + 1
    difference = results.comparison["ours"] - results.comparison["published"]
    assert difference.abs().max() < 0.005, results.comparison  # percentage points
