"""The trainer: turns a recipe into a checkpoint that timm opens, a log, and a state from which to resume."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, NotFinite
from ood_scores.models.networks.classifier import linear_classifier
from ood_scores.progress import showing_work
from ood_scores.training.augment import Augmentation, seed_of
from ood_scores.training.distributed import Processes, fastest_convolutions, processes
from ood_scores.training.log import Log, require_tensorboard, write_log
from ood_scores.training.recipe import Recipe, Stage
from ood_scores.training.recipe_file import load_recipe
from ood_scores.training.setup import Prepared, prepare
from ood_scores.training.stages import make_objective, trainable_parameters
from ood_scores.training.state import (
    LAST,
    STATE,
    Progress,
    State,
    clear,
    find_state,
    locked,
    require_same,
    restore_optimizer,
    save_state,
    write_tensors,
)
from ood_scores.training.step import (
    TrainingStep,
    count_correct,
    ignores_some,
    leaves_some_unread,
    make_optimizer,
    record,
    train_step,
)
from ood_scores.training.streams import Images, cycled, in_order, order, share

CHECK_EVERY = 50
"""Number of steps between checks of the loss, each of which waits for the GPU."""


@dataclass(frozen=True)
class Trained:
    """The result of a training run.

    Attributes:
        checkpoint: Path of the weights, for ``timm.create_model(name, num_classes=…, checkpoint_path=…)``.
        history: One record per epoch, the rows of ``log.csv``.
        accuracy: Accuracy of the finished network on ``training`` (in training mode, during the last epoch), and on
            ``validation`` and ``test`` if the recipe has them.
    """

    checkpoint: Path
    history: list[dict[str, Any]]
    accuracy: dict[str, float]


def train(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Trained:
    """Train a network by a recipe, or resume an interrupted run.

    A run that was killed at any step resumes from its last state when the same call is made again. On a CPU it ends
    with the same weights, bit for bit, as an uninterrupted run. Under ``torchrun`` all processes train one model.

    Args:
        recipe: A ``Recipe``, or the path of its TOML file.
        out: Output folder; defaults to ``runs/`` and the name of the recipe.
        device: ``cpu``, ``cuda``, …; ``auto`` uses a GPU if there is one.
        overwrite: Whether to discard a previous run in the folder.
        progress: Whether to show a line per epoch, and a progress bar on a terminal.

    Returns:
        The path of the checkpoint, the history, and the accuracies.

    Raises:
        BadInput: if the recipe cannot be used, the folder is a file, or it holds a run of another recipe or with other
            images. ``prepare`` and ``load_recipe`` list the other errors.
        NotFinite: if the loss or the weights become infinite or NaN; the last good state is kept.
        CacheBusy: if another process trains in the folder.
        CacheWriteFailed: if the disk refuses a write; what was saved before is safe.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path("runs") / recipe.name if out is None else user_path(out)
    if recipe.tensorboard:
        require_tensorboard()
    with processes(device) as who, locked(folder) if who.first else nullcontext():
        state = who.broadcast(find_state(folder, recipe) if who.first and not overwrite else None)
        with showing_work("reading the images …", progress and who.first):
            prepared = prepare(recipe, who, folder)
        if state is not None:
            known = {name: fact for name, fact in prepared.facts().items() if name in state.data}
            require_same(folder, "other data", state.data, known)  # an earlier version knew fewer facts
        if overwrite and who.first:
            clear(folder)
        run = Run(recipe, folder, who, prepared, state)
        run.train(progress)
        return Trained(folder / LAST, run.progress.history, run.accuracy())


class Run:
    """A training run in progress: the objective and optimizer of the current stage, and the progress so far."""

    def __init__(self, recipe: Recipe, folder: Path, who: Processes, prepared: Prepared, state: State | None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.who = who
        self.prepared = prepared
        self.model = prepared.model
        self.head = linear_classifier(prepared.model)
        self.progress = state.progress if state else Progress()
        if state:
            self.model.load_state_dict(state.part("model"))
        self.state = state

    def train(self, show: bool) -> None:
        """Train the remaining epochs."""
        steps = [len(self._rows(epoch)) for epoch in self._first_epochs() for _ in range(self._stage(epoch).epochs)]
        done = sum(steps[: self.progress.epoch]) + self.progress.step
        self.log = Log(
            self.folder, sum(steps), done, self.progress.epoch,
            show=show, tensorboard=self.recipe.tensorboard, silent=not self.who.first,
        )  # fmt: skip
        devices = [self.who.device] if self.who.device.type == "cuda" else []
        with self.log, torch.random.fork_rng(devices=devices), fastest_convolutions(self.who.device):
            if self.state is not None:
                self.log.say(f"resuming {self.folder} after {self._done()}")
            if self.progress.history and self.who.first:  # a kill may have come between state and log
                write_log(self.folder, self.progress.history)
            for epoch in range(self.progress.epoch, self.recipe.epochs):
                if epoch in self._first_epochs() or self.state is not None:
                    self._start_stage()
                self._epoch(epoch)
        self.who.wait()

    def _done(self) -> str:
        """Return how far the run has come, for a message."""
        epochs = f"epoch {self.progress.epoch} of {self.recipe.epochs}"
        return f"{epochs} and {self.progress.step} steps" if self.progress.step else epochs

    def accuracy(self) -> dict[str, float]:
        """Return the accuracies of the finished network."""
        last = self.progress.history[-1]
        found = {"training": last["accuracy"]}
        if "validation_accuracy" in last:
            found["validation"] = last["validation_accuracy"]
        if self.prepared.test is not None:
            found["test"] = self._evaluate(self.prepared.test)["accuracy"]
        return found

    def _first_epochs(self) -> list[int]:
        """Return the first epoch of each stage."""
        stages = self.recipe.stages
        return [sum(stage.epochs for stage in stages[:number]) for number in range(len(stages))]

    def _stage(self, epoch: int) -> Stage:
        return self.recipe.stages[self.recipe.stage_of(epoch)[0]]

    def _start_stage(self) -> None:
        """Create the objective and the optimizer, and restore them if the state was saved within the stage."""
        number, inner = self.recipe.stage_of(self.progress.epoch)
        stage = self.recipe.stages[number]
        counts, seed = self.prepared.class_counts, seed_of(self.recipe.seed, "objective", number)
        self.objective = make_objective(stage, self.model, counts, seed).to(self.who.device).train()
        wanted = set(trainable_parameters(self.model, stage.trainable))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        step = TrainingStep(self.model, self.objective, amp=self.recipe.amp == "bf16")
        self.optimizer = make_optimizer(stage.optimizer, [p for p in step.parameters() if p.requires_grad])
        self.sums = self._first_sums()
        if self.state is not None and (inner or self.progress.step):
            self.objective.load_state_dict(self.state.part("objective"))
            restore_optimizer(self.optimizer, self.state)
        self.state = None
        wrapped = self.who.wrap(step, some_unread=self.who.count > 1 and self._some_unread())
        self.step: Any = torch.compile(wrapped) if self.recipe.compile else wrapped

    def _some_unread(self) -> bool:
        """Whether the loss ignores some trainable parameters."""
        to_input = self.prepared.to_input
        images = torch.zeros(2, to_input.channels, *to_input.size, device=self.who.device)
        return leaves_some_unread(self.objective, self.head) or ignores_some(self.model, images)

    def _first_sums(self) -> Tensor:
        """Return the sums over the completed steps of the epoch: loss, correct, norms, samples, terms of the loss."""
        sums = [0.0] * (4 + len(self.objective.term_names))
        if self.progress.step and self.who.first:
            sums = self.progress.sums + [math.nan] * (len(sums) - len(self.progress.sums))  # of an earlier version
        return torch.tensor(sums, dtype=torch.float32 if self.who.device.type == "mps" else torch.float64).to(
            self.who.device
        )

    def _rows(self, epoch: int) -> list[Tensor]:
        """Return the rows of each step for all processes; each process gets at least one."""
        stage = self._stage(epoch)
        rows = order(self.recipe.seed, epoch, len(self.prepared.train), stage.batch_size, stage.drop_last)
        if rows and len(rows[-1]) < self.who.count:
            rows.pop()
        table, auxiliary = self.recipe.auxiliary, self.prepared.auxiliary
        if table is not None and auxiliary is not None and not table.repeat:
            rows = rows[: max(1, len(auxiliary) // (table.batch_size or stage.batch_size))]
        if not rows:
            raise BadInput(
                f"{len(self.prepared.train)} training images do not fill a batch of {stage.batch_size}: lower "
                "batch_size, or set drop_last = false."
            )
        return rows

    def _epoch(self, epoch: int) -> None:
        stage = self._stage(epoch)
        inner = self.recipe.stage_of(epoch)[1]
        rows = self._rows(epoch)
        first = self.progress.step
        losses: list[Tensor] = []
        batches = zip(rows[first:], self._batches(epoch, rows), strict=True)
        for step, (whole, (images, labels, ood)) in enumerate(batches, start=first):
            torch.manual_seed(self._seed("dropout", epoch, step))
            lr = stage.lr(inner, step, len(rows))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            weight = len(labels) * self.who.count / (len(whole) * self.objective.views)
            sums = train_step(self.step, self.head, self.optimizer, images, labels, ood, weight)
            terms = [len(labels) * self.objective.terms[name] for name in self.objective.term_names]
            self.sums += torch.stack([*sums, sums.new_full((), len(labels)), *terms])
            losses.append(sums[0])
            self.log.step()
            last = step + 1 == len(rows)
            save = (step + 1) % self.recipe.state_every == 0 and not last
            if save or last or len(losses) == CHECK_EVERY:
                self._check_finite(losses, epoch, step)
                self.log.show_numbers(epoch, record(self.sums[:3], float(self.sums[3]), lr))
                losses = []
            if save:
                self._save_state(step + 1)
        self._end_epoch(epoch, stage.lr(inner, len(rows) - 1, len(rows)))

    def _batches(self, epoch: int, rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield the remaining steps of an epoch: this process's images, labels, and OoD images, ready for the model."""
        prepared, first = self.prepared, self.progress.step
        number, inner = self.recipe.stage_of(epoch)
        views = self.objective.views
        augment = self._augmenter("train", epoch, prepared.augment)
        own = share(rows[first:], self.who.rank, self.who.count)
        images = prepared.train.batches(own, [self._seed("open", epoch, step) for step in range(first, len(rows))])
        ood: Iterator[Any] = iter([None] * len(own))
        if self.objective.auxiliary:
            assert prepared.auxiliary is not None
            assert self.recipe.auxiliary is not None
            size = self.recipe.auxiliary.batch_size or self.recipe.stages[number].batch_size
            start = inner * len(rows) + first
            other = cycled(self.recipe.seed, number, start, len(own), len(prepared.auxiliary), size)
            seeds = [self._seed("open auxiliary", epoch, step) for step in range(first, len(rows))]
            ood = prepared.auxiliary.batches(share(other, self.who.rank, self.who.count), seeds)
        augment_ood = self._augmenter("auxiliary", epoch, prepared.augment_auxiliary)
        for step, ((batch, labels), outside) in enumerate(zip(images, ood, strict=True), start=first):
            seen = [augment(batch, step, view) for view in range(views)]
            outliers = None if outside is None else augment_ood(outside[0], step, 0)
            yield torch.cat(seen) if views > 1 else seen[0], labels.repeat(views), outliers

    def _augmenter(self, purpose: str, epoch: int, by: Augmentation) -> Any:
        generator = Generator(self.who.device)

        def augmented(images: Tensor, step: int, view: int) -> Tensor:
            generator.manual_seed(self._seed(purpose, epoch, step, view))
            return self.prepared.to_input.augmented(images, by, generator, self.recipe.channels_last)

        return augmented

    def _seed(self, purpose: str, *numbers: int) -> int:
        return seed_of(self.recipe.seed, purpose, *numbers, self.who.rank)

    def _check_finite(self, losses: list[Tensor], epoch: int, step: int) -> None:
        finite = torch.stack(losses).isfinite()
        if not finite.all():
            first = int(finite.int().argmin())
            step -= len(losses) - 1 - first
            self._fail(f"in epoch {epoch + 1}, step {step + 1}, the loss became {float(losses[first])}")

    def _check_weights(self, epoch: int) -> None:
        finite = torch.stack([value.isfinite().all() for value in self.model.state_dict().values()])
        if not finite.all():
            self._fail(f"in epoch {epoch + 1} the weights became infinite or NaN")

    def _fail(self, what: str) -> None:
        done = self.progress.epoch
        kept = f"{self.folder / LAST} holds the weights of epoch {done}" if done else "no epoch was completed"
        raise NotFinite(f"{what} ({kept}): lower the learning rate, or check the images and the objective's settings.")

    def _end_epoch(self, epoch: int, lr: float) -> None:
        self._check_weights(epoch)
        sums = self.who.sum(self.sums)
        number = self.recipe.stage_of(epoch)[0]
        entry: dict[str, Any] = {"epoch": epoch + 1, "stage": number + 1, **record(sums[:3], float(sums[3]), lr)}
        terms = zip(self.objective.term_names, (sums[4:] / sums[3]).tolist(), strict=True)
        entry |= {f"loss_{name}": value for name, value in terms}
        self.who.share_buffers(self.model)
        if self.prepared.validation is not None:
            found = self._evaluate(self.prepared.validation)
            entry |= {f"validation_{name}": value for name, value in found.items()}
        self.progress.history.append(entry)
        self.progress.epoch += 1
        self.progress.sums = []
        self.sums.zero_()
        self._save_weights(entry)
        self.log.epoch(self.progress.history)
        self._save_state(0)

    def _evaluate(self, images: Images) -> dict[str, float]:
        """Return the accuracy in eval mode of the head on features z, and on normalized features z/‖z‖."""
        rows = share(in_order(len(images), self.recipe.stages[-1].batch_size), self.who.rank, self.who.count)
        rows = [batch for batch in rows if len(batch)]
        plain, generator = Augmentation(), Generator(self.who.device)
        ready = (
            (self.prepared.to_input.augmented(batch, plain, generator, self.recipe.channels_last), labels)
            for batch, labels in images.batches(rows, [0] * len(rows))
        )
        correct = self.who.sum(count_correct(self.model, ready, amp=self.recipe.amp == "bf16"))
        accuracy, normalized = (correct.double() / len(images)).tolist()
        return {"accuracy": accuracy, "accuracy_normalized": normalized}

    def _save_weights(self, entry: dict[str, Any]) -> None:
        if not self.who.first:
            return
        facts = {
            "architecture": self.recipe.model.name,
            "arguments": self.prepared.arguments,
            "epoch": entry["epoch"],
            "metrics": entry,
            "recipe": self.recipe.to_dict(),
        }
        every = self.recipe.checkpoint_every
        names = [f"epoch_{entry['epoch']:03d}.safetensors"] if every and entry["epoch"] % every == 0 else []
        for name in (*names, LAST):
            write_tensors(self.folder / name, self.model.state_dict(), facts)

    def _save_state(self, step: int) -> None:
        """Save the state after ``step`` steps of an epoch; within an epoch, check the weights first."""
        self.progress.step = step
        if step:
            self._check_weights(self.progress.epoch)
            self.progress.sums = self.who.sum(self.sums).tolist()
        if self.who.first:
            facts = self.recipe.to_dict(), self.prepared.facts()
            save_state(self.folder / STATE, self.progress, *facts, self.model, self.objective, self.optimizer)
