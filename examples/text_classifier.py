"""Score texts: a tiny BERT tells weather from sports, and texts about cooking are out of distribution.

Batches are dicts of what the model's ``forward`` takes, such as a tokenizer of transformers returns.
"""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification

import ood_scores

TOPICS = [
    ["rain", "sun", "wind", "cloud", "storm", "snow", "fog", "heat", "frost", "thunder"],
    ["goal", "team", "match", "ball", "coach", "player", "league", "score", "race", "medal"],
]
COOKING = ["salt", "oven", "butter", "flour", "sugar", "onion", "pepper", "boil", "fry", "taste"]
WORDS = ["", "the", "a", "is", "and", *TOPICS[0], *TOPICS[1], *COOKING]


def tokenize(words: list[list[str]], labels: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Return the numbers of words ``[B, T]``, padded with 0, and the mask of those that are no padding."""
    longest = max(map(len, words))
    rows = [[WORDS.index(word) for word in text] + [0] * (longest - len(text)) for text in words]
    batch = {"input_ids": torch.tensor(rows)}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    return batch if labels is None else batch | {"labels": torch.tensor(labels)}


def texts(rows: int, topics: list[list[str]], seed: int) -> dict[str, torch.Tensor]:
    rng = random.Random(seed)
    labels = [rng.randrange(len(topics)) for _ in range(rows)]
    words = [rng.choices([*topics[label], *WORDS[1:5]], k=rng.randint(6, 12)) for label in labels]
    return tokenize(words, labels)


torch.manual_seed(0)
config = BertConfig(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(60):
    model(**texts(64, TOPICS, 100 + step)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

train, id, ood = (
    ood_scores.extract(model, [batch], name=name, progress=False)
    for name, batch in (
        ("train", texts(600, TOPICS, 0)),
        ("topics", texts(300, TOPICS, 1)),
        ("cooking", texts(300, [COOKING], 2)),
    )
)
table = ood_scores.evaluate(["msp", "energy", "mahalanobis", "knn"], id=id, ood={"cooking": ood}, fit=train)
print(table[["scorer", "auroc", "fpr95_id"]].round(3).to_string(index=False))

detector = ood_scores.calibrate("mahalanobis", model, fit=train, id=id)
print(f"{detector.predict(texts(100, TOPICS, 3)).is_ood.sum()} of 100 new texts rejected")
print(f"{detector.predict(texts(100, [COOKING], 4)).is_ood.sum()} of 100 texts about cooking rejected")
