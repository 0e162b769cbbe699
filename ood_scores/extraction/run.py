"""``extract``: run a model once over a loader and keep what it computes."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ood_scores.atomic import require_writable, user_path
from ood_scores.errors import UnfinishedCache
from ood_scores.extraction import heads, loaders
from ood_scores.extraction.distributed import extract_shards
from ood_scores.extraction.encoders import pool_text, require_whole_inputs
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.further_inputs import further_inputs, unread_labels, with_names
from ood_scores.extraction.one_pass import Target, Task, run, state_of, warn_of_rows_left_out
from ood_scores.extraction.options import options_from, takes_options
from ood_scores.extraction.probes.base import record_of
from ood_scores.extraction.row_ids import warn_of_repeated_ids
from ood_scores.features import FeatureSet, Provenance, load
from ood_scores.features.accuracy import warn_of_chance
from ood_scores.features.storage import shards
from ood_scores.models.class_names import other_order
from ood_scores.models.origin import origin_of
from ood_scores.models.running import architecture, choose_device, unwrapped, weights_sha256
from ood_scores.models.zero_shot.build import as_classifier, require_no_texts
from ood_scores.models.zero_shot.towers import Tokenizer
from ood_scores.progress import stderr_console
from ood_scores.runtime import Ranks, default_torch_state, tf32_is_allowed, versions_of
from ood_scores.user_warnings import warn_user

PACKAGES = ("ood_scores", "torch", "timm", "h5py", "numpy")


@takes_options
@default_torch_state()
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
    classes: Any = None,
    templates: Any = None,
    negatives: Any = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> FeatureSet:
    """Run a model once over a loader and keep its features, and of a classifier its logits and head.

    The model may be any ``nn.Module`` (timm, torchvision, Hugging Face, your own) whose logits are an affine map of a
    vector: that vector is kept as the features, exactly as the map received it. Of an encoder, a model without a
    classifier, the pooled output is kept as the features, without logits and head. The model's device, modes, and
    gradient settings are restored afterwards.

    Under ``torchrun`` and with a ``cache``, each process writes its share of the rows to a shard next to the cache, and
    the cache joins the shards; the result is the same as with one process. ``loader`` must then be a ``DataLoader``
    over all rows, in order, and all processes must make the same call.

    Args:
        model: a module that returns logits ``[B, C]``, or an object or dict with ``logits``; or an encoder, which
            returns a vector ``[B, D]`` or an output with one (``pooler_output``, ``image_embeds``), or tokens or maps,
            for which ``pool`` is needed. The original module is run if it is wrapped by ``torch.compile``,
            ``DataParallel``, or the like.
        loader: an iterable of batches ``(x, y)``, ``x``, or dicts, of known or unknown length, with or without labels.
            A dict has them under ``labels``, ``label``, ``targets``, ``target``, or ``y``; a warning names others.
        cache: the HDF5 file to write. If it exists and was created with the same weights, data, preprocessing, and
            options, it is opened and the model is not run; if its extraction was interrupted, it is continued.
        device: the device to run on; ``"auto"`` uses a GPU if the model is on the CPU and there is one, else the
            model's own device; under ``torchrun``, the device of the process.
        progress: whether to show a progress bar (on standard error).
        resume: whether to continue an interrupted extraction; False starts it again.
        overwrite: whether to replace an existing cache, whatever created it.
        name: the dataset's name in tables; by default the dataset's own ``name`` or its class. An existing cache of the
            same data is opened, or continued, under whatever name it was created.
        classes: the names of classes, which make a vision-language model such as CLIP or SigLIP a zero-shot classifier.
            For several datasets, call ``ood_scores.zero_shot_classifier`` once instead, and pass its result as
            ``model``; its arguments have the same meaning as here.
        templates: texts in which the name of a class replaces ``{}``.
        negatives: words that are not classes, which the scorers ``neglabel`` and ``csp`` need.
        tokenizer: the tokenizer of a vision-language model; by default its own.
        **options: how the model is run and what is computed: the fields of ``ExtractionOptions``, which are ``amp``,
            ``channels_last``, ``compile``, ``dtype``, ``head``, ``layers``, ``pool``, ``probes``, and ``on_error``.

    Returns:
        The feature set: read lazily from the cache if there is one, else in memory.

    Raises:
        HeadNotFound, HeadMismatch: if no affine map computes the logits, or the named one does not; the message lists
            the candidates.
        EmptyInput: if the loader yields nothing, or nothing that can be read.
        UnreadableRow: if an input cannot be read, with ``on_error="raise"`` or a loader of whose rows none can be left
            out. The cache keeps earlier batches.
        TooManyUnreadableRows: if more than one row, and more than a tenth, cannot be read.
        MissingData, FileSystemFault: if a file is missing, or the file system does not deliver it. The cache keeps
            earlier batches.
        NotFinite: if an activation is NaN or infinite; the message names the row. The cache keeps earlier batches.
        MissingInput: if there are ``classes``, but no tokenizer.
        BadLabels, ShapeMismatch, BadInput: if a batch or an option cannot be used, or the model cannot take a batch.
        UnknownName: if there is no probe of that name.
        StaleCache: if the cache was created with different settings; the message lists both.
        ShuffledLoader: if the loader's order is random and a cache exists, which then cannot be resumed or compared.
        WorkerDied: if another process of ``torchrun`` has ended.
        ForeignFile, DamagedCache, CacheBusy, CacheWriteFailed: see ``ood_scores.errors``.
    """
    chosen = options_from(options, extract)
    model, ranks = unwrapped(model), Ranks.here()
    model = as_classifier(
        model, classes, templates, negatives, tokenizer, device=choose_device(model, device, ranks.local)
    )
    require_no_texts(model)
    require_whole_inputs(model)
    forward = Forward(model, chosen, choose_device(model, device, ranks.local), loaders.transform_of(loader))
    order = other_order(getattr(loader, "dataset", None), model)
    batches = loaders.Batches.look_into(loader, chosen.on_error == "skip", partial(with_names, model=model))
    for text in (order, unread_labels(batches.example[1], model)):
        if text and ranks.first:
            warn_user(text)
    provenance = _describe(forward, batches, name)
    task = Task(forward, batches, progress and ranks.first)
    feats = _named(_extracted(task, provenance, cache, ranks, resume, overwrite), name)
    if ranks.first:
        warn_of_rows_left_out(feats)
        _warn_of_encoder(forward)
    return feats


def _extracted(
    task: Task,
    provenance: Provenance,
    cache: str | os.PathLike[str] | None,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
) -> FeatureSet:
    rows = task.batches.rows_of_list()
    if cache is None:
        feats = run(task, Target(provenance, rows=rows))
        warn_of_repeated_ids(feats)
        warn_of_chance(feats)
        return feats
    path = user_path(cache)
    state = state_of(path, provenance, resume, overwrite, task.skip, task.row_ids)
    if state and state.finished:
        if task.progress:
            stderr_console().print(f"{path} is complete: reused, the model was not run", soft_wrap=True, markup=False)
        return load(path)
    if not state:
        require_writable(path.parent)
    if ranks.count > 1:
        if state:
            raise UnfinishedCache(
                f"{path} contains {state.rows:,} rows of an extraction by one process: continue it without torchrun, "
                "or pass overwrite=True to extract again."
            )
        extract_shards(task, path, provenance, ranks, resume, overwrite)
        feats = load(path)
    else:
        if not (state or overwrite):
            shards.require_no_others(path)
        feats = run(task, Target(provenance, path, rows, state, overwrite or not resume))
        shards.remove(path)  # of the cache that was replaced
    if ranks.first:
        warn_of_repeated_ids(feats)
        warn_of_chance(feats)
    return feats


def _named(feats: FeatureSet, name: str | None) -> FeatureSet:
    """Give a set the requested name of its dataset, if there is one; its cache may have another."""
    if name and feats.provenance:
        feats.provenance = replace(feats.provenance, dataset=name)
    return feats


def _warn_of_encoder(forward: Forward) -> None:
    """Warn of a model that was taken for an encoder although nothing says so."""
    encoder = forward.found.encoder if forward.found else None
    if encoder and not encoder.is_declared:
        warn_user(
            f"no affine map computes the output of {architecture(forward.model)}, which is taken for an encoder: the "
            "output is kept as the features, without logits. Set model.num_classes = 0 to confirm it; if these are the "
            "logits of a classifier, name its last layer with head='module.name'.",
        )


def _describe(forward: Forward, batches: loaders.Batches, name: str | None) -> Provenance:
    model, options, device = forward.model, forward.options, forward.device
    origin = origin_of(model)
    loader = batches.loader
    inputs, labels = loaders.unpack(batches.example[1])
    text, root = loaders.data_text(loader)
    own = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    matmul_tf32, conv_tf32 = tf32_is_allowed() if device and device.type == "cuda" else (None, None)
    return Provenance(
        architecture=architecture(model),
        weights_sha256=weights_sha256(model),
        head=heads.resolve_module(model, options.head)[0],
        head_modules="",
        dataset=name or loaders.dataset_name(loader),
        dataset_rows=loaders.row_count(loader),
        data_sha256=batches.checksum(lambda batch: further_inputs(batch, model)),
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
        versions=versions_of(PACKAGES),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        pool=pool_text(options.pool),
        probes=tuple(record_of(probe) for probe in options.all_probes),
        label_order=getattr(getattr(loader, "dataset", None), "label_order", None),
        data_text=text,
        data_root=root,
        model=origin.name if origin else None,
        arguments=origin.unseen_arguments if origin else None,
        matmul_tf32=matmul_tf32,
        conv_tf32=conv_tf32,
    )
