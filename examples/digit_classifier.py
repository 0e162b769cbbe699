"""Define a small timm classifier for the other examples: a random transformer whose head is fitted on digits.

The other examples import this module; it prints nothing.
"""

import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits_split, photo_patches
from ood_scores.models.opening import preprocessing

PREPROCESSING = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}

torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=10, img_size=16).eval()
split = digits_split()
photographs = photo_patches(200)  # uint8 [200, 8, 8], like the digits


def loader(images, labels=None, names=None):
    return DataLoader(ImageArrays(images, labels, preprocessing(model, **PREPROCESSING), names=names), batch_size=128)


fit = loader(split.train_images, split.train_labels, [f"digit {row}" for row in range(len(split.train_images))])
held_out = loader(split.test_images[:300], split.test_labels[:300])
new_digits = split.test_images[300:]

features = ood_scores.extract(model, fit, pool="cls", progress=False)  # of the encoder: the head is still random
probe = LogisticRegression(C=100, max_iter=2000).fit(features.features, features.labels)
weights = {"weight": torch.from_numpy(probe.coef_), "bias": torch.from_numpy(probe.intercept_)}
model.get_submodule("head").load_state_dict(weights)
