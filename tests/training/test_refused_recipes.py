"""Recipes that the trainer refuses before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import OOD, imbalanced, run, weights

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
    ],
)
def test_invalid_recipe_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], error: type[OodScoresError], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(tmp_path, **changes)
    assert not list(tmp_path.glob("*.*safetensors"))


def test_missing_tensorboard_is_noticed_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *at: None if name == "tensorboard" else find(name, *at)
    )
    with pytest.raises(BadInput, match=r'pip install "ood_scores\[train\]"'):
        run(tmp_path, tensorboard=True, data={"train": "npz:nowhere.npz"})


def test_classes_without_training_images_are_allowed_if_the_recipe_sets_their_number(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no training images of 2 of 9 classes, such as class 7"):
        result = run(tmp_path / "a", model={"num_classes": 9})
    assert weights(result.checkpoint)["fc.weight"].shape == (9, 16)
    for objective in ("logit_adjustment", "pascl"):
        with pytest.warns(match="2 of 9"), pytest.raises(BadInput, match="choose an objective without a class prior"):
            run(
                tmp_path / "b",
                model={"num_classes": 9},
                auxiliary={"data": "digits?classes=7-9"},
                objective={"name": objective},
            )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 64}, "65 training images leave a last batch of 1, .*TinyNet .*drop_last = true, or choose"),
        ({"batch_size": 1}, "batch_size is 1, .*at least 2: choose another batch_size"),
    ],
)
def test_step_with_one_image_is_refused_if_batchnorm_would_see_one_value(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    sixty_five = {"epochs": 1, "data": {"train": "digits?classes=0-6&take=65"}} | changes
    with pytest.raises(BadInput, match=words):
        run(tmp_path, model={"norm_pooled": True}, **sixty_five)
    if changes["batch_size"] == 64:
        assert run(tmp_path / "dropped", model={"norm_pooled": True}, drop_last=True, **sixty_five).history
        assert run(tmp_path / "maps", **sixty_five).history


def test_step_with_one_image_and_ood_images_is_accepted(tmp_path: Path) -> None:
    tables = {"epochs": 1, "data": {"train": "digits?classes=0-6&take=65"}, "model": {"norm_pooled": True}}
    assert run(tmp_path, objective={"name": "oe"}, auxiliary=OOD, **tables).history


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
