"""
6. Reproducing a row of a paper
===============================

The tables of four papers are benchmark files that contain the published numbers. What can be measured on this machine
runs; what is missing is listed with the command that gets it.
"""

# %%
# What a paper needs
# ------------------
# Table 6 of GradNorm (Huang et al. 2021) on CIFAR. On the command line this is ``ood-scores paper gradnorm_cifar``.
# The plan lists what is missing on a machine that has neither the images nor the network, with the remedy:

from pathlib import Path
from tempfile import mkdtemp

import ood_scores.demo  # registers a small network, digit_net
from ood_scores import benchmark

here = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "benchmarks" / "papers").is_dir())
folder = Path(mkdtemp())
spec = benchmark.load_spec(here / "benchmarks" / "papers" / "gradnorm_cifar.toml")
planned = benchmark.plan(spec, folder / "runs", folder)
for each in planned.not_run[:2]:
    print(f"{each.what}: {each.reason}\n    {each.remedy}".replace(f"{folder}/", ""))

# %%
# So a row takes three commands: train the network, get the images, compare. Each continues where it was interrupted.
#
# .. code-block:: sh
#
#    ood-scores train benchmarks/recipes/gradnorm_cifar10_resnet20.toml --set seed=0 \
#        --out runs/gradnorm_cifar10_resnet20_seed0
#    ood-scores benchmark benchmarks/papers/gradnorm_cifar.toml --dry-run
#    ood-scores paper gradnorm_cifar
#
# The published numbers are in the file:

import pandas as pd

published = pd.DataFrame(spec.parts[0].published)
published[published["ood"] == "mean"].pivot_table(index="scorer", columns="metric", values="value")

# %%
# A paper of your own
# -------------------
# The same with data that are at hand: a file that names a network, datasets, scorers, and the numbers that somebody
# published. First the network, in seconds:

from ood_scores.training import train

(folder / "digits.toml").write_text("""
epochs = 4
[model]
name = "digit_net"
[data]
train = "digits?classes=0-6"
validation = 0.2
[optimizer]
lr = 0.1
""")
train(folder / "digits.toml", folder / "runs" / "digits_seed0", progress=False).accuracy

# %%
# The images that were not trained on are ID test images, and the digits 7 to 9 are near OoD. The published numbers
# here are invented.

(folder / "paper.toml").write_text("""
title = "Table 1 of an imaginary paper"
fit = "digits"
id = "held_out"
near = ["unseen"]
far = ["noise"]
scorers = ["msp", "energy", "gradnorm", "knn"]

[sets]
digits = "digits?classes=0-6&without_validation=0.2"
held_out = "digits?classes=0-6&validation=0.2"
unseen = "digits?classes=7-9"
noise = "noise:uniform?n=300&size=8"

[[model]]
label = "Small network"
name = "digit_net"
recipe = "digits"
seeds = [0]

[[published]]
source = "Imaginary 2026, Table 1"
model = "Small network"
metrics = ["auroc"]
ood = ["unseen", "noise"]
[published.values]
msp = [[90.0], [95.0]]
energy = [[91.0], [96.0]]
""")

results = benchmark.run(folder / "paper.toml", out=folder / "runs" / "paper", data=folder, jobs=1, progress=False)
results.comparison[["scorer", "ood", "metric", "published", "ours", "difference"]].round(2)

# %%
# The report has the same columns, and ``results.csv`` all metrics with intervals:

print((results.folder / "report.md").read_text()[:900])
