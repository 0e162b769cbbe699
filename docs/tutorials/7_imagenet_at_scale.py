"""
7. ImageNet on eight GPUs, or under Ray
=======================================

The model is the only expensive part. Several processes extract one cache together, and everything after that reads it
in blocks. This page does it with two processes on the digits; the commands for ImageNet differ only in their
arguments.
"""

# %%
# Several processes, one cache
# ----------------------------
# Every process writes its own rows, and the result reads like one file. On one machine with eight GPUs:
#
# .. code-block:: sh
#
#    torchrun --nproc-per-node 8 -m ood_scores extract resnet50 folder:imagenet/train cache/train.h5 \
#        --amp bf16 --workers 12
#    torchrun --nproc-per-node 8 -m ood_scores extract resnet50 folder:imagenet/val cache/val.h5 \
#        --amp bf16 --workers 12
#
# Here, two processes on the CPU extract 1,797 digits with an untrained network:

import os
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch

import ood_scores
from ood_scores.models.networks.cifar_resnet import cifar_resnet20

folder = Path(mkdtemp())
torch.manual_seed(0)
torch.save(cifar_resnet20(num_classes=10, in_chans=1).state_dict(), folder / "weights.pth")
command = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ood_scores"),
    *("extract", "cifar_resnet20", "digits:", str(folder / "digits.h5"), "--checkpoint", str(folder / "weights.pth")),
    *("--workers", "0", "--device", "cpu"),
]
done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
assert done.returncode == 0, done.stderr
feats = ood_scores.load(folder / "digits.h5")
feats

# %%
# Killed jobs continue with the same command. Several machines take ``--nnodes`` and a rendezvous address:
#
# .. code-block:: sh
#
#    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m ood_scores extract …
#
# Scores from disk
# ----------------
# A set on disk is read in blocks, and statistics of the fit set are stored beside it, so the second scorer that
# needs a covariance pays nothing. Memory does not grow with the number of images, except for neighbor searches,
# whose bank ``share`` limits:

scorer = ood_scores.create_scorer("knn", k=10, share=0.5).fit(folder / "digits.h5")
scorer.score(folder / "digits.h5")[:5]

# %%
# The suite for ImageNet names all datasets of OpenOOD v1.5; its plan lists what is missing, and how to get it:
#
# .. code-block:: sh
#
#    ood-scores benchmark benchmarks/suites/imagenet.toml --dry-run
#    ood-scores benchmark benchmarks/suites/imagenet.toml --data /data
#
# Under Ray
# ---------
# For millions of images in production, a detector is a callable on batches. Each worker opens it once from its folder
# (``examples/ray_batches.py`` runs offline):
#
# .. code-block:: python
#
#    class Detect:
#        def __init__(self, folder):
#            self.detector = ood_scores.Detector.load(folder)
#
#        def __call__(self, batch):
#            found = self.detector(batch)
#            return {name: found[name] for name in ("path", "predicted_label", "score", "is_ood")}
#
#    images = ray.data.read_images("s3://bucket/images/", include_paths=True)
#    scores = images.map_batches(
#        Detect, fn_constructor_args=["detector"], batch_size=256, num_gpus=1, concurrency=8
#    )
#    scores.write_parquet("scores/")
