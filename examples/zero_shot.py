"""Score a zero-shot model: a CLIP model with random weights, a tokenizer of whole words, and negatives.

python examples/zero_shot.py

For a real one, replace ``tiny_clip()`` by ``CLIPModel.from_pretrained("openai/clip-vit-base-patch16")`` and leave out
the tokenizer, which is then that of the model.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import ood_scores
from ood_scores.data.kinds.digits import digits

CLASSES = ["zero", "one", "two", "three", "four", "five", "six"]
NOUNS = ["table", "cloud", "river", "moon", "stone", "tower", "leaf", "spoon"]
ADJECTIVES = ["white", "sunny", "broken", "tall"]
OTHERS = "the nice a photo of digit This is good close-up environment space object scene place item area view thing"
MORE = "pattern structure landscape vista creature - ."
WORDS = ["<pad>", "<start>", "<unknown>", *CLASSES, *NOUNS, *ADJECTIVES, *OTHERS.split(), *MORE.split(), "<end>"]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


def tiny_clip():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": len(WORDS) - 1, "pad_token_id": 0}
    text = {**size, **ends, "vocab_size": len(WORDS), "max_position_embeddings": 16}
    vision = {**size, "image_size": 8, "patch_size": 4, "num_channels": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def tokenizer():
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(name, VOCABULARY[name]) for name in ("<start>", "<end>")]
    words.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


def loader(classes):
    images, labels = digits(classes)
    inputs = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    return DataLoader(TensorDataset(inputs, torch.from_numpy(labels)), batch_size=64)


model = ood_scores.zero_shot_classifier(
    tiny_clip(),
    CLASSES,
    templates=["a photo of the digit {}.", "the {}"],
    negatives=ood_scores.NegativeWords(NOUNS, ADJECTIVES, share=0.5),
    tokenizer=tokenizer(),
)
known, unknown = (ood_scores.extract(model, loader(each), probes=["local_mcm"]) for each in (range(7), range(7, 10)))
table = ood_scores.evaluate(["mcm", "gl_mcm", "neglabel", "csp", "energy"], id=known, ood={"digits 7-9": unknown})
print("The weights are random, so the scores mean nothing:")
print(table.round(3).to_string(index=False))
