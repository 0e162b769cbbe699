"""
2. A threshold in production
============================

A score becomes a decision by a threshold. This page calibrates one with a known error rate, watches a stream, and
saves the detector.
"""

# %%
# A classifier of the digits 0 to 6, trained by a recipe in two seconds. Half of its validation images will
# determine the threshold, the other half show whether it keeps its promise.

from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import ood_scores
import ood_scores.demo  # registers a small network, digit_net
from ood_scores.data.kinds.digits import digits, digits_split, photo_patches
from ood_scores.models.opening import load_model
from ood_scores.training import train
from ood_scores.training.recipe_file import recipe_from

folder = Path(mkdtemp())
split = digits_split(range(7))
np.savez(folder / "train.npz", images=split.train_images, labels=split.train_labels)
recipe = {
    "epochs": 8,
    "model": {"name": "digit_net"},
    "data": {"train": f"npz:{folder / 'train.npz'}"},
    "objective": {"name": "cross_entropy"},
    "optimizer": {"lr": 0.1},
}
trained = train(recipe_from(recipe), folder / "run", progress=False)
model = load_model("digit_net", folder / "run" / "last.safetensors")
trained.accuracy

# %%
# Calibrate
# ---------
# ``fit`` is what the scorer learns from, ``id`` what the threshold is set on. Both are ID data, and they must not
# be the same.

from torch.utils.data import DataLoader

from ood_scores.data.images import ImageArrays
from ood_scores.models.opening import preprocessing

transform = preprocessing(model)


def loader(images, labels=None):
    return DataLoader(ImageArrays(images, labels, transform), batch_size=128)


held_out, new = split.test_images[::2], split.test_images[1::2]
detector = ood_scores.calibrate(
    "cadref",
    model,
    fit=loader(split.train_images, split.train_labels),
    id=loader(held_out, split.test_labels[::2]),
    keep=0.95,
    classes=[str(digit) for digit in range(7)],
)
detector

# %%
# Decide
# ------

unseen, photographs = digits(range(7, 10))[0], photo_patches(300)
for name, images in {"new digits": new, "unseen digits": unseen, "photographs": photographs}.items():
    print(f"{name}: {detector.predict(list(images)).is_ood.mean():.1%} rejected")

# %%
# At most 5% of new digits are rejected on average over calibration sets. Each image has a class, a p-value, and a
# decision:

detector.predict([new[0], new[1], photographs[0]]).to_pandas().round(4)

# %%
# Watch a stream
# --------------
# A monitor counts the rejections and tells, at any time and with a bounded probability of a false alarm, whether
# their rate has increased.

from ood_scores.detector.monitor import Monitor

monitor = Monitor.of(detector.predict(list(held_out)).score, keep=0.95)
monitor.update(detector.predict(list(new)).score)
print("before:", monitor.drifted(alpha=0.01))
monitor.update(detector.predict([*new[:60], *photographs[:40]]).score)
print("after photographs arrive:", monitor.drifted(alpha=0.01))
stream = monitor.plot()

# %%
# Save and load
# -------------
# The folder has the weights, the fitted scorer, the calibration, and the preprocessing; nothing is pickled.

detector.save(folder / "detector")
again = ood_scores.Detector.load(folder / "detector")
assert (again.predict([new[0]]).score == detector.predict([new[0]]).score).all()
print(sorted(path.name for path in (folder / "detector").iterdir()))

# %%
# On the command line, a folder of pictures is checked by
#
# .. code-block:: sh
#
#    ood-scores predict inbox/ --detector detector --out results.csv --fail-on-ood
#
# :doc:`/deploy` shows an HTTP server, ONNX, and batches of millions of images.
