"""Image processors of Hugging Face's transformers as transforms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ood_scores.errors import BadInput


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a function from a PIL image to ``[C, H, W]``.

    One of NaFlex returns patches ``[P, W]``, of which the model needs more: the function returns all it makes by name.
    """

    processor: Any

    def __call__(self, image: Image.Image) -> Any:
        made = self.processor(images=image, return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0]
        return pixels if pixels.ndim == 3 else {name: values[0] for name, values in made.items()}

    def pixels(self, image: Image.Image) -> Image.Image:
        """Return an image as the processor resizes and crops it, without rescaling and normalization."""
        plain = {"do_rescale": False, "do_normalize": False}
        found = self.processor(images=image, return_tensors="np", **plain)["pixel_values"][0]
        return Image.fromarray(np.asarray(found).astype(np.uint8).transpose(1, 2, 0))

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """The mean and the standard deviation for pixels in [0, 1], one for each channel.

        Raises:
            BadInput: if the processor rescales pixels to another range, or does not normalize them.
        """
        does = getattr(self.processor, "do_normalize", False) and getattr(self.processor, "do_rescale", False)
        if not does or abs(255 * self.processor.rescale_factor - 1) > 1e-6:
            raise BadInput(
                f"{type(self.processor).__name__} does not normalize pixels in [0, 1]: set do_rescale, do_normalize, "
                "and rescale_factor = 1 / 255 in its file, preprocessor_config.json."
            )
        return list(self.processor.image_mean), list(self.processor.image_std)

    def normalized(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> ProcessorTransform:
        """Return the transform with another mean and standard deviation for pixels in [0, 1]; None keeps its own."""
        processor = copy.deepcopy(self.processor)
        if mean is not None:
            processor.image_mean = list(mean)
        if std is not None:
            processor.image_std = list(std)
        return ProcessorTransform(processor)
