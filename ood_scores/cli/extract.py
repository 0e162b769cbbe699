"""``ood-scores extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ood_scores.cli import completion, options, parsing
from ood_scores.cli.printing import answer, console, stoppable
from ood_scores.terminal import marked


@options.takes_extraction_options
def extract(
    model: options.Model,
    data: Annotated[
        str,
        typer.Argument(
            help="Dataset, as folder:, npz:, imglist:, torchvision:, hf:, …", autocompletion=completion.datasets
        ),
    ],
    cache: Annotated[Path, typer.Argument(help="HDF5 file to write.")],
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    model_arg: options.ModelArg = None,
    classes: options.Classes = None,
    templates: options.Templates = None,
    negatives: options.Negatives = None,
    adjectives: options.Adjectives = None,
    batch_size: options.BatchSize = 64,
    workers: options.Workers = 2,
    device: options.Device = "auto",
    mean: options.Mean = None,
    std: options.Std = None,
    name: Annotated[str | None, typer.Option(help="Name to record for the dataset; defaults to its own.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing cache, whatever created it.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted extraction, or start it again.")
    ] = True,
    **extraction: Any,
) -> None:
    """Run a model once over a dataset and store its features, logits, labels, and last layer in an HDF5 file.
    Of an encoder without a classifier, the features and labels are stored.

    An interrupted run continues where it stopped; a cache that was created with different settings is refused. Under
    torchrun, the processes share the rows. With --classes, CLIP, SigLIP, and models of open_clip are zero-shot
    classifiers.

    \b
    [bold]Examples[/]
      ood-scores extract resnet50 folder:imagenet/val val.h5 --amp bf16
      ood-scores extract cifar_resnet20 "torchvision:CIFAR10?split=test" \\
          test.h5 --checkpoint cifar10.safetensors
      ood-scores extract hf-hub:OWNER/NAME imglist:textures.txt dtd.h5
      ood-scores extract hf:openai/clip-vit-base-patch16 folder:photos clip.h5 \\
          --classes classes.txt --templates "a photo of a {}."
      ood-scores extract nets.py:small folder:photos c.h5 --model-arg width=32
      ood-scores extract vit_small_patch14_dinov2 folder:photos c.h5 \\
          --pool cls+mean
      ood-scores extract resnet50 folder:imagenet/val val.h5 \\
          --layers stages --probe odin:epsilon=0.004 --probe rankfeat
      torchrun --nproc-per-node 4 -m ood_scores extract resnet50 \\
          folder:imagenet/val val.h5

    \b
    [bold]Data[/]
      folder:PATH     one subfolder per class, or images without labels
      npz:PATH        arrays images [N,H,W,3] or [N,H,W], and labels [N]
      imglist:PATH?root=DIR          lines "relative/path label"
      sheets:DIR/NAME                images packed on a few large ones
      torchvision:CIFAR10?split=test&root=DIR&download=true
      hf:OWNER/NAME?split=test       from the Hugging Face hub
      wds:DIR/shards-{000..127}.tar  tar files of webdataset
      noise:gaussian?n=10000&size=32&seed=0     or noise:uniform
      digits?classes=0-6             scikit-learn's handwritten digits
      options of all: rows=0:5000, take=500, only=2,4,7-9, long_tail=100,
                      scramble=SEED, validation=0.1, without_validation=0.1
                      labels=none     OoD images in folders named like classes
                      classes=FILE    names in the order of the model's classes
      $NAME is replaced by the environment variable NAME

    \b
    [bold]Probes[/] add extras to the cache; most run the model again
      activations, adascale, batch_norm_gap, extremes, fgsm, gradients,
      gradnorm, gram, iodin, layers, local_mcm, mahalanobis_odin, mc_dropout,
      mixup, nac, norms, odin, rankfeat
      with parameters: odin:epsilon=0.004,std=(0.2,0.2,0.2)
    """
    from torch.utils.data import DataLoader

    import ood_scores
    from ood_scores.data.sources import open_dataset
    from ood_scores.features.accuracy import accuracy_of
    from ood_scores.models.class_names import in_models_order
    from ood_scores.models.opening import load_model, preprocessing
    from ood_scores.runtime import Ranks
    from ood_scores.transfers import pins_memory

    parsing.import_named(model, [data], extraction.get("probes", ()), extraction.get("pool"))
    means, stds = parsing.numbers(mean), parsing.numbers(std)
    dataset = open_dataset(data)
    network = load_model(model, checkpoint, num_classes, **parsing.model_arguments(model_arg))
    network = parsing.zero_shot(network, classes, templates, negatives, adjectives)
    dataset = in_models_order(dataset, network)
    dataset.transform = preprocessing(network, means, stds)
    with stoppable(lambda: _kept(cache, resume and not overwrite)):
        feats = ood_scores.extract(
            network,
            DataLoader(dataset, batch_size, num_workers=workers, pin_memory=pins_memory(device)),
            cache,
            device=device,
            resume=resume,
            overwrite=overwrite,
            name=name,
            **extraction,
        )
    if not Ranks.here().first:
        return
    found: dict[str, Any] = {
        "cache": str(cache),
        "rows": len(feats),
        "features": feats.num_features,
        "classes": feats.num_classes if feats.head else None,
        "accuracy": accuracy_of(feats),
    }
    answer(found, lambda: _show(**found))


def _show(cache: str, rows: int, features: int, classes: int | None, accuracy: float | None) -> None:
    shown = f", {classes} classes" if classes else ""
    correct = "" if accuracy is None else f", accuracy [bold]{accuracy:.2%}[/]"
    console().print(f"[green]✓[/] {rows:,} rows of {features} features{shown}{correct} in [bold]{marked(cache)}[/]")


def _kept(cache: Path, continues: bool) -> str:
    """Return what an interrupted extraction has kept, and how to continue it."""
    from ood_scores.atomic import user_path
    from ood_scores.errors import CacheError
    from ood_scores.features.storage import cache as caches

    again = "run the same command" + (" again" if continues else ", without --overwrite or --no-resume,")
    try:
        with caches.open_to_read(user_path(cache)) as h5:
            rows = caches.state(h5).rows
    except (CacheError, OSError):
        return again
    return f"[bold]{marked(cache)}[/] keeps {rows:,} rows; {again} to continue"
