"""Small vision-language models with random weights, and a tokenizer of whole words, for tests; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

CLASSES = ("cat", "dog", "fire truck", "crane bird")
TEMPLATES = ("a photo of a {}.", "the {}", "a picture of one {} outside")
NOUNS = ("table", "cloud", "river", "moon", "stone", "tower", "dog", "leaf", "spoon", "paper", "road", "lamp")
ADJECTIVES = ("white", "sunny", "broken", "tall")
EXTRA = "environment space object scene place item area view thing pattern structure landscape vista creature"
OTHERS = "a an of the photo picture outside one nice good close-up with This is . -"
WORDS = [*f"{OTHERS} {EXTRA} {' '.join(CLASSES)} {' '.join(NOUNS)} {' '.join(ADJECTIVES)}".split()]
SPECIAL = ["<pad>", "<start>", "<unknown>"]
VOCABULARY = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS, "<end>"]))}

TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TOKENS = {"bos_token_id": VOCABULARY["<start>"], "eos_token_id": VOCABULARY["<end>"], "pad_token_id": 0}
TEXT = {**TOWER, **TOKENS, "vocab_size": len(VOCABULARY), "max_position_embeddings": 16}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}


def tokenizer() -> Any:
    """A tokenizer that starts a text with one token and ends it with another, as CLIP's does."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, VOCABULARY[name]) for name in ("<start>", "<end>")]
    words.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )


def clip() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    return spread(transformers.CLIPModel(config))


def siglip() -> Any:
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Make random weights larger, so that images and texts have different features."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1:
                values.copy_(torch.randn(values.shape, generator=generator) * 3 / values[0].numel() ** 0.5)
            elif "bias" in name and values.numel() > 1:
                values.copy_(0.3 * torch.randn(values.shape, generator=generator))
    return model.eval()


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, model: Any, size: int = 32) -> Path:
    """Save a model, its tokenizer, and an image processor as ``save_pretrained`` does."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shape = {"height": size, "width": size}
    transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=shape).save_pretrained(folder)
    return folder
