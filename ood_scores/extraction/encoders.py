"""Encoders: models without a classifier, whose pooled output is the features."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, HeadNotFound
from ood_scores.extraction.layers import as_maps
from ood_scores.extraction.outputs import is_flat, rows_of
from ood_scores.user_code import is_reference, referenced

PoolName = Literal["cls", "mean", "cls+mean"]
Pool: TypeAlias = "PoolName | str | Callable[[Any], Tensor]"
"""How tokens or maps become one vector per input: a name, ``FILE.py:FUNCTION``, or a function of the model's output."""

EMBEDDINGS = ("image_embeds", "text_embeds", "pooler_output")
"""Entries of the outputs of transformers that are one vector per input, the first of which is kept."""

TOKENS = "last_hidden_state"
NAMES = "'mean', 'cls', 'cls+mean'"
CHOICES = "pool='mean', 'cls', or 'cls+mean', or a function of the output"

_pools_itself: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model of timm returns vectors, so that the tokens that a named pooling applies to are those before."""

_functions: WeakValueDictionary[str, Callable[[Any], Tensor]] = WeakValueDictionary()
"""The functions that this process has pooled with, by their texts."""


def pool_text(pool: Pool | None) -> str | None:
    """Return the text of a pooling for the identity of a cache.

    Raises:
        BadInput: if it is a function that has no name of its own, so that others could not be told from it.
    """
    if pool is None or isinstance(pool, str):
        return pool
    name = getattr(pool, "__qualname__", "<")
    if "<" in name or not callable(pool):
        raise BadInput(f"pool must be {NAMES}, or a function that a module defines under a name, got {pool!r}.")
    text = f"{pool.__module__}:{name}"
    _functions[text] = pool
    return text


def pool_function(pool: Pool | None) -> PoolName | Callable[[Any], Tensor] | None:
    """Return a pooling as a name or a function.

    Raises:
        BadInput: if it is neither, or a text names code that has not been imported.
    """
    if not isinstance(pool, str):
        pool_text(pool)
        return pool
    if pool in get_args(PoolName):
        return pool  # type: ignore[return-value]
    function = _functions.get(pool) or (referenced(pool) if ":" in pool or is_reference(pool) else None)
    if not callable(function):
        raise BadInput(f"pool must be {NAMES}, a function, or FILE.py:FUNCTION, got {pool!r}.")
    return function


@dataclass(frozen=True)
class Encoder:
    """A model without a classifier.

    Attributes:
        model: the model.
        pool: the name or the function of the pooling; None for the model's own.
        is_declared: whether the model, its output, or the caller says that it has no classifier.
    """

    model: nn.Module
    pool: PoolName | Callable[[Any], Tensor] | None = None
    is_declared: bool = True

    def features(self, output: Any, inputs: Tensor, mask: Tensor | None = None, start: int = 0) -> Tensor:
        """Return the features ``[B, D]`` from the output for some inputs.

        Args:
            output: what the model returned.
            inputs: the inputs ``[B, ...]``.
            mask: which tokens are no padding ``[B, T]``; None if all are.
            start: the number of the first row.

        Raises:
            HeadNotFound: if the output is not one vector per input, and no pooling is chosen.
            BadInput: if the pooling does not apply to this output, or a row has padding alone.
        """
        if self.pool is None:
            return _own_pooling(output)
        if callable(self.pool):
            return _checked(self.pool(output), len(inputs))
        values = _tokens(output)
        if values.ndim == 4:
            if self.pool != "mean":
                raise BadInput(f"maps {list(values.shape)} have no class token: use pool='mean'.")
            return as_maps(values).mean(dim=2)
        return _pooled(values, self.pool, prefix_tokens(self.model, inputs, values.shape[1]), mask, start)

    @contextmanager
    def _of_tokens(self) -> Iterator[None]:
        own: Any = self.model.forward
        unpooled: Any = self.model.forward_features

        @functools.wraps(own)
        def forward(*inputs: Any, **named: Any) -> Any:
            if self.model not in _pools_itself:
                output = own(*inputs, **named)
                _pools_itself[self.model] = isinstance(output, Tensor) and output.ndim == 2
            return (unpooled if _pools_itself[self.model] else own)(*inputs, **named)

        vars(self.model)["forward"] = forward
        try:
            yield
        finally:
            del vars(self.model)["forward"]

    def ready(self) -> Any:
        """Return a context in which a model of timm returns the tokens or maps that a named pooling applies to."""
        is_timm = hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")
        return self._of_tokens() if isinstance(self.pool, str) and is_timm else nullcontext()


def require_whole_inputs(model: nn.Module) -> None:
    """Raise BadInput if a model hides random parts of its inputs in eval mode, too, as masked autoencoders do."""
    for part in model.modules():
        share = getattr(getattr(part, "config", None), "mask_ratio", 0)
        if hasattr(part, "random_masking") and getattr(part, "is_mae", True) and share > 0:
            raise BadInput(
                f"{type(model).__name__} hides {share:.0%} of the patches of each image at random, so that its "
                "features would be random: open its weights with a model that sees whole images, such as "
                "transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False) for a ViTMAEModel, or set "
                "config.mask_ratio = 0."
            )


def declared_encoder(model: nn.Module, output: Any, pool: Any) -> Encoder | None:
    """Return the encoder if a pooling is chosen, or if the model or its output says that there is no classifier.

    A model says so by ``num_classes`` (timm) or ``config.num_labels`` (transformers), which are 0.
    """
    config = getattr(model, "config", None)
    none = 0 in (getattr(model, "num_classes", None), getattr(config, "num_labels", None))
    found = pool is not None or none or _is_embedding(output)
    return Encoder(model, pool) if found else None


def prefix_tokens(model: nn.Module, inputs: Tensor, tokens: int) -> int | None:
    """Return the number of class and register tokens before those of the patches; None if it is not known.

    It is the attribute ``num_prefix_tokens`` of the model (timm), or follows from the size of images and the patch size
    in the configuration (transformers), or from the number of patches, if the inputs are patches
    ``[B, P, W]``.
    """
    known = getattr(model, "num_prefix_tokens", None)
    if isinstance(known, int):
        return known
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None) or getattr(getattr(config, "vision_config", None), "patch_size", None)
    if patch is None or inputs.ndim not in (3, 4):
        return None
    sides = tuple(patch) if isinstance(patch, (list, tuple)) else (patch, patch)
    if inputs.ndim == 3:
        is_patches = inputs.shape[2] == math.prod(sides) * getattr(config, "num_channels", 3)
        return max(0, tokens - inputs.shape[1]) if is_patches else None
    return max(0, tokens - math.prod(size // side for size, side in zip(inputs.shape[2:], sides, strict=True)))


def _is_embedding(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.ndim > 2 and not is_flat(output)
    named = isinstance(output, Mapping) and not {"logits", "logits_per_image"} & output.keys()
    return named and any(isinstance(output.get(name), Tensor) for name in (*EMBEDDINGS, TOKENS))


def _own_pooling(output: Any) -> Tensor:
    named = [output.get(name) for name in (*EMBEDDINGS, TOKENS, "logits")] if isinstance(output, Mapping) else [output]
    values = next((each for each in named if isinstance(each, Tensor)), None)
    rows = rows_of(values)
    if rows is not None:
        return rows
    got = type(output).__name__ if values is None else f"a tensor of shape {tuple(values.shape)}"
    raise HeadNotFound(
        f"the model returned {got}, which is neither logits [batch, classes] nor one vector per input: if it is an "
        f"encoder, choose {CHOICES}; if it is a classifier (timm: num_classes=0?), wrap it so that it returns logits."
    )


def _checked(values: Any, rows: int) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != rows:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise BadInput(f"pool must return one vector per input, a tensor [{rows}, features], got {got}.")
    return values


def _tokens(output: Any) -> Tensor:
    values = output.get(TOKENS) if isinstance(output, Mapping) else output
    if not isinstance(values, Tensor) or values.ndim not in (3, 4):
        got = list(values.shape) if isinstance(values, Tensor) else type(output).__name__
        raise BadInput(
            "pool='mean', 'cls', and 'cls+mean' apply to tokens [batch, tokens, width], maps [batch, channels, height, "
            f"width], or an output with {TOKENS}, but the model returned {got}: leave out pool, or pass a function."
        )
    return values


def _pooled(tokens: Tensor, pool: PoolName, prefix: int | None, mask: Tensor | None, start: int) -> Tensor:
    """Return the class token, the mean of the other tokens, or both, from tokens ``[B, T, D]``."""
    if pool == "mean":
        return _mean(tokens, prefix or 0, mask, start)
    if prefix == 0:
        raise BadInput(f"the model has no class token among its {tokens.shape[1]} tokens: use pool='mean'.")
    first = tokens[:, 0]
    return first if pool == "cls" else torch.cat([first, _mean(tokens, prefix or 1, mask, start)], dim=1)


def _mean(tokens: Tensor, prefix: int, mask: Tensor | None, start: int) -> Tensor:
    if mask is None or bool(mask.all()):
        return tokens[:, prefix:].mean(dim=1)
    if mask.shape != tokens.shape[:2]:
        raise BadInput(
            f"the mask has shape {list(mask.shape)}, but there are {list(tokens.shape[:2])} tokens, so that it "
            "is unknown which of them are padding: use batches without padding, or a function as pool."
        )
    is_empty = ~mask[:, prefix:].bool().any(dim=1)
    if bool(is_empty.any()):
        row = start + int(is_empty.int().argmax())
        raise BadInput(
            f"row {row} has no tokens but padding, whose mean is undefined: remove the row, or use another pooling."
        )
    weights = mask[:, prefix:, None].to(tokens.dtype)
    return (tokens[:, prefix:] * weights).sum(dim=1) / weights.sum(dim=1)
