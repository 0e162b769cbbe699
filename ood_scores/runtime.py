"""The rank of this process, torch's state, and the device to compute on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import Any, TypeVar

import torch

from ood_scores.errors import BadInput, OodScoresError
from ood_scores.version import __version__

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

CPU = torch.device("cpu")

MOST_WORKERS = 1024
"""Maximum number of processes of a loader; a larger one is a mistake that would stop the machine."""

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

_callers_default_device: ContextVar[torch.device | None] = ContextVar("callers_default_device", default=None)
"""The default device outside ``default_torch_state``, unless that is the CPU."""


@functools.cache
def version_of(package: str) -> str:
    """Return the installed version of a package, which is looked for once: to find it takes milliseconds."""
    return __version__ if package == "ood_scores" else importlib.metadata.version(package)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of some packages, for the record."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in packages}


def from_workers(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches of a DataLoader; an error of this package in a worker process comes without its traceback."""
    try:
        yield from batches
    except OodScoresError as error:
        message, name = str(error), f"{type(error).__module__}.{type(error).__qualname__}: "
        if "DataLoader worker process" in message and name in message:
            raise type(error)(message.rpartition(name)[2].strip()) from None
        raise


@dataclass
class Cost:
    """What some work cost: seconds, and the bytes by which it raised the peak memory of the process."""

    seconds: float = 0.0
    memory: int = 0

    @contextmanager
    def measured(self, memory: bool = True) -> Iterator[None]:
        """Add what the work within the context costs.

        Without ``memory``, only the seconds: some systems take milliseconds to tell the peak memory.
        """
        peak = _peak_memory() if memory else 0
        start = perf_counter()
        yield
        self.seconds += perf_counter() - start
        self.memory += _peak_memory() - peak if memory else 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.memory + other.memory)


def _peak_memory() -> int:
    """Return the most bytes of memory that this process has used so far; 0 where the system does not tell."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Compute as in a process that has set nothing in torch, so that numbers do not depend on what surrounds a call.

    Within the context, also where the caller has set these otherwise: autocast is off, the default device is the CPU,
    the default dtype is float32, inference mode is off, gradients are enabled, and float32 matrix products have float32
    precision. Deterministic algorithms that the caller requests are used where they exist, and no operation is refused.
    The caller's settings are restored afterwards. The default dtype and the precision of matrix products belong to the
    whole process: other threads see the defaults until the last context of all threads ends.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device != CPU:
            device = torch.get_default_device()  # which is slow
            stack.enter_context(CPU)
            stack.callback(_callers_default_device.reset, _callers_default_device.set(device))
        stack.enter_context(_PROCESS_SETTINGS.at_their_defaults())
        yield


@contextmanager
def callers_default_device() -> Iterator[None]:
    """Restore the caller's default device within ``default_torch_state``, for a model that relies on it."""
    device = _callers_default_device.get()
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(device)
        yield


@dataclass
class _ProcessSettings:
    """Settings of the whole process, which stay at their defaults until the last of all threads needs them no more."""

    lock: Any = field(default_factory=Lock)
    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    @contextmanager
    def at_their_defaults(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self._set_defaults()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                while not self.users and self.undo:
                    self.undo.pop()()

    def _set_defaults(self) -> None:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            self.undo.append(lambda: torch.set_default_dtype(dtype))
            torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            self.undo.append(lambda: torch.use_deterministic_algorithms(True))
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._set_matmul_precision()

    def _set_matmul_precision(self) -> None:
        modules: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn) if NEW_PRECISION_API else ()
        backends = [module.matmul for module in modules]
        before = [backend.fp32_precision for backend in backends]
        try:
            overall = torch.get_float32_matmul_precision()
        except RuntimeError:  # set for one backend alone, through the new interface
            overall = ""
        if overall == "highest" and not {"tf32", "bf16"}.intersection(before):
            return

        def restore() -> None:
            if overall:
                torch.set_float32_matmul_precision(overall)
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision

        self.undo.append(restore)
        torch.set_float32_matmul_precision("highest")


NEW_PRECISION_API = hasattr(torch.backends, "fp32_precision")


def tf32_is_allowed() -> tuple[bool, bool]:
    """Return whether float32 matrix products, and convolutions, may use TF32 on a CUDA device.

    The flags of the older interface cannot be read if the precision was set through the new one.
    """
    backends: Any = torch.backends
    if NEW_PRECISION_API:
        return backends.cuda.matmul.fp32_precision == "tf32", backends.cudnn.conv.fp32_precision == "tf32"
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32


_PROCESS_SETTINGS = _ProcessSettings()


@dataclass(frozen=True)
class Ranks:
    """The rank of this process (from 0), the number of processes, and its local rank on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """Read the ranks from the environment variables that ``torchrun`` sets.

        Raises:
            BadInput: if one of them is not a whole number, or ``WORLD_SIZE`` is above 1 and ``MASTER_ADDR`` is not set.
        """
        rank, count, local = map(_whole_number_of, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if count > 1 and "MASTER_ADDR" not in os.environ:
            raise BadInput(
                f"WORLD_SIZE={count} is set, but MASTER_ADDR is not: start the processes with torchrun, "
                "or unset WORLD_SIZE to run alone."
            )
        return cls(rank, max(count, 1), local)

    @property
    def first(self) -> bool:
        """Whether this is the process of rank 0."""
        return self.rank == 0


def _whole_number_of(variable: str) -> int:
    """Return the value of an environment variable; 0 if it is not set, or empty."""
    value = os.environ.get(variable) or "0"
    if not (value.isdecimal() and len(value) < 10):
        raise BadInput(
            f"the environment variable {variable} is {value[:30]!r}, not a whole number: start the processes with "
            "torchrun, or unset it to run alone."
        )
    return int(value)


def available(device: torch.device) -> torch.device:
    """Return the device if this process has it, else another of its type, else the CPU."""
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return CPU if not count else device if (device.index or 0) < count else torch.device("cuda", 0)


def find_device(device: str | torch.device, own: torch.device = CPU, local_rank: int = 0) -> torch.device:
    """Find the device to compute on.

    ``"auto"`` is ``own`` unless that is the CPU, then a GPU if one is available, then the CPU. Each process on a
    machine uses the GPU of its ``local_rank``, or the only GPU that it sees.

    Raises:
        BadInput: if the device is not available.
    """
    if device == "auto":
        device = "cuda" if own.type == "cpu" and torch.cuda.is_available() else own
    if str(device) == "cuda" and torch.cuda.is_available():
        device = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        found = torch.zeros(1, device=device)
        found.item()  # the meta device has no values
        return found.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BadInput(f"the device {str(device)!r} is not available: {str(error).splitlines()[0]}") from error
