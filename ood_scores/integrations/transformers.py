"""A callback for the Trainer of transformers that logs how well scorers detect OoD inputs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ood_scores.integrations.epoch_scores import EpochScores


class OODCallback(TrainerCallback):
    """Logs the metrics of scorers after each evaluation: ``ood/clinc/energy/auroc``.

    >>> from ood_scores.integrations.transformers import OODCallback
    >>> trainer = Trainer(model, arguments, train_dataset=..., eval_dataset=...)
    >>> trainer.add_callback(OODCallback(trainer, id=id_loader, ood={"clinc": clinc_loader}, scorers=["energy"]))

    The values go to everything that the trainer reports to and, with the prefix ``eval_``, into the metrics of the
    evaluation, so that ``metric_for_best_model="ood/clinc/energy/auroc"`` finds them.

    Args:
        trainer: the trainer that the callback is added to.
        arguments: those of ``EpochScores``. ``every`` counts evaluations.
    """

    def __init__(self, trainer: Trainer, **arguments: Any) -> None:
        self.trainer = trainer
        self.scores = EpochScores(**arguments)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.scores.is_due():
            values = self.scores.measure(kwargs["model"])
            kwargs["metrics"].update({f"eval_{name}": value for name, value in values.items()})
            self.trainer.log(values)
