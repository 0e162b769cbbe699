"""Register a custom scorer, the spread of the logits, and compare it with others.

python examples/your_own_scorer.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores.data.kinds.digits import digits_split, photo_patches


@ood_scores.register_scorer("logit_spread")
@dataclass
class LogitSpread(ood_scores.Scorer):
    """The standard deviation of a row's logits."""

    needs = ("logits",)

    def score_block(self, block) -> Tensor:
        return block.logits.std(dim=1, correction=0)


def loader(images, labels=None):
    arrays = [torch.from_numpy(images).float()[:, None] / 255]
    return DataLoader(TensorDataset(*arrays, *([] if labels is None else [torch.from_numpy(labels)])), batch_size=128)


torch.manual_seed(0)
split = digits_split()
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(20):
    for x, y in loader(split.train_images, split.train_labels):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

table = ood_scores.evaluate(
    ["logit_spread", "msp", "energy"],
    id=ood_scores.extract(model, loader(split.test_images, split.test_labels)),
    ood={"photographs": ood_scores.extract(model, loader(photo_patches(500)))},
)
print(table.round(3).to_string(index=False))
