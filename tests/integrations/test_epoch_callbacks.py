"""Callbacks that evaluate scorers while a model is trained by Lightning or by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ood_scores
from ood_scores.errors import BadInput, UnknownName
from ood_scores.integrations.epoch_scores import EpochScores

NAMES = {
    f"ood/{ood}/{scorer}/{metric}"
    for ood in ("shifted", "noise")
    for scorer in ("energy", "mahalanobis")
    for metric in ("auroc", "fpr95_id")
}


def rows(count: int, seed: int, shift: float = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return TensorDataset(torch.randn(count, 6, generator=generator) + 3 * torch.eye(6)[labels] + shift, labels)


def sets(loader: Any) -> dict[str, Any]:
    return {
        "id": loader(rows(40, 1)),
        "ood": {"shifted": loader(rows(30, 2, shift=2)), "noise": loader(rows(30, 3, shift=-1))},
        "fit": loader(rows(60, 4)),
        "scorers": ["energy", "mahalanobis"],
    }


def expected(model: nn.Module, given: dict[str, Any]) -> dict[str, float]:
    """The same numbers from the functions that a user would call."""

    def feats(loader: Any) -> ood_scores.FeatureSet:
        return ood_scores.extract(model, loader, progress=False)

    ood = {name: feats(loader) for name, loader in given["ood"].items()}
    table = ood_scores.evaluate(given["scorers"], id=feats(given["id"]), ood=ood, fit=feats(given["fit"]))
    return {
        f"ood/{row.ood}/{row.scorer}/{metric}": getattr(row, metric)
        for row in table.itertuples()
        for metric in ("auroc", "fpr95_id")
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))


def loader(data: Dataset) -> DataLoader:
    return DataLoader(data, 16)


def fitted(folder: Path, epochs: int, **arguments: Any) -> Any:
    """Train with Lightning and the callback."""
    pytest.importorskip("lightning.pytorch", reason="pip install lightning")
    from lightning.pytorch import LightningModule, Trainer

    from ood_scores.integrations.lightning import OODCallback

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            assert self.net[1].training
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks: Any = [OODCallback(**arguments)]
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=callbacks, **quiet
    )
    trainer.fit(Classifier(), loader(rows(60, 4)), loader(rows(40, 1)))
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_logs_the_metrics_of_the_weights_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    given = sets(loader)
    trainer = fitted(tmp_path, epochs=2, **given)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found.keys() == NAMES
    assert found == pytest.approx(expected(trainer.lightning_module, given))
    assert max(found.values()) > 0.6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_measures_every_third_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []

    def measure(_: EpochScores, model: nn.Module) -> dict[str, float]:
        measured.append(model)
        return {"ood/x": 1.0}

    monkeypatch.setattr(EpochScores, "measure", measure)
    fitted(tmp_path, epochs=7, every=3, **sets(loader))
    assert len(measured) == 2


class Columns(Dataset):
    """Rows with the names of a classifier of transformers."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        x, label = self.data[row]
        return {"pixel_values": x.reshape(1, 2, 3).repeat(1, 2, 2), "labels": label}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainer_of_transformers_logs_and_can_choose_the_best_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    from ood_scores.integrations.transformers import OODCallback

    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"num_channels": 1, "num_labels": 3, "image_size": (4, 6), "patch_size": (2, 3)}
    config = ViTConfig(**sizes)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, eval_strategy="epoch", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, per_device_train_batch_size=16, logging_strategy="no", learning_rate=0.01,
    )  # fmt: skip
    trainer = HuggingFaceTrainer(
        ViTForImageClassification(config), arguments,
        train_dataset=Columns(rows(60, 4)), eval_dataset=Columns(rows(40, 1)),
    )  # fmt: skip
    given = sets(lambda data: DataLoader(Columns(data), 16))
    trainer.add_callback(OODCallback(trainer, **given))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "ood/noise/energy/auroc" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2]
    model: Any = trainer.model
    values = expected(model, given)
    assert {name: logged[-1][name] for name in values} == pytest.approx(values)
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in values} == pytest.approx(values)


def test_mistakes_are_found_before_the_training() -> None:
    with pytest.raises(UnknownName, match="aurok"):
        EpochScores(id=[], ood={}, metrics=["aurok"])
    with pytest.raises(BadInput, match="every must be at least 1"):
        EpochScores(id=[], ood={}, every=0)
