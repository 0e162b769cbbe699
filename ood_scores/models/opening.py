"""Opening timm models with pretrained weights or a checkpoint, without running code that a checkpoint contains."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

import ood_scores.models.networks  # noqa: F401  registers the CIFAR networks
from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.arguments import check_arguments
from ood_scores.models.checkpoints import arguments_of, read_checkpoint, shared_prefix
from ood_scores.models.running import architecture
from ood_scores.registry import did_you_mean


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
        **arguments: Arguments of the network itself; see ``ood_scores.models.arguments``.

    Raises:
        UnknownName: if timm has no such model.
        CheckpointError: if the checkpoint is missing, unsafe, damaged or of another architecture; or if there is none,
            and the pretrained weights do not exist or cannot be downloaded.
        BadInput: if ``num_classes`` is given without a checkpoint, or the model does not accept an argument.
    """
    config = _weights_config(name)
    if checkpoint is not None:
        return _from_checkpoint(name, config, user_path(checkpoint), num_classes, arguments).eval()
    if num_classes is not None:
        raise BadInput("num_classes needs a checkpoint, since pretrained weights have their own classes: pass both.")
    return _pretrained(name, arguments).eval()


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


def make(name: str, arguments: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Create a timm model.

    Args:
        name: Name that timm knows.
        arguments: Arguments of the network itself, which may come from a stranger's file.
        pretrained: Whether to fetch timm's weights of that name.

    Raises:
        UnknownName: if timm has no model of this name.
        BadInput: if the network has no such argument, or does not accept its value.
    """
    require_known(name)
    check_arguments(name, arguments)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # constructors check little, and raise errors of any kind
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise
        raise BadInput(
            f"{name!r} cannot be created with {dict(arguments)} ({_first_sentence(error)}): change its arguments."
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
    state = {f"{shared_prefix(own)}{key}": values for key, values in state.items()}
    paths = [f"{path}." for path, part in model.named_modules() if part is new_head]
    head = {key for key in own if key.startswith(tuple(paths))}
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        state = {key: value for key, value in state.items() if key not in head}
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    counts = {key for key in own if key.endswith("num_batches_tracked")}  # which old checkpoints lack
    missing = [f"{key} is missing" for key in sorted(own.keys() - state.keys() - head - counts)]
    unexpected = [f"{key} is not of this model" for key in sorted(state.keys() - own.keys())]
    wrong = [*shapes[:4], *missing[:2], *unexpected[:2]]
    if not wrong:
        try:
            model.load_state_dict(state, strict=False)
        except Exception as error:  # of values that torch cannot copy
            wrong = [_first_sentence(error)]
    if wrong:
        hidden = len(shapes) + len(missing) + len(unexpected) - len(wrong)
        more = f"; and {hidden:,} more" if hidden > 0 else ""
        raise CheckpointError(
            f"{checkpoint} does not fit {architecture(model)!r} ({'; '.join(wrong)}{more}): pass "
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
        return make(name, arguments, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"timm returned no pretrained weights for {name!r} ({_first_sentence(error)}): try again where the network "
            "is reachable, or pass a checkpoint file."
        ) from error


def _from_checkpoint(
    name: str, config: PretrainedCfg | None, path: Path, num_classes: int | None, arguments: Mapping[str, Any]
) -> nn.Module:
    state = read_checkpoint(path)
    stored = arguments_of(path, name)
    sizes = {**stored, **arguments}
    if num_classes or (num_classes := _size(state, getattr(config, "classifier", None), axis=0)):
        sizes["num_classes"] = num_classes
    if _size(state, getattr(config, "first_conv", None), axis=1) == 1:
        sizes["in_chans"] = 1
    try:
        model = make(name, sizes)
    except BadInput as error:
        if not stored:
            raise
        raise CheckpointError(f"{path} stores arguments of its network that cannot be used: {error}") from error
    fill(model, state, path)
    return model


def _size(state: Mapping[str, Tensor], module: str | Sequence[str] | None, axis: int) -> int | None:
    """Return the size of a module's weight along an axis, or None; the first of several modules counts."""
    first = module if isinstance(module, str) else next(iter(module or ()), None)
    weight = state.get(f"{first}.weight")
    return None if weight is None or weight.ndim <= axis else weight.shape[axis]


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
