"""Build a zero-shot classifier: run the text encoder over the names of classes, and over words that are not classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, MissingInput
from ood_scores.features.head import mean_direction, zero_shot_head
from ood_scores.models.origin import Origin, network_of, origin_of, remember_origin
from ood_scores.models.running import choose_device, evaluating, model_device, unwrapped
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier
from ood_scores.models.zero_shot.negatives import NegativeWords, negative_words
from ood_scores.models.zero_shot.prompts import SHOWN, TEMPLATES, checked_classes, checked_templates, filled
from ood_scores.models.zero_shot.towers import Tokenizer, Towers, has_towers, towers_of
from ood_scores.progress import ProgressBar
from ood_scores.runtime import default_torch_state

TEXTS_AT_ONCE = 256
"""How many texts the text encoder receives at a time."""

SAME = 1e-5
"""The difference of unit features up to which they are the same, which only rounding causes."""

LONG = 2000
"""The number of texts from which progress is shown."""

TEXTS = ("classes", "templates", "negatives")
"""The arguments of ``load_model`` that make a zero-shot classifier."""

STORED = "zero-shot"
"""The kind of network that ``ood_scores.models.kinds.zero_shot_networks`` creates."""


@default_torch_state()
def zero_shot_classifier(
    model: nn.Module,
    classes: Sequence[str] | Mapping[Any, Any] | str | os.PathLike[str],
    templates: Sequence[str] | str = TEMPLATES,
    *,
    negatives: NegativeWords | Iterable[str] | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> ZeroShotClassifier:
    """Return a classifier of the named classes from a vision-language model, as CLIP and SigLIP classify.

    The text encoder runs once. The result is a module like any other classifier: ``extract``, ``calibrate``, and all
    scorers take it. The directions of the features of each class are averaged over the templates, as CLIP's authors do.

    Args:
        model: a model of transformers with ``get_image_features`` and ``get_text_features``, such as ``CLIPModel`` and
            ``SiglipModel``, or a model of open_clip. It becomes a part of the classifier.
        classes: the names of the classes, in the order of their numbers; or the path of a file with one per line.
        templates: texts in which the name of a class replaces ``{}``; or the path of a file with one per line.
        negatives: words that are not classes, for the scorers ``neglabel`` and ``csp``: ``NegativeWords``, a list of
            nouns, or the path of a file with one per line.
        tokenizer: the model's tokenizer; by default that of the folder or repository from which transformers loaded
            the model, or of the name that ``load_model`` opened.
        device: the device of the text encoder, with the same meaning as in ``extract``.
        progress: whether to show a progress bar for many texts.

    Raises:
        BadInput: if the model has no text encoder, a list or template is not valid, or the tokenizer does not fit.
        MissingInput: if there is no tokenizer.
        NotFinite: if a text feature is NaN or infinite.
    """
    model = unwrapped(model)
    if isinstance(model, ZeroShotClassifier):
        raise BadInput(
            "the model is a zero-shot classifier already, with its own classes: leave out classes=, or pass the model "
            "that it was built from."
        )
    towers = towers_of(model)
    names, texts = checked_classes(classes), checked_templates(templates)
    words = None if negatives is None else negative_words(negatives)
    encode = _Encoder(towers, tokenizer or _own_tokenizer(model), progress)
    with evaluating(model, choose_device(model, device), differentiable=True):
        class_features = encode(texts, names)
        _require_different(class_features, names)
        bank = {} if words is None else words.bank(names, class_features, encode)
    head = zero_shot_head(class_features, towers.logit_scale, towers.logit_bias, negatives=bank)
    classifier = ZeroShotClassifier(model, head, names, texts).to(model_device(model)).train(model.training)
    _remember(classifier, words)
    return classifier


class _Encoder:
    """The text encoder as a function from templates and words to unit features ``[W, D]`` on the CPU."""

    def __init__(self, towers: Towers, tokenizer: Tokenizer, progress: bool) -> None:
        self.towers, self.tokenizer, self.progress = towers, tokenizer, progress

    def __call__(self, templates: Sequence[str], words: Sequence[str]) -> Tensor:
        at_once = max(1, TEXTS_AT_ONCE // len(templates))
        parts = []
        visible = self.progress and len(words) * len(templates) >= LONG
        with ProgressBar("embedding texts", len(words), "words", visible=visible) as bar:
            for start in range(0, len(words), at_once):
                texts = filled(templates, words[start : start + at_once])
                features = self.towers.text_features(texts, self.tokenizer).float().cpu()
                parts.append(mean_direction(features.unflatten(0, (-1, len(templates)))))
                bar.advance(len(texts) // len(templates))
        return torch.cat(parts)


def _require_different(features: Tensor, names: Sequence[str]) -> None:
    """Check that the unit features ``[C, D]`` of all classes differ."""
    _, numbers, counts = features.div(SAME).round().unique(dim=0, return_inverse=True, return_counts=True)
    same = [name for name, number in zip(names, numbers.tolist(), strict=True) if counts[number] > 1]
    if same:
        raise BadInput(
            f"the text encoder does not tell apart the classes {', '.join(map(repr, same[:SHOWN]))}"
            f"{', …' if len(same) > SHOWN else ''}: pass the tokenizer of this model as tokenizer=, or make the names "
            "different."
        )


def _own_tokenizer(model: nn.Module) -> Tokenizer:
    """Return the tokenizer that belongs to a model.

    Raises:
        MissingInput: if it is not known, or cannot be loaded.
    """
    origin = origin_of(model)
    if origin and origin.tokenizer:
        tokenizer: Tokenizer = origin.tokenizer()
        return tokenizer
    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not place:
        raise MissingInput(
            f"the tokenizer of this {type(model).__name__} is unknown: pass tokenizer=, such as "
            "transformers.AutoTokenizer.from_pretrained(NAME) or open_clip.get_tokenizer(NAME)."
        )
    return tokenizer_of_transformers(place)


def tokenizer_of_transformers(place: str, **options: Any) -> Tokenizer:
    """Return the tokenizer in a folder or repository.

    Raises:
        MissingInput: if there is none, or a package that it needs is not installed.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # of files with any content, and of packages that are not installed
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise MissingInput(
            f"transformers cannot load a tokenizer from {place} ({reason}): save the tokenizer there with "
            "save_pretrained, or pass tokenizer=."
        ) from error


def _remember(classifier: ZeroShotClassifier, words: NegativeWords | None) -> None:
    """Attach the origin: the name of the model, the texts, and the network that detectors create again."""
    inner = origin_of(classifier.model)
    texts: dict[str, Any] = {"classes": list(classifier.class_names), "templates": list(classifier.templates)}
    counts = {kind: len(values) for kind, values in classifier.negatives.items()}
    network, arguments = network_of(classifier.model)
    stored = {**arguments, **texts, "width": classifier.head.in_features, "negatives": counts}
    chosen = {} if words is None else {"negatives": {**counts, "share": words.share, "quantile": words.quantile}}
    origin = Origin(
        name=inner.name if inner else None,
        arguments={**(inner.arguments if inner else {}), **texts, **chosen},
        network=network and f"{STORED}:{network}",
        network_arguments=stored,
        transform=inner.transform if inner else None,
    )
    remember_origin(classifier, origin)


def check_texts(classes: Any = None, templates: Any = None, negatives: Any = None) -> None:
    """Check the arguments of a zero-shot classifier that are plain values; paths of files are not opened.

    Raises:
        BadInput: as ``zero_shot_classifier``.
    """
    if classes is not None and not isinstance(classes, (str, os.PathLike)):
        checked_classes(classes)
    if templates is not None and not isinstance(templates, (str, os.PathLike)):
        checked_templates(templates)
    if isinstance(negatives, Mapping):
        unknown = negatives.keys() - NegativeWords.__dataclass_fields__
        if unknown:
            raise BadInput(
                f"negatives have no {min(unknown)!r}: there are {', '.join(NegativeWords.__dataclass_fields__)}."
            )


def as_classifier(
    model: nn.Module,
    classes: Any = None,
    templates: Any = None,
    negatives: Any = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> nn.Module:
    """Return a zero-shot classifier of a model if texts are given, else the model itself.

    Raises:
        BadInput: if there are templates, negatives, or a tokenizer, but no classes; otherwise as
            ``zero_shot_classifier``.
    """
    if classes is not None:
        texts = {} if templates is None else {"templates": templates}
        return zero_shot_classifier(model, classes, **texts, negatives=negatives, tokenizer=tokenizer, **options)
    given = {"templates": templates, "negatives": negatives, "tokenizer": tokenizer}
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise BadInput(f"{', '.join(names)} belong to a zero-shot classifier: pass the names of its classes, too.")
    return model


def require_no_texts(model: nn.Module) -> None:
    """Raise BadInput if a model compares images with texts, which cannot run on images alone."""
    if has_towers(model):
        raise BadInput(
            f"{type(model).__name__} compares images with texts: pass the names of classes (classes=[...], --classes "
            "FILE), or pass its image encoder alone, such as transformers.CLIPVisionModelWithProjection."
        )
