"""Recipes that the trainer refuses before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import OOD, imbalanced, run

from ood_scores.errors import (
    BadInput,
    BadLabels,
    EmptyInput,
    HeadNotFound,
    MissingInput,
    OodScoresError,
    UnknownName,
)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"objective": {"name": "rna"}}, MissingInput, "add \\[auxiliary\\] with data"),
        ({"objective": {"name": "rna"}, "auxiliary": OOD, "model": {"name": "tiny_plain"}}, BadInput, "BatchNorm"),
        ({"objective": {"name": "rnaa"}}, UnknownName, "choose from .*rna"),
        ({"objective": {"name": "oe", "wait": 3}, "auxiliary": OOD}, UnknownName, "no setting 'wait'"),
        ({"objective": {"name": "oe", "weight": "x"}, "auxiliary": OOD}, BadInput, "'oe' failed.*'x'"),
        ({"model": {"name": "tiny_nett"}}, UnknownName, "did you mean .tiny_net.\\?"),
        ({"model": {"layers": 3}}, BadInput, "'layers' is not an argument of the network 'tiny_net': remove it"),
        ({"model": {"pretrained": True}}, BadInput, "'pretrained' is not an argument of the network 'tiny_net'"),
        ({"model": {"cache_dir": "x"}}, BadInput, "'cache_dir' is not an argument of the network 'tiny_net'"),
        ({"model": {"num_classes": 3}}, BadLabels, "labels up to 6, but num_classes of \\[model\\] is 3"),
        ({"model": {"num_classes": 9}}, BadLabels, "no training images of 2 of 9 classes, such as class 7"),
        ({"model": {"name": "resnetv2_50x1_bit"}}, HeadNotFound, "not an nn.Linear"),
        ({"data": {"train": "npz:nowhere.npz"}}, BadInput, "there is no nowhere.npz"),
        ({"data": {"train": "torchvision:CIFAR10?split=train&root=nowhere"}}, BadInput, "add download=true"),
        ({"data": {"train": "cifar"}}, UnknownName, "no kind of dataset 'cifar'"),
        ({"data": {"train": "digits?rows=0:0"}}, EmptyInput, "no images"),
        ({"data": {"test": "digits"}}, BadLabels, "labels up to 9"),
        ({"data": {"augmentation": "rnd"}}, UnknownName, "choose from crop_flip, flip"),
        ({"data": {"augmentation": "rna"}, "model": {"in_chans": 1}}, BadInput, "needs color images"),
        ({"batch_size": 5000, "drop_last": True}, BadInput, "do not fill a batch of 5000"),
        ({"trainable": ["nothing"]}, BadInput, "no parameter matches 'nothing'"),
        ({"tensorboard": True}, BadInput, "pip install tensorboard"),
    ],
)
def test_invalid_recipe_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], error: type[OodScoresError], words: str
) -> None:
    if "tensorboard" in changes:
        pytest.MonkeyPatch().setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(error, match=words):
        run(tmp_path, **changes)
    assert not list(tmp_path.glob("*.*safetensors"))


def test_each_class_needs_at_least_one_training_image(tmp_path: Path) -> None:
    spec = imbalanced(tmp_path, [20, 0, 5])
    with pytest.raises(BadLabels, match="no training images of 1 of 3 classes, such as class 1"):
        run(tmp_path, data={"train": spec})
    single = imbalanced(tmp_path, [20, 6, 1])
    for objective in ("logit_adjustment", "pascl"):
        result = run(
            tmp_path / objective,
            data={"train": single, "validation": 0.5},
            objective={"name": objective},
            auxiliary=OOD,
        )
        assert len(result.history) == 2


def test_training_images_without_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((5, 8, 8), dtype=np.uint8))
    with pytest.raises(BadLabels, match="images without a label"):
        run(tmp_path, data={"train": f"npz:{tmp_path}/data.npz"})
