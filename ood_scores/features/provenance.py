"""Provenance: what made a feature set, enough to refuse it for anything else and to make it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ood_scores.errors import StaleCache

WHAT_TO_DO = "pass overwrite=True to extract again, or another cache path to keep both"


@dataclass(frozen=True)
class Provenance:
    """Where a feature set comes from.

    The *fingerprint* (weights, architecture, requested head, data, precision) decides whether a cache may be used; the
    rest is for the reader. ``data_sha256`` covers the first inputs exactly as the model saw them, and their labels, so
    that a changed resize, crop or normalisation is noticed; ``preprocessing`` describes the transform where it can be
    read. ``shard`` says which rows of the dataset a file holds that is one of several processes' own.
    """

    architecture: str
    weights_sha256: str
    head: str
    head_modules: str
    dataset: str
    data_sha256: str
    dataset_rows: int | None
    labelled: bool
    shuffled: bool
    batch_size: int | None
    preprocessing: str
    precision: str
    device: str
    versions: Mapping[str, str]
    created: str
    probes: Sequence[str] = ()
    shard: str | None = None

    FINGERPRINT = (
        ("architecture", "architecture"),
        ("weights_sha256", "weights"),
        ("head", "requested head"),
        ("dataset", "dataset name"),
        ("dataset_rows", "number of rows"),
        ("labelled", "labels present"),
        ("shuffled", "random order"),
        ("data_sha256", "first inputs and labels (data or preprocessing)"),
        ("precision", "precision"),
        ("probes", "layers and probes"),
        ("shard", "rows of this shard"),
    )

    def differences(self, other: Provenance) -> Iterable[str]:
        """One line for each part of the fingerprint in which the other differs."""
        for field, title in self.FINGERPRINT:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                yield f"{title}: cache {_short(mine)}, now {_short(theirs)}"

    def require_same(self, other: Provenance, file: str) -> None:
        """Raises StaleCache, naming both sides, if ``other`` would give other numbers."""
        differences = list(self.differences(other))
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise StaleCache(f"{file} was made by something else than what is asked for now:{lines}\n{WHAT_TO_DO}.")

    def to_attributes(self) -> dict[str, Any]:
        """Plain HDF5 attributes: strings, integers and booleans; nothing for None."""
        values = asdict(self) | {"versions": json.dumps(dict(self.versions)), "probes": json.dumps(list(self.probes))}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Provenance | None:
        """None where a file holds features without provenance."""
        if "weights_sha256" not in attributes:
            return None
        values = {field.name: _plain(attributes.get(field.name)) for field in fields(cls)}
        decoded = {"versions": json.loads(values["versions"]), "probes": tuple(json.loads(values["probes"] or "[]"))}
        return cls(**values | decoded)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
