"""The image and text encoders of vision-language models of transformers and open_clip, as functions."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ood_scores.errors import BadInput, ProbeDoesNotApply
from ood_scores.models.running import model_device

Tokenizer = Callable[..., Any]
"""A tokenizer of transformers, or a function from a list of texts to token numbers ``[T, L]``, as in open_clip."""

FIXED_LENGTH = ("siglip", "siglip2")
"""Types of models of transformers that were trained with texts padded to their full length."""


class Towers(ABC):
    """The two encoders of a model, its scale and bias, and its image tokens.

    Args:
        model: the vision-language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @abstractmethod
    def image_features(self, inputs: Tensor, **further: Tensor) -> Tensor:
        """Return the features ``[B, D]``, of any length, of inputs ``[B, C, H, W]``.

        ``further`` are the mask and the shapes of the patches of a model whose inputs are patches ``[B, P, W]``.
        """

    @abstractmethod
    def text_features(self, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
        """Return the features ``[T, D]`` of texts, of any length."""

    @abstractmethod
    def last_block(self) -> nn.Module:
        """Return the last block of the image encoder, which receives tokens ``[B, P, W]`` first.

        Raises:
            ProbeDoesNotApply: if the encoder is not a vision transformer of a known form.
        """

    @abstractmethod
    def local_features(self, tokens: Tensor) -> Tensor:
        """Return features ``[B, P, D]`` of places in the image, from the tokens that the last block receives.

        Every token attends to itself alone in the last block, so that it describes its own place.
        """

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine."""
        return math.exp(float(self.model.logit_scale.detach()))

    @property
    def logit_bias(self) -> float:
        """The constant that is added to the cosine, 0 if the model has none."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    def _no_local_features(self) -> ProbeDoesNotApply:
        return ProbeDoesNotApply(
            "local_mcm",
            "local features are known for the vision transformers of CLIP and SigLIP, but not for this "
            f"{type(self.model).__name__}: use the scorer mcm instead of gl_mcm.",
        )


class TransformersTowers(Towers):
    """A model of Hugging Face's transformers with ``get_image_features`` and ``get_text_features``."""

    def image_features(self, inputs: Tensor, **further: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=inputs, **further))

    def text_features(self, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
        config = self.model.config
        length = config.text_config.max_position_embeddings
        padding = "max_length" if config.model_type in FIXED_LENGTH else True
        tokens = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        taken = inspect.signature(self.model.get_text_features).parameters
        inputs = {name: values.to(model_device(self.model)) for name, values in tokens.items() if name in taken}
        _check_tokens(inputs["input_ids"], texts, config.text_config.vocab_size)
        return _pooled(self.model.get_text_features(**inputs))

    def last_block(self) -> nn.Module:
        if self.model.config.model_type == "siglip2":  # whose patches may be padding
            raise self._no_local_features()
        block = getattr(getattr(self._vision, "encoder", None), "layers", [None])[-1]
        known = ("layer_norm1", "layer_norm2", "mlp")
        has_values = hasattr(getattr(block, "self_attn", None), "v_proj") and hasattr(block.self_attn, "out_proj")
        ends = hasattr(self.model, "visual_projection") or getattr(self._vision, "head", None) is not None
        if not (has_values and ends and all(hasattr(block, part) for part in known)):
            raise self._no_local_features()
        return block

    def local_features(self, tokens: Tensor) -> Tensor:
        block: Any = self.last_block()
        values = block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(tokens)))
        tokens = tokens + values
        tokens = self._vision.post_layernorm(tokens + block.mlp(block.layer_norm2(tokens)))
        pooling = getattr(self._vision, "head", None)
        if pooling is not None:  # attention pooling, which gives each token all the attention
            return pooling(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        return self.model.visual_projection(tokens[:, 1:])

    @property
    def _vision(self) -> Any:
        vision = getattr(self.model, "vision_model", None)
        return getattr(vision, "vision_model", vision)


class OpenClipTowers(Towers):
    """A model of open_clip, with ``encode_image`` and ``encode_text``."""

    def image_features(self, inputs: Tensor, **further: Tensor) -> Tensor:
        return self.model.encode_image(inputs)

    def text_features(self, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
        tokens = tokenizer(list(texts))
        _check_tokens(tokens, texts, getattr(self.model, "vocab_size", None))
        return self.model.encode_text(tokens.to(model_device(self.model)))

    def last_block(self) -> nn.Module:
        visual = self.model.visual
        block = getattr(getattr(visual, "transformer", None), "resblocks", [None])[-1]
        pooled = getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", None) == "tok"
        attention = getattr(block, "attn", None)
        if not (pooled and isinstance(attention, nn.MultiheadAttention) and attention.batch_first):
            raise self._no_local_features()
        return block

    def local_features(self, tokens: Tensor) -> Tensor:
        block: Any = self.last_block()
        visual, start = self.model.visual, 2 * tokens.shape[-1]
        weight, bias = block.attn.in_proj_weight[start:], block.attn.in_proj_bias[start:]
        values = block.attn.out_proj(nn.functional.linear(block.ln_1(tokens), weight, bias))
        tokens = tokens + block.ls_1(values)
        tokens = visual.ln_post(tokens + block.ls_2(block.mlp(block.ln_2(tokens))))
        return tokens[:, 1:] @ visual.proj


def has_towers(model: nn.Module) -> bool:
    """Return whether a model has an image and a text encoder that are known here."""
    return _kind_of(model) is not None


def towers_of(model: nn.Module) -> Towers:
    """Return the encoders of a model.

    Raises:
        BadInput: if it is not a vision-language model of transformers or open_clip.
    """
    kind = _kind_of(model)
    if kind is None:
        raise BadInput(
            f"{type(model).__name__} has no text encoder, which a zero-shot classifier needs: pass a model such as "
            "transformers.CLIPModel or SiglipModel, or one of open_clip.create_model."
        )
    return kind(model)


def _kind_of(model: nn.Module) -> type[Towers] | None:
    if not isinstance(getattr(model, "logit_scale", None), Tensor):
        return None
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return TransformersTowers
    return OpenClipTowers if hasattr(model, "encode_image") and hasattr(model, "encode_text") else None


def _pooled(output: Any) -> Tensor:
    """Return the features of an output, which is a tensor in transformers 4."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _check_tokens(tokens: Any, texts: Sequence[str], vocabulary: int | None) -> None:
    """Check that a tokenizer returned numbers ``[T, L]`` that the text encoder has embeddings for."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != len(texts):
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BadInput(
            f"the tokenizer returned {got} for {len(texts)} texts, not token numbers [texts, length]: pass the "
            "tokenizer of this model as tokenizer=."
        )
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise BadInput(
            f"the tokenizer returned the token {int(tokens.max()):,}, but the text encoder has {vocabulary:,} tokens: "
            "pass the tokenizer of this model as tokenizer=."
        )
