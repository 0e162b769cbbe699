"""The model as a function from a batch to rows of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ood_scores.device_memory import FittingParts
from ood_scores.errors import BadInput, BadLabels, HeadNotFound, OodScoresError, ShapeMismatch
from ood_scores.extraction import heads, loaders
from ood_scores.extraction.encoders import Encoder
from ood_scores.extraction.further_inputs import further_inputs, mask_in, passed_by_name
from ood_scores.extraction.hooks import Capture
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.outputs import logits_of
from ood_scores.extraction.probes.base import Pass, Probe, watch_all
from ood_scores.extraction.writers import feature_set
from ood_scores.features import FeatureSet, Head
from ood_scores.features.finite import require_finite
from ood_scores.models.running import (
    autocasting,
    evaluating,
    laid_out,
    model_device,
    model_dtype,
    on_cpu,
    prefers_channels_last,
)
from ood_scores.runtime import available, callers_default_device, default_torch_state
from ood_scores.transfers import Arriving, Transfers

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""One lock for each model that runs: its modes and hooks belong to one caller at a time."""


@dataclass
class Forward:
    """The model as a function from a batch to rows of columns on the CPU: features, logits, labels, extras.

    The head is found, and checked, on the first batch. Calls are made within ``ready``.

    Attributes:
        model: the model; its modes, device and gradient settings are the same after ``ready`` as before.
        options: how it is run, and what is computed.
        device: where it runs; None for the device that the model is on.
        transform: the function that makes an input from an image of the dataset, for probes; None if it is not known.
        found: the head and the modules whose inputs are the features; None before the first batch.
    """

    model: nn.Module
    options: ExtractionOptions = field(default_factory=ExtractionOptions)
    device: torch.device | None = None
    transform: Callable[[Any], Any] | None = None
    found: heads.FoundHead | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._run = torch.compile(self.model) if self.options.compile else self.model
        self._head_there: Head | None = None
        self._parts = FittingParts("batch")
        self._refuses_channels_last = False

    @contextmanager
    def ready(self, one_batch: bool = False) -> Iterator[None]:
        """Prepare the model for calls, and restore it afterwards. Other threads that run the model wait until then.

        For one batch alone, the weights keep their memory format unless the options say otherwise.
        """
        device = self.device or model_device(self.model)
        differentiates = any(probe.gradients for probe in self.options.all_probes)
        with (
            default_torch_state(),
            _LOCKS.setdefault(self.model, RLock()),
            evaluating(self.model, device, differentiates),
            autocasting(device, self.options.amp),
            Encoder(self.model, self.options.pooling).ready(),
            ExitStack() as self._hooks,
        ):
            self._transfers = Transfers(device)
            self._channels_last = self._runs_channels_last(device, one_batch)
            if self._channels_last:
                self._hooks.enter_context(laid_out(self.model, torch.channels_last))
            if self.found:
                self._hooks.enter_context(self._capture.running())
            yield

    def __call__(self, batch: Any, start: int = 0) -> Arriving:
        """Return the rows of a batch, the first of which is row ``start``, on their way to the CPU.

        A batch for which the memory of the device does not suffice is run in parts.

        Raises:
            BadInput: if the model cannot take the batch.
            BadLabels, ShapeMismatch: if the batch has other columns than the first one.
            HeadNotFound, HeadMismatch, NotFinite: if no affine map computes the logits of the first batch.
        """
        return self._transfers.to_host(self._on_device(batch, start))

    def _on_device(self, batch: Any, start: int) -> dict[str, Tensor]:
        """Return the columns of a batch on the device, before the work of the device is complete."""
        inputs, labels = self._unpack(batch)
        further = self._further(batch)

        def columns_of(rows: slice) -> dict[str, Tensor]:
            here = {name: values[rows] for name, values in further.items()}
            part = self._laid_out(inputs[rows]), None if labels is None else labels[rows], here, start + rows.start
            with _naming(part[0], part[-1]), callers_default_device(), passed_by_name(self.model, batch, here):
                first = self._first_rows(*part) if self.found is None else None
                return first if first and not self.options.compile else self._rows(*part)

        parts = [columns for _, columns in self._parts.run(max(1, len(inputs)), columns_of)]
        self._transfers.wait_for_reads()  # the loader may refill its buffer, while the device is still busy
        return parts[0] if len(parts) == 1 else {name: torch.cat([each[name] for each in parts]) for name in parts[0]}

    def feature_set(self, batch: Any, start: int = 0, *, checked: bool = True) -> FeatureSet:
        """Prepare the model, and return the rows of one batch as a feature set, on the device of the model.

        Args:
            batch: the batch.
            start: the number of its first row.
            checked: whether to wait for the device to know that all columns are finite.

        Raises:
            NotFinite: if a column contains NaN or infinite values, and is checked. Other errors are those of a call.
        """
        with self.ready(one_batch=True):
            columns = self._on_device(batch, start)
        if checked:
            require_finite(columns, start)
        head = self.found.head if self.found else None
        if head and self._head_there is None:
            self._head_there = head.to(columns["features"].device)
        return feature_set(columns, self._head_there)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the parts that a copy in another process recreates, the model on the CPU."""
        home = model_device(self.model)
        return {"model": on_cpu(self.model), "options": self.options, "device": self.device, "home": home}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore the state; a model from a device that this process lacks stays on the CPU."""
        model, device = state["model"], state["device"]
        home = available(state.get("home", model_device(model)))
        if home != model_device(model):
            model.to(home)
        self.__init__(model, state["options"], device and available(device))  # type: ignore[misc]

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the inputs on the device, in the model's floating-point type, and the labels."""
        inputs, labels = loaders.unpack(batch)
        return self._to_model({"inputs": inputs})["inputs"], labels

    def _runs_channels_last(self, device: torch.device, one_batch: bool) -> bool:
        if self.options.channels_last is None:
            return not (one_batch or self._refuses_channels_last) and prefers_channels_last(self.model, device)
        return self.options.channels_last

    def _laid_out(self, inputs: Tensor) -> Tensor:
        """Return inputs in the memory format that the model is run in."""
        if self._channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        if self.options.channels_last:
            raise BadInput(f"channels_last requires inputs [batch, channels, height, width], got {inputs.ndim}-D.")
        return inputs

    def _further(self, batch: Any) -> dict[str, Tensor]:
        """Return the inputs of a model with several inputs besides the first, as ``_unpack`` returns that."""
        further = further_inputs(batch, self.model)
        if further and self.options.compile:
            raise BadInput(
                f"compile=True is for models with one input, but the batch has {', '.join(further)} too: leave it out."
            )
        return self._to_model(further) if further else {}

    def _to_model(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move tensors to the device, and floating-point ones to the model's type."""
        moved = self._transfers.to_device(inputs).on_device()
        return {
            name: values.to(model_dtype(self.model, values.dtype)) if values.is_floating_point() else values
            for name, values in moved.items()
        }

    def _first_rows(
        self, inputs: Tensor, labels: Tensor | None, further: dict[str, Tensor], start: int
    ) -> dict[str, Tensor]:
        """Find the head, in the channels-last memory format only if the model accepts it or it was requested."""
        try:
            return self._rows_and_head(inputs, labels, further, start)
        except RuntimeError as error:  # such as that of a model that views the map of a convolution
            chosen = self._channels_last and self.options.channels_last is None
            if not chosen or isinstance(error, torch.OutOfMemoryError):
                raise
        self._channels_last, self._refuses_channels_last = False, True
        self._hooks.enter_context(laid_out(self.model, torch.contiguous_format))
        return self._rows_and_head(inputs.contiguous(), labels, further, start)

    def _rows_and_head(
        self, inputs: Tensor, labels: Tensor | None, further: dict[str, Tensor], start: int
    ) -> dict[str, Tensor]:
        """Find and check the head on the first batch, without ``torch.compile``."""
        mask = mask_in(further)
        first = heads.FirstPass(self.model, inputs, self.options.head, self.options.pooling, mask, start)
        self._probes: list[Probe] = [probe.for_model(self.model, inputs) for probe in self.options.all_probes]
        with first.recorded(), watch_all(self._probes, self.model) as seen:
            output = self.model(inputs)
        try:
            found = first.find(output)
        except HeadNotFound:
            require_finite({"logits": logits_of(output)}, start)
            raise
        self._check_probes(found)
        features, logits = first.rows(found, output)
        self._capture = Capture(found.places, self.options.compile)
        self._hooks.enter_context(self._capture.running())
        done = self._pass(found, inputs, logits, labels, start, further)
        columns = self._columns(features, logits, done, seen)
        require_finite(columns, start)
        self._shapes = {name: values.shape[1:] for name, values in columns.items()}
        self.found = found
        return columns

    def _rows(self, inputs: Tensor, labels: Tensor | None, further: dict[str, Tensor], start: int) -> dict[str, Tensor]:
        if (labels is None) == ("labels" in self._shapes):
            raise BadLabels(f"some batches have labels and others have none, first at row {start}.")
        with self._capture.recording(), watch_all(self._probes, self.model) as seen:
            output = self._run(inputs)
            if self.options.compile and not self._capture.is_complete:
                torch.compiler.reset()  # it was compiled before the hooks were registered
                output = self._run(inputs)
        assert self.found is not None
        features, logits = self.found.read(self._capture, output, inputs, mask_in(further), start)
        done = self._pass(self.found, inputs, logits, labels, start, further)
        columns = self._columns(features, logits, done, seen)
        if columns.keys() != self._shapes.keys():
            names = ", ".join(sorted(columns.keys() ^ self._shapes.keys()))
            raise ShapeMismatch(f"the batch at row {start} has different extras than the first batch: {names}.")
        for name, values in columns.items():
            if values.shape[1:] != self._shapes[name]:
                expected = (len(values), *self._shapes[name])
                raise ShapeMismatch(f"{name} have shape {tuple(values.shape)} at row {start}, but {expected} before.")
        return columns

    def _check_probes(self, found: heads.FoundHead) -> None:
        """Check that the model returns the logits that the probes read."""
        if found.log_probabilities and self._probes:
            raise BadInput(
                "layers and probes need a model that returns logits, not their log-softmax: wrap the model so that it "
                f"returns the output of {found.names[0]}."
            )
        reading = [probe.name for probe in self._probes if probe.needs_logits]
        if reading and not found.returns_logits:
            raise BadInput(
                f"the probe {reading[0]!r} reads the logits of the model, which returns none: wrap it with a linear "
                "layer, torch.nn.Sequential(model, layer), or leave out the probe."
            )

    def _pass(
        self,
        found: heads.FoundHead,
        inputs: Tensor,
        logits: Tensor | None,
        labels: Tensor | None,
        start: int,
        further: dict[str, Tensor],
    ) -> Pass:
        """Return the pass for the probes, with the function that they call for the features of other inputs."""

        def features_of(others: Tensor) -> Tensor:
            with self._capture.recording():
                output = self.model(others)
            return found.read(self._capture, output, others, mask_in(further), start)[0]

        known = inputs.new_empty((len(inputs), 0), dtype=torch.float32) if logits is None else logits
        return Pass(self.model, inputs, known, labels, start, further, features_of, self.transform)

    def _columns(
        self, features: Tensor, logits: Tensor | None, done: Pass, seen: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        found = {"features": features} | ({} if logits is None else {"logits": logits})
        for probe, own in zip(self._probes, seen, strict=True):
            found |= {f"extras/{name}": values for name, values in probe.columns(done, own).items()}
        for name, values in found.items():
            if len(values) != len(done.inputs):
                raise ShapeMismatch(
                    f"the model mixes its inputs: {len(done.inputs)} inputs resulted in {len(values)} rows of {name}."
                )
        dtype = getattr(torch, self.options.dtype)
        columns = {name: (values.detach(), dtype) for name, values in found.items()}
        return self._transfers.own_copies(
            columns if done.labels is None else columns | {"labels": (done.labels, torch.int64)}
        )


@contextmanager
def _naming(inputs: Tensor, start: int) -> Iterator[None]:
    """Turn an error of the model into one that names the batch."""
    try:
        yield
    except (OodScoresError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise BadInput(
            f"the model cannot take a batch of shape {list(inputs.shape)} (first row {start}): {reason}"
            f"{_advice(inputs, error)}."
        ) from error


def _advice(inputs: Tensor, error: Exception) -> str:
    """Return what to do about an error of the model, if its cause is likely to be known."""
    if inputs.dtype == torch.uint8:
        return ". The inputs are uint8: convert them to floating point and normalize them as in training"
    if isinstance(error, TypeError):
        return (
            ". Besides the images, the model receives the entries of a dict batch that its forward has parameters for: "
            "use such a batch, or wrap the model"
        )
    if inputs.ndim == 3:
        return ". If this is a single image, pass DataLoader(dataset, batch_size=...)"
    if inputs.ndim == 4:
        return ". Check that the preprocessing is that of this model: the size of the images and their channels"
    return ""
