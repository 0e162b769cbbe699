"""Everything that can go wrong, by name. Each message says what was found and what to do about it."""


class OodScoresError(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(OodScoresError, ValueError):
    """An argument or an array that cannot be worked with."""


class MissingData(BadInput):
    """Data that is not there. `remedy` is the command or address that gets it, "" where none is known."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason.rstrip('.')}. To get it: {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class ShapeMismatch(BadInput):
    """Arrays whose shapes do not fit each other."""


class OtherModel(BadInput):
    """Feature sets of models with different weights, where one model is meant."""


class NotFinite(BadInput):
    """NaN or infinite values where numbers are needed."""


class BadLabels(BadInput):
    """Labels that are not class indices of the model."""


class EmptyInput(BadInput):
    """A loader or feature set without a single row."""


class UnknownName(OodScoresError, LookupError):
    """A scorer, data source or option that does not exist; the message lists those that do."""


class MissingInput(OodScoresError, ValueError):
    """A scorer needs logits, features, labels, a head or an extra that the feature set has not got."""


class NotFitted(OodScoresError, RuntimeError):
    """A scorer that is fitted on in-distribution features was asked to score before."""


class HeadNotFound(OodScoresError, ValueError):
    """No affine map in the model gives its logits."""


class HeadMismatch(HeadNotFound):
    """The named head does not reproduce the logits."""


class CheckpointError(OodScoresError, ValueError):
    """A checkpoint that is missing, unsafe to open, or of another architecture."""


class CacheError(OodScoresError):
    """Base of everything that can be wrong with a cache file or a saved scorer."""


class StaleCache(CacheError):
    """The cache was made by other weights, preprocessing, data or settings than those asked for."""


class UnfinishedCache(CacheError):
    """The extraction that writes this cache has not finished."""


class ForeignFile(CacheError):
    """The file is not what this package writes there, or a newer version of it wrote it."""


class DamagedCache(CacheError):
    """The file is truncated or otherwise unreadable."""


class CacheBusy(CacheError):
    """Another process is writing the cache."""


class CacheWriteFailed(CacheError):
    """The disk refused a write; what was written before is safe."""


class ShuffledLoader(CacheError):
    """A loader in random order can neither resume a cache nor be compared with one."""


class WorkerDied(OodScoresError, RuntimeError):
    """A process that worked for this one was ended from outside; the same call continues."""
