"""``python -m benchmarks.speed scorers``: measure the cost of each scorer, and of pytorch-ood 0.4 on the same tensors.

The results are ``scorers.json`` and ``scorers.md``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ood_scores
from benchmarks.speed.measure import Product, timed
from benchmarks.speed.peers import PEERS, Problem
from ood_scores.errors import OodScoresError
from ood_scores.scorers.numerics.pruned_mixture import RANK
from ood_scores.scorers.one_pass import fit_all

SAME = {"vra": {"below": "clip"}}
"""Parameters with which a scorer computes the same as the detector of pytorch-ood."""

CACHED = {"features", "logits", "labels", "head"}
ACCURACY = (
    "Where pytorch-ood takes less time: its fits sum in float32. Those of `fdbd` and `nci` sum the features in "
    "float64, that of `dice` their differences from the first row, and those of `mahalanobis`, `pnml`, and `vim` also "
    "sum their products in float64, of which float32 would keep half of the digits: no faster way that is as exact "
    "was found. `energy`, `entropy`, `temperature`, and `weighted_energy` take about a millisecond for all rows, of "
    "which a call of `score` takes about 0.1 ms whatever the number of rows, and every set is checked for NaN and "
    "infinite values. `react` and `vra` check the features too, because clipping would hide an infinite value."
)
"""The reasons why some fits and scores take longer than those of pytorch-ood."""

PAIRS, MOST_PAIRS = 3, 100
"""Numbers of runs: the second only if all runs take less than a second together."""


@dataclass(frozen=True)
class Cost:
    """Seconds per fit and microseconds per scored row, ours and theirs; None if there is no fit or no detector."""

    name: str
    fit_s: float
    row_us: float
    peer_fit_s: float | None = None
    peer_row_us: float | None = None
    peer_share: float = 1.0


@dataclass(frozen=True)
class Together:
    """Seconds for ``evaluate`` with all scorers, with the slowest alone, for reading the data once, and for the product
    of all rows with the bank of neighbors at the speed of a large product."""

    width: int
    classes: int
    scorers: int
    all_s: float
    slowest: str
    slowest_s: float
    read_s: float
    bank_s: float

    @property
    def ratio(self) -> float:
        return self.all_s / (self.slowest_s + self.read_s)


def problem(fit_rows: int, rows: int, width: int, classes: int) -> Problem:
    """Create float32 features around class means, after a ReLU, and a head that separates the classes."""
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.copy_(means * 8 / width)
        layer.bias.zero_()
    return Problem(_around(means, layer, fit_rows, 1), _around(means, layer, rows, 2), layer)


def _around(means: torch.Tensor, layer: nn.Linear, rows: int, seed: int, noise: float = 1.0) -> ood_scores.FeatureSet:
    labels = torch.arange(rows) % len(means)
    features = torch.randn(rows, means.shape[1], generator=torch.Generator().manual_seed(seed))
    features.mul_(noise).add_(means[labels]).relu_()
    with torch.no_grad():
        return ood_scores.FeatureSet(features, layer(features), labels, ood_scores.Head(layer.weight, layer.bias))


def cached_scorers() -> list[str]:
    """Return the names of the scorers that read only features, logits, labels and the head."""
    made = {name: ood_scores.create_scorer(name) for name in ood_scores.list_scorers()}
    return [name for name, scorer in made.items() if {*scorer.needs, *scorer.fit_needs} <= CACHED]


def cost(name: str, data: Problem) -> Cost:
    """Measure medians of alternating fits and scores, after a warm-up of each on few rows."""
    times: dict[str, list[float]] = {"fit": [], "score": [], "peer fit": [], "peer score": []}
    theirs = PEERS.get(name)
    detector: Any = None
    for _ in range(PAIRS):
        data.train.statistics.clear()
        scorer = _timed(times["fit"], lambda: ood_scores.create_scorer(name, **SAME.get(name, {})).fit(data.train))
        if theirs and _another(times["peer fit"]):
            detector = _timed(times["peer fit"], lambda: theirs.fitted(data))
    while _another(times["score"]):
        _timed(times["score"], partial(scorer.score, data.test))
        if theirs and _another(times["peer score"]):
            _timed(times["peer score"], lambda: theirs.scored(detector, data))
    found = {what: statistics.median(seconds) for what, seconds in times.items() if seconds}
    ours = Cost(name, found["fit"] if scorer.fit_needs else 0.0, _per_row(found["score"], data))
    if not theirs:
        return ours
    peer_fit = found["peer fit"] if theirs.fit else None
    peer_row = _per_row(found["peer score"] / theirs.share, data)
    return Cost(ours.name, ours.fit_s, ours.row_us, peer_fit, peer_row, theirs.share)


def _another(seconds: list[float]) -> bool:
    """Decide whether to run again: ``PAIRS`` runs, one if it takes more than 20 s, more if they take under a second."""
    if len(seconds) < PAIRS:
        return not seconds or seconds[0] <= 20
    return len(seconds) < MOST_PAIRS and sum(seconds) < 1


def _timed(seconds: list[float], function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - start)
    return result


def _per_row(seconds: float, data: Problem) -> float:
    return 1e6 * seconds / len(data.test)


def together(fit_rows: int, rows: int, width: int, classes: int) -> Together:
    """Measure ``evaluate`` with fitted scorers on ``rows`` ID rows and four times as many OoD rows."""
    data = problem(fit_rows, rows, width, classes)
    ood = {str(n): _around(torch.zeros(classes, width), data.layer, rows, 10 + n, noise=1 + n / 4) for n in range(4)}
    scorers = {name: ood_scores.create_scorer(name) for name in cached_scorers()}
    fit_all(scorers.values(), data.train)
    alone: dict[str, float] = {}
    for name, scorer in scorers.items():
        seconds: list[float] = []
        _timed(seconds, partial(scorer.score, data.test))
        alone[name] = seconds[0]
    slowest = max(alone, key=alone.__getitem__)
    runs: dict[str, Callable[[], Any]] = {
        "all": lambda: ood_scores.evaluate(scorers, id=data.test, ood=ood),
        "slowest": lambda: ood_scores.evaluate({slowest: scorers[slowest]}, id=data.test, ood=ood),
        "read": lambda: _read(data.test, *ood.values()),
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    while len(times["all"]) < PAIRS and _another(times["all"]):
        for what, run in runs.items():
            _timed(times[what], run)
    all_s, slowest_s, read_s = (statistics.median(times[what]) for what in runs)
    product = Product(4096, torch.float32)
    bank_s = 2 * 5 * rows * fit_rows * width / product.flops * timed(product.runner())
    return Together(width, classes, len(scorers), all_s, slowest, slowest_s, read_s, bank_s)


def _read(*sets: ood_scores.FeatureSet) -> None:
    for feats in sets:
        for block in feats.blocks():
            block.features.sum() + block.logits.sum()


def memory(whose: str, *sizes: int) -> float:
    """Measure the memory that fitting and scoring the mixture adds to the peak of its own process, in MiB."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", whose, *map(str, sizes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def markdown(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    lines = [
        "# What each scorer costs",
        "",
        f"Written by `python -m benchmarks.speed scorers` on {results['machine']}: {sizes['fit_rows']:,} rows to fit, "
        f"{sizes['rows']:,} to score, D = {sizes['width']}, C = {sizes['classes']}, float32, from RAM. Medians of "
        f"{PAIRS} runs, up to {MOST_PAIRS} of what takes little time, that alternate with those of pytorch-ood on the "
        "same tensors (one run where it takes more than 20 s). A fit counts alone, with the pass over the data that "
        'fits share in `evaluate`. `vra` is measured with `below="clip"`, which is what pytorch-ood computes.',
        "",
        "| scorer | fit | score a row | pytorch-ood: fit | score a row | scores faster | fits faster | GPU: waits |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(Cost(**cost)) for cost in results["scorers"]),
        "",
        "\\* of fewer rows, scaled: a tenth for GradNorm, a fifth for the others.",
        "",
        "GPU: waits are the times that the host waits for a GPU to score a block. One of them is the transfer of the "
        "scores, which all scorers of a pass share. Scorers that are not in the table wait once, except for "
        f"{_other_waits({cost['name'] for cost in results['scorers']})}. A block with rows that float32 does not "
        "decide, as most blocks have for `cf_ood`, takes up to three waits more.",
        "",
        ACCURACY,
        "",
    ]
    if results["memory"]:
        ours, theirs = results["memory"]["ours"], results["memory"]["peer"]
        lines += [
            f"Peak memory of `gmm`, fit and score, above what the data take (`VmHWM` of a process of its own): "
            f"{ours:,.0f} MiB, pytorch-ood {theirs:,.0f} MiB: {theirs / max(ours, 1):.1f} times as much.",
            "",
        ]
    for line in results["together"]:
        lines += [
            f"`evaluate` with all {line['scorers']} scorers, fitted, on {sizes['rows']:,} ID and 4 x {sizes['rows']:,} "
            f"OoD rows, D = {line['width']}, C = {line['classes']}: {line['all_s']:.2f} s; with the slowest alone "
            f"(`{line['slowest']}`) {line['slowest_s']:.2f} s; one read of the data {line['read_s']:.3f} s: "
            f"{line['ratio']:.2f} times the last two. One product of all rows with the bank's {sizes['fit_rows']:,}, "
            f"which `knn`, `nnguide`, `dknn`, `lid`, and `relation` share, takes {line['bank_s']:.2f} s at the speed "
            "of a 4,096 x 4,096 float32 product. `grood` needs another one, with rows of other directions. At that "
            "speed, the products that the scores cannot do without (these two, and those of `relation`, `weiper`, "
            f"`corp`, `cf_ood`, and `gmm`) take {_products_s(sizes, line):.2f} s: `evaluate` takes "
            f"{line['all_s'] / _products_s(sizes, line):.2f} times as long.",
            "",
        ]
    return "\n".join(lines)


def _products_s(sizes: dict[str, int], line: dict[str, Any]) -> float:
    """Return the seconds for the large products that scores need, each counted once, at the speed of the bank's."""
    width, classes, bank = line["width"], line["classes"], sizes["fit_rows"]
    made: dict[str, Any] = {name: ood_scores.create_scorer(name) for name in ("weiper", "corp", "cf_ood")}
    products = {
        "bank": bank * width,
        "grood": bank * width,
        "relation": bank * classes,
        "weiper": made["weiper"].repeats * classes * width,
        "corp": made["corp"].directions * width,
        "cf_ood": made["cf_ood"].share * bank * width,
        "gmm": (RANK * classes + 1) * width**2,  # bounds of all classes, and one triangle in float64
    }
    return float(line["bank_s"] * sum(products.values()) / products["bank"])


def _other_waits(shown: set[str]) -> str:
    """Describe the scorers that are not shown and wait more than once."""
    waits = {name: ood_scores.create_scorer(name).tags.waits for name in ood_scores.list_scorers()}
    return ", ".join(f"`{name}` ({count})" for name, count in waits.items() if count > 1 and name not in shown)


def _row(cost: Cost) -> str:
    def shown(value: float | None, unit: str) -> str:
        return f"{value:.3g} {unit}" if value else ""

    def faster(theirs: float | None, ours: float) -> str:
        return f"{theirs / ours:,.2g} times" if theirs and ours else ""

    scaled = "\\*" if cost.peer_share < 1 else ""
    cells = (
        f"`{cost.name}`",
        shown(cost.fit_s, "s"),
        shown(cost.row_us, "µs"),
        shown(cost.peer_fit_s, "s"),
        shown(cost.peer_row_us, "µs") + scaled,
        faster(cost.peer_row_us, cost.row_us),
        faster(cost.peer_fit_s, cost.fit_s),
        str(ood_scores.create_scorer(cost.name).tags.waits),
    )
    return f"| {' | '.join(cells)} |"


def run(folder: Path, machine: str, fit_rows: int, rows: int, width: int, classes: int, names: list[str]) -> None:
    """Measure the scorers, and write the table after each, so that an interrupted run keeps its results."""
    warnings.simplefilter("ignore")
    sizes = {"fit_rows": fit_rows, "rows": rows, "width": width, "classes": classes}
    results: dict[str, Any] = {"machine": machine, "sizes": sizes, "scorers": [], "memory": {}, "together": []}
    small, data = problem(4 * classes, 2 * classes, width, classes), problem(**sizes)
    for name in names or cached_scorers():
        try:
            cost(name, small)  # warm-up
        except (OodScoresError, RuntimeError, ValueError, torch.linalg.LinAlgError) as error:
            print(f"{name}: too few rows to warm up: {error}")
        results["scorers"].append(asdict(cost(name, data)))
        print(_row(Cost(**results["scorers"][-1])), flush=True)
        _write(folder, results)
    if names:
        return
    results["memory"] = {whose: memory(whose, *sizes.values()) for whose in ("ours", "peer")}
    for other_width, other_classes in ((width, classes), (342, 10)):
        line = together(fit_rows, rows, other_width, other_classes)
        results["together"].append(asdict(line) | {"ratio": line.ratio})
        print(results["together"][-1], flush=True)
        _write(folder, results)


def _write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "scorers.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "scorers.md").write_text(markdown(results))
