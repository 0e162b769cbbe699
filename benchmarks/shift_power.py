"""Power of the tests of shift beside alibi-detect's MMD: CIFAR-10 features in which a share of CIFAR-100 is mixed.

``OOD_SCORES_DATA=FOLDER python -m benchmarks.shift_power`` prints a Markdown table. All tests get the same rows and the
same number of permutations. It needs alibi-detect with its PyTorch backend: ``pip install alibi-detect[torch]``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.data.sources import open_dataset
from ood_scores.models.opening import load_model, preprocessing

Rows = NDArray[np.float32]
Test = Callable[[Rows, Rows], float]

SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)
LEVELS = (0.01, 0.05)
PEER, OURS = "alibi-detect MMD", ("mmd", "energy", "knn", "classifier", "ks")


def features(data: Path, network: str, name: str) -> Rows:
    """Return the features of all test images of a dataset, float32 ``[10000, D]``."""
    model = load_model(f"cifar_{network}", data / "checkpoints" / f"cifar10_{network}.safetensors")
    loader = DataLoader(open_dataset(f"sheets:{data}/images/{name}_test", preprocessing(model)), 500)
    return ood_scores.extract(model, loader).features.numpy()


def tests(permutations: int) -> dict[str, Test]:
    """Return functions from reference rows and a window to a p-value, by name."""
    from alibi_detect.cd import MMDDrift

    def peer(reference: Rows, window: Rows) -> float:
        found = MMDDrift(reference, "pytorch", n_permutations=permutations).predict(window)
        return float(found["data"]["p_val"])

    def ours(name: str, reference: Rows, window: Rows) -> float:
        return ood_scores.shift(reference, window, name, permutations=permutations).p_value  # type: ignore[arg-type]

    return {PEER: peer, **{f"`{name}`": partial(ours, name) for name in OURS}}


def drawn(known: Rows, other: Rows, share: float, rows: tuple[int, int], rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Draw the reference rows, and a window with a share of other rows."""
    reference, window = rows
    mixed = round(share * window)
    chosen = rng.choice(len(known), reference + window - mixed, replace=False)
    inside = known[chosen[reference:]], other[rng.choice(len(other), mixed, replace=False)]
    return known[chosen[:reference]], np.concatenate(inside)


def with_interval(alarms: NDArray[np.bool_]) -> str:
    """Describe a share with its 95% interval of Clopper and Pearson."""
    ends = binomtest(int(alarms.sum()), len(alarms)).proportion_ci()
    return f"{alarms.mean():.2f} ({ends.low:.2f}–{ends.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "densenet100"))
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--rows", type=int, default=500, help="rows of the reference and of a window (default 500)")
    parser.add_argument("--permutations", type=int, default=99)
    options = parser.parse_args()
    data = Path(os.environ["OOD_SCORES_DATA"])
    known, other = (features(data, options.network, name) for name in ("cifar10", "cifar100"))
    chosen = tests(options.permutations)
    p_values = {name: np.empty((len(SHARES), options.repeats)) for name in chosen}
    seconds = dict.fromkeys(chosen, 0.0)
    for at, share in enumerate(SHARES):
        rng = np.random.default_rng(at)
        torch.manual_seed(at)  # alibi-detect draws its permutations with the global generator
        for repeat in range(options.repeats):
            reference, window = drawn(known, other, share, (options.rows, options.rows), rng)
            for name, test in chosen.items():
                start = time.process_time()
                p_values[name][at, repeat] = test(reference, window)
                seconds[name] += time.process_time() - start
    for level in LEVELS:
        print(f"\n| p ≤ {level:g} | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | CPU seconds |")
        print("|---" * (len(SHARES) + 2) + "|")
        for name, p in p_values.items():
            cells = [with_interval(of_share <= level) for of_share in p]
            print(f"| {name} | " + " | ".join(cells) + f" | {seconds[name] / p.size:.3f} |")


if __name__ == "__main__":
    main()
