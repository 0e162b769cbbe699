"""
1. Your model and your folders: from images to a report
=======================================================

You have a trained classifier and some folders with images. This page goes from there to a table, a figure, and an
HTML report.
"""

# %%
# Folders and a checkpoint
# ------------------------
# Skip this part with data of your own. It writes pictures into folders, one for each class, and trains a small
# network on the digits 0 to 6. The digits 7 to 9 and the photographs are out of distribution.

from pathlib import Path
from tempfile import mkdtemp

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ood_scores.data.kinds.digits import digits, digits_split, photo_patches

folder = Path(mkdtemp())


def write(name, images, classes):
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        path = folder / name / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


split = digits_split(range(7))
write("train", split.train_images, split.train_labels)
write("test", split.test_images, split.test_labels)
write("unseen_digits", *digits(range(7, 10)))
write("photographs", photo_patches(300), ["all"] * 300)

# %%
# The model is defined in a file, ``nets.py``, with a function that returns the trained model. Its ``transform``
# turns a picture into an input.

(folder / "nets.py").write_text("""
from pathlib import Path
from torch import nn, load
from torchvision import transforms


def small_net(weights="small.pth"):
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7),
    )
    model.transform = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    path = Path(__file__).parent / weights
    if path.exists():
        model.load_state_dict(load(path))
    return model.eval()
""")

# %%
# ``import_code`` imports the file, as ``--import nets.py`` does on the command line. Then the usual training loop:

from ood_scores.user_code import import_code

nets = import_code(str(folder / "nets.py"))
torch.manual_seed(0)
model = nets.small_net().train()
inputs = torch.from_numpy(split.train_images)[:, None] / 255
labels = torch.from_numpy(split.train_labels)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(8):
    for rows in torch.randperm(len(inputs)).split(128):
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
torch.save(model.state_dict(), folder / "small.pth")
model = nets.small_net()

# %%
# One pass over each folder
# -------------------------
# ``extract`` runs the model once and keeps features, logits, labels, and file names.

import ood_scores
from ood_scores.data.sources import open_dataset


def extracted(name):
    dataset = open_dataset(f"folder:{folder / name}", model.transform)
    return ood_scores.extract(model, DataLoader(dataset, batch_size=128), cache=folder / f"{name}.h5", progress=False)


train, test, unseen, photographs = map(extracted, ["train", "test", "unseen_digits", "photographs"])
test

# %%
# A table
# -------

ood = {"unseen digits": unseen, "photographs": photographs}
table = ood_scores.evaluate(["msp", "energy", "gradnorm", "knn", "cadref"], id=test, ood=ood, fit=train)
table[["scorer", "ood", "auroc", "fpr95_id", "fpr95_ood"]].round(3)

# %%
# A figure
# --------
# Gray is in-distribution. A good score leaves no overlap.

from ood_scores.plotting.curves import Panel, score_histograms


def panel(name):
    id_scores, *others = (ood_scores.score(name, feats, fit=train) for feats in [test, unseen, photographs])
    return Panel(id_scores, dict(zip(ood, others, strict=True)))


figure = score_histograms({"msp": panel("msp"), "energy": panel("energy"), "knn": panel("knn")})

# %%
# The pictures that look least in-distribution, with their file names:

from ood_scores.plotting.picture_grid import picture_grid

grid = picture_grid(test, ood_scores.score("knn", test, fit=train), open_dataset(f"folder:{folder / 'test'}"), count=8)

# %%
# A report
# --------
# A benchmark file names the same things. It compares every score that can run, and writes an HTML report with
# intervals, figures, and costs.

(folder / "mine.toml").write_text("""
title = "My classifier"
fit = "train"
id = "test"
near = ["unseen digits"]
far = ["photographs"]

[sets]
train = "folder:train"
test = "folder:test"
"unseen digits" = "folder:unseen_digits"
photographs = "folder:photographs"

[[model]]
label = "small network"
name = "nets.py:small_net"
""")

import os

import ood_scores.benchmark

os.chdir(folder)
results = ood_scores.benchmark.run("mine.toml", out="report", jobs=1, progress=False)
print(sorted(path.name for path in results.folder.iterdir()))
results.table.groupby("scorer")["auroc"].mean().nlargest(8).round(4)

# %%
# On the command line
# -------------------
# The same without a line of Python, for ``nets.py`` and folders of your own:
#
# .. code-block:: sh
#
#    ood-scores extract nets.py:small_net folder:test test.h5
#    ood-scores extract nets.py:small_net folder:photographs photographs.h5
#    ood-scores evaluate --id test.h5 --ood photographs.h5
#    ood-scores benchmark mine.toml --import nets.py          # report in runs/mine
