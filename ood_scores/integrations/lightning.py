"""A callback for Lightning that logs how well scorers detect OoD images. It needs ``pip install lightning``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ood_scores.integrations.epoch_scores import EpochScores


class OODCallback(Callback):
    """Logs the metrics of scorers after each validation epoch: ``ood/svhn/energy/auroc``.

    >>> from ood_scores.integrations.lightning import OODCallback
    >>> callback = OODCallback(id=id_loader, ood={"svhn": svhn_loader}, scorers=["energy", "knn"], fit=train_loader)
    >>> Trainer(callbacks=[callback])

    Other callbacks can monitor these names, such as ``ModelCheckpoint(monitor="ood/svhn/energy/auroc", mode="max")``,
    if they come after this one.

    Args:
        arguments: those of ``EpochScores``. ``every`` counts validation epochs; that of the sanity check is left out.
    """

    def __init__(self, **arguments: Any) -> None:
        self.scores = EpochScores(**arguments)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.scores.is_due():
            pl_module.log_dict(self.scores.measure(pl_module))
