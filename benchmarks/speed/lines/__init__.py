"""The groups of lines of the speed table: functions of the scale that yield lines with their baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.speed.lines import extraction, fitting, gpu, importing, metrics, scaling, scoring, search, training
from benchmarks.speed.measure import Figure, Line

GROUPS: dict[str, Callable[[float], Iterable[Line | Figure]]] = {
    "extraction": extraction.extraction,
    "gradnorm": scoring.gradnorm,
    "mahalanobis": scoring.mahalanobis,
    "disk": scoring.disk,
    "fit": fitting.fit,
    "memory": fitting.memory,
    "knn": search.knn,
    "metrics": metrics.metrics,
    "import": importing.importing,
    "detector": extraction.detector,
    "training": training.training,
    "exponents": scaling.exponents,
    "gpu": gpu.gpu,
}
