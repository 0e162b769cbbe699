"""Score sounds: a tiny Wav2Vec2 tells low from high tones, and noise is out of distribution.

Batches are dicts of what the model's ``forward`` takes, such as a feature extractor of transformers returns.
"""

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import ood_scores

SAMPLES = 800


def tones(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Return low (class 0) and high (class 1) tones at random phases ``[B, samples]``, with a little noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows,), generator=rng)
    pitch = 0.05 + 0.25 * labels + 0.05 * torch.rand(rows, generator=rng)
    phase = 6.28 * torch.rand(rows, generator=rng)
    waves = torch.sin(pitch[:, None] * torch.arange(SAMPLES) + phase[:, None])
    return {"input_values": waves + 0.1 * torch.randn(rows, SAMPLES, generator=rng), "labels": labels}


def noise(rows: int, seed: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(rows, SAMPLES, generator=torch.Generator().manual_seed(seed))}


torch.manual_seed(0)
config = Wav2Vec2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    conv_dim=(16, 16),
    conv_kernel=(10, 8),
    conv_stride=(5, 8),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=16,
    apply_spec_augment=False,
)
model = Wav2Vec2ForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(40):
    model(**tones(32, 100 + step)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

train, id, ood = (
    ood_scores.extract(model, [batch], name=name, progress=False)
    for name, batch in (("train", tones(400, 0)), ("tones", tones(200, 1)), ("noise", noise(200, 2)))
)
table = ood_scores.evaluate(["msp", "energy", "mahalanobis", "knn"], id=id, ood={"noise": ood}, fit=train)
print(table[["scorer", "auroc", "fpr95_id"]].round(3).to_string(index=False))

detector = ood_scores.calibrate("mahalanobis", model, fit=train, id=id)
print(f"{detector.predict(tones(100, 3)).is_ood.sum()} of 100 new tones rejected")
print(f"{detector.predict(noise(100, 4)).is_ood.sum()} of 100 noises rejected")
