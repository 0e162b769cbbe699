"""The errors that this package raises. Every message says what is wrong and what to do about it."""


class OodScoresError(Exception):
    """Base class of every error that this package raises on purpose."""


class BadInput(OodScoresError, ValueError):
    """An argument or an array is invalid."""


class MissingData(BadInput):
    """Data is missing. ``remedy`` is the command or address that provides it, or "" if none is known."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason.rstrip('.')}. To get it: {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class ShapeMismatch(BadInput):
    """The shapes of arrays do not match."""


class OtherModel(BadInput):
    """Feature sets come from models with different weights but must come from the same model."""


class NotFinite(BadInput):
    """Values are NaN or infinite."""


class BadLabels(BadInput):
    """Labels are not class indices of the model."""


class EmptyInput(BadInput):
    """A loader or feature set has no rows."""


class UnreadableImage(BadInput):
    """An image cannot be decoded, or is refused because of its pixels."""


class UnreadableRow(BadInput):
    """A row of a dataset cannot be read during an extraction."""


class TooManyUnreadableRows(BadInput):
    """So many rows of a dataset cannot be read that it is not used without them."""


class FileSystemFault(BadInput):
    """The file system does not deliver a file, which it may do later: unlike a damaged row, it is never left out."""


class ProbeDoesNotApply(BadInput):
    """A probe cannot be computed for this model; ``probe`` is its name."""

    def __init__(self, probe: str, reason: str) -> None:
        super().__init__(f"{probe}: {reason}")
        self.probe = probe


class UnknownName(OodScoresError, LookupError):
    """A scorer, dataset, or option does not exist; the message lists the known names."""


class MissingInput(OodScoresError, ValueError):
    """The feature set lacks logits, features, labels, a head, or an extra that a scorer requires.

    ``command`` is what to do on the command line, or "" if that is not known.
    """

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command


class MissingPackage(MissingInput, ImportError):
    """A package that only some uses need is not installed; the message says the command that installs it."""


class NotFitted(OodScoresError, RuntimeError):
    """A scorer that requires a fit was asked to score before it was fitted."""


class HeadNotFound(OodScoresError, ValueError):
    """No affine map in the model computes its logits."""


class HeadMismatch(HeadNotFound):
    """The named head does not reproduce the logits."""


class CheckpointError(OodScoresError, ValueError):
    """A checkpoint is missing, unsafe to open, or belongs to another architecture."""


class CacheError(OodScoresError):
    """Base class of the errors about cache files and saved scorers."""


class StaleCache(CacheError):
    """The cache was created with other weights, preprocessing, data, or settings than those requested."""


class UnfinishedCache(CacheError):
    """The extraction that writes the cache has not finished."""


class ForeignFile(CacheError):
    """The file was not written by this package, or was written by a newer version of it."""


class DamagedCache(CacheError):
    """The file is truncated or otherwise unreadable."""


class CacheBusy(CacheError):
    """Another process is writing the cache."""


class CacheWriteFailed(CacheError):
    """The disk refused a write; everything written before it is safe."""


class ShuffledLoader(CacheError):
    """A loader in random order can neither resume a cache nor be compared with one."""


class WorkerDied(OodScoresError, RuntimeError):
    """A worker process was killed from outside; running the same call again continues."""


class RowsLeftOut(UserWarning):
    """Rows of a dataset were left out of an extraction, or have no scores in a prediction, as they cannot be read."""


class NearChance(UserWarning):
    """The accuracy on a dataset that was extracted is near chance."""
