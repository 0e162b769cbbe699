"""Provenance: how a feature set was created, in enough detail to compare it and to create it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from ood_scores.errors import StaleCache
from ood_scores.features.migration import migrated
from ood_scores.terminal import encodable

SHOWN = 3
"""Number of skipped rows that a sentence lists."""

LONGEST_TEXT = 300
"""Number of characters of a value that an error message quotes."""

JOINT = " + "
"""What joins the facts of the members of an ensemble."""

WHAT_TO_DO = "pass overwrite=True to extract again, or another cache path to keep both"


@dataclass(frozen=True)
class ProbeRecord:
    """The class of a probe and its parameters, as JSON values (see ``to_json``)."""

    kind: str
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        arguments = (f"{name}={_literal(value)}" for name, value in self.parameters.items())
        return f"{self.kind}({', '.join(arguments)})"


@dataclass(frozen=True)
class Provenance:
    """Where a feature set comes from.

    The *fingerprint* (weights, architecture, requested head, data, precision, probes) decides whether a cache may be
    used; the rest is information for the reader. ``data_sha256`` covers the first inputs exactly as the model saw them,
    and their labels, so that a changed resize, crop, or normalization is noticed; ``preprocessing`` describes the
    transform, if it can be read. ``dataset`` is the name under which the data were first extracted. ``head``, ``amp``,
    ``channels_last``, ``compiled``, ``dtype``, and ``pool`` are the options of ``extract``; the name of a head that was
    given is its digest. ``channels_last`` is None if the memory format was chosen for the device and the model; it then
    affects rounding alone, as the device does, and the fingerprint does not tell it from False. ``shard`` names the
    rows of the dataset in a file that is one of several. ``label_order`` is the order of the labels if it is not the
    dataset's own, or the alphabetical one for folders. ``data_text`` opens the dataset with relative paths starting
    from ``data_root``, if its rows are those of the set, in order; see ``ood_scores.data.sources``. ``skipped`` lists
    the rows of the dataset that the set lacks because they cannot be read, each with the reason. ``model`` is the name
    that ``load_model`` opened, and ``arguments`` are those of the network that its weights do not show; both are None
    for other models. ``matmul_tf32`` and ``conv_tf32`` tell whether matrix products and convolutions could use TF32;
    they are None on devices other than CUDA ones, and for information only.
    """

    architecture: str
    weights_sha256: str
    head: str | bool | None
    head_modules: str
    dataset: str
    data_sha256: str
    dataset_rows: int | None
    labelled: bool
    shuffled: bool
    batch_size: int | None
    preprocessing: str
    model_dtype: str
    amp: str | None
    channels_last: bool | None
    compiled: bool
    dtype: str
    device: str
    versions: Mapping[str, str]
    created: str
    probes: tuple[ProbeRecord, ...] = ()
    shard: str | None = None
    label_order: str | None = None
    data_text: str | None = None
    data_root: str | None = None
    skipped: tuple[tuple[int, str], ...] = ()
    model: str | None = None
    arguments: Mapping[str, Any] | None = None
    pool: str | None = None
    matmul_tf32: bool | None = None
    conv_tf32: bool | None = None

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"skipped", "matmul_tf32", "conv_tf32"})
    """Sets that differ in these have different times of creation."""

    IN_DIGEST_IF_SET: ClassVar[frozenset[str]] = frozenset({"pool"})
    """Earlier versions did not have it."""

    FINGERPRINT = (
        ("architecture", "architecture"),
        ("weights_sha256", "weights"),
        ("arguments", "arguments of the network"),
        ("requested_head", "requested head"),
        ("pooling", "pooling"),
        ("dataset_rows", "number of rows"),
        ("labelled", "labels present"),
        ("shuffled", "random order"),
        ("data_sha256", "first inputs and labels (data or preprocessing)"),
        ("precision", "precision"),
        ("probe_texts", "layers and probes"),
        ("labels_numbered", "order of the classes"),
        ("shard", "rows of this shard"),
    )

    @property
    def requested_head(self) -> str:
        """The requested head in words: ``found``, ``none``, or the name of a module."""
        return self.head if isinstance(self.head, str) else ("found" if self.head is None else "none")

    @property
    def pooling(self) -> str:
        """The pooling in words."""
        return self.pool or "the model's own"

    @property
    def labels_numbered(self) -> str:
        """The order of the classes in words."""
        return self.label_order or "the dataset's own"

    @property
    def precision(self) -> str:
        """Everything that decides how numbers are rounded, in words."""
        layout = ["channels last"] if self.channels_last else []
        compiled = ["compiled"] if self.compiled else []
        parts = [f"model {self.model_dtype}", f"autocast {self.amp or 'off'}", *layout, *compiled]
        return ", ".join([*parts, f"stored {self.dtype}"])

    @property
    def probe_texts(self) -> tuple[str, ...]:
        """Each probe as it is written in Python."""
        return tuple(map(str, self.probes))

    @property
    def members(self) -> tuple[str, ...]:
        """The digest of the weights of each member of an ensemble; of one model, its own."""
        return tuple(self.weights_sha256.split(JOINT))

    @classmethod
    def of_members(cls, members: Sequence[Provenance]) -> Provenance:
        """Return the provenance of the joint set of several models for the same data, which are told by their order."""
        if len(members) == 1:
            return members[0]
        poolings = [each.pooling for each in members]
        return replace(
            members[0],
            architecture=JOINT.join(each.architecture for each in members),
            weights_sha256=JOINT.join(each.weights_sha256 for each in members),
            head_modules=JOINT.join(each.head_modules for each in members),
            pool=members[0].pool if len(set(poolings)) == 1 else JOINT.join(poolings),
            probes=(),
            model=None,
            arguments=None,
        )

    def of_some_rows(self) -> Provenance:
        """Return the provenance of some rows of the set, which are no longer those of the dataset."""
        return replace(self, data_text=None, data_root=None)

    @property
    def left_out(self) -> str:
        """A sentence about the skipped rows; "" if there are none."""
        if not self.skipped:
            return ""
        of = "" if self.dataset_rows is None else f" of {self.dataset_rows:,}"
        shown = "; ".join(f"row {row}: {reason.rstrip('.')}" for row, reason in self.skipped[:SHOWN])
        more = f"; and {len(self.skipped) - SHOWN:,} more" if len(self.skipped) > SHOWN else ""
        return f"{len(self.skipped):,}{of} rows of {self.dataset} cannot be read and are left out ({shown}{more})."

    @property
    def skipped_rows(self) -> tuple[int, ...]:
        """The rows of the dataset that are left out."""
        return tuple(row for row, _ in self.skipped)

    def rows_in_dataset(self, count: int) -> np.ndarray:
        """Return the row in the dataset of each row of a set, int64 ``[count]``; for a part of a set, count from 0."""
        if count + len(self.skipped) != self.dataset_rows:
            return np.arange(count)
        return np.delete(np.arange(self.dataset_rows), self.skipped_rows)

    def differences(self, other: Provenance) -> dict[str, tuple[Any, Any]]:
        """Return the parts of the fingerprint that differ, by title, as the value here and the other one."""
        pairs = {title: (getattr(self, name), getattr(other, name)) for name, title in self.FINGERPRINT}
        differ = {title: (mine, theirs) for title, (mine, theirs) in pairs.items() if mine != theirs}
        if None in (self.arguments, other.arguments):  # of a model that was not opened by its name
            differ.pop("arguments of the network", None)
        if "arguments of the network" in differ:
            differ |= {"arguments of the network": _that_differ(self.arguments or {}, other.arguments or {})}
        return differ

    def require_same(self, other: Provenance, file: str) -> None:
        """Check that ``other`` has the same fingerprint.

        Raises:
            StaleCache: if it has not; the message lists both sides of every difference.
        """
        differences = self.differences(other)
        if differences:
            lines = "".join(
                f"\n  {title}: cache {_short(mine)}, now {_short(theirs)}"
                for title, (mine, theirs) in differences.items()
            )
            raise StaleCache(f"{file} was created with different settings than those requested:{lines}\n{WHAT_TO_DO}.")

    def to_attributes(self) -> dict[str, Any]:
        """Return plain HDF5 attributes: strings, integers, and booleans; None is left out."""
        values = asdict(self)
        values |= {name: json.dumps(values[name]) for name in ("versions", "probes")}
        values["skipped"] = json.dumps(self.skipped) if self.skipped else None
        values["arguments"] = None if self.arguments is None else json.dumps(self.arguments)
        return {name: encodable(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Provenance | None:
        """Return the provenance in the attributes of a file; None if it has none."""
        if "weights_sha256" not in attributes:
            return None
        known = migrated(attributes)
        values = {field.name: _plain(known.get(field.name)) for field in fields(cls)}
        probes = tuple(ProbeRecord(**record) for record in json.loads(values["probes"] or "[]"))
        skipped = tuple((int(row), str(reason)) for row, reason in json.loads(values["skipped"] or "[]"))
        absent = {"versions": "", "arguments": "null"}
        read = {name: json.loads(values[name] or text) for name, text in absent.items()}
        return cls(**values | read | {"probes": probes, "skipped": skipped})


def to_json(value: Any) -> Any:
    """Encode a parameter as plain JSON: sequences as lists, other values that JSON lacks as ``{kind: content}``.

    A value that cannot be restored is stored as its text, ``{"repr": ...}``, for comparison only.
    """
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case np.generic():
            return to_json(value.item())
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        case list() | tuple() | range():
            return [to_json(part) for part in value]
        case Mapping():
            return {"mapping": [[to_json(key), to_json(part)] for key, part in value.items()]}
    return {"repr": repr(value)}


def from_json(value: Any) -> Any:
    """Decode a parameter that ``to_json`` encoded; sequences become tuples.

    Raises:
        ValueError: if only the text of the value is known.
    """
    match value:
        case {"float": text}:
            return float(text)
        case {"mapping": pairs}:
            return {from_json(key): from_json(part) for key, part in pairs}
        case {"repr": text}:
            raise ValueError(f"only the text of {text} is known")
        case list():
            return tuple(map(from_json, value))
    return value


def _literal(value: Any) -> str:
    """Return the Python text of an encoded parameter."""
    match value:
        case {"float": text} | {"repr": text}:
            return text
        case {"mapping": pairs}:
            return f"{{{', '.join(f'{_literal(key)}: {_literal(part)}' for key, part in pairs)}}}"
        case list():
            return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _that_differ(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return of each of two mappings the entries that the other lacks or has with another value."""
    pairs = ((mine, theirs), (theirs, mine))
    own, other = ({key: each[key] for key in each if key not in of or each[key] != of[key]} for each, of in pairs)
    return own, other


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
