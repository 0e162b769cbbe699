"""Benchmark results in experiment trackers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ood_scores.benchmark import Results
from ood_scores.errors import BadInput


def log_results(results: Results, tracker: Any, *, step: int = 0) -> None:
    """Log every metric of a benchmark as ``part/model/scorer/ood/auroc``, and its report.

    Metrics of several checkpoints of a model are averaged.

    Args:
        results: what ``ood_scores.benchmark.run`` or ``load_results`` returned.
        tracker: a ``SummaryWriter`` of TensorBoard, a run of Weights & Biases (``wandb.init()``), or the module
            ``mlflow`` within a run.
        step: the step under which the metrics are logged.

    Raises:
        BadInput: if the tracker is none of these.
    """
    for kind, log in _TRACKERS.items():
        if hasattr(tracker, kind):
            log(results, tracker, step)
            return
    raise BadInput(
        f"cannot log to {type(tracker).__name__}: pass a TensorBoard SummaryWriter, a run of wandb, or the module "
        "mlflow."
    )


def metrics_by_name(results: Results) -> dict[str, float]:
    """Return the means over checkpoints of all metrics that were measured, by ``part/model/scorer/ood/metric``."""
    names = [metric.name for metric in results.metrics]
    means = results.table.groupby(["part", "model", "scorer", "ood"], sort=False)[names].mean()
    measured = means.reset_index().melt(["part", "model", "scorer", "ood"], var_name="metric").dropna(subset="value")
    return {"/".join(map(str, name)): value for *name, value in measured.itertuples(index=False)}


def _tensorboard(results: Results, writer: Any, step: int) -> None:
    for name, value in metrics_by_name(results).items():
        writer.add_scalar(name, value, step)
    writer.add_text("report", (results.folder / "report.md").read_text(encoding="utf-8"), step)


def _mlflow(results: Results, mlflow: Any, step: int) -> None:
    mlflow.log_metrics(metrics_by_name(results), step=step)
    mlflow.log_artifact(str(results.folder / "results.csv"))
    if _page(results).exists():
        mlflow.log_artifact(str(_page(results)))


def _wandb(results: Results, run: Any, step: int) -> None:
    import wandb

    logged = {**metrics_by_name(results), "results": wandb.Table(dataframe=results.table)}
    if _page(results).exists():
        logged["report"] = wandb.Html(_page(results).read_text(encoding="utf-8"))
    run.log(logged, step=step)


def _page(results: Results) -> Path:
    """The HTML report, which is written only if the packages that it needs are installed."""
    return results.folder / "report.html"


_TRACKERS: dict[str, Callable[[Results, Any, int], None]] = {
    "add_scalar": _tensorboard,
    "log_metrics": _mlflow,
    "log": _wandb,
}
"""How to log to a tracker that has a method of this name."""
