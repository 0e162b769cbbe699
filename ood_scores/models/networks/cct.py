"""Compact Convolutional Transformer CCT-7/3x1 for 32x32 images, which Haas et al. (2024) train with an L2 head.

Source: Hassani, Walton, Shah, Abuduweili, Li & Shi, "Escaping the Big Data Paradigm with Compact Transformers" (2021);
what the paper leaves open (order of the norms, dropout, initialisation) is as in the authors' repository
SHI-Labs/Compact-Transformers, to which Haas et al. refer for model and training.
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
    """Multi-head self-attention, `[N, L, dim]` to the same; queries, keys and values have no bias."""

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
    """Attention and a GELU perceptron, each with a residual connection: `[N, L, dim]` to the same.

    The second LayerNorm is in the residual stream itself: the perceptron's output is added to the normalised tokens.
    The usual pre-norm layer adds it to those before; the authors' code does not, nor do we.
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
    """CCT with one 3x3 convolution as its tokenizer, learnt positions, and sequence pooling in place of a class token.

    Images `[N, in_chans, S, S]` become (S/2)² tokens `[N, (S/2)², dim]` (`forward_features`, after the last LayerNorm)
    and, their average under learnt weights, features `[N, dim]`.

    The last LayerNorm is before the pooling, so the norm of the features is not fixed by it: it is the larger the more
    the tokens agree.

    Args:
        img_size: S. The learnt positions make the weights fit this size only.
        dim: Width of the tokens.
        depth: Number of encoder layers.
        heads: Of each attention.
        mlp_ratio: Width of the perceptrons over `dim`.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last layer, rising linearly from 0 in the first.
        l2_head: The classifier is an `L2Head`: while training it sees z/‖z‖.
        normalize_eval: The `L2Head` also normalises in eval mode.
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
        self._initialise()

    def _initialise(self) -> None:
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.trunc_normal_(self.positional_emb, std=0.2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """What the tokenizer makes of images, before the positions are added: `[N, L, dim]`."""
        tokens = self.pool(F.relu(self.conv1(images))).flatten(2).transpose(1, 2)
        if tokens.shape[1:] != self.positional_emb.shape[1:]:
            raise ShapeMismatch(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels give {tokens.shape[1]} tokens, but this model "
                f"has {self.positional_emb.shape[1]} positions. Resize the images, or create the model with their "
                "img_size."
            )
        return tokens

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens `[N, L, dim]` of images `[N, in_chans, S, S]`, after the last LayerNorm."""
        return self.norm(self.blocks(self.tokens(images) + self.positional_emb))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        weights = self.attention_pool(tokens).softmax(dim=1)
        features = (weights * tokens).sum(dim=1)
        return features if pre_logits else self.get_classifier()(features)


@register_model
def haas_cct7_3x1(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """Haas's CCT-7/3x1, the authors' network with an L2 head: 256 features, 3,760,139 parameters with 10 classes."""
    return build_model_with_cfg(CompactTransformer, "haas_cct7_3x1", pretrained, **{"l2_head": True, **kwargs})
