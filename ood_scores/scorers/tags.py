"""Facts about a scorer class that are not parameters: its paper, its limits, and how to test and tune it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Paper:
    """The publication that introduced a score.

    Args:
        title: The full title.
        authors: All authors, as "First Last, First Last".
        venue: The conference or journal, abbreviated where that is usual; "arXiv" for a preprint.
        year: The year of publication at the venue.
        url: A page with the text or its abstract.
        code: The authors' own repository; None if there is none or it is not known.
    """

    title: str
    authors: str
    venue: str
    year: int
    url: str
    code: str | None = None

    @property
    def key(self) -> str:
        """The BibTeX key: family name of the first author, year, and first word of the title that is no article."""
        family = self.authors.split(",")[0].split()[-1]
        word = next(word for word in re.findall(r"\w+", self.title) if word.lower() not in {"a", "an", "on", "the"})
        ascii_only = unicodedata.normalize("NFKD", f"{family}{self.year}{word}").encode("ascii", "ignore")
        return ascii_only.decode().lower()

    def bibtex(self) -> str:
        """The BibTeX entry."""
        kind, where = ("article", "journal") if self.venue in ("arXiv", "TMLR") else ("inproceedings", "booktitle")
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors.replace(", ", " and "),
            where: self.venue,
            "year": str(self.year),
            "url": self.url,
        }
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


@dataclass(frozen=True)
class Tags:
    """Facts about a scorer class, kept in its attribute ``tags``.

    Args:
        paper: The source of the formula; None if no single publication introduced it.
        no_graph: Why the scorer cannot be exported as a graph, as a clause ("it ranks all logits"); None if it can.
        small_parameters: Parameters that make the scorer small and fast, for tests.
        small_extras: Functions of features ``[N, D]`` and logits ``[N, C]`` that create the extras it reads, for tests.
        exceptions: Conformance properties that the scorer does not have, each with the reason.
        float32_tolerance: The relative error of scores that float32 inputs may cause.
        search_space: Values to try for each parameter when the scorer is tuned on validation data.
        aliases: Names of the scorer in other packages, in lower case with underscores.
        parameters_before: Values of parameters in files that were saved before the parameters existed, if these values
            are not the defaults.
        waits: How often the host waits for a GPU to score a block, 1 for the transfer of the scores included.
        formula: The score as LaTeX, ``s(x) = …``, in the notation of the page of scorers; None if it has none.
        experimental: Why scores may not be those of the paper, for instance because only its abstract was available.
    """

    paper: Paper | None = None
    no_graph: str | None = None
    small_parameters: Mapping[str, Any] = field(default_factory=dict)
    small_extras: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    float32_tolerance: float = 1e-4
    search_space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    aliases: Sequence[str] = ()
    parameters_before: Mapping[str, Any] = field(default_factory=dict)
    waits: int = 1
    formula: str | None = None
    experimental: str | None = None
