"""The options of an extraction: everything but the model and the data that decides the numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ood_scores.errors import BadInput
from ood_scores.parameters import require_known

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ood_scores.extraction.encoders import Pool, PoolName
    from ood_scores.extraction.layers import Layers
    from ood_scores.extraction.probes import Probe
    from ood_scores.features import Head, Provenance

F = TypeVar("F", bound=Callable[..., Any])

AMP = ("bf16", "fp16")
DTYPES = ("float16", "float32", "float64")
ON_ERROR = ("skip", "raise")


def _shown(help: str, *, choices: Sequence[str] = (), metavar: str | None = None, flag: bool = False) -> dict[str, Any]:
    """The metadata of a field: its help text, its allowed values (besides the default), a placeholder.

    A ``flag`` is true or false, or None by default.
    """
    return {"help": help, "choices": choices, "metavar": metavar, "flag": flag}


@dataclass(frozen=True)
class ExtractionOptions:
    """The options of an extraction.

    They decide how numbers are rounded and which columns there are. All but ``on_error`` are part of a cache's
    identity, and a detector applies the options of its calibration set.

    Args:
        amp: ``"bf16"`` or ``"fp16"`` for automatic mixed precision.
        channels_last: whether to use the channels-last memory format for weights and inputs ``[B, C, H, W]``, which
            tensor cores prefer. None for convolutional models on a CUDA device alone, unless they do not accept it; a
            cache does not tell this from False, and a detector then uses the format that its model has.
        compile: whether to run the model through ``torch.compile``, which takes about a minute to start and needs a C++
            compiler. Not available with ``layers`` or ``probes``.
        dtype: the type in which features, logits and extras are stored: ``"float16"``, ``"float32"`` or ``"float64"``.
        head: None to find the last affine map; a module or its name to choose it; a ``Head`` to compute the logits
            from the features, such as a linear probe of an encoder; False to keep the logits, and the features or else
            the model's output, without a head.
        layers: names of modules whose outputs are pooled and kept as extras ``layers.<module>``, computed in the same
            pass; ``"stages"`` for the modules that end the stages of the model.
        pool: how the tokens ``[B, T, D]`` or maps ``[B, C, H, W]`` of an encoder become its features: ``"cls"`` for the
            class token, ``"mean"`` for the mean over patches, words, or positions, ``"cls+mean"`` for both, or a
            function from the output of the model to ``[B, D]``, which is named ``FILE.py:FUNCTION`` in texts. None for
            the pooling of the model itself.
        probes: further extras to compute for every input, as objects of ``ood_scores.probes``, names, or names with
            parameters: ``[ODIN(epsilon=0.004), "gram", "odin:epsilon=0.004"]``. Most run the model again.
        on_error: ``"skip"`` to leave out rows that cannot be read, such as damaged images, with a warning; they are
            listed in the provenance. ``"raise"`` stops at the first one. A cache is continued with either, but one that
            lacks rows is used only with ``"skip"``. Missing files, faults of the file system, and more than one
            unreadable row in ten always stop, and so does any unreadable row of a loader that is not a ``DataLoader``
            with a ``batch_size`` that reads a dataset of known length in order.

    Raises:
        BadInput: if a value is not one of those above, or two probes have the same name.
        UnknownName: if there is no probe of that name, or it has no such parameter.
    """

    amp: str | None = field(default=None, metadata=_shown("Automatic mixed precision.", choices=AMP))
    channels_last: bool | None = field(
        default=None,
        metadata=_shown("Channels-last memory format; defaults to convolutional models on a GPU alone.", flag=True),
    )
    compile: bool = field(
        default=False, metadata=_shown("Run through torch.compile; not with layers or probes.", flag=True)
    )
    dtype: str = field(
        default="float32",
        metadata=_shown("Type to store: float16, float32, or float64.", choices=DTYPES, metavar="TYPE"),
    )
    head: str | nn.Module | bool | Head | None = field(
        default=None, metadata=_shown("Name of the last linear layer, if it cannot be found.")
    )
    layers: Layers | None = field(
        default=None,
        metadata=_shown("Layers to pool and keep: 'stages', or names separated by commas.", metavar="NAMES"),
    )
    pool: Pool | None = field(
        default=None,
        metadata=_shown(
            "How tokens or maps become the features of an encoder: mean, cls, cls+mean, or FILE.py:FUNCTION; "
            "defaults to its own pooling.",
            metavar="POOL",
        ),
    )
    probes: Iterable[str | Probe] = field(
        default=(), metadata=_shown("Probe to compute, as NAME or NAME:key=value,…; may be repeated.", metavar="NAME")
    )
    on_error: str = field(
        default="skip",
        metadata=_shown(
            "At an image that cannot be read: skip to leave it out and list it, raise to stop.",
            choices=ON_ERROR,
            metavar="WHAT",
        ),
    )

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"on_error"})
    """The provenance of a cache lists the rows that it lacks."""

    IN_DIGEST_IF_SET: ClassVar[frozenset[str]] = frozenset({"pool"})
    """Earlier versions did not have it."""

    NONE_IN_DIGEST: ClassVar[Mapping[str, Any]] = {"channels_last": False}
    """The defaults of earlier versions."""

    def __post_init__(self) -> None:
        if isinstance(self.probes, Iterable) and not isinstance(self.probes, str):
            object.__setattr__(self, "probes", tuple(self.probes))
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value not in (each.default, *choices):
                allowed = [*(["None"] if each.default is None else []), *map(repr, choices)]
                raise BadInput(f"{each.name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}.")
        if not isinstance(self.layers, Iterable | None):
            raise BadInput(f"layers must be 'stages' or a list of names of modules, got {self.layers!r}.")
        _ = self.pooling
        if self.all_probes and self.compile:
            raise BadInput(
                "compile=True cannot be combined with layers or probes, whose hooks compiled code does not see."
            )

    @cached_property
    def all_probes(self) -> tuple[Probe, ...]:
        """The probe of ``layers``, if there are any, and the ``probes``."""
        from ood_scores.extraction.probes import as_probes

        return tuple(as_probes(self.layers, self.probes))

    @cached_property
    def pooling(self) -> PoolName | Callable[[Any], Tensor] | None:
        """The name or the function of the pooling."""
        from ood_scores.extraction.encoders import pool_function

        return pool_function(self.pool)

    @classmethod
    def of(cls, provenance: Provenance, probes: Sequence[str] = (), head: Head | None = None) -> ExtractionOptions:
        """Return the options that a feature set was extracted with, and of its probes those with the given names.

        ``head`` is the head of the set, which is used if it was given to the extraction.
        """
        from ood_scores.extraction.probes.base import probe_of

        return cls(
            amp=provenance.amp,
            channels_last=provenance.channels_last,
            compile=provenance.compiled,
            dtype=provenance.dtype,
            head=head if head and provenance.head == head.digest else provenance.head,
            pool=provenance.pool,
            probes=[probe_of(record) for record in provenance.probes if record.parameters["name"] in probes],
        )


def options_from(given: Mapping[str, Any], function: Callable[..., Any]) -> ExtractionOptions:
    """Return the options with these values, which were given to a function that ``takes_options``.

    Raises:
        UnknownName: if there is no such option; the message lists all arguments of the function.
    """
    require_known(function, given, function.__name__, "argument")
    return ExtractionOptions(**given)


def takes_options(function: F) -> F:
    """Show the fields of ``ExtractionOptions`` in the signature of a function, in place of its ``**options``."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(ExtractionOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
