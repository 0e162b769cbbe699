"""Models by names of every kind: the same logits as the library's own, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import get_model, get_model_weights

import ood_scores
from ood_scores import Detector, calibrate
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, CheckpointError, StaleCache, UnknownName
from ood_scores.models import hub
from ood_scores.models.opening import load_model, load_stored_model, preprocessing, require_known

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found if isinstance(found, Tensor) else found.logits


def saved_by_timm(folder: Path, safe: bool = False, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, global_pool="max").eval()
    model_config = {"num_classes": 4, "pretrained_cfg": {"mean": (0.1, 0.2, 0.3)}}
    arguments = {"global_pool": "max", **config}
    timm.models.save_for_hf(
        model, str(folder), model_config=model_config, model_args=arguments, safe_serialization=safe
    )
    return model


def saved_by_transformers(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
    config = transformers.ViTConfig(**sizes)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


# ---- timm's format


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("prefix", ["local-dir:", ""])
def test_folder_of_timm(prefix: str, safe: bool, inputs: Tensor, tmp_path: Path) -> None:
    expected = saved_by_timm(tmp_path, safe)
    model = load_model(f"{prefix}{tmp_path}")
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.1, 0.2, 0.3)


def test_repository_of_the_hub(inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved_by_timm(tmp_path)
    asked = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        if not (tmp_path / name).exists():
            raise hub.EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = load_model("hf-hub:owner/name@v1")
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    assert ("owner/name", "pytorch_model.bin", "v1") in asked


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "hf:google/vit-base-patch16-224"])
def test_error_without_network_speaks_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    target = name.partition(":")[2]
    with pytest.raises(CheckpointError, match=f"cache of the Hugging Face hub .*: .*hf download {target} --local-dir"):
        load_model(name)


def test_description_of_a_stranger_names_no_other_files(tmp_path: Path) -> None:
    saved_by_timm(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["pretrained_cfg"] |= {"url": "http://example.org/x.pth", "file": "/etc/passwd", "custom_load": True}
    (tmp_path / "config.json").write_text(json.dumps(described))
    config: Any = load_model(f"local-dir:{tmp_path}").pretrained_cfg
    own: Any = timm.get_pretrained_cfg("test_resnet")
    own = own.to_dict()
    assert all(config.get(key) == own.get(key) for key in ("url", "file", "custom_load"))
    described["model_args"] |= {"checkpoint_path": "/etc/passwd"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(BadInput, match="'checkpoint_path' is not an argument of the network"):
        load_model(f"local-dir:{tmp_path}")


def test_checkpoint_of_another_size_for_a_folder(inputs: Tensor, tmp_path: Path) -> None:
    saved_by_timm(tmp_path)
    other = timm.create_model("test_resnet", num_classes=9, global_pool="max").eval()
    torch.save(other.state_dict(), tmp_path / "tuned.pth")
    model = load_model(f"local-dir:{tmp_path}", tmp_path / "tuned.pth")
    assert torch.equal(logits(model, inputs), logits(other, inputs))


# ---- torchvision


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT"])
def test_torchvision_with_a_checkpoint(weights: str, inputs: Tensor, tmp_path: Path) -> None:
    expected = get_model("mobilenet_v3_large", num_classes=7)
    torch.save({"state_dict": expected.state_dict()}, tmp_path / "c.pth")
    model = load_model("torchvision:mobilenet_v3_large", tmp_path / "c.pth", weights=weights)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    transform = get_model_weights("mobilenet_v3_large")[weights].transforms()
    assert torch.equal(preprocessing(model)(PHOTO), transform(PHOTO))


def test_weights_of_torchvision_are_opened_or_named(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = get_model("mobilenet_v3_small")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: expected.state_dict())
    assert torch.equal(logits(load_model("torchvision:mobilenet_v3_small"), inputs), logits(expected, inputs))

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(CheckpointError, match=r"mobilenet_v3_small-.*\.pth.*no route.*pass a checkpoint file"):
        load_model("torchvision:mobilenet_v3_small")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("torchvision:resnet19", {}, UnknownName, "did you mean 'resnet1"),
        ("torchvision:resnet18", {"weights": "IMAGENET1K_V9"}, UnknownName, "did you mean 'IMAGENET1K_V1'"),
        ("torchvision:resnet18", {"weights": "/etc/passwd"}, BadInput, "not a plain value"),
        ("torchvision:resnet18", {"progress": True}, BadInput, "'progress' is not an argument"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, UnknownName, "torchvision has no classifier"),
        ("hf:x/y", {"revision": "main"}, BadInput, "has no argument 'revision'"),
        ("hf:", {}, BadInput, "write hf:OWNER/NAME"),
        ("local-dir:", {}, BadInput, "write local-dir:"),
        ("torchvison:resnet18", {}, UnknownName, r"no kind of model 'torchvison' \(did you mean 'torchvision'\?\)"),
        ("local_dir:/x", {}, UnknownName, "did you mean 'local-dir'"),
        ("own.py:small", {}, BadInput, "runs only if you ask for it: if you trust own.py, add --import own.py"),
    ],
)
def test_names_and_arguments_are_checked_without_network(
    name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        require_known(name, arguments)


# ---- transformers


@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_folder_of_transformers(prefix: str, inputs: Tensor, tmp_path: Path) -> None:
    expected = saved_by_transformers(tmp_path)
    model = load_model(f"{prefix}{tmp_path}")
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(preprocessing(model)(PHOTO), processor(PHOTO, return_tensors="pt")["pixel_values"][0])
    plain = preprocessing(model, mean=[0.0] * 3, std=[1.0] * 3)(PHOTO)
    torch.testing.assert_close(plain, preprocessing(model)(PHOTO) / 2 + 0.5)
    with pytest.raises(BadInput, match="its own preprocessing, in which crop_pct cannot be set"):
        preprocessing(model, crop_pct=0.9)


def test_checkpoints_of_transformers(inputs: Tensor, tmp_path: Path) -> None:
    """``save_pretrained`` of transformers 5 writes other names than those of ``state_dict``."""
    expected = saved_by_transformers(tmp_path)
    torch.save(expected.state_dict(), tmp_path / "own.pth")
    for file in ("model.safetensors", "own.pth"):
        model = load_model(f"hf:{tmp_path}", tmp_path / file)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))
    torch.save(dict(list(expected.state_dict().items())[3:]) | {"more": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth does not fit 'ViT.* is missing; .*more is not of this"):
        load_model(f"hf:{tmp_path}", tmp_path / "other.pth")


def test_incomplete_folder_of_transformers_is_refused(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for name, error, message in [
        ("ViTForMaskedImageModeling", UnknownName, "no classifier or encoder 'ViTForMaskedImageModeling'"),
        ("TimmWrapperForImageClassification", UnknownName, "write hf-hub:OWNER/NAME for a model of timm"),
        ("Evil", UnknownName, r"FILE\.py:FUNCTION for a class of your own"),
        ("Dinov2ForImageClassification", CheckpointError, "cannot open the weights|has no weights for"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": [name]}))
        with pytest.raises(error, match=message):
            load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config\.json in .*save_pretrained"):
        load_model(f"hf:{tmp_path}")


def test_encoder_without_pooling_layer(inputs: Tensor, tmp_path: Path) -> None:
    """DINO: its class has a pooling layer by default, of which its checkpoint has no weights."""
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    expected = transformers.ViTModel(config, add_pooling_layer=False).eval()
    expected.save_pretrained(tmp_path)
    with torch.no_grad():
        tokens = expected(inputs).last_hidden_state
    for checkpoint in (None, tmp_path / "model.safetensors"):
        model = load_model(f"hf:{tmp_path}", checkpoint)
        with torch.no_grad():
            found = model(inputs)
        assert torch.equal(found.last_hidden_state, tokens)
        assert found.pooler_output is None
    fit, validation = [(inputs, torch.arange(3) % 2)], [(inputs.flip(3), torch.arange(3) % 2)]
    detector = calibrate("mahalanobis", model, fit=fit, id=validation, keep=0.5, pool="cls", device="cpu")
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    assert np.array_equal(loaded.predict(inputs).score, detector.predict(inputs).score)


def test_weights_that_a_model_of_transformers_does_not_use(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(state | {"more": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="weights that ViTForImageClassification does not use, such as more"):
        load_model(f"hf:{tmp_path}")


def test_sharded_folder_of_transformers(inputs: Tensor, tmp_path: Path) -> None:
    expected: Any = saved_by_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    expected.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for checkpoint in (None, tmp_path / "model.safetensors.index.json"):
        model = load_model(f"hf:{tmp_path}", checkpoint)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"cannot open the weights in .*{shards[0].name}"):
        load_model(f"hf:{tmp_path}")
    with pytest.raises(CheckpointError, match=f"there is no checkpoint .*{shards[0].name}"):
        load_model(f"hf:{tmp_path}", checkpoint)


@pytest.mark.parametrize("content", ["{damaged", '{"image_processor_type": "NoSuch"}'])
def test_image_processor_that_cannot_be_opened(content: str, tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot open the image processor of .*: save it again"):
        load_model(f"hf:{tmp_path}")


def test_image_processor_of_another_size(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    data = open_dataset("noise:gaussian?n=2&size=32")
    data.transform = preprocessing(model)
    with pytest.raises(BadInput, match=r"cannot take a batch of shape \[2, 3, 48, 48\].*doesn't match model"):
        ood_scores.extract(model, DataLoader(data, 2), progress=False)


def test_classifier_of_sounds_with_its_feature_extractor(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ASTConfig(**sizes, max_length=64, num_mel_bins=16)
    expected = transformers.ASTForAudioClassification(config)
    expected.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(tmp_path)
    sounds = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(load_model(f"hf:{tmp_path}"), sounds), logits(expected, sounds))


# ---- provenance and detectors


def test_arguments_that_the_weights_do_not_show_identify_a_cache(tmp_path: Path) -> None:
    saved_by_timm(tmp_path)
    data = open_dataset("noise:gaussian?n=6&size=32")

    def extract(**arguments: Any) -> Any:
        model = load_model("test_resnet", tmp_path / "pytorch_model.bin", **arguments)
        data.transform = preprocessing(model)
        return ood_scores.extract(model, DataLoader(data, 6), tmp_path / "c.h5", progress=False).provenance

    made_by = extract()
    assert (made_by.model, made_by.arguments) == ("test_resnet", {})
    assert extract() == made_by
    with pytest.raises(StaleCache, match=r"arguments of the network: cache \{\}, now \{'global_pool': 'max'\}"):
        extract(global_pool="max")
    model = timm.create_model("test_resnet", checkpoint_path=tmp_path / "pytorch_model.bin", num_classes=4)
    assert ood_scores.extract(model, DataLoader(data, 6), tmp_path / "c.h5", progress=False).provenance == made_by


@pytest.mark.parametrize("kind", ["timm", "torchvision", "transformers"])
def test_detector_creates_its_model_again(kind: str, inputs: Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "timm":
        saved_by_timm(folder)
        model = load_model(f"local-dir:{folder}")
    elif kind == "torchvision":
        torch.save(get_model("mobilenet_v3_small", num_classes=7).state_dict(), folder / "c.pth")
        model = load_model("torchvision:mobilenet_v3_small", folder / "c.pth")
    else:
        saved_by_transformers(folder)
        model = load_model(str(folder))
    detector = calibrate("energy", model, id=[inputs], keep=0.5)
    detector.save(tmp_path / "detector")
    for file in folder.iterdir():
        file.unlink()
    again = Detector.load(tmp_path / "detector").predict(inputs)
    assert np.array_equal(again.score, detector.predict(inputs).score)


@pytest.mark.parametrize("network", ["hf:x/y", "hf-hub:x/y", "local-dir:/x"])
def test_stored_name_fetches_nothing(network: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names other files: pass the model"):
        load_stored_model(network, tmp_path / "model.safetensors")
