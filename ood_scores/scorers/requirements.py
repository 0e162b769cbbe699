"""Requirements of scorers: whether a feature set meets them, and how to get what is missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ood_scores.errors import BadInput
from ood_scores.extraction.probes import PROBES, Probe
from ood_scores.registry import did_you_mean

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

Has = Callable[[str], bool]
"""A function such as ``FeatureSet.has``: whether a set has the column or extra of a name."""

Where = Literal["python", "command line", "benchmark"]
"""The interface for which a remedy is phrased: a call, a command, or a key of a benchmark file."""

COLUMNS = ("features", "logits", "labels", "head", "negatives", "negatives.conjugated")
"""The parts of a feature set that are available without a probe."""

HOW_TO_GET: Mapping[str, tuple[str, str, str]] = {
    "features": (
        "pass features=... to FeatureSet",
        "extract them with ood-scores extract",
        "use a model that has features",
    ),
    "logits": (
        "extract from a classifier, or give the features of an encoder the logits of a linear probe, "
        "ood_scores.fit_linear_probe(train_feats) and feats.with_head(probed.head)",
        "extract from a classifier, or give the caches of an encoder the logits of a linear probe with ood-scores "
        "linear-probe",
        "use a model with a classifier, or ood-scores linear-probe",
    ),
    "head": (
        "pass head=Head(weight, bias) to FeatureSet, extract from a classifier, or give the features of an encoder the "
        "head of a linear probe, ood_scores.fit_linear_probe(train_feats) and feats.with_head(probed.head)",
        "extract from a model whose last layer is linear, or give the caches of an encoder the head of a linear probe "
        "with ood-scores linear-probe",
        "use a model whose last layer is linear",
    ),
    "negatives": (
        "extract from zero_shot_classifier(model, classes, negatives=NegativeWords(nouns, adjectives))",
        "extract with --classes FILE, --negatives FILE, and --adjectives FILE",
        'classes = "FILE" and negatives = {nouns = "FILE", adjectives = "FILE"} of a [[model]] of CLIP or SigLIP',
    ),
    "mahalanobis_odin": (
        "extract it with extract(..., probes=[MahalanobisODIN(fit='train.h5')]), where train.h5 is the cache of the "
        "fit set",
        "extract it with --probe mahalanobis_odin:fit=train.h5, where train.h5 is the cache of the fit set",
        '[extraction] probes = ["mahalanobis_odin:fit=PATH/train.h5"], where train.h5 is the cache of the fit set',
    ),
    "mixup": (
        "extract the fit set with extract(..., probes=[Mixup(proxy='folder:photos')]), where photos is a folder of "
        "images that stand for OoD data",
        "extract it with --probe mixup:proxy=folder:photos, where photos is a folder of images that stand for OoD data",
        '[extraction] fit_probes = ["mixup:proxy=folder:PATH/photos"], where photos is a folder of images that stand '
        "for OoD data",
    ),
    "labels": (
        "extract from a loader that yields (images, labels), or pass labels=... to FeatureSet",
        "extract from a dataset with labels",
        "use a dataset with labels",
    ),
    "ensemble": (
        "pass a list of feature sets with logits, one of each model, on the same data",
        "pass a list of caches to ood_scores.evaluate in Python, or list models under [ensembles] in a benchmark",
        'list two [[model]] or more in [ensembles] "label" = ["model", "model"]',
    ),
    "fit set": (
        "pass fit=train_feats, or call .fit(train_feats) first",
        "pass --fit CACHE",
        'fit = "…", a name of [sets]',
    ),
}
"""Remedies for requirements that no probe meets by default, one for each interface of ``Where``."""


@dataclass(frozen=True)
class Requirement:
    """A column or an extra that a scorer reads.

    Args:
        name: one of ``COLUMNS``, or an extra such as ``odin``, ``layers`` or ``gradnorm.fc``.
        fitting: whether the fit reads it rather than the scoring.
        together: the names that are read together with it, so that the remedy names one probe for all of them.
    """

    name: str
    fitting: bool = False
    together: Sequence[str] = ()

    def met_by(self, has: Has) -> bool:
        """Return whether a set meets the requirement."""
        return has(self.name)

    @property
    def reason(self) -> str:
        """The reason why a scorer cannot run if the requirement is not met."""
        if self == FIT_SET:
            return "it needs a fit set"
        owner = "the dataset does not have" if self.name == "labels" else "the model does not have"
        if self.name.startswith("ensemble."):
            return "it scores an ensemble of several models"
        return (
            f"{'fitting' if self.fitting else 'scoring'} needs {self.name!r}, which "
            f"{owner if self.name in COLUMNS else 'was not extracted'}"
        )

    def how_to_get(self, where: Where) -> str:
        """Return the remedy, without punctuation at the end."""
        stem = self.name.partition(".")[0]
        if stem in HOW_TO_GET:
            return HOW_TO_GET[stem][get_args(Where).index(where)]
        if stem not in PROBES:
            meant = did_you_mean(stem, [*COLUMNS, *PROBES])
            return f"pass it to FeatureSet in extras={{...}}, because no registered probe computes it{meant}"
        default = PROBES[stem]()
        asked = PROBES[stem].parameters_for(_parts([self.name, *self.together])[stem])
        parameters = {key: value for key, value in asked.items() if value != getattr(default, key)}
        if stem == "layers":
            return _layers(parameters.get("layers", "stages"), where)
        zero_shot = PROBES[stem].zero_shot
        if where == "python":
            model = " from a zero-shot classifier" if zero_shot else ""
            return f"extract it with extract(..., probes=[{_as_call(stem, parameters)}]){model}"
        text = _as_text(stem, parameters)
        if where == "command line":
            return f"extract it with {'--classes FILE ' if zero_shot else ''}--probe {shlex.quote(text)}"
        key, quote = "fit_probes" if self.fitting else "probes", "'" if '"' in text else '"'
        model = ' for a [[model]] with classes = "FILE"' if zero_shot else ""
        return f"[extraction] {key} = [{quote}{text}{quote}]{model}"


FIT_SET = Requirement("fit set", fitting=True)
"""The requirement of a fit set, whatever its columns."""


def requirements(scorer: Scorer, fitting: bool) -> list[Requirement]:
    """Return the requirements of the fit of a scorer, or those of its scoring."""
    names = tuple(scorer.fit_needs if fitting else scorer.needs)
    return [Requirement(name, fitting, names) for name in names]


def unmet(scorer: Scorer, fit: Has | None, sets: Sequence[Has]) -> Requirement | None:
    """Return the first requirement of a scorer that is not met, or None if it can run.

    Args:
        scorer: the scorer, not fitted.
        fit: the columns of the fit set; None if there is no fit set.
        sets: the columns of each set to score.
    """
    if scorer.fit_needs and fit is None:
        return FIT_SET
    needed = [(each, [fit] if fit else []) for each in requirements(scorer, fitting=True)]
    needed += [(each, list(sets)) for each in requirements(scorer, fitting=False)]
    return next((each for each, having in needed if not all(map(each.met_by, having))), None)


def cannot_run(scorers: Mapping[str, Scorer], fit: Has | None, sets: Sequence[Has], where: Where) -> dict[str, str]:
    """Return the reason and the remedy, in one sentence, for each scorer that lacks a requirement; see ``unmet``."""
    missing = {label: unmet(scorer, fit, sets) for label, scorer in scorers.items()}
    return {label: f"{need.reason}: {need.how_to_get(where)}" for label, need in missing.items() if need}


def probes_for(needs: Iterable[str]) -> list[Probe]:
    """Return the probes that compute the extras among some requirements.

    Raises:
        BadInput: if no registered probe computes one of them.
    """
    parts = _parts(name for name in needs if name not in COLUMNS)
    for stem in parts:
        if stem not in PROBES:
            raise BadInput(f"the scorer reads {stem!r}, which no registered probe computes: choose another scorer.")
    return [PROBES[stem](**PROBES[stem].parameters_for(below)) for stem, below in parts.items()]


def _parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the parts ``b`` of names ``a.b`` by ``a``."""
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        stem, _, part = name.partition(".")
        parts.setdefault(stem, []).extend([part] if part else [])
    return parts


def _layers(layers: str | Sequence[str], where: Where) -> str:
    """Return the remedy for pooled layers, for which ``extract`` has an option of its own."""
    if where == "command line":
        return f"extract it with --layers {layers if isinstance(layers, str) else ','.join(layers)}"
    if where == "benchmark":
        return f"[extraction] layers = {json.dumps(layers)}"
    return f"extract it with extract(..., layers={layers!r})"


def _as_call(stem: str, parameters: Mapping[str, Any]) -> str:
    """Return a probe in Python: its name, or a call of its class."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return f"{PROBES[stem].__name__}({arguments})" if arguments else repr(stem)


def _as_text(stem: str, parameters: Mapping[str, Any]) -> str:
    """Return a probe in a command or a benchmark file: ``name:key=value``."""
    arguments = ",".join(f"{key}={_value(value)}" for key, value in parameters.items())
    return f"{stem}:{arguments}" if arguments else stem


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
