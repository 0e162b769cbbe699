"""Words that are not classes: how a bank of negatives is chosen from lists of words."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.models.zero_shot.prompts import checked_templates, read_words

NEGLABEL_TEMPLATES = ("the nice {}",)
"""The template of NegLabel's code for classes and nouns."""

NEGLABEL_ADJECTIVE_TEMPLATES = ("This is a {} photo",)
"""The template of NegLabel's code for adjectives."""

CSP_TEMPLATES = (
    "a close-up photo of the nice {}.",
    "a photo with the nice {}.",
    "a good photo with the nice {}.",
    "a photo of the nice {}.",
    "{}",
    "the {}",
    "the good {}",
    "the nice {}",
)
"""The templates of CSP's code for classes and nouns."""

CSP_CONJUGATED_TEMPLATES = ("{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}")
"""The templates of CSP's code for an adjective with a superclass."""

SUPERCLASSES = (
    "environment",
    "space",
    "object",
    "scene",
    "place",
    "item",
    "area",
    "view",
    "thing",
    "pattern",
    "structure",
    "landscape",
    "vista",
    "creature",
)
"""The superclasses of CSP's code, one of which is drawn for each adjective."""

WORDS_AT_ONCE = 4096
"""How many candidates are compared with all classes at a time."""

Embed = Callable[[Sequence[str], Sequence[str]], Tensor]
"""A function from templates and words to unit text features ``[W, D]``, averaged over the templates."""


@dataclass(frozen=True)
class NegativeWords:
    """Candidates for words that are not classes, and how negatives are chosen among them.

    NegMining keeps, of the nouns and of the adjectives each, the share with the smallest similarity to the classes: the
    ``quantile`` of the cosines of a candidate with all classes. (In the paper, the distance is the 1 - ``quantile``
    quantile of the negative cosines, and the words with the largest distances are kept.) Words that are names of
    classes are never candidates.

    For the conjugated semantic pool, each adjective is joined with one of ``superclasses``, drawn with ``seed``, as in
    "white creature"; these are chosen in the same way.

    No list of words comes with this package. The authors use the nouns and adjectives of WordNet, about 70,000 words,
    which NLTK provides: ``{lemma.name() for synset in wordnet.all_synsets("n") for lemma in synset.lemmas()}``.

    Source: Jiang et al. 2024, "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", Algorithm 1
    and the authors' code, whose defaults these are; Chen, Gao & Xu 2024, "Conjugated Semantic Pool Improves OOD
    Detection with Pre-trained Vision-Language Models", and their code. Departure: CSP averages the features of the
    templates as they are, and here their directions are averaged, as for classes.

    Args:
        nouns: words, or the path of a file with one per line.
        adjectives: words, or the path of a file with one per line; none by default.
        share: the share of the candidates that are kept, in (0, 1].
        quantile: the quantile of the cosines, in [0, 1].
        too_similar: leave out words whose cosine with a class exceeds this, 0.95 in CSP's code; None to keep them.
        templates: the templates of nouns; use the same for classes.
        adjective_templates: the templates of adjectives.
        conjugated_templates: the templates of adjectives with superclasses.
        superclasses: the superclasses; none to build no conjugated words.
        seed: the seed of the draw of superclasses.

    Raises:
        BadInput: if a value is out of range, a list is empty or cannot be read, or a template has no placeholder.
    """

    nouns: Sequence[str] | str | os.PathLike[str]
    adjectives: Sequence[str] | str | os.PathLike[str] = ()
    share: float = 0.15
    quantile: float = 0.95
    too_similar: float | None = None
    templates: Sequence[str] | str = NEGLABEL_TEMPLATES
    adjective_templates: Sequence[str] | str = NEGLABEL_ADJECTIVE_TEMPLATES
    conjugated_templates: Sequence[str] | str = CSP_CONJUGATED_TEMPLATES
    superclasses: Sequence[str] = SUPERCLASSES
    seed: int = 0

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "nouns", read_words(self.nouns))
        set_field(self, "adjectives", read_words(self.adjectives) if self.adjectives else ())
        for name in ("templates", "adjective_templates", "conjugated_templates"):
            set_field(self, name, checked_templates(getattr(self, name)))
        set_field(self, "superclasses", tuple(self.superclasses))
        if not 0 < self.share <= 1:
            raise BadInput(f"share must be in (0, 1], got {self.share}.")
        if not 0 <= self.quantile <= 1:
            raise BadInput(f"quantile must be in [0, 1], got {self.quantile}.")

    def bank(self, classes: Sequence[str], class_features: Tensor, embed: Embed) -> dict[str, Tensor]:
        """Return the unit text features ``[M, D]`` of the negatives by kind, the least similar to the classes first.

        Args:
            classes: the names of the classes.
            class_features: their unit text features ``[C, D]``.
            embed: the text encoder.

        Raises:
            BadInput: if no candidate is left.
        """
        names = {name.casefold() for name in classes}
        nouns = [word for word in read_words(self.nouns) if word.casefold() not in names]
        known = names | {word.casefold() for word in nouns}
        others = read_words(self.adjectives) if self.adjectives else ()
        adjectives = [word for word in others if word.casefold() not in known]
        if not nouns:
            raise BadInput("every noun is the name of a class: pass a list with other words, such as WordNet's.")
        candidates = {"nouns": (self.templates, nouns)}
        if adjectives:
            candidates["adjectives"] = self.adjective_templates, adjectives
            if self.superclasses:
                candidates["conjugated"] = self.conjugated_templates, self._conjugated(adjectives)
        return {
            kind: self._chosen(embed(templates, words), class_features)
            for kind, (templates, words) in candidates.items()
        }

    def _conjugated(self, adjectives: Sequence[str]) -> list[str]:
        draw = random.Random(self.seed)
        return [f"{word} {draw.choice(self.superclasses)}" for word in adjectives]

    def _chosen(self, words: Tensor, class_features: Tensor) -> Tensor:
        chosen = mined(words, class_features, self.share, self.quantile, self.too_similar)
        if not len(chosen):
            raise BadInput(
                f"all of the {len(words):,} words have a cosine above too_similar={self.too_similar} with a class: "
                "raise it, or pass other words."
            )
        return words[chosen]


def mined(
    words: Tensor, classes: Tensor, share: float, quantile: float = 0.95, too_similar: float | None = None
) -> Tensor:
    """Return the numbers of the words that NegMining keeps, those least similar to the classes first.

    Args:
        words: unit text features of the candidates ``[W, D]``.
        classes: unit text features of the classes ``[C, D]``.
        share: the share of the candidates to keep; at least one is kept.
        quantile: the quantile of the cosines of a word with all classes that is its similarity.
        too_similar: the largest cosine with a class that a word may have; None for any.
    """
    similarities = []
    for part in words.double().split(WORDS_AT_ONCE):
        cosines = part @ classes.double().T
        similarity = torch.quantile(cosines, quantile, dim=1)
        if too_similar is not None:
            similarity[cosines.amax(dim=1) > too_similar] = torch.inf
        similarities.append(similarity)
    similarity = torch.cat(similarities)
    order = similarity.argsort(stable=True)[: max(1, int(len(words) * share))]
    return order[similarity[order] < torch.inf]


def negative_words(given: Any) -> NegativeWords:
    """Return negative words from an object, a table of its parameters, or a list or file of nouns.

    Raises:
        BadInput: if a parameter does not exist, or as ``NegativeWords``.
    """
    if isinstance(given, NegativeWords):
        return given
    if isinstance(given, Mapping):
        try:
            return NegativeWords(**given)
        except TypeError as error:
            known = ", ".join(NegativeWords.__dataclass_fields__)
            raise BadInput(f"negatives must be a table with nouns, and may have {known}: {error}.") from error
    if isinstance(given, (str, os.PathLike, Iterable)):
        return NegativeWords(given)  # type: ignore[arg-type]
    raise BadInput(f"negatives must be words, a file of words, or NegativeWords, got {given!r}.")
