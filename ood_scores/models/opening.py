"""Opening models by name, with pretrained weights or a checkpoint, without running code that a file contains.

A name is timm's (``resnet50.a1_in1k``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH``), that of a model of torchvision
(``torchvision:resnet50``), open_clip (``open_clip:NAME/WEIGHTS``), or transformers (``hf:OWNER/NAME``, ``hf:PATH``, or
the path of a folder that ``save_pretrained`` wrote), or that of a function of the user's own code
(``FILE.py:FUNCTION``, ``MODULE:FUNCTION``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import Compose, Grayscale

import ood_scores.models.kinds  # noqa: F401  registers every kind of name
from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.checkpoints import arguments_of, read_checkpoint
from ood_scores.models.filling import fill
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.models.kinds.timm_names import TimmNames, size_of
from ood_scores.models.kinds.user_functions import UserFunction
from ood_scores.models.origin import Origin, origin_of, remember_origin
from ood_scores.models.processors import ProcessorTransform
from ood_scores.models.zero_shot.build import STORED, TEXTS, as_classifier, check_texts
from ood_scores.registry import did_you_mean
from ood_scores.user_code import is_reference

REQUIRED = ("input_size", "mean", "std")
"""Entries of timm's data configuration that a model must state; timm has defaults for the others."""


def load_model(
    name: str, checkpoint: str | os.PathLike[str] | None = None, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """Open a model in eval mode.

    A checkpoint that this package trained also contains the arguments of its network. With ``classes``, a model with a
    text encoder is returned as a zero-shot classifier; see ``ood_scores.zero_shot_classifier``.

    Args:
        name: Name of a model, in one of the forms above.
        checkpoint: A ``.safetensors`` file, the index of several, or a file of ``torch.save``; defaults to the model's
            own weights, which are downloaded if they are not in a folder.
        num_classes: Number of classes of the checkpoint; defaults to the size of its classifier. A function of yours
            receives it as its argument, with and without a checkpoint.
        **arguments: Arguments of the network itself; see ``ood_scores.models.arguments``. ``classes``, ``templates``,
            and ``negatives`` are those of a zero-shot classifier.

    Raises:
        UnknownName: if there is no such model.
        CheckpointError: if the checkpoint is missing, unsafe, damaged or of another architecture; or if there is none,
            and the model's own weights do not exist or cannot be downloaded.
        BadInput: if ``num_classes`` is given without a checkpoint and without a function of yours, the model does not
            accept an argument, or the name is that of code that has not been imported.
        MissingInput: if transformers is needed and not installed.
    """
    kind, target = kind_of(name)
    arguments, texts = _without_texts(kind, arguments)
    kind.check(target, arguments)
    if checkpoint is not None:
        model, own = _from_checkpoint(kind, target, name, user_path(checkpoint), num_classes, arguments)
    elif num_classes is not None and not isinstance(kind, UserFunction):
        raise BadInput("num_classes needs a checkpoint, since pretrained weights have their own classes: pass both.")
    else:
        own = arguments if num_classes is None else {**arguments, "num_classes": num_classes}
        model = kind.open(target, own)
    transform, tokenizer = kind.transform(model, target), partial(kind.tokenizer, target)
    remember_origin(model, Origin(name, own, *kind.again(model, target, own), transform, tokenizer))
    return as_classifier(model, **texts).eval()


def load_stored_model(network: str, checkpoint: str | os.PathLike[str]) -> nn.Module:
    """Open a model as a detector stores it: no other file is read, and nothing is fetched.

    Raises:
        CheckpointError: if the name stands for something else than a network; otherwise as ``load_model``.
    """
    if not kind_of(network)[0].offline:
        raise CheckpointError(f"{checkpoint} belongs to {network!r}, which names other files: pass the model.")
    return load_model(network, checkpoint)


def widths_of(
    name: str, checkpoint: str | os.PathLike[str] | None = None, num_classes: int | None = None, **arguments: Any
) -> tuple[int, int] | str:
    """Return the numbers of features and of classes (0 for an encoder) of a model, without creating its weights.

    The arguments are those of ``load_model``. Nothing is fetched, and no code of the user runs.

    Returns:
        The numbers, or why they are not known without that, as a clause.
    """
    kind, target = kind_of(name)
    own, texts = _without_texts(kind, arguments)
    if texts:
        return "the texts of a zero-shot classifier are encoded only then"
    if isinstance(kind, UserFunction):
        return f"{name} is code of your own, which runs only then"
    if not kind.offline:
        return f"the files that describe {name} are read only then"
    try:
        state = {} if checkpoint is None else read_checkpoint(user_path(checkpoint))
        with torch.device("meta"):
            sizes = {"num_classes": num_classes} if num_classes else kind.sizes(target, state, own) if state else {}
            model: Any = kind.create(target, own | sizes)
    except Exception:  # opening the model will tell; constructors may read values, which these tensors do not have
        return f"{name} cannot be created without its weights"
    if hasattr(model, "num_features") and hasattr(model, "num_classes"):
        return getattr(model, "head_hidden_size", None) or model.num_features, model.num_classes
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return (layers[-1].in_features, layers[-1].out_features) if layers else f"{name} has no linear layer"


def preprocessing(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **changes: Any
) -> Callable[[Any], Any]:
    """Return the evaluation transform of a model, from a PIL image to its input.

    Args:
        model: Model of timm, or one of ``load_model``, or one with an attribute ``transform``, which is then returned.
            It determines size, crop, interpolation and normalization. A model for gray images gets gray images,
            normalized with the averages over the three channels.
        mean: Mean for pixels in [0, 1], one number or one per channel; defaults to the model's.
        std: Standard deviation for pixels in [0, 1], one number or one per channel; defaults to the model's.
        **changes: Other entries of timm's data configuration: ``input_size`` (height, width), ``crop_pct``,
            ``crop_mode``, ``interpolation``.

    Raises:
        BadInput: if the number of values is wrong, a standard deviation is not positive, the model has a transform of
            its own that cannot be changed, or its preprocessing is unknown.
    """
    origin = origin_of(model)
    own = origin.transform if origin else getattr(model, "transform", None)
    if own:
        return _changed(own, mean, std, changes)
    _require_described(model, [*changes, *(["mean"] if mean else []), *(["std"] if std else [])])
    channels = _channels(model)
    config = resolve_model_data_config(model) | changes
    config["mean"] = _per_channel("mean", mean or config["mean"], channels)
    config["std"] = _per_channel("std", std or config["std"], channels)
    if min(config["std"]) <= 0:
        raise BadInput(f"std must be positive, got {config['std']}.")
    transform = create_transform(**config, is_training=False)
    return Compose([Grayscale(), transform]) if channels == 1 else transform


def _require_described(model: nn.Module, given: Sequence[str]) -> None:
    """Check that the preprocessing of a model is known, rather than guess that of ImageNet.

    Raises:
        BadInput: if it is not.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    stated = [*given, *(config if isinstance(config, Mapping) else REQUIRED if config else ())]
    missing = [name for name in (REQUIRED if config else resolve_model_data_config(model)) if name not in stated]
    if missing:
        origin = origin_of(model)
        name = origin.name if origin and origin.name else type(model).__name__
        raise BadInput(
            f"the {', '.join(missing)} of the preprocessing of {name} are unknown: give the model an attribute "
            "transform, a function from a PIL image to its input, or pretrained_cfg, a dictionary of timm's data "
            "configuration; for a model of transformers, save its image processor in its folder. A model of texts or "
            "audio takes batches in Python, ood_scores.extract(model, loader)."
        )


def _changed(
    transform: Callable[[Any], Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    changes: Mapping[str, Any],
) -> Callable[[Any], Any]:
    """Return the transform of a model with another normalization."""
    if changes or ((mean or std) and not isinstance(transform, ProcessorTransform)):
        names = ", ".join([*changes, *(["mean"] if mean else []), *(["std"] if std else [])])
        raise BadInput(f"the model has its own preprocessing, in which {names} cannot be set: leave it out.")
    return transform.normalized(mean, std) if isinstance(transform, ProcessorTransform) and (mean or std) else transform


def require_known(name: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Check the name and the arguments of a model, which may come from a stranger's file, without network access.

    Raises:
        UnknownName: if there is no such model.
        BadInput: if the network has no such argument, or a value is not plain; or if the name is that of code that has
            not been imported.
    """
    kind, target = kind_of(name)
    own, texts = _without_texts(kind, arguments or {})
    kind.check(target, own)
    check_texts(**texts)


def kind_of(name: str) -> tuple[ModelKind, str]:
    """Return the kind of a name, and the name without it."""
    kind, colon, target = name.partition(":")
    if colon and kind in MODEL_KINDS:
        return MODEL_KINDS[kind], target
    if is_reference(name):
        return UserFunction(), name
    if colon:
        forms = ", ".join(each.form for each in (TimmNames(), *MODEL_KINDS.values(), UserFunction()))
        raise UnknownName(
            f"there is no kind of model {kind!r}{did_you_mean(kind, MODEL_KINDS)}: write one of {forms}, or "
            "MODULE:FUNCTION of a module that was imported with --import."
        )
    if (description := Path(name).expanduser() / "config.json").is_file() and not timm.is_model(name):
        return MODEL_KINDS["local-dir" if '"architecture"' in description.read_text(errors="replace") else "hf"], name
    return TimmNames(), name


def _without_texts(kind: ModelKind, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the network itself, and those that make it a zero-shot classifier."""
    given = set() if kind is MODEL_KINDS[STORED] else arguments.keys() & set(TEXTS)
    own = {key: value for key, value in arguments.items() if key not in given}
    return own, {key: arguments[key] for key in given}


def _from_checkpoint(
    kind: ModelKind, target: str, name: str, path: Path, num_classes: int | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network with the weights of a checkpoint, and its arguments that the weights do not determine."""
    state = read_checkpoint(path)
    stored = arguments_of(path, name)
    own = {**stored, **arguments, **({"num_classes": num_classes} if num_classes else {})}
    try:
        kind.check(target, own)
        sizes = {} if num_classes else kind.sizes(target, state, own)
        model = kind.create(target, own | sizes)
    except BadInput as error:
        if not stored:
            raise
        raise CheckpointError(f"{path} stores arguments of its network that cannot be used: {error}") from error
    fill(model, kind.renamed(model, state), path)
    return model, own


def _channels(model: nn.Module) -> int:
    """Return 1 if the first convolution takes gray images, else 3 (a stem may fold pixels into more channels)."""
    config: Any = getattr(model, "pretrained_cfg", {})
    return 1 if size_of(model.state_dict(), config.get("first_conv"), axis=1) == 1 else 3


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return (values[0],) * channels
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    if len(values) != channels:
        raise BadInput(f"{name} has {len(values)} values, but the model takes {channels} channels: pass one each.")
    return tuple(values)
