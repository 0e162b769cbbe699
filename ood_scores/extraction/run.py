"""extract: one forward pass over a loader, kept."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ood_scores.errors import UnfinishedCache
from ood_scores.extraction import heads, loaders
from ood_scores.extraction.distributed import extract_shards
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.one_pass import Target, Task, run, state_of
from ood_scores.extraction.options import ExtractionOptions, takes_options
from ood_scores.extraction.probes.base import record_of
from ood_scores.features import FeatureSet, Provenance, load
from ood_scores.features.storage import shards
from ood_scores.models.running import architecture, choose_device, uncompiled, weights_sha256
from ood_scores.runtime import Ranks

PACKAGES = ("ood_scores", "torch", "timm", "h5py", "numpy")


@takes_options
def extract(
    model: nn.Module,
    loader: Iterable[Any],
    cache: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    name: str | None = None,
    **options: Any,
) -> FeatureSet:
    """Runs a classifier once over a loader and keeps penultimate features, logits, labels and the head.

    The model may be any ``nn.Module`` (timm, torchvision, Hugging Face, your own) whose logits are an affine map of
    something: that something is what is kept, exactly as the map received it. The model's device, its modes and its
    gradients setting are as before when this returns.

    Under ``torchrun`` and with a ``cache``, each process writes the rows of its share of the batches to a shard beside
    the cache, and the cache joins the shards; the result is what one process gives. ``loader`` is then a ``DataLoader``
    of all rows, in order, and all processes call this alike.

    Args:
        model: returns logits ``[B, C]``, or an object or dict with ``logits``. Of one that ``torch.compile`` made, the
            original is run.
        loader: an iterable of batches ``(x, y)``, ``x`` or dicts; of known or unknown length, with or without labels.
        cache: an HDF5 file to write. If it exists and was made by the same weights, data, preprocessing and precision
            it is opened and the model is not run; if its extraction was interrupted, it is continued.
        device: where to run; ``"auto"`` takes a GPU if the model is on the CPU and there is one, else the model's own;
            under ``torchrun`` that of the process.
        progress: show a progress bar (on standard error).
        resume: continue an interrupted extraction; False starts it again.
        overwrite: replace an existing cache, whatever made it.
        name: the dataset's name, part of the cache's identity; by default the dataset's own ``name`` or its class.
        **options: how the model is run and what is computed, as listed in ``ExtractionOptions``: ``amp``,
            ``channels_last``, ``compile``, ``dtype``, ``head``, ``layers`` and ``probes``.

    Returns:
        The feature set, lazily on the cache if there is one, else in memory.

    Raises:
        HeadNotFound, HeadMismatch: no affine map gives the logits, or the named one does not; says what was found.
        EmptyInput: the loader gave nothing.
        NotFinite: an activation is NaN or infinite; names the row. Batches before it are kept in the cache.
        BadLabels, ShapeMismatch, BadInput: batches that cannot be worked with; a layer that does not exist.
        UnknownName: there is no probe of that name.
        StaleCache: the cache was made by something else; names both fingerprints.
        ShuffledLoader: a loader in random order cannot resume a cache or be compared with one.
        WorkerDied: another process of ``torchrun`` is gone.
        ForeignFile, DamagedCache, CacheBusy, CacheWriteFailed: see ``ood_scores.errors``.
    """
    chosen = ExtractionOptions(**options)
    model = uncompiled(model)
    ranks = Ranks.here()
    forward = Forward(model, chosen, choose_device(model, device, ranks.local))
    batches = loaders.Batches.look_into(loader)
    provenance = _describe(forward, batches, name)
    task = Task(forward, batches, progress and ranks.first)
    if cache is None:
        return run(task, Target(provenance))
    path = Path(cache)
    state = state_of(path, provenance, resume, overwrite)
    if state and state.finished:
        return load(path)
    if ranks.count > 1:
        if state:
            raise UnfinishedCache(
                f"{path} holds {state.rows:,} rows of an extraction by one process: continue it without torchrun, or "
                "pass overwrite=True to extract again."
            )
        extract_shards(task, path, provenance, ranks, resume, overwrite)
        return load(path)
    if not (state or overwrite):
        shards.require_no_others(path)
    feats = run(task, Target(provenance, path, state=state, replace=overwrite or not resume))
    shards.remove(path)  # those of the cache whose place it took
    return feats


def _describe(forward: Forward, batches: loaders.Batches, name: str | None) -> Provenance:
    model, options, device = forward.model, forward.options, forward.device
    loader = batches.loader
    inputs, labels = loaders.unpack(batches.first[0])
    own = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return Provenance(
        architecture=architecture(model),
        weights_sha256=weights_sha256(model),
        head=heads.resolve_module(model, options.head)[0],
        head_modules="",
        dataset=name or loaders.dataset_name(loader),
        dataset_rows=loaders.row_count(loader),
        data_sha256=batches.checksum(),
        labelled=labels is not None,
        shuffled=loaders.is_shuffled(loader),
        batch_size=getattr(loader, "batch_size", None) or len(inputs),
        preprocessing=loaders.preprocessing(loader),
        model_dtype=str(own).removeprefix("torch."),
        amp=options.amp,
        channels_last=options.channels_last,
        compiled=options.compile,
        dtype=options.dtype,
        device=torch.cuda.get_device_name(device) if device and device.type == "cuda" else str(device),
        versions={"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        probes=tuple(record_of(probe) for probe in options.all_probes),
    )
