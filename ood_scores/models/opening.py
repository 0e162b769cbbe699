"""Opening timm models with pretrained weights or a checkpoint, without running code that a checkpoint contains."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import PretrainedCfg, clean_state_dict
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

import ood_scores.models.networks  # noqa: F401  registers the CIFAR networks
from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.running import architecture
from ood_scores.registry import did_you_mean

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts store the weights; averaged weights come first, as in timm."""


def load_model(
    name: str, checkpoint: str | os.PathLike[str] | None = None, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """Open a timm model in eval mode.

    A checkpoint that this package trained also contains the arguments of its network.

    Args:
        name: Name that timm knows, with or without a tag (``"resnet50"``, ``"resnet50.a1_in1k"``), including the
            networks of ``ood_scores.models.networks``.
        checkpoint: A ``.safetensors`` file or one of ``torch.save``; defaults to the pretrained weights, which are
            downloaded.
        num_classes: Number of classes of the checkpoint; defaults to the size of its classifier.
        **arguments: Other arguments of ``timm.create_model``.

    Raises:
        UnknownName: if timm has no such model.
        CheckpointError: if the checkpoint is missing, unsafe, damaged or of another architecture; or if there is none,
            and the pretrained weights do not exist or cannot be downloaded.
        BadInput: if ``num_classes`` is given without a checkpoint, or the model does not accept an argument.
    """
    config = _weights_config(name)
    if checkpoint is not None:
        return _from_checkpoint(name, config, Path(checkpoint), num_classes, arguments).eval()
    if num_classes is not None:
        raise BadInput("num_classes needs a checkpoint, since pretrained weights have their own classes: pass both.")
    return _pretrained(name, arguments).eval()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, without the wrappers and prefixes that training scripts add.

    Raises:
        CheckpointError: if the file is missing or damaged, contains no weights, or would run code when opened.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: check the path.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not (isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise CheckpointError(
            f"{path} contains no weights by name: save model.state_dict(), alone or under {' or '.join(WRAPPERS)}."
        )
    return clean_state_dict(dict(content))


def preprocessing(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **changes: Any
) -> Callable[[Any], Any]:
    """Return the evaluation transform of a timm model, from a PIL image to its input.

    Args:
        model: Model that determines size, crop, interpolation and normalization. A model for gray images gets gray
            images, normalized with the averages over the three channels.
        mean: Mean for pixels in [0, 1], one number or one per channel; defaults to the model's.
        std: Standard deviation for pixels in [0, 1], one number or one per channel; defaults to the model's.
        **changes: Other entries of timm's data configuration: ``input_size`` (height, width), ``crop_pct``,
            ``crop_mode``, ``interpolation``.

    Raises:
        BadInput: if the number of values is wrong, or a standard deviation is not positive.
    """
    channels = _channels(model)
    config = resolve_model_data_config(model) | changes
    config["mean"] = _per_channel("mean", mean or config["mean"], channels)
    config["std"] = _per_channel("std", std or config["std"], channels)
    if min(config["std"]) <= 0:
        raise BadInput(f"std must be positive, got {config['std']}.")
    transform = create_transform(**config, is_training=False)
    return Compose([Grayscale(), transform]) if channels == 1 else transform


def require_known(name: str) -> None:
    """Raise UnknownName, with the closest name, if timm has no model of this name."""
    if not timm.is_model(name):
        raise UnknownName(
            f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}: see timm.list_models()."
        )


def make(name: str, **arguments: Any) -> nn.Module:
    """Create a timm model.

    Raises:
        UnknownName: if timm has no model of this name.
        BadInput: if the model does not accept an argument.
    """
    require_known(name)
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{name!r} cannot be created with {arguments} ({_first_sentence(error)}): change its arguments."
        ) from error


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    checkpoint: str | os.PathLike[str],
    new_head: nn.Module | None = None,
) -> None:
    """Load weights into a model, which must need all of them and no others.

    Args:
        model: Network to fill.
        state: Weights by name, as ``read_checkpoint`` returns them.
        checkpoint: Where the weights come from, for the error message.
        new_head: Submodule that keeps its own weights if the others have none for it or of another shape.

    Raises:
        CheckpointError: if the weights are those of another architecture.
    """
    own = model.state_dict()
    paths = [f"{path}." for path, part in model.named_modules() if part is new_head]
    head = {key for key in own if key.startswith(tuple(paths))}
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        state = {key: value for key, value in state.items() if key not in head}
    wrong = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if not wrong:
        missing, unexpected = model.load_state_dict(state, strict=False)
        wrong = [f"{key} is missing" for key in missing if key not in head]
        wrong += [f"{key} is not of this model" for key in unexpected]
    if wrong:
        more = f"; and {len(wrong) - 4:,} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{checkpoint} does not fit {architecture(model)!r} ({'; '.join(sorted(wrong)[:4])}{more}): pass "
            "the name and the arguments of the model that it was trained with."
        )


def _weights_config(name: str) -> PretrainedCfg | None:
    """Return timm's configuration of a model's weights, or None if it has none."""
    require_known(name)
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownName(
            f"timm has no model {name!r} ({_first_sentence(error)}): see timm.list_pretrained()."
        ) from error


def _pretrained(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return make(name, pretrained=True, **arguments)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"timm returned no pretrained weights for {name!r} ({_first_sentence(error)}): try again where the network "
            "is reachable, or pass a checkpoint file."
        ) from error


def _from_checkpoint(
    name: str, config: PretrainedCfg | None, path: Path, num_classes: int | None, arguments: Mapping[str, Any]
) -> nn.Module:
    state = read_checkpoint(path)
    sizes = {**arguments_of(path, name), **arguments}
    if num_classes or (num_classes := _size(state, getattr(config, "classifier", None), axis=0)):
        sizes["num_classes"] = num_classes
    if _size(state, getattr(config, "first_conv", None), axis=1) == 1:
        sizes["in_chans"] = 1
    model = make(name, **sizes)
    fill(model, state, path)
    return model


def arguments_of(path: Path, name: str) -> dict[str, Any]:
    """Return the arguments of the network in a checkpoint of ``ood_scores.training``; none for other checkpoints."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
    known = "arguments" in facts and json.loads(facts.get("architecture", "null")) == name
    return json.loads(facts["arguments"]) if known else {}


def _size(state: Mapping[str, Tensor], module: str | Sequence[str] | None, axis: int) -> int | None:
    """Return the size of a module's weight along an axis, or None; the first of several modules counts."""
    first = module if isinstance(module, str) else next(iter(module or ()), None)
    weight = state.get(f"{first}.weight")
    return None if weight is None or weight.ndim <= axis else weight.shape[axis]


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({_first_sentence(error)}): restore it."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, in which timm stores its options
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: restore it.") from error
        raise CheckpointError(
            f"{path} was not opened because that would call {wanted[1]}: if you trust the file, save only its "
            "state_dict, preferably as safetensors."
        ) from error


def _channels(model: nn.Module) -> int:
    """Return 1 if the first convolution takes gray images, else 3 (a stem may fold pixels into more channels)."""
    config: Any = getattr(model, "pretrained_cfg", {})
    return 1 if _size(model.state_dict(), config.get("first_conv"), axis=1) == 1 else 3


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return (values[0],) * channels
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    if len(values) != channels:
        raise BadInput(f"{name} has {len(values)} values, but the model takes {channels} channels: pass one each.")
    return tuple(values)


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error), maxsplit=1)[0].rstrip(".")
