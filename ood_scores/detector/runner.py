"""The model as a detector runs it: from a batch to a feature set of its rows."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, OodScoresError
from ood_scores.extraction import heads
from ood_scores.extraction.heads import FoundHead
from ood_scores.extraction.probes import PROBES, LayerProbe, Pass, Probe
from ood_scores.extraction.probes.base import watch_all
from ood_scores.features import FeatureSet, Head, Provenance
from ood_scores.features.finite import require_finite
from ood_scores.models.running import autocasting, evaluating, model_device

_LOCKS: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()
"""Of every model that runs: its modes and hooks are there for one call at a time."""

COLUMNS = frozenset({"features", "logits", "labels", "head"})
"""What a feature set has without any probe."""


@dataclass
class Runner:
    """The model as a function from a batch to a feature set of its rows, on the CPU.

    Attributes:
        model: of the user; its modes and its gradients setting are as before after every call.
        head: as ``extract`` takes it: None finds the last affine map, a name says which it is, False does without.
        probes: what else to compute of every batch.
        amp: mixed precision, as ``extract`` takes it.
        dtype: what features, logits and extras are rounded to, as ``extract`` stores them.
    """

    model: nn.Module
    head: str | bool | None = None
    probes: tuple[Probe, ...] = ()
    amp: str | None = None
    dtype: str = "float32"
    _found: FoundHead | None = field(default=None, init=False, repr=False)
    _decided: Sequence[Probe] = field(default=(), init=False, repr=False)

    @classmethod
    def like(cls, model: nn.Module, feats: FeatureSet, needs: Iterable[str]) -> Runner:
        """One that makes of a batch what ``extract`` made of the data of a set, as far as ``needs`` goes.

        Raises BadInput where the set does not say by which probe it came to what is needed.
        """
        provenance = feats.provenance
        probes = tuple(_probe_in(provenance, stem) for stem in extra_stems(needs))
        if provenance is None:
            return cls(model, probes=probes)
        heads_asked: dict[str, str | bool | None] = {"found": None, "none": False}
        amp = re.search(r"autocast (bf16|fp16)", provenance.precision)
        stored = re.search(r"stored (\w+)", provenance.precision)
        head = heads_asked.get(provenance.head, provenance.head)
        return cls(model, head, probes, amp[1] if amp else None, stored[1] if stored else "float32")

    def __call__(self, inputs: Tensor, start: int) -> FeatureSet:
        """The rows of inputs ``[B, C, H, W]``, the first of which is row ``start`` of what is asked for.

        Raises:
            BadInput: the model cannot take inputs of this shape.
            NotFinite: what the model gives is NaN or infinite.
            HeadNotFound, HeadMismatch: as ``extract``; on the first batch.
        """
        device = model_device(self.model)
        differentiates = any(probe.gradients for probe in self.probes)
        with (
            _LOCKS.setdefault(self.model, Lock()),
            evaluating(self.model, device, differentiates),
            autocasting(device, self.amp),
            self._named(inputs),
        ):
            columns = self._columns(inputs.to(device, model_dtype(self.model)), start)
        rows = {name: values.detach().to("cpu", getattr(torch, self.dtype)) for name, values in columns.items()}
        require_finite(rows, start, "image")
        head = self._found.head if self._found else None
        return FeatureSet(rows.pop("features"), rows.pop("logits"), head=head, extras=rows)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in another process finds by itself is left out."""
        return vars(self) | {"_found": None, "_decided": ()}

    def _columns(self, inputs: Tensor, start: int) -> dict[str, Tensor]:
        """Features, logits and extras of a batch; the head is found, and checked, on the first."""
        if self._found is None:
            _, module = heads.resolve_module(self.model, self.head)
            self._decided = [probe.for_model(self.model, inputs) for probe in self.probes]
            with heads.record_calls(self.model, module) as calls, watch_all(self._decided, self.model) as seen:
                logits = heads.logits_of(self.model(inputs))
            require_finite({"logits": logits}, start, "image")
            self._found = _cloned(heads.find_head(calls, logits, self.head))
            features = self._found.features_in(calls)
        else:
            with self._found.capture() as received, watch_all(self._decided, self.model) as seen:
                logits = heads.logits_of(self.model(inputs))
            features = heads.features_of(received)
        done = Pass(self.model, inputs, logits, None, start)
        columns = {"features": features, "logits": logits}
        for probe, own in zip(self._decided, seen, strict=True):
            columns |= probe.columns(done, own)
        return columns

    @contextmanager
    def _named(self, inputs: Tensor) -> Iterator[None]:
        """What a model raises for a batch becomes an error that says what the batch was."""
        try:
            yield
        except (OodScoresError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"the model cannot take a batch of shape {list(inputs.shape)}: {reason}") from error


def _cloned(found: FoundHead) -> FoundHead:
    """With a head of its own: what was made in inference mode is of no use under autograd."""
    if found.head is None:
        return found
    with torch.inference_mode(False):
        return replace(found, head=Head(found.head.weight.clone(), found.head.bias.clone()))


def model_dtype(model: nn.Module) -> torch.dtype:
    """That of the first parameter of floating point."""
    return next((values.dtype for values in model.parameters() if values.is_floating_point()), torch.float32)


def extra_stems(needs: Iterable[str]) -> list[str]:
    """The names of the probes behind the extras among what a scorer needs.

    Raises BadInput for an extra that comes from no probe.
    """
    stems = list(dict.fromkeys(name.partition(".")[0] for name in needs if name not in COLUMNS))
    for stem in stems:
        if stem not in PROBES:
            raise BadInput(f"the scorer reads {stem!r}, which no probe of one model gives: it is for no detector.")
    return stems


def cost(probes: Iterable[Probe]) -> str:
    """How often a batch goes through the model."""
    again = [probe for probe in probes if type(probe).columns is not LayerProbe.columns]
    backward = [probe.name for probe in again if probe.gradients]
    forward = [probe.name for probe in again if not probe.gradients]
    parts = ["one forward pass"]
    parts += [f"backward passes for {', '.join(backward)}"] if backward else []
    parts += [f"further forward passes for {', '.join(forward)}"] if forward else []
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _probe_in(provenance: Provenance | None, stem: str) -> Probe:
    """The probe whose extras have that first name, as the provenance describes it."""
    for text in provenance.probes if provenance else ():
        probe = probe_of(text)
        if probe.name == stem:
            return probe
    raise BadInput(
        f"the set of ID data holds {stem}, but not how it was computed: make it with ood_scores.extract(..., "
        f"probes=[{stem!r}]) and leave its provenance with it."
    )


def probe_of(text: str) -> Probe:
    """The probe with that ``repr``, as provenances hold it; nothing is evaluated but literals."""
    classes = {cls.__name__: cls for cls in PROBES.values()}
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return classes[call.func.id](**arguments)
    except (SyntaxError, AssertionError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"the probe {text} cannot be made again: import the module that registers it first. There are: "
            f"{', '.join(sorted(classes))}."
        ) from error


def _literal(node: ast.expr) -> Any:
    return math.inf if isinstance(node, ast.Name) and node.id == "inf" else ast.literal_eval(node)
