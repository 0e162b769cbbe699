"""A zero-shot classifier: an image encoder whose head is a bank of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.features.head import NEGATIVES, Head
from ood_scores.models.zero_shot.prompts import checked_classes
from ood_scores.models.zero_shot.towers import Towers, towers_of


class ZeroShotClassifier(nn.Module):
    """An image encoder with a bank of texts: a classifier whose logits are those of CLIP or SigLIP.

    Its features are the image features divided by their length, in float32, so that the logits are an affine map of
    them. It contains the whole model, whose text encoder is not used again, and belongs to this bank: other classes or
    templates are other weights.

    Args:
        model: the vision-language model, of transformers or open_clip.
        head: the bank, from ``ood_scores.zero_shot_head``.
        class_names: the names of the classes.
        templates: the templates of the bank, for the record.

    Raises:
        BadInput: if the model has no text encoder, or there is not one name for each class.
    """

    def __init__(self, model: nn.Module, head: Head, class_names: Any, templates: Sequence[str] = ()) -> None:
        super().__init__()
        self.class_names = checked_classes(class_names)
        self.templates = tuple(templates)
        if len(self.class_names) != head.num_classes:
            raise BadInput(
                f"the head has {head.num_classes} classes, but there are {len(self.class_names)} names: pass the names "
                "with which its texts were made."
            )
        towers_of(model)
        self.model = model
        self.num_classes = head.num_classes
        self.head = nn.Linear(head.num_features, head.num_classes)
        with torch.inference_mode(False):
            self.head.weight = nn.Parameter(head.weight.detach().float().clone(), requires_grad=False)
            self.head.bias = nn.Parameter(head.bias.detach().float().clone(), requires_grad=False)
            for kind, words in head.negatives.items():
                self.register_buffer(f"negative_{kind}", words.detach().float().clone())
        config = getattr(model, "pretrained_cfg", None)
        if config is not None:
            self.pretrained_cfg = config  # which timm's resolve_model_data_config reads

    @property
    def towers(self) -> Towers:
        """The encoders of the model."""
        return towers_of(self.model)

    @property
    def negatives(self) -> dict[str, Tensor]:
        """The text features ``[M, D]`` of words that are not classes, by kind."""
        buffers = dict(self.named_buffers(recurse=False))
        return {kind: buffers[f"negative_{kind}"] for kind in NEGATIVES if f"negative_{kind}" in buffers}

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> Tensor:
        """Return the logits ``[B, C]`` of inputs ``[B, C, H, W]``.

        A model of NaFlex, such as ``Siglip2Model``, needs patches ``[B, P, W]``, their mask ``[B, P]``, and the heights
        and widths ``[B, 2]`` of the images in patches.
        """
        further = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        given = {name: values for name, values in further.items() if values is not None}
        features = self.towers.image_features(pixel_values, **given).float()
        if features.shape[1] != self.head.in_features:
            raise BadInput(
                f"the image features have {features.shape[1]} values, but the text features {self.head.in_features}: "
                "use text features of this model."
            )
        with torch.autocast(features.device.type, enabled=False):
            return self.head(unit(features))

    def local_cosines(self, tokens: Tensor) -> Tensor:
        """Return the cosines ``[B, P, C]`` of places in the image with the classes; see ``Towers.local_features``."""
        features = self.towers.local_features(tokens).float()
        with torch.autocast(features.device.type, enabled=False):
            return unit(features) @ unit(self.head.weight).T


def negatives_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the negatives of a zero-shot classifier; none for other models."""
    return model.negatives if isinstance(model, ZeroShotClassifier) else {}


def unit(values: Tensor) -> Tensor:
    """Return vectors ``[..., D]`` divided by their lengths."""
    return values / values.norm(dim=-1, keepdim=True)
