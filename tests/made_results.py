"""Benchmark results with random scores, and all other numbers computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ood_scores.benchmark.results import NotRun, Results, table_columns
from ood_scores.benchmark.unit_files import Scored
from ood_scores.evaluation import metrics
from ood_scores.evaluation.uncertainty import auroc_interval

PART = "Scores & costs of <every> scorer, 100% real_data"
PROBED = "Scores that run the model again"
GROUPS = {"cifar100_test": "near", "tinyimagenet_resize": "near", "textures": "far", "scenes": "far", "mnist": "far"}
SHIFTS = {"cifar100_test": 1.5, "tinyimagenet_resize": 1.7, "textures": 2.1, "scenes": 1.9, "mnist": 3.4}
SCORERS = {
    "cadref": 0.97,
    "vra": 0.965,
    "fdbd": 0.96,
    "react → gradnorm": 0.87,
    "energy": 0.93,
    "weighted_energy": 0.93,
    "knn": 0.92,
    "msp": 0.8,
    "ODIN T=1000 & ε=0.004": 0.9,
    "gradnorm": 0.85,
    "mahalanobis": 0.35,
    "<script>alert('ash_s')</script>|`": 0.2,
}
"""Correlation of each scorer with the variable that separates the datasets."""
MODELS = {
    "ResNet-20": (1.0, 0.9173, 2),
    "DenseNet-100 (k=12)": (1.15, 0.9454, 1),
    "ViT-B/16 <ünïcode>": (0.75, 0.7444, 1),
}
"""Separation of the datasets, ID accuracy and number of checkpoints of each model."""


NOTES = "Rows & columns <made> up.\n\n- *first*\n- ![picture](https://example.org/a.png)"


def make_results(folder: Path, n_id: int = 300, n_ood: int = 200, parts: tuple[str, ...] = (PART,)) -> Results:
    """Create results of three models, twelve scorers and five datasets.

    Two scorers are equal, and the first model has two checkpoints.
    """
    rng = np.random.default_rng(0)
    units = [
        _unit(rng, part, model, checkpoint, n_id, n_ood)
        for part in parts
        for model, (_, _, checkpoints) in MODELS.items()
        for checkpoint in range(checkpoints)
    ]
    table = pd.DataFrame([row for unit in units for row in table_rows(unit)], columns=list(table_columns()))
    return Results(
        name="made",
        title="Every score on made-up images",
        folder=folder,
        spec={
            "title": "Every score on made-up images",
            "parts": [{"title": parts[0], "notes": NOTES}],
        },
        table=table,
        comparison=_comparison(table),
        measures=_measures(),
        not_run=(
            NotRun(parts[0], "svhn", "there is no data/svhn", "ood-scores data get svhn"),
            NotRun(parts[0], "BiT-S R101x1", "its checkpoint is not here", "https://example.org/BiT-S-R101x1.npz"),
            NotRun(parts[0], "mc_dropout", "these networks have no dropout"),
        ),
        scored=tuple(units),
        searched=pd.DataFrame(
            [
                {
                    "part": parts[0],
                    "model": "ResNet-20",
                    "checkpoint": 0,
                    "scorer": "knn",
                    "parameters": f"k={k}",
                    "metric": "auroc",
                    "value": value,
                    "chosen": k == 50,
                }
                for k, value in ((1, 0.871), (10, 0.893), (50, 0.902))
            ]
        ),
        environment={
            "versions": {"ood_scores": "0.1.0", "torch": "2.9.0", "timm": "1.0.22"},
            "device": "cpu",
            "created": "2026-11-21T18:00:00+00:00",
            "seconds": 812.4,
        },
    )


def _unit(rng: np.random.Generator, part: str, model: str, checkpoint: int, n_id: int, n_ood: int) -> Scored:
    """Draw scores: weighted sums of the variable that separates the datasets and of noise for each scorer."""
    seen = {"id": rng.standard_normal(n_id)}
    seen |= {name: rng.standard_normal(n_ood) - MODELS[model][0] * shift for name, shift in SHIFTS.items()}
    rows = {name: len(values) for name, values in seen.items()}
    scores: dict[str, dict[str, Tensor]] = {}
    for i, (scorer, weight) in enumerate(SCORERS.items()):
        noise = {name: np.sqrt(1 - weight**2) * rng.standard_normal(count) for name, count in rows.items()}
        own = {name: 10.0 ** (i % 3) * (weight * seen[name] + noise[name]) + i for name in rows}
        scores[scorer] = {name: torch.from_numpy(values) for name, values in own.items()}
    scores["weighted_energy"] = scores["energy"]
    return Scored(
        part=part,
        model=model,
        checkpoint=checkpoint,
        scores=scores,
        labels={name: torch.arange(n) % 10 if name == "id" else torch.full((n,), -1) for name, n in rows.items()},
        predictions={name: torch.from_numpy(rng.integers(0, 10, n)) for name, n in rows.items()},
        rows={name: torch.arange(n) for name, n in rows.items()},
        origins={name: ["cifar10_test" if name == "id" else name] * n for name, n in rows.items()},
        ids={name: np.array([f"{name}/<b>{row}.png" for row in range(n)]) for name, n in rows.items()},
    )


def table_rows(unit: Scored) -> list[dict[str, Any]]:
    """Compute the rows of the table for the scores of a unit."""
    made = []
    for i, (scorer, scores) in enumerate(unit.scores.items()):
        for ood, group in GROUPS.items():
            found = dict(metrics.compare(scores["id"], scores[ood]))
            interval = auroc_interval(scores["id"], scores[ood])
            near = {f"{name}_{end}": found[name] + step for name in ("fpr95_id", "fpr95_ood") for end, step in ENDS}
            made.append(
                {
                    "part": unit.part,
                    "model": unit.model,
                    "checkpoint": unit.checkpoint,
                    "scorer": scorer,
                    "ood": ood,
                    "group": group,
                    **found,
                    "auroc_low": interval.low,
                    "auroc_high": interval.high,
                    **near,
                    "id_accuracy": MODELS[unit.model][1] + 0.002 * unit.checkpoint,
                    "fit_seconds": 0.4 * i,
                    "score_microseconds": 0.3 * 1.8**i,
                    "parameters": json.dumps({"name": scorer} | ({"k": 50} if scorer == "knn" else {})),
                    "weights_sha256": f"{unit.model}-{unit.checkpoint}".encode().hex().ljust(64, "0")[:64],
                    "id_sha256": "1d" * 32,
                    "ood_sha256": ood.encode().hex().ljust(64, "0")[:64],
                    "fit_sha256": "f1" * 32,
                    "versions": "ood_scores 0.1.0, torch 2.9.0",
                }
            )
    return made


ENDS = (("low", -0.02), ("high", 0.02))


def _comparison(table: pd.DataFrame) -> pd.DataFrame:
    """Create published numbers of a model that ran and of one that did not, and an accuracy."""
    part = table["part"].iloc[0]
    ours = (
        table[(table["part"] == part) & (table["checkpoint"] == 0)].set_index(["model", "scorer", "ood"]).sort_index()
    )
    rows: list[tuple[Any, ...]] = []
    for model in ("DenseNet-100 (k=12)", "BiT-S R101x1"):
        for scorer in ("msp", "energy"):
            for ood in ("textures", "mnist", "mean"):
                for metric, published in (("fpr95_id", 48.25), ("auroc", 90.15)):
                    ran = model != "BiT-S R101x1"
                    found = ours.loc[(model, scorer), metric] if ran else None
                    value = np.nan if found is None else 100 * (found.mean() if ood == "mean" else found[ood])
                    rows.append((part, model, scorer, ood, metric, published, value))
    rows.append((part, "DenseNet-100 (k=12)", None, None, "accuracy", 95.0, 94.54))
    frame = pd.DataFrame(rows, columns=["part", "model", "scorer", "ood", "metric", "published", "ours"])
    return frame.assign(
        difference=frame["ours"] - frame["published"], sd=np.nan, n=1, source="Sun et al. 2022, Table 1"
    )


def _measures() -> pd.DataFrame:
    names = ("nc1", "en_means", "en_classifier", "ea_means", "ea_classifier", "nc3", "nc4")
    rows = []
    for i, (model, (_, accuracy, checkpoints)) in enumerate(MODELS.items()):
        for checkpoint in range(checkpoints):
            rows.append((PART, model, checkpoint, "accuracy", accuracy + 0.002 * checkpoint))
            rows += [
                (PART, model, checkpoint, name, (0.3 + 0.2 * i + 0.05 * checkpoint) / (k + 1))
                for k, name in enumerate(names)
            ]
    return pd.DataFrame(rows, columns=["part", "model", "checkpoint", "measure", "value"])
