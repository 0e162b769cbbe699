"""Image processors of Hugging Face's transformers as transforms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a function from a PIL image to ``[C, H, W]``."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def normalized(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> ProcessorTransform:
        """Return the transform with another mean and standard deviation for pixels in [0, 1]; None keeps its own."""
        processor = copy.deepcopy(self.processor)
        if mean is not None:
            processor.image_mean = list(mean)
        if std is not None:
            processor.image_std = list(std)
        return ProcessorTransform(processor)
