"""``ood-scores calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ood_scores.atomic import require_writable, user_path
from ood_scores.cli import completion, options, parsing
from ood_scores.cli.printing import answer, console, facts
from ood_scores.errors import BadInput
from ood_scores.terminal import marked

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ood_scores.detector import Detector

CACHES = (".h5", ".hdf5")
"""Suffixes of caches that do not exist; others are recognized by their content."""


@options.takes_extraction_options
def calibrate(
    model: options.Model,
    id: Annotated[
        str,
        typer.Option(
            "--id",
            metavar="DATA",
            help="Held-out ID data for the threshold: cache or dataset.",
            autocompletion=completion.paths_and_datasets,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the detector to.")],
    scorer: Annotated[
        str, typer.Option(help="Name of a scorer; ood-scores list shows them.", autocompletion=completion.scorers)
    ] = "energy",
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="ID data to fit the scorer on, usually the training set: cache or dataset.",
            autocompletion=completion.paths_and_datasets,
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of ID images to keep.")] = 0.95,
    delta: Annotated[
        float | None,
        typer.Option(help="Share of calibration sets for which less may be kept; without it, --keep is an average."),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Compute a threshold for each predicted class.")
    ] = False,
    sets: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Also predict a set of labels: lac, aps, raps, or saps.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of ID images whose set may lack the label, with --sets.")] = 0.1,
    sets_among: Annotated[
        str, typer.Option(metavar="all|class|cluster", help="Images among which the set may lack it, with --sets.")
    ] = "all",
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Scorer parameter as KEY=VALUE; may be repeated.")
    ] = None,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    model_arg: options.ModelArg = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Dataset of the images of the cache --id, to check the preprocessing.",
            autocompletion=completion.datasets,
        ),
    ] = None,
    classes: options.Classes = None,
    templates: options.Templates = None,
    negatives: options.Negatives = None,
    adjectives: options.Adjectives = None,
    mean: options.Mean = None,
    std: options.Std = None,
    batch_size: options.BatchSize = 64,
    workers: options.Workers = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the detector in the folder.")] = False,
    device: options.Device = "auto",
    **extraction: Any,
) -> None:
    """Create a detector: a model and a scorer with the threshold that keeps a share of in-distribution images.

    The threshold is valid for images like those of --id, which must be used neither in training nor in the fit.

    \b
    [bold]Examples[/]
      ood-scores calibrate resnet50 --id folder:imagenet/val --out detector
      ood-scores calibrate cifar_resnet20 --checkpoint resnet20.safetensors \\
          --scorer vim --fit train.h5 --id val.h5 --keep 0.99 --out detector
      ood-scores predict photos --detector detector --out results.csv

    \b
    [bold]Data[/] is a cache of the same model from ood-scores extract, or
      folder:PATH, npz:PATH, imglist:PATH, torchvision:CIFAR10?split=test
    """
    import ood_scores
    from ood_scores.data.class_names import read_classes
    from ood_scores.detector.bundle import DESCRIPTION
    from ood_scores.models.opening import load_model, preprocessing
    from ood_scores.models.zero_shot.towers import has_towers
    from ood_scores.scorers import create_scorer

    out = user_path(out)
    if (out / DESCRIPTION).exists() and not overwrite:
        raise BadInput(f"there is a detector in {out}: pass --overwrite to replace it, or choose another --out.")
    require_writable(out)
    named = [id, *([fit] if fit else []), *([images] if images else [])]
    parsing.import_named(model, named, extraction.get("probes", ()), extraction.get("pool"))
    scorer = parsing.scorer_name(scorer)
    changes = {name: parsing.numbers(text) for name, text in (("mean", mean), ("std", std)) if text}
    ready = create_scorer(scorer, **parsing.parameters(scorer, param or ()))
    network = load_model(model, checkpoint, num_classes, **parsing.model_arguments(model_arg))
    if templates or negatives or adjectives or has_towers(network):
        network = parsing.zero_shot(network, classes, templates, negatives, adjectives)
    opened = _opener(network, preprocessing(network, **changes), batch_size, workers, device)
    detector = ood_scores.calibrate(
        ready,
        network,
        fit=opened(fit) if fit else None,
        id=opened(id),
        keep=keep,
        delta=delta,
        per_class=per_class,
        sets=sets,  # type: ignore[arg-type]
        alpha=alpha,
        sets_among=sets_among,  # type: ignore[arg-type]
        preprocessing=changes or None,
        classes=read_classes(user_path(classes)) if classes else None,
        images=images,
        device=device,
        **extraction,
    )
    detector.save(out)
    found = {
        "detector": str(out),
        "scorer": detector.scorer.name,
        "passes": detector.passes,
        "thresholds": [each.value for each in detector.calibration.thresholds],
        "rows": len(detector.calibration.scores),
        "dataset": detector.data.dataset if detector.data else None,
        "guarantee": detector.calibration.guarantee,
        "label_sets": detector.label_sets.guarantee if detector.label_sets else None,
    }
    answer(found, lambda: _show(detector, out))


def _opener(network: nn.Module, transform: Any, batch_size: int, workers: int, device: str) -> Callable[[str], Any]:
    """Return a function that opens a cache, or a dataset as a loader, from its text."""
    from torch.utils.data import DataLoader

    import ood_scores
    from ood_scores.data.sources import open_dataset
    from ood_scores.features.storage.reading import is_hdf5
    from ood_scores.models.class_names import in_models_order
    from ood_scores.transfers import pins_memory

    def opened(text: str) -> Any:
        if Path(text).suffix in CACHES or is_hdf5(user_path(text)):
            return ood_scores.load(text)
        images = in_models_order(open_dataset(text, transform), network)
        return DataLoader(images, batch_size, num_workers=workers, pin_memory=pins_memory(device))

    return opened


def _show(detector: Detector, out: Path) -> None:
    calibration = detector.calibration
    of = f" of {detector.data.dataset}" if detector.data else ""
    limits = [each.value for each in calibration.thresholds]
    limit = f"{limits[0]:.6g}" if len(limits) == 1 else f"{min(limits):.6g} to {max(limits):.6g}, by predicted class"
    screen = console()
    screen.print(f"[green]✓[/] a detector in [bold]{marked(out)}[/]")
    screen.print(
        facts(
            {
                "scorer": f"{detector.scorer.name} ({detector.passes})",
                "threshold": limit,
                "from": f"{len(calibration.scores):,} rows{of}",
                "guarantee": calibration.guarantee,
                **({"sets of labels": detector.label_sets.guarantee} if detector.label_sets else {}),
            }
        )
    )
