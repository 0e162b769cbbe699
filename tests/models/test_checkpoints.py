"""Checkpoints as training scripts save them, and as damage or strangers leave them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import resnet
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ood_scores.errors import CheckpointError
from ood_scores.models.checkpoints import read_checkpoint
from ood_scores.models.filling import fill
from ood_scores.models.opening import load_model

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return resnet(num_classes=7).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": values for key, values in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "net": lambda s: {"net": s, "acc": 93.1, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}},
    "optimizer": lambda s: {"weights": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{}]}},
    "ema": lambda s: {"ema": s, "model": {key: values + 1 for key, values in s.items()}},
    "nested ema": lambda s: {"ema": {"decay": 0.999, "module": s}, "state_dict": prefixed(s, "other.")},
    "any name": lambda s: {"my_classifier": s, "args": None},
    "loss beside": lambda s: {"net": s, "loss": {"weight": torch.ones(7)}},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}},
    "lightning net": lambda s: {"state_dict": prefixed(s, "net.")},
    "distributed and compiled": lambda s: prefixed(s, "module._orig_mod."),
    "lightning, distributed": lambda s: {"state_dict": prefixed(s, "model.module.")},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "numpy scalar": lambda s: {"state_dict": s, "best": np.float64(0.93), "epoch": np.int64(3)},
    "numpy array": lambda s: {"state_dict": s, "mean": np.ones(3), "rng": np.random.RandomState(0).get_state()},
    "path": lambda s: {"state_dict": s, "out": Path("x")},
    "no counts of batches": lambda s: {key: v for key, v in s.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_training_scripts_are_opened(form: str, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "c.pth")
    found = load_model("cifar_resnet20", tmp_path / "c.pth").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights"])
def test_safetensors_of_any_name_are_opened(name: str, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / name)
    assert read_checkpoint(tmp_path / name).keys() == state.keys()


def test_pickle_called_safetensors_is_opened(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "c.safetensors")
    assert read_checkpoint(tmp_path / "c.safetensors").keys() == state.keys()


def test_prefix_that_belongs_to_the_model_is_kept(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 2)

    torch.save(Wrapped().state_dict(), tmp_path / "c.pth")
    model = Wrapped()
    fill(model, read_checkpoint(tmp_path / "c.pth"), "c.pth")
    assert torch.equal(model.model.weight, torch.load(tmp_path / "c.pth")["model.weight"])


def test_error_names_missing_and_unexpected_weights(state: State, tmp_path: Path) -> None:
    renamed = {key.replace("linear", "fc"): values for key, values in state.items()}
    torch.save(renamed, tmp_path / "c.pth")
    words = "linear.bias is missing; linear.weight is missing; fc.bias is not of this model; fc.weight is not"
    with pytest.raises(CheckpointError, match=words):
        load_model("cifar_resnet20", tmp_path / "c.pth")


def test_error_names_what_the_file_has(state: State, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "cfg": "x"}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"no weights by name \(it has: epoch, cfg\): save model.state_dict"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"\(it has: a list\)"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"student": state, "teacher": state}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"several sets of weights \(student, teacher\)"):
        read_checkpoint(tmp_path / "two.pth")
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        read_checkpoint(tmp_path / "script.pt")


def _text(path: Path, state: State) -> None:
    path.write_text("a\nb\nc\n")


def _pickle(content: Callable[[State], Any]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(content(state), path)


def _half(path: Path, state: State) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:3000])


DAMAGES: dict[str, Callable[[Path, State], Any]] = {
    "text": _text,
    "empty": lambda path, state: path.write_bytes(b""),
    "half": _half,
    "half safetensors": lambda path, state: path.write_bytes(save(state)[:3000]),
    "header of safetensors": lambda path, state: path.write_bytes((20).to_bytes(8, "little") + b"{" + b"x" * 50),
    "empty zip": lambda path, state: zipfile.ZipFile(path, "w").close(),
    "integer keys": _pickle(lambda state: {1: torch.ones(2)}),
    "meta": _pickle(lambda state: {key: values.to("meta") for key, values in state.items()}),
    "expanded": _pickle(lambda state: {**state, "linear.weight": torch.ones(1, 1).expand(10**9, 64)}),
    "sparse": _pickle(lambda state: {**state, "linear.bias": torch.ones(7).to_sparse()}),
    "folder": lambda path, state: path.mkdir(),
    "pipe": lambda path, state: os.mkfifo(path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_end_in_checkpoint_error(damage: str, state: State, tmp_path: Path) -> None:
    DAMAGES[damage](tmp_path / "c.pth", state)
    with pytest.raises(CheckpointError):
        load_model("cifar_resnet20", tmp_path / "c.pth")


def test_changed_bytes_end_in_checkpoint_error_or_open(state: State, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    torch.save({"net": {key: values[:1] for key, values in list(state.items())[:3]}}, tmp_path / "c.pth")
    save_file({"x": torch.ones(4)}, tmp_path / "c.safetensors")
    refused = 0
    for file in (tmp_path / "c.pth", tmp_path / "c.safetensors"):
        whole = file.read_bytes()
        for place in drawn.integers(0, len(whole), 150):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(drawn.integers(8))
            file.write_bytes(changed)
            try:
                read_checkpoint(file)
            except CheckpointError:
                refused += 1
    assert refused > 0


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, state: State) -> None:
    class Program:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"net": state, "x": Program()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"would call posix\.mkdir"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "made").exists()


# ---- several files


def sharded(state: State, folder: Path) -> Path:
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file in parts for name in parts[file]}}))
    return index


def test_sharded_checkpoint_is_all_its_files(state: State, tmp_path: Path) -> None:
    found = read_checkpoint(sharded(state, tmp_path))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_damaged_index_ends_in_checkpoint_error(state: State, tmp_path: Path) -> None:
    index = sharded(state, tmp_path)
    whole = json.loads(index.read_text())["weight_map"]
    first = next(iter(whole))
    for content, message in [
        ("{", "is not the index of a sharded checkpoint"),
        ("[1]", "is not the index of a sharded checkpoint"),
        (json.dumps({"weight_map": {first: "../model.safetensors"}}), "which is not a file in its folder"),
        (json.dumps({"weight_map": {first: "absent.safetensors"}}), "there is no checkpoint"),
        (json.dumps({"weight_map": whole | {"extra": whole[first]}}), "lists extra, which is not in model-0000"),
    ]:
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(index)
    index.unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(index)


def test_error_for_a_pickled_module_contains_the_lines_that_convert_it(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet(num_classes=7), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"would call .*CifarResNet") as refused:
        read_checkpoint(tmp_path / "whole.pth")
    lines = [line.strip() for line in str(refused.value).split("\n")[1:]]
    exec("\n".join(["import torch", *lines]), {})
    found = read_checkpoint(tmp_path / "whole_weights.pth")
    assert found.keys() == resnet(num_classes=7).state_dict().keys()


def test_one_file_of_a_sharded_checkpoint_leads_to_the_index(state: State, tmp_path: Path) -> None:
    index = sharded(state, tmp_path)
    first = next(tmp_path.glob("*-00001-of-0000*.safetensors"))
    with pytest.raises(CheckpointError, match=r"is one of several files of a checkpoint: pass .*index\.json"):
        read_checkpoint(first)
    index.unlink()
    read_checkpoint(first)
