"""Creation of a recipe's network, by a name of any kind, and its preprocessing in two parts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from torch import Generator, Tensor, nn
from torchvision import transforms

from ood_scores.errors import BadInput, CheckpointError, HeadNotFound
from ood_scores.extraction.outputs import raw_logits_of
from ood_scores.models.checkpoints import read_checkpoint
from ood_scores.models.filling import fill
from ood_scores.models.networks.classifier import CLASSIFIER, linear_classifier
from ood_scores.models.opening import kind_of, preprocessing
from ood_scores.models.origin import Origin, remember_origin
from ood_scores.models.processors import ProcessorTransform
from ood_scores.training.augment import Augmentation, random_resized_crop, seed_of
from ood_scores.training.recipe import ModelTable


@dataclass(frozen=True)
class ToInput:
    """The evaluation transform from PIL images to the input of a network, in two parts.

    Attributes:
        geometry: Transform of a PIL image to the size and channels of the network.
        channels: Number of channels: 3, or 1 for gray.
        size: Height and width.
        resample: Interpolation of a random crop.
        mean, std: Mean and standard deviation of the channels ``[C, 1, 1]``.
    """

    geometry: Callable[[Image.Image], Image.Image]
    channels: int
    size: tuple[int, int]
    resample: Image.Resampling
    mean: Tensor
    std: Tensor

    def open(self, image: Image.Image, seed: int) -> Image.Image:
        """Apply the geometry of the evaluation transform."""
        return self.geometry(image)

    def open_crop(self, image: Image.Image, seed: int, smallest: float) -> Image.Image:
        """Crop a random part of the image, at least the share ``smallest``, at the size of the network."""
        cropped = random_resized_crop(image, self.size, self.resample, seed, smallest)
        return cropped.convert("L") if self.channels == 1 else cropped

    def standardized(self, images: Tensor) -> Tensor:
        """Standardize images with values in [0, 1]."""
        return (images - self.mean) / self.std

    def to(self, device: torch.device) -> ToInput:
        """Return the transform for images on a device."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    def augmented(self, images: Tensor, by: Augmentation, generator: Generator, channels_last: bool) -> Tensor:
        """Augment and standardize uint8 images."""
        ready = self.standardized(by(images, generator))
        return ready.contiguous(memory_format=torch.channels_last) if channels_last else ready.contiguous()


def make_model(table: ModelTable, arguments: dict[str, Any], seed: int, out: Path) -> nn.Module:
    """Create a network with random weights, which depend on the seed, or with those of the checkpoint.

    Raises:
        UnknownName: if there is no such model.
        BadInput: if the model does not accept an argument, or the name is that of code that has not been imported.
        HeadNotFound: if the model has no linear classifier.
        CheckpointError: if the checkpoint is missing or of another architecture.
    """
    kind, target = kind_of(table.name)
    kind.check(target, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "model"))
        model = kind.create(target, arguments)
    network, own = kind.again(model, target, arguments)
    remember_origin(model, Origin(table.name, arguments, network, own, kind.transform(model, target)))
    if not hasattr(model, "forward_head"):
        _mark_classifier(model)
    head = linear_classifier(model)
    checkpoint = table.checkpoint_for(seed, out)
    if checkpoint is not None:
        if not checkpoint.exists():
            raise CheckpointError(_how_to_train(checkpoint, seed))
        fill(model, kind.renamed(model, read_checkpoint(checkpoint)), str(checkpoint), new_head=head)
    return model


def network_arguments(table: ModelTable, classes: int) -> dict[str, Any]:
    """Return the arguments of a recipe's network; the number of classes is that of the data unless the recipe has it.

    A function that has no argument ``num_classes`` gets none.
    """
    kind, target = kind_of(table.name)
    return {**({"num_classes": classes} if kind.takes_classes(target) else {}), **table.arguments}


def _mark_classifier(model: nn.Module) -> None:
    """Remember the name of the linear layer whose output is the logits of a model that is not timm-style.

    Raises:
        HeadNotFound: if there is none.
    """
    to_input = input_of(model)
    images = torch.linspace(-1, 1, 2 * to_input.channels * to_input.size[0] * to_input.size[1])
    returned: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: returned.update({name: output}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            logits = raw_logits_of(model.eval()(images.reshape(2, to_input.channels, *to_input.size)))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    found = [name for name, values in returned.items() if torch.equal(values, logits)]
    if not found:
        raise HeadNotFound(
            f"no linear layer returns the logits of {type(model).__name__}: recipes train networks whose last layer is "
            "an nn.Linear."
        )
    setattr(model, CLASSIFIER, found[-1])


def _how_to_train(checkpoint: Path, seed: int) -> str:
    folder = checkpoint.parent
    return (
        f"there is no checkpoint {checkpoint} to start from: check the path, or train it first, by the recipe "
        f"{folder.name.removesuffix(f'_seed{seed}')} with --set seed={seed} --out {shlex.quote(str(folder))}."
    )


def input_of(model: nn.Module) -> ToInput:
    """Return the evaluation transform of a model, in two parts.

    Raises:
        BadInput: if it is unknown, or does not consist of a transform of images and of a normalization.
    """
    transform = preprocessing(model)
    if isinstance(transform, ProcessorTransform):
        resample = Image.Resampling(getattr(transform.processor, "resample", None) or Image.Resampling.BILINEAR)
        return _in_parts(transform.pixels, *transform.normalization, resample)
    steps = _steps(transform)
    norm = next((step for step in steps if isinstance(step, transforms.Normalize)), None)
    if norm is None:
        raise BadInput(
            f"the transform of {type(model).__name__} has no step transforms.Normalize, before which a recipe augments "
            "images: end it with transforms.ToTensor() and transforms.Normalize(mean, std)."
        )
    geometry = [step for step in steps if not isinstance(step, (transforms.ToTensor, transforms.Normalize))]
    config = resolve_model_data_config(model)
    resample = str_to_pil_interp(config["interpolation"])
    size = tuple(config["input_size"][1:]) if getattr(model, "pretrained_cfg", None) else None
    return _in_parts(transforms.Compose(geometry), norm.mean, norm.std, resample, size)


def _in_parts(
    geometry: Callable[[Image.Image], Image.Image],
    mean: Sequence[float],
    std: Sequence[float],
    resample: Image.Resampling,
    size: tuple[int, ...] | None = None,
) -> ToInput:
    """Return a transform; its size is that of a transformed image unless it is given."""
    if size is None:
        example = geometry(Image.new("RGB", (64, 48)))
        if not isinstance(example, Image.Image):
            raise BadInput("the transform of a model must change PIL images until transforms.ToTensor().")
        size = example.size[::-1]
    values = [torch.as_tensor(each, dtype=torch.float32).reshape(-1, 1, 1) for each in (mean, std)]
    return ToInput(geometry, len(values[0]), (size[0], size[1]), resample, *values)


def _steps(transform: Any) -> list[Any]:
    if not isinstance(transform, transforms.Compose):
        return [transform]
    return [step for part in transform.transforms for step in _steps(part)]
