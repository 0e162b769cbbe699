"""Power of the tests of shift beside alibi-detect's MMD: CIFAR-10 features in which a share of CIFAR-100 is mixed.

``OOD_SCORES_DATA=FOLDER python -m benchmarks.shift_power`` prints Markdown tables. All tests get the same rows and the
same number of permutations. alibi-detect needs a second for a test, so that its test is repeated here with one matrix
product for all permutations; for the first ``--checked`` draws of each share, alibi-detect itself must find the same
statistic. That needs ``pip install alibi-detect[torch]``.
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
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.data.sources import open_dataset
from ood_scores.models.opening import load_model, preprocessing

Rows = NDArray[np.float32]
Test = Callable[[Rows, Rows, int], float]

SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)
LEVELS = (0.01, 0.05)
PEER, OURS = "alibi-detect MMD", ("mmd", "energy", "knn", "classifier", "ks")


def features(data: Path, network: str, name: str) -> Rows:
    """Return the features of all test images of a dataset, float32 ``[10000, D]``."""
    model = load_model(f"cifar_{network}", data / "checkpoints" / f"cifar10_{network}.safetensors")
    loader = DataLoader(open_dataset(f"sheets:{data}/images/{name}_test", preprocessing(model)), 500)
    return ood_scores.extract(model, loader).features.numpy()


def peer_statistics(reference: Rows, window: Rows, permutations: int, seed: int) -> NDArray[np.float64]:
    """Return the squared MMD of alibi-detect 0.13, without a permutation and with each.

    Its kernel is exp(-d^2 / s^2), where s is the median distance between reference rows, and its estimate is unbiased.
    """
    rows, n, m = np.concatenate([reference, window]).astype(np.float64), len(reference), len(window)
    squares = cdist(rows, rows, "sqeuclidean")
    median = np.sort(squares[:n, :n], axis=None)[n + (n * n - n) // 2 - 1]
    kernel = np.exp(-squares / median)
    np.fill_diagonal(kernel, 0)
    sides = np.tile(np.arange(n + m) < n, (permutations + 1, 1))
    sides[1:] = np.random.default_rng(seed).permuted(sides[1:], axis=1)
    to_reference = sides @ kernel
    inside = (to_reference * sides).sum(axis=1)
    across = (to_reference * ~sides).sum(axis=1)
    outside = kernel.sum() - 2 * across - inside
    return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)


def peer_itself(reference: Rows, window: Rows, permutations: int) -> float:
    """Return the squared MMD that alibi-detect finds."""
    from alibi_detect.cd import MMDDrift

    return float(MMDDrift(reference, "pytorch", n_permutations=permutations).predict(window)["data"]["distance"])


def tests(permutations: int) -> dict[str, Test]:
    """Return functions from reference rows, a window, and a seed to a p-value, by name."""

    def peer(reference: Rows, window: Rows, seed: int) -> float:
        found = peer_statistics(reference, window, permutations, seed)
        return float((found[1:] >= found[0]).mean())

    def ours(name: str, reference: Rows, window: Rows, seed: int) -> float:
        return ood_scores.shift(reference, window, name, permutations=permutations).p_value  # type: ignore[arg-type]

    return {PEER: peer, **{f"`{name}`": partial(ours, name) for name in OURS}}


def drawn(known: Rows, other: Rows, share: float, rows: int, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Draw reference rows, and a window of as many rows with a share of other rows."""
    mixed = round(share * rows)
    chosen = rng.choice(len(known), 2 * rows - mixed, replace=False)
    inside = known[chosen[rows:]], other[rng.choice(len(other), mixed, replace=False)]
    return known[chosen[:rows]], np.concatenate(inside)


def with_interval(alarms: NDArray[np.bool_]) -> str:
    """Describe a share with its 95% interval of Clopper and Pearson."""
    ends = binomtest(int(alarms.sum()), len(alarms)).proportion_ci()
    return f"{alarms.mean():.2f} ({ends.low:.2f}–{ends.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "densenet100"))
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--rows", type=int, default=500, help="rows of the reference and of a window (default 500)")
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--checked", type=int, default=1, help="draws for alibi-detect itself (default 1)")
    options = parser.parse_args()
    data = Path(os.environ["OOD_SCORES_DATA"])
    known, other = (features(data, options.network, name) for name in ("cifar10", "cifar100"))
    chosen = tests(options.permutations)
    p_values = {name: np.empty((len(SHARES), options.repeats)) for name in chosen}
    seconds = dict.fromkeys(chosen, 0.0)
    of_peer = []
    for at, share in enumerate(SHARES):
        rng = np.random.default_rng(at)
        for repeat in range(options.repeats):
            reference, window = drawn(known, other, share, options.rows, rng)
            for name, test in chosen.items():
                start = time.process_time()
                p_values[name][at, repeat] = test(reference, window, repeat)
                seconds[name] += time.process_time() - start
            if repeat < options.checked:
                start = time.process_time()
                found = peer_itself(reference, window, options.permutations)
                of_peer.append(time.process_time() - start)
                assert np.isclose(found, peer_statistics(reference, window, 1, 0)[0], rtol=0, atol=5e-6)
    costs = {name: f"{taken / len(SHARES) / options.repeats:.3f}" for name, taken in seconds.items()}
    costs[PEER] = f"{np.mean(of_peer):.3f}" if of_peer else "–"
    for level in LEVELS:
        print(f"\n| p ≤ {level:g} | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | CPU seconds |")
        print("|---" * (len(SHARES) + 2) + "|")
        for name, p in p_values.items():
            cells = [with_interval(of_share <= level) for of_share in p]
            print(f"| {name} | " + " | ".join(cells) + f" | {costs[name]} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
