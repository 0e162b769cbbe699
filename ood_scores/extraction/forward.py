"""The model as a function from a batch to rows of columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch
from ood_scores.extraction import heads, loaders
from ood_scores.extraction.probes.base import Pass, Probe, watch_all
from ood_scores.extraction.transfers import Arriving, Transfers
from ood_scores.features.finite import require_finite
from ood_scores.models.running import autocasting, evaluating


@dataclass
class Forward:
    """The model as a function from a batch to rows of columns on the CPU: features, logits, labels, extras.

    With ``compiled`` all rows come from the model as ``torch.compile`` makes it; the head is found without.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    probes: Sequence[Probe] = ()
    amp: str | None = None
    channels_last: bool = False
    compiled: bool = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """With the model as the passes need it; afterwards it is as it was."""
        self._transfers = Transfers(self.device)
        self._run = torch.compile(self.model) if self.compiled else self.model
        differentiates = any(probe.gradients for probe in self.probes)
        with (
            evaluating(self.model, self.device, differentiates, self.channels_last),
            autocasting(self.device, self.amp),
        ):
            yield

    def find_head(
        self, batch: Any, requested: str | bool | None, module: nn.Module | None
    ) -> tuple[heads.FoundHead, Arriving]:
        """The head, found and checked on the first batch, and that batch's rows."""
        inputs, labels = self._unpack(batch)
        self.probes = [probe.for_model(self.model, inputs) for probe in self.probes]
        with heads.record_calls(self.model, module) as calls, watch_all(self.probes, self.model) as seen:
            logits = heads.logits_of(self.model(inputs))
        require_finite({"logits": logits})
        found = heads.find_head(calls, logits, requested)
        rows = self._columns(found.features_in(calls), Pass(self.model, inputs, logits, labels, 0), seen)
        require_finite(rows.wait())
        return found, rows

    def rows_of(self, batch: Any, received: list[Tensor | None], start: int, like: Mapping[str, Tensor]) -> Arriving:
        """The rows of one batch, with ``received`` being filled by the head's hooks."""
        inputs, labels = self._unpack(batch)
        if (labels is None) == ("labels" in like):
            raise BadLabels(f"some batches have labels and some have none, first at row {start}.")
        received[:] = [None] * len(received)  # what an earlier batch left is not this batch's
        with watch_all(self.probes, self.model) as seen:
            output = self._run(inputs)
            if self.compiled and any(values is None for values in received):
                torch.compiler.reset()  # it had been compiled before the hooks were there
                output = self._run(inputs)
        logits = heads.logits_of(output)
        rows = self._columns(heads.features_of(received), Pass(self.model, inputs, logits, labels, start), seen)
        if rows.columns.keys() != like.keys():
            names = ", ".join(sorted(rows.columns.keys() ^ like.keys()))
            raise ShapeMismatch(f"the batch at row {start} has other extras than the first: {names}.")
        for name, values in rows.columns.items():
            if values.shape[1:] != like[name].shape[1:]:
                raise ShapeMismatch(
                    f"{name} are {tuple(values.shape)} at row {start}, {tuple(like[name].shape)} before."
                )
        return rows

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        inputs, labels = loaders.unpack(batch)
        inputs = self._transfers.to_device(inputs)
        if self.channels_last:
            if inputs.ndim != 4:
                raise BadInput(f"channels_last is for inputs [batch, channels, height, width], got {inputs.ndim}-D.")
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, labels

    def _columns(self, features: Tensor, done: Pass, seen: Sequence[Mapping[str, Tensor]]) -> Arriving:
        found = {"features": features, "logits": done.logits}
        for probe, own in zip(self.probes, seen, strict=True):
            found |= {f"extras/{name}": values for name, values in probe.columns(done, own).items()}
        for name, values in found.items():
            if len(values) != len(done.inputs):
                raise ShapeMismatch(
                    f"{len(done.inputs)} inputs gave {len(values)} rows of {name}: the model mixes its inputs."
                )
        columns = {name: (values.detach(), self.dtype) for name, values in found.items()}
        return self._transfers.to_host(
            columns if done.labels is None else columns | {"labels": (done.labels, torch.int64)}
        )
