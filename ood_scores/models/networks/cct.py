"""Compact Convolutional Transformer CCT-7/3x1 for 32x32 images, trained by Haas et al. (2024) with an L2 head.

Source: Hassani, Walton, Shah, Abuduweili, Li & Shi, "Escaping the Big Data Paradigm with Compact Transformers" (2021);
details that the paper does not state (order of the norms, dropout, initialization) follow the authors' repository
SHI-Labs/Compact-Transformers, which Haas et al. cite for model and training.
"""

from typing import Any

import torch
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.errors import ShapeMismatch

from .classifier import cifar_cfg
from .l2_head import PooledL2Classifier

__all__ = ["CompactTransformer"]

default_cfgs = generate_default_cfgs(
    {
        "haas_cct7_3x1": {
            **cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            "interpolation": "bicubic",
        }
    }
)


class Attention(nn.Module):
    """Multi-head self-attention of tokens ``[N, L, dim]``; queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.drop = drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and a GELU perceptron on tokens ``[N, L, dim]``, each with a residual connection.

    The second LayerNorm is part of the residual stream: the perceptron's output is added to the normalized tokens, as
    in the authors' code. A standard pre-norm layer adds it to the tokens before normalization.
    """

    def __init__(self, dim: int, heads: int, hidden: int, attn_drop: float, drop_path: float) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads, attn_drop)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm1(tokens + self.drop_path(self.self_attn(self.pre_norm(tokens))))
        return tokens + self.drop_path(self.linear2(F.gelu(self.linear1(tokens))))


class CompactTransformer(PooledL2Classifier):
    """CCT with one 3x3 convolution as tokenizer, learned positions, and sequence pooling instead of a class token.

    Images ``[N, in_chans, S, S]`` become tokens ``[N, (S/2)^2, dim]`` (``forward_features``, after the last LayerNorm).
    Features ``[N, dim]`` are their average with learned weights.

    The last LayerNorm precedes the pooling and therefore does not fix the norm of the features, which increases with
    the agreement of the tokens.

    Args:
        img_size: Image size S. Because of the learned positions, weights fit only this size.
        dim: Width of the tokens.
        depth: Number of encoder layers.
        heads: Number of heads of each attention.
        mlp_ratio: Ratio of the width of the perceptrons to ``dim``.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last layer, which rises linearly from 0 in the first.
        l2_head: Whether the classifier is an ``L2Head``, which sees z/‖z‖ in training.
        normalize_eval: Whether the ``L2Head`` also normalizes in eval mode.
    """

    def __init__(
        self,
        img_size: int = 32,
        dim: int = 256,
        depth: int = 7,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        num_classes: int = 10,
        in_chans: int = 3,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        l2_head: bool = False,
        normalize_eval: bool = False,
    ) -> None:
        super().__init__(in_chans, dim, l2_head, normalize_eval)
        self.conv1 = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.positional_emb = nn.Parameter(torch.zeros(1, ((img_size + 1) // 2) ** 2, dim))
        drop_paths = [drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        self.blocks = nn.Sequential(
            *(EncoderLayer(dim, heads, int(mlp_ratio * dim), attn_drop_rate, drop_path) for drop_path in drop_paths)
        )
        self.feature_info = [{"num_chs": dim, "reduction": 2, "module": f"blocks.{i}"} for i in range(depth)]
        self.norm = nn.LayerNorm(dim)
        self.attention_pool = nn.Linear(dim, 1)
        self.reset_classifier(num_classes)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.trunc_normal_(self.positional_emb, std=0.2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens ``[N, L, dim]`` of images before the positions are added."""
        tokens = self.pool(F.relu(self.conv1(images))).flatten(2).transpose(1, 2)
        if tokens.shape[1:] != self.positional_emb.shape[1:]:
            raise ShapeMismatch(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels have {tokens.shape[1]} tokens, but this model "
                f"has {self.positional_emb.shape[1]} positions: resize the images, or create the model with their "
                "img_size."
            )
        return tokens

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens ``[N, L, dim]`` of images ``[N, in_chans, S, S]`` after the last LayerNorm."""
        return self.norm(self.blocks(self.tokens(images) + self.positional_emb))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        weights = self.attention_pool(tokens).softmax(dim=1)
        features = (weights * tokens).sum(dim=1)
        return features if pre_logits else self.get_classifier()(features)


@register_model
def haas_cct7_3x1(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/3x1 of the authors with the L2 head of Haas et al.: 256 features, 3,760,139 parameters with 10 classes."""
    return build_model_with_cfg(CompactTransformer, "haas_cct7_3x1", pretrained, **{"l2_head": True, **kwargs})
