"""``python -m benchmarks.quarter_hour``: train five networks of the papers in full on a GPU, and compare their numbers.

One seed each of ResNet-18 without and with L2 normalization (Haas et al. 2024), RNA, OE and LA (Shin et al. 2024), in
this order, in mixed precision and channels-last, with the images in the memory of the device. The images are those in
the folder ``OOD_SCORES_DATA``; the auxiliary images are TinyImageNet's, not the 300,000 of the paper. The same command
resumes an interrupted run. Rehearse it on a CPU in a minute::

    python -m benchmarks.quarter_hour --out /tmp/rehearsal --rows 200 --set epochs=1 --set model.width=4 \\
        --set 'data.train=sheets:$OOD_SCORES_DATA/images/cifar10_train?take=500'
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.time_limit import TimeIsUp, time_limit
from ood_scores.benchmark import Results, Spec, load_spec, run
from ood_scores.training import load_recipe, train

HERE = Path(__file__).parent
RECIPES = ("haas_resnet18_60", "haas_resnet18_60_l2", "rna_cifar10_lt", "oe_cifar10_lt", "la_cifar10_lt")
IMAGES = "sheets:$OOD_SCORES_DATA/images"
DATA = (f"data.train={IMAGES}/cifar10_train", f"data.test={IMAGES}/cifar10_test")
AUXILIARY = f"auxiliary.data={IMAGES}/tinyimagenet_auxiliary"
MEASURING = 60
"""Seconds that are kept for the measurements."""


def main(arguments: Sequence[str] | None = None) -> Results | None:
    options = _parser().parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes - MEASURING
    finished = [name for name in RECIPES if _train(name, options, end - time.monotonic())]
    if not finished:
        print("no training was finished: run the same command again to resume", flush=True)
        return None
    results = run(_spec(finished, options.rows), out=options.out / "results", data=options.out, device=options.device)
    columns = ["part", "model", "scorer", "ood", "metric", "ours", "published", "difference"]
    print(results.comparison[columns].round(2).to_string(index=False), flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train five networks of the papers in full, and compare their numbers."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quarter_hour"), help="output folder")
    parser.add_argument("--minutes", type=float, default=15, help="time after which trainings stop, to be resumed")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …")
    parser.add_argument("--rows", type=int, help="evenly spaced rows of each test set; default: all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="key of all recipes to override"
    )
    return parser


def _train(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Train a recipe for at most some seconds, and return whether it is finished."""
    path = HERE / "recipes" / f"{name}.toml"
    auxiliary = [AUXILIARY] if load_recipe(path).auxiliary else []
    recipe = load_recipe(path, ["amp=bf16", "channels_last=true", "seed=0", *DATA, *auxiliary, *options.set])
    start = time.monotonic()
    with suppress(TimeIsUp), time_limit(seconds):
        trained = train(recipe, options.out / "runs" / f"{name}_seed0", device=options.device)
        print(f"{name}: {time.monotonic() - start:.0f} s, {trained.accuracy}", flush=True)
        return True
    print(f"{name}: stopped after {time.monotonic() - start:.0f} s", flush=True)
    return False


def _spec(finished: Sequence[str], rows: int | None) -> Spec:
    """Return the suite of the shortened trainings with the finished full ones in place of the shortened."""
    spec = load_spec(HERE / "suites" / "shortened.toml")
    parts = []
    for part in spec.parts:
        full = [replace(model, recipe=str(model.recipe).removeprefix("short_"), seeds=(0,)) for model in part.models]
        models = tuple(model for model in full if model.recipe in finished)
        titles = {model.title for model in models}
        published = tuple(number for number in part.published if number.model in titles)
        changed = replace(part, models=models, published=published, notes="Full trainings, one seed.")
        parts += [replace(changed, extraction=replace(part.extraction, rows=rows))] if models else []
    return Spec("quarter_hour", "Five networks of the papers, in full", tuple(parts))


if __name__ == "__main__":
    main()
