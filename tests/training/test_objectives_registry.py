"""All objectives by name: their attributes, their errors, and training on real digits with each of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyNet
from torch import Tensor, nn

from ood_scores.data.kinds.digits import digits
from ood_scores.errors import BadInput, EmptyInput, MissingInput, ShapeMismatch, UnknownName
from ood_scores.training import objectives
from ood_scores.training.objectives import (
    Objective,
    create_objective,
    list_objectives,
    objective_class,
    register_objective,
)

CLASSES = 5
OF_ID = {"cross_entropy", "l2_norm", "logit_adjustment", "logit_norm", "nc_loss"}
OF_OOD = {"balanced_energy", "energy_oe", "oe", "oecc", "pascl", "rna"}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return 96 images of the digits 0 to 4 with labels, and 64 images of the digits 5 to 9."""
    (known, labels), (unknown, _) = digits(range(5)), digits(range(5, 10))
    images, ood = (torch.from_numpy(pixels).float()[:, None] / 127.5 - 1 for pixels in (known[:96], unknown[:64]))
    return images, torch.from_numpy(labels[:96]), ood


def by_name(name: str, **settings: Any) -> Objective:
    settings = {**objective_class(name).test_settings, **settings}
    return create_objective(name, class_counts=[50, 20, 10, 5, 1], num_features=16, **settings)


def steps(objective: Objective, number: int, lr: float = 0.1) -> list[float]:
    """Return the losses of SGD steps on one batch, each with one forward pass of ID and OoD images."""
    torch.manual_seed(0)
    net = TinyNet(CLASSES, in_chans=1).train()
    images, labels, ood = batch()
    noise = torch.randn_like(images) * 0.1
    views = torch.cat([images, images + noise][: objective.views])
    labels = labels.repeat(objective.views)
    inputs = torch.cat([views, ood]) if objective.auxiliary else views
    optimizer = torch.optim.SGD([*net.parameters(), *objective.parameters()], lr, momentum=0.9)
    losses = []
    for _ in range(number):
        features = net.forward_head(net.forward_features(inputs), pre_logits=True)
        ood_features = features[len(views) :] if objective.auxiliary else None
        loss = objective(features[: len(views)], net.get_classifier(), labels, ood_features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- training


@pytest.mark.parametrize("name", list_objectives())
def test_every_objective_decreases_on_real_digits(name: str) -> None:
    losses = steps(by_name(name), 30)
    assert losses[::5] == sorted(losses[::5], reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["oe", "energy_oe", "balanced_energy"])
def test_exposure_with_logit_adjustment_as_base_decreases_on_real_digits(name: str) -> None:
    losses = steps(by_name(name, base="logit_adjustment"), 30)
    assert losses[-1] < 0.7 * losses[0]


# ---- the registry


def test_published_objectives_are_registered() -> None:
    assert set(list_objectives()) >= OF_ID | OF_OOD
    assert list_objectives("*energy*") == ["balanced_energy", "energy_oe"]


@pytest.mark.parametrize("name", list_objectives())
def test_created_objective_has_its_name_class_and_views(name: str) -> None:
    objective = by_name(name)
    assert objective.name == name
    assert isinstance(objective, objective_class(name))
    assert objective.views in (1, 2)


def test_batches_and_parameters_of_published_objectives() -> None:
    published = {name: by_name(name) for name in OF_ID | OF_OOD}
    assert {name for name, objective in published.items() if objective.auxiliary} == OF_OOD
    assert [name for name, objective in published.items() if objective.views == 2] == ["pascl"]
    assert {name for name, objective in published.items() if list(objective.parameters())} == {"pascl", "rna"}
    assert [name for name, objective in published.items() if objective.through_batchnorm] == ["rna"]


def test_errors_for_unknown_names_list_the_known_names() -> None:
    with pytest.raises(UnknownName, match=r"cross_entropy.*rna"):
        create_objective("cross-entropy")
    with pytest.raises(UnknownName, match="'lambda': choose from weight, base"):
        by_name("oe", **{"lambda": 0.5})
    with pytest.raises(UnknownName, match="there are none"):
        by_name("cross_entropy", tau=1)
    with pytest.raises(UnknownName, match="linear, mlp, none"):
        by_name("rna", projector="conv")
    with pytest.raises(UnknownName, match="there is no objective 'la'"):
        by_name("oe", base="la")


def test_missing_arguments_of_objectives_are_named() -> None:
    with pytest.raises(MissingInput, match="'rna' needs class_counts, num_features"):
        create_objective("rna")
    with pytest.raises(MissingInput, match="'oecc' needs train_accuracy"):
        create_objective("oecc")
    with pytest.raises(MissingInput, match="'logit_adjustment' needs class_counts"):
        create_objective("oe", base="logit_adjustment")


def test_importing_objectives_imports_every_module_of_the_package() -> None:
    folder = Path(objectives.__file__).parent
    modules = {f"{objectives.__name__}.{path.stem}" for path in folder.glob("[!_]*.py")}
    assert modules <= set(sys.modules)


def test_objective_names_cannot_be_registered_twice() -> None:
    with pytest.raises(BadInput, match="'rna' exists already"):

        @register_objective("rna")
        class Other(Objective):
            def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
                return features.sum()

    class Unregistered(Objective):
        def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
            return features.sum()

    assert Unregistered().name == "Unregistered"


# ---- bad input


@pytest.mark.parametrize("name", list_objectives())
def test_objectives_refuse_batches_of_wrong_shape(name: str) -> None:
    objective, head = by_name(name), nn.Linear(16, CLASSES)
    features, labels, ood = torch.randn(6, 16), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(3, 16)
    assert objective(features, head, labels, ood).isfinite()
    with pytest.raises(EmptyInput, match=name):
        objective(features[:0], head, labels[:0], ood)
    with pytest.raises(ShapeMismatch, match="one label per feature"):
        objective(features, head, labels[:5], ood)
    with pytest.raises(ShapeMismatch, match="head of 16 features"):
        objective(features[:, :7], head, labels, ood)


@pytest.mark.parametrize("name", [name for name in list_objectives() if by_name(name).auxiliary])
def test_objectives_with_auxiliary_images_refuse_batches_without_them(name: str) -> None:
    objective, head = by_name(name), nn.Linear(16, CLASSES)
    features, labels = torch.randn(6, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(MissingInput, match="auxiliary images"):
        objective(features, head, labels)
    with pytest.raises(EmptyInput, match="empty batch of OoD images"):
        objective(features, head, labels, features[:0])
    with pytest.raises(ShapeMismatch, match="OoD features"):
        objective(features, head, labels, features[:, :7])


def test_pascl_refuses_an_odd_number_of_features() -> None:
    with pytest.raises(ShapeMismatch, match="2 views"):
        by_name("pascl")(torch.randn(3, 16), nn.Linear(16, CLASSES), torch.tensor([0, 1, 2]), torch.randn(3, 16))


@pytest.mark.parametrize("base", ["oe", by_name("pascl"), nn.CrossEntropyLoss()])
def test_base_must_be_an_objective_on_id_images_only(base: Any) -> None:
    with pytest.raises(BadInput, match="base"):
        by_name("oe", base=base)


def test_base_can_be_an_objective_with_its_own_settings() -> None:
    features, head, labels, ood = (
        torch.randn(4, 16),
        nn.Linear(16, CLASSES),
        torch.tensor([0, 1, 2, 2]),
        torch.zeros(2, 16),
    )
    sharp = by_name("logit_adjustment", tau=2.0)
    exposed = by_name("oe", base=sharp, weight=0.0)
    torch.testing.assert_close(exposed(features, head, labels, ood), sharp(features, head, labels))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("logit_norm", {"temperature": 0.0}),
        ("oecc", {"train_accuracy": 95}),
        ("oecc", {"reduction": "max"}),
        ("pascl", {"temperature": -1.0}),
        ("pascl", {"tail_share": 1.5}),
        ("rna", {"amplify": False}),
        ("rna", {"attenuate": True, "auxiliary": False}),
    ],
)
def test_objective_settings_out_of_range_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=name):
        by_name(name, **settings)
