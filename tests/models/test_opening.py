"""Opening models: wrapped checkpoints, their sizes, and errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import resnet
from safetensors.torch import save_file
from torch import Tensor

from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.checkpoints import read_checkpoint
from ood_scores.models.opening import load_model, preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _resized(image: Any) -> Tensor:
    from torchvision.transforms import functional as F

    return F.to_tensor(F.resize(image, 32, F.InterpolationMode.BILINEAR, antialias=True))


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "plain.pth", "timm.pth", "state_dict.pth", "model.pt", "ema.bin"]
)
def test_wrapped_checkpoints_are_understood(checkpoints: dict[str, Path], file: str) -> None:
    expected = resnet(num_classes=7).state_dict()
    found = load_model("cifar_resnet20", checkpoints[file]).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gray_checkpoint_takes_gray_images(tmp_path: Path) -> None:
    save_file(resnet(in_chans=1).state_dict(), tmp_path / "gray.safetensors")
    model = load_model("cifar_resnet20", tmp_path / "gray.safetensors")
    image = open_dataset("digits")[0][0]
    found = preprocessing(model)(image)
    expected = (_resized(image)[:1] - float(np.mean(MEAN))) / float(np.mean(STD))
    torch.testing.assert_close(found, expected)


def test_two_heads_are_both_loaded(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "deit.pth")
    model: Any = load_model(name, tmp_path / "deit.pth")
    assert (model.head.out_features, model.head_dist.out_features) == (5, 5)


def test_errors_for_bad_checkpoints(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("junk.pth", "junk.safetensors", "empty.pth"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no weights at all")
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="contains no weights by name"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"layer1\.3\.bn1\.bias is missing.* more"):
        load_model("cifar_resnet56", checkpoints["plain.pth"])
    with pytest.raises(CheckpointError, match=r"linear\.weight is \[7, 64\], expected \[3, 64\]"):
        load_model("cifar_resnet20", checkpoints["plain.pth"], num_classes=3)


def test_errors_for_unavailable_models(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UnknownName, match=r"did you mean .cifar_resnet20"):
        load_model("cifar_resnet21")
    with pytest.raises(UnknownName, match="nonsense"):
        load_model("resnet18.nonsense", checkpoints["plain.pth"])
    with pytest.raises(BadInput, match="needs a checkpoint"):
        load_model("resnet18", num_classes=10)
    with pytest.raises(CheckpointError, match="pass a checkpoint"):
        load_model("cifar_resnet20")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    with pytest.raises(CheckpointError, match="network is reachable, or pass a checkpoint"):
        load_model("resnet18")


def test_normalization_is_validated() -> None:
    model = resnet()
    with pytest.raises(BadInput, match="2 values, but the model takes 3"):
        preprocessing(model, mean=[0.5, 0.5])
    with pytest.raises(BadInput, match="positive"):
        preprocessing(model, std=[0.0])
