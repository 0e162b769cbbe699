"""The files in ``tests/legacy``, unpacked, with the networks, inputs and options that they were written with.

The networks are plain torch; weights and inputs are stored, so that nothing depends on a random generator.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
zipfile.ZipFile(Path(__file__).parent / "legacy" / "files.zip").extractall(FOLDER)

FACTS: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
ARRAYS: dict[str, np.ndarray] = dict(np.load(FOLDER / "expected.npz"))
"""The values that the version that wrote the files read from them."""

NEW_PARAMETERS = (", one_class=False", ', "one_class": false')
"""Parameters of scorers that did not exist when the files were written, with their defaults, as text and as JSON."""


def without_new_parameters(text: str) -> str:
    """A scorer, as text or as JSON, as it was when the files were written."""
    for parameter in NEW_PARAMETERS:
        text = text.replace(parameter, "")
    return text


CLASSES, WIDTH, BATCH = 3, 8, 5
CLASS_NAMES = ("äpfel", "b", "c")
ARGUMENTS: dict[str, Any] = {"width": 5}
"""Arguments of ``timm.create_model("legacy_net", num_classes=3, ...)`` for the network ``narrow``."""

_CFG = {
    "input_size": (3, 8, 8), "num_classes": CLASSES, "crop_pct": 1.0, "interpolation": "bilinear",
    "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.25, 0.5), "first_conv": "conv1", "classifier": "fc",
}  # fmt: skip
default_cfgs = generate_default_cfgs({"legacy_net": _CFG})


class LegacyNet(nn.Module):
    """A network that timm knows: two convolutions, the mean over the map, a linear classifier."""

    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, width, in_chans
        self.conv1 = nn.Conv2d(in_chans, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, width, 3, stride=2, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]

    def forward_features(self, images: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn1(self.conv1(images)))))

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        features = maps.mean(dim=(2, 3))
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


@register_model
def legacy_net(pretrained: bool = False, **kwargs: Any) -> LegacyNet:
    return build_model_with_cfg(LegacyNet, "legacy_net", pretrained, **kwargs)


def bare_network(name: str) -> nn.Module:
    """Create ``plain`` (nn.Sequential with dropout), ``legacy_net`` (known to timm), or ``narrow`` (the same with
    ``ARGUMENTS``), without their weights."""
    if name == "plain":
        parts = {
            "stage1": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
            "stage2": nn.Sequential(nn.Conv2d(4, WIDTH, 3, stride=2, padding=1), nn.ReLU()),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "drop": nn.Dropout(0.25),
            "fc": nn.Linear(WIDTH, CLASSES),
        }
        return nn.Sequential(OrderedDict(parts))
    return timm.create_model("legacy_net", num_classes=CLASSES, **(ARGUMENTS if name == "narrow" else {}))


def network(name: str) -> nn.Module:
    """Return the network of that name with its weights, in eval mode."""
    model = bare_network(name)
    model.load_state_dict(load_file(FOLDER / "weights" / f"{name}.safetensors"))
    return model.eval()


def pixels(name: str) -> np.ndarray:
    """Return the images uint8 ``[N, 8, 8, 3]`` of ``fit`` (32), ``id`` (24), or ``ood`` (16)."""
    return np.load(FOLDER / "inputs.npz")[f"{name}_images"]


def inputs(name: str) -> Tensor:
    """Return the same as inputs of the networks, float32 ``[N, 3, 8, 8]``, exact on every machine."""
    return torch.from_numpy(pixels(name)).permute(0, 3, 1, 2).float().contiguous() / 64 - 2


def labels(name: str) -> Tensor:
    return torch.from_numpy(np.load(FOLDER / "inputs.npz")[f"{name}_labels"])


class Images(Dataset[Any]):
    """The inputs of a set; reading fails at row ``broken_at``, as with a bad disk."""

    def __init__(self, name: str, labelled: bool = True, broken_at: int | None = None) -> None:
        self.name = f"legacy {name}"
        self.inputs, self.labels = inputs(name), labels(name)
        self.labelled, self.broken_at = labelled, broken_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        if row == self.broken_at:
            raise OSError("the disk is gone")
        return (self.inputs[row], self.labels[row]) if self.labelled else self.inputs[row]


def loader(name: str, labelled: bool = True, broken_at: int | None = None, kind: str = "loader") -> Iterable[Any]:
    """Return batches of 5 of a set: a ``loader``, a ``shuffled`` loader, or a ``generator`` of unknown length."""
    data = Images(name, labelled, broken_at)
    if kind == "shuffled":
        return DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))
    batches = DataLoader(data, BATCH)
    return (batch for batch in batches) if kind == "generator" else batches


def probes(name: str) -> list[Any]:
    """Return a list of probes: ``all`` of them with parameters of every kind, or some with ``odd`` values."""
    from ood_scores.probes import (
        FGSM,
        ODIN,
        GramSums,
        LayerGradients,
        LayerNorms,
        MCDropout,
        ParameterGradients,
        RankFeat,
    )

    if name == "odd":
        return [
            ODIN(name="odin's größe", epsilon=0, std=[0.5, 0.25, 1]),
            ODIN(name='odin "quoted"', epsilon=1e-05, temperature=1e16),
            ODIN(name="odin_numpy", epsilon=np.float64(0.01), temperature=np.float32(10.5)),
            GramSums(orders=[1, 3], layers=["stage2"]),
            GramSums(name="gram_range", orders=range(1, 3)),
            LayerNorms(layers=("pool",)),
            MCDropout(name="mc.dropout", passes=True),
        ]
    return [
        ODIN(epsilon=0.05, temperature=10.0, std=(0.25, 0.5, 1.0)),
        ODIN(name="odin_other", epsilon=0.0),
        ParameterGradients(groups=("fc", "all"), p=float("inf"), temperature=2.0),
        ParameterGradients(name="gradnorm_stages", groups="stages", p=0.5),
        LayerGradients(noise=True, biases=False, seed=7),
        GramSums(layers=("stage2",), orders=(1, 5)),
        LayerNorms(),
        RankFeat(layers=("stage2",)),
        MCDropout(passes=3, seed=11),
        FGSM(layers=("stage1", "stage2"), epsilon=0.1, std=(1.0, 1.0, 2.0)),
    ]


EXTRACTIONS: dict[str, dict[str, Any]] = {
    # cache -> network, loader(...), options of extract; "probes" names a list of ``probes``
    "plain": {"network": "plain", "loader": {"name": "fit"}},
    "float16_unlabelled": {
        "network": "plain", "loader": {"name": "id", "labelled": False},
        "options": {"dtype": "float16", "name": "a name of its own"},
    },
    "amp_bf16": {"network": "plain", "loader": {"name": "id"}, "options": {"amp": "bf16"}},
    "channels_last": {"network": "legacy_net", "loader": {"name": "id"}, "options": {"channels_last": True}},
    "compiled": {"network": "legacy_net", "loader": {"name": "id"}, "options": {"compile": True, "head": "fc"}},
    "headless": {
        "network": "legacy_net", "loader": {"name": "id", "kind": "generator"},
        "options": {"head": False, "dtype": "float64"},
    },
    "probes": {
        "network": "plain", "loader": {"name": "fit"}, "options": {"layers": ("stage1", "stage2")}, "probes": "all",
    },
    "probes_odd": {"network": "plain", "loader": {"name": "ood"}, "probes": "odd"},
    "unfinished": {
        "network": "plain", "loader": {"name": "fit"},
        "options": {"layers": "stages", "probes": ["odin", "mc_dropout"]},
    },
    "joined": {"network": "plain", "loader": {"name": "id"}},
}  # fmt: skip
"""The settings of each cache: calling ``extract`` with them again must open the cache without running the model
(``unfinished`` is continued). ``joined`` was written by two processes, ``headless`` from a loader of unknown length."""


def options(cache: str) -> dict[str, Any]:
    """Return the keyword arguments of ``extract`` for a cache."""
    entry = EXTRACTIONS[cache]
    chosen = {"device": "cpu", "progress": False, **entry.get("options", {})}
    return chosen | ({"probes": probes(entry["probes"])} if "probes" in entry else {})
