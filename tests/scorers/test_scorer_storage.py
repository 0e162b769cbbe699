"""Saved scorers are loaded bit for bit, or an error explains why not."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import FeatureSet, Head, Scorer, atomic, create_scorer, evaluate, load_scorer, register_scorer
from ood_scores.errors import (
    BadInput,
    CacheWriteFailed,
    DamagedCache,
    ForeignFile,
    NotFitted,
    OtherModel,
    ShapeMismatch,
    UnknownName,
)
from ood_scores.features import Block
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.scorers import storage


def problem(rows: int, seed: int) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    means = 1.5 + 3 * torch.eye(4, 8)
    features = (means[labels] + torch.randn(rows, 8, generator=generator)).relu()
    head = Head(means - means.mean(dim=1, keepdim=True), torch.full((4,), 0.1))
    return FeatureSet(features, head(features), labels, head)


TRAIN, ID, OOD = problem(120, 0), problem(50, 1), problem(50, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scorer.safetensors"


def saved(scorer: Scorer, path: Path) -> Scorer:
    scorer.save(path)
    return load_scorer(path)


def description(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as stored:
        assert set(stored.metadata()) <= {"scorer", "sha256"}
        return json.loads(stored.metadata()["scorer"])


def rewrite(path: Path, **changes: Any) -> None:
    """Change the description of the scorer, or of the format, in a file, which becomes one without a checksum."""
    tensors, described = safetensors.torch.load_file(path), description(path) | {"version": 1}
    for name, value in changes.items():
        where = described if name in described else described["scorer"]
        where[name] = value
    safetensors.torch.save_file(tensors, path, {"scorer": json.dumps(described)})


# --- saving and loading -----------------------------------------------------------------------------------------------

COMPOSED: dict[str, Callable[[], Scorer]] = {
    "two shapers": lambda: create_scorer("react", base=create_scorer("ash_s", base="vim")),
    "a fitted base with parameters": lambda: create_scorer("react", q=0.8, base=create_scorer("knn", k=3)),
    "a sparse head around a bank": lambda: create_scorer("dice", base=create_scorer("nnguide", k=2)),
    "a shaper that is not fitted": lambda: create_scorer("scale", base=create_scorer("energy", temperature=2.0)),
    "a tree of three": lambda: create_scorer("vra", base=create_scorer("react", base=create_scorer("dice"))),
}


@pytest.mark.parametrize("make", COMPOSED.values(), ids=COMPOSED)
def test_composed_scorers_are_loaded(make: Callable[[], Scorer], path: Path) -> None:
    scorer = make().fit(TRAIN)
    again = saved(scorer, path)
    assert again == scorer
    assert repr(again) == repr(scorer)
    assert torch.equal(again.score(ID), scorer.score(ID))
    assert torch.equal(again.fit(ID).score(OOD), make().fit(ID).score(OOD))


def test_tensors_of_inner_scorers_are_named_by_their_path(path: Path) -> None:
    create_scorer("react", base=create_scorer("ash_s", base="vim")).fit(TRAIN).save(path)
    tensors = safetensors.torch.load_file(path)
    assert sorted(tensors) == ["base.base.origin_", "base.base.residual_space_"]
    described = description(path)["scorer"]
    assert described["name"] == "react"
    assert described["parameters"]["base"]["scorer"]["parameters"] == {"percentile": 0.9, "base": "vim"}
    assert described["state"]["base"]["scorer"]["state"]["base"]["scorer"]["name"] == "vim"
    assert described["fitted_widths"] == {"features": 8, "logits": 4}


def test_the_given_base_and_the_refitted_base_are_saved_separately(path: Path) -> None:
    inner = create_scorer("mahalanobis").fit(ID)
    scorer = create_scorer("react", base=inner).fit(TRAIN)
    again: Any = saved(scorer, path)
    assert torch.equal(again.score(OOD), scorer.score(OOD))
    assert torch.equal(again.base.score(OOD), inner.score(OOD))
    assert not torch.equal(again.base.score(OOD), again.score(OOD))


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "HNSW8", "PCA4,Flat"])
def test_loaded_indexes_find_the_same_neighbors(index: str, path: Path) -> None:
    scorer = create_scorer("knn", k=2, index=index).fit(TRAIN)
    assert torch.equal(saved(scorer, path).score(ID), scorer.score(ID))
    assert ("index" in safetensors.torch.load_file(path)) == (index != "Flat")


def test_the_provenance_of_the_fit_set_is_saved(path: Path) -> None:
    train = extracted(0)
    scorer = saved(create_scorer("mahalanobis").fit(train), path)
    assert train.provenance is not None
    assert description(path)["scorer"]["fitted_on"]["weights_sha256"] == train.provenance.weights_sha256
    assert scorer.fitted_on == train.provenance
    assert saved(create_scorer("mahalanobis").fit(TRAIN), path).fitted_on is None


def test_load_scorer_and_scorer_load_are_equivalent(path: Path) -> None:
    create_scorer("energy", temperature=2.0).save(str(path))
    for loaded in (load_scorer(str(path)), Scorer.load(path)):
        assert loaded == create_scorer("energy", temperature=2.0)
        assert type(loaded) is type(create_scorer("energy"))


def test_a_fusion_opens_in_a_process_that_imports_the_scorers_only(path: Path) -> None:
    create_scorer("fusion", scorers=["energy", "knn"]).fit(TRAIN).save(path)
    code = f"from ood_scores.scorers import Scorer; print(Scorer.load({str(path)!r}).name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fusion"


def test_a_loaded_scorer_outlives_its_file(path: Path) -> None:
    scorer = create_scorer("mahalanobis").fit(TRAIN)
    again = saved(scorer, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(again.score(ID), scorer.score(ID))


# --- values that a scorer may hold ------------------------------------------------------------------------------------


@dataclass
class Holder(Scorer):
    """A scorer that stores given values and scores with the tensor ``matrix_``, if that is one of them."""

    setting: Any = None
    contents: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    needs = ("features",)
    fit_needs = ("features",)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        for name, value in self.contents.items():
            setattr(self, name, value)
        self.contents = {}

    def statistics(self) -> Sequence[Statistic]:
        return ()

    def score_block(self, block: Block) -> Tensor:
        matrix: Tensor = vars(self).get("matrix_", torch.ones(8, 1, dtype=torch.float64))
        return (block.features.double() @ matrix).sum(dim=1)


@pytest.fixture
def holder(registered_scorers: dict[str, type[Scorer]]) -> Iterator[Callable[..., Scorer]]:
    """A function that creates a registered scorer with given values."""
    register_scorer("holder")(Holder)
    yield lambda setting=None, **contents: Holder(setting, contents).fit(TRAIN)
    Holder.name = "Holder"


NUMBERS = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.pi * 1e-200, math.inf, -math.inf, math.nan]


def bits(values: Sequence[float]) -> list[str]:
    return [value.hex() for value in values]


def test_floats_are_saved_exactly(holder: Callable[..., Scorer], path: Path) -> None:
    again: Any = saved(holder(setting=NUMBERS, numbers_=tuple(NUMBERS), one_=1 / 3), path)
    assert bits(again.setting) == bits(NUMBERS)
    assert bits(again.numbers_) == bits(NUMBERS)
    assert again.one_.hex() == (1 / 3).hex()
    json.loads(json.dumps(description(path)), parse_constant=pytest.fail)  # strict JSON: no bare NaN or Infinity


def test_all_kinds_of_values_are_saved(holder: Callable[..., Scorer], path: Path) -> None:
    kept = {
        "nothing_": None,
        "flag_": True,
        "count_": 2**60,
        "text_": "α 'quoted' \"twice\"",
        "nested_": [1, (2, [3.5, None]), {"a": (1,), 3: "b", (0, 1): []}],
    }
    again = saved(holder(setting={"list": [1, 2], "tuple": (1, 2)}, **kept), path)
    assert {name: vars(again)[name] for name in kept} == kept
    assert vars(again)["setting"] == {"list": [1, 2], "tuple": (1, 2)}
    assert [type(vars(again)[name]) for name in kept] == [type(value) for value in kept.values()]


def test_numpy_values_are_saved(holder: Callable[..., Scorer], path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    again = vars(saved(holder(array_=array, number_=np.float64(1 / 3), count_=np.int64(7)), path))
    np.testing.assert_array_equal(again["array_"], array)
    assert again["array_"].dtype == np.float32
    assert (again["number_"], again["count_"]) == (1 / 3, 7)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_all_types_and_shapes_are_saved(
    dtype: torch.dtype, holder: Callable[..., Scorer], path: Path
) -> None:
    shapes = {"scalar_": (), "empty_": (0, 3), "also_empty_": (0,), "row_": (1, 5), "cube_": (2, 3, 4)}
    kept = {name: (torch.randn(shape) * 3).to(dtype) for name, shape in shapes.items()}
    again = vars(saved(holder(**kept), path))
    for name, tensor in kept.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor)


def test_tensors_that_share_memory_or_are_strided_are_saved(holder: Callable[..., Scorer], path: Path) -> None:
    whole = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    kept = {
        "whole_": whole,
        "same_": whole,
        "row_": whole[1],
        "column_": whole[:, 2],
        "transposed_": whole.T,
        "strided_": whole[::2, 1::3],
        "expanded_": whole[:, :1].expand(4, 5),
        "parameter_": nn.Parameter(whole[2:]),
    }
    again = vars(saved(holder(**kept), path))
    for name, tensor in kept.items():
        assert torch.equal(again[name], tensor), name
        assert not again[name].requires_grad
    again["whole_"].zero_()
    assert torch.equal(again["same_"], torch.arange(24.0, dtype=torch.float64).reshape(4, 6))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_the_memory_order_of_dimensions_is_saved(
    order: tuple[int, int, int], holder: Callable[..., Scorer], path: Path
) -> None:
    """Products with a transposed matrix may round differently."""
    tensor = torch.randn(2, 3, 4).permute(order)
    again = vars(saved(holder(tensor_=tensor), path))["tensor_"]
    assert torch.equal(again, tensor)
    assert again.stride() == tensor.stride()


def test_scores_with_a_transposed_matrix_are_bit_identical(holder: Callable[..., Scorer], path: Path) -> None:
    scorer = holder(matrix_=torch.randn(37, 8, dtype=torch.float64).T)
    assert torch.equal(saved(scorer, path).score(ID), scorer.score(ID))


def test_heads_are_saved(holder: Callable[..., Scorer], path: Path) -> None:
    head = Head(torch.randn(3, 5).T, torch.randn(5))
    again = vars(saved(holder(head_=head), path))["head_"]
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)


def test_scorers_in_lists_are_saved(holder: Callable[..., Scorer], path: Path) -> None:
    members = [create_scorer("mahalanobis").fit(TRAIN), create_scorer("knn", k=3), create_scorer("energy")]
    again = vars(saved(holder(setting=members), path))["setting"]
    assert again == members
    assert [member.is_fitted for member in again] == [True, False, True]
    assert torch.equal(again[0].score(ID), members[0].score(ID))


def test_values_that_cannot_be_saved_are_refused(holder: Callable[..., Scorer], path: Path) -> None:
    with pytest.raises(BadInput, match=r"secret_ is a object, which cannot be saved: use numbers, strings, tensors"):
        holder(secret_=object()).save(path)
    with pytest.raises(BadInput, match=r"nested_\.1 is a function"):
        holder(nested_=[1, lambda: None]).save(path)
    assert not path.exists()


def test_private_attributes_are_not_saved(holder: Callable[..., Scorer], path: Path) -> None:
    again = vars(saved(holder(_hidden_=object(), cache=object(), kept_=1), path))
    assert again["kept_"] == 1
    assert not {"_hidden_", "cache"} & again.keys()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unfitted_scorer_cannot_be_saved(path: Path) -> None:
    with pytest.raises(NotFitted, match=r"'vim' cannot be saved before it is fitted: call \.fit\(train_feats\)"):
        create_scorer("vim").save(path)
    with pytest.raises(NotFitted, match="'react' cannot be saved before"):
        create_scorer("react").save(path)
    assert not path.exists()


def test_an_unregistered_scorer_cannot_be_saved(path: Path) -> None:
    scorer = Holder(contents={"one_": 1}).fit(TRAIN)
    with pytest.raises(BadInput, match=r'Holder is not registered.* put @register_scorer\("a_name"\) before the class'):
        scorer.save(path)

    class Derived(type(create_scorer("energy"))):  # type: ignore[misc]
        pass

    with pytest.raises(BadInput, match="Derived is not registered"):
        Derived().save(path)


def test_an_unregistered_scorer_cannot_be_loaded(
    holder: Callable[..., Scorer], registered_scorers: dict[str, type[Scorer]], path: Path
) -> None:
    holder(one_=1).save(path)
    del registered_scorers["holder"]
    with pytest.raises(UnknownName, match="'holder', which is not registered: import the module that registers it"):
        load_scorer(path)


def test_a_removed_parameter_is_named(path: Path) -> None:
    create_scorer("energy").save(path)
    rewrite(path, parameters={"temperature": 1.0, "color": "red"})
    with pytest.raises(UnknownName, match="scorer 'energy' has no parameter 'color': choose from temperature"):
        load_scorer(path)


def test_a_newer_format_is_refused(path: Path) -> None:
    create_scorer("energy").save(path)
    rewrite(path, version=storage.VERSION + 1)
    with pytest.raises(ForeignFile, match=r"has scorer format 3, .* reads formats up to 2: update"):
        load_scorer(path)


def test_a_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_scorer(path)


def _text(path: Path) -> None:
    path.write_text("notes")


def _weights(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"format": "pt"})


def _mentions_us(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"card": "not an ood_scores scorer"})


@pytest.mark.parametrize("make", [_text, _weights, Path.touch, Path.mkdir])
def test_foreign_files_are_refused_and_not_changed(make: Callable[[Path], None], path: Path) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ForeignFile, match="is not a scorer that ood_scores saved"):
        load_scorer(path)
    with pytest.raises(ForeignFile, match="not overwritten: choose another path, or delete it yourself"):
        create_scorer("energy").save(path)
    assert path.is_dir() if before is None else path.read_bytes() == before


def test_a_file_that_only_mentions_the_package_is_refused(path: Path) -> None:
    _mentions_us(path)
    with pytest.raises(ForeignFile, match="is not a scorer that ood_scores saved"):
        load_scorer(path)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 0.9999])
def test_truncated_files_are_refused_and_can_be_replaced(kept: float, path: Path) -> None:
    scorer = create_scorer("mahalanobis").fit(TRAIN)
    scorer.save(path)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(DamagedCache, match=r"truncated or damaged .* fit the scorer again and save it"):
        load_scorer(path)
    assert torch.equal(saved(scorer, path).score(ID), scorer.score(ID))


def test_a_missing_tensor_is_named(path: Path) -> None:
    create_scorer("mahalanobis").fit(TRAIN).save(path)
    tensors = safetensors.torch.load_file(path)
    del tensors["means_"]
    safetensors.torch.save_file(tensors, path, {"scorer": json.dumps(description(path) | {"version": 1})})
    with pytest.raises(DamagedCache, match="does not contain tensor means_"):
        load_scorer(path)


def test_the_file_holds_no_pickles(path: Path) -> None:
    create_scorer("knn", k=2, index="IVF4,Flat").fit(TRAIN).save(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert set(header) == {"__metadata__", "bank_", "index"}
    assert json.loads(header["__metadata__"]["scorer"])["format"] == "ood_scores scorer"


# --- changed and hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["energy", "mahalanobis", "react"])
def test_every_changed_byte_is_noticed(name: str, path: Path) -> None:
    create_scorer(name).fit(TRAIN).save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = np.unique(
        np.concatenate([np.linspace(0, header - 1, 60), np.linspace(0, len(content) - 1, 20)]).astype(int)
    )
    for number, place in enumerate(places.tolist()):
        changed = bytearray(content)
        changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        with pytest.raises((DamagedCache, ForeignFile)):
            load_scorer(path)


def test_every_digit_of_the_checksum_counts(path: Path) -> None:
    create_scorer("mahalanobis").fit(TRAIN).save(path)
    content = path.read_bytes()
    place = storage.CHECKSUM.search(content)
    assert place is not None
    for position in range(place.start() - 1, place.end() + 1):
        for flip in (1, 8):
            changed = bytearray(content)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(DamagedCache):
                load_scorer(path)


def test_a_changed_tensor_is_named_as_damage(path: Path) -> None:
    create_scorer("mahalanobis").fit(TRAIN).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DamagedCache, match=r"\(its content differs from its checksum\): fit the scorer again and save it"
    ):
        load_scorer(path)


def test_a_file_of_an_earlier_version_has_no_checksum(path: Path) -> None:
    scorer = create_scorer("mahalanobis").fit(TRAIN)
    scorer.save(path)
    rewrite(path, version=1)
    assert torch.equal(load_scorer(path).score(ID), scorer.score(ID))
    rewrite(path, version=2)
    with pytest.raises(DamagedCache, match="its checksum is missing"):
        load_scorer(path)


FORGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a state that is no attribute": ("energy", {"state": {"score_block": 1}}, "'score_block' is no fitted attribute"),
    "a private state": ("vim", {"state": {"__class__": 1}}, "'__class__' is no fitted attribute"),
    "a number for a tensor": ("mahalanobis", {"state": {"means_": 3}}, "means_ must be .*Tensor.*, got int"),
    "a text for a number": ("react", {"parameters": {"q": "0.9"}}, "q must be .*float.*, got str"),
    "a number for a text": ("feature_norm", {"parameters": {"space": 1}}, "space must be .*str.*, got int"),
    "a parameter out of range": ("energy", {"parameters": {"temperature": -1.0}}, "temperature must be positive"),
    "a k beyond the bank": ("knn", {"parameters": {"k": 10**9}}, "k=1000000000 exceeds the 120 rows of the bank"),
    "an index to train": ("knn", {"parameters": {"index": "IVF9999999,Flat"}}, "'index'"),
    "bins that are not stored": ("weiper", {"parameters": {"bins": 10**12}}, "bins=1000000000000, but 100 are stored"),
    "a wide average": ("weiper", {"parameters": {"smoothing": 10**12}}, "smoothing must be at most 100 times bins"),
    "widths that no tensor has": (
        "mahalanobis",
        {"fitted_widths": {"features": 10}},
        "must match|cannot be multiplied",
    ),
    "widths that are no numbers": ("mahalanobis", {"fitted_widths": {"features": "8"}}, "its widths are"),
    "a list for widths": ("mahalanobis", {"fitted_widths": [1, 2]}, "cannot convert dictionary"),
}


@pytest.mark.parametrize(("name", "changes", "message"), FORGED.values(), ids=FORGED)
def test_forged_values_are_refused(name: str, changes: dict[str, Any], message: str, path: Path) -> None:
    create_scorer(name, **({"k": 3} if name == "knn" else {})).fit(TRAIN).save(path)
    described = description(path)["scorer"]
    rewrite(
        path,
        **{key: {**described[key], **value} if isinstance(value, dict) else value for key, value in changes.items()},
    )
    with pytest.raises(DamagedCache, match=f"truncated or damaged .*{message}"):
        load_scorer(path)


def test_tensors_that_do_not_fit_together_are_refused(path: Path) -> None:
    create_scorer("vra").fit(TRAIN).save(path)
    tensors, described = safetensors.torch.load_file(path), description(path) | {"version": 1}
    tensors["low_"] = tensors["low_"][:-1].clone()
    safetensors.torch.save_file(tensors, path, {"scorer": json.dumps(described)})
    with pytest.raises(DamagedCache, match=r"size of tensor .* must match"):
        load_scorer(path)


def test_an_index_that_declares_more_than_it_holds_is_refused(path: Path) -> None:
    """Eight bytes that are a length would have faiss allocate 2^38 values."""
    create_scorer("knn", k=2, index="IVF4,Flat").fit(TRAIN).save(path)
    tensors, described = safetensors.torch.load_file(path), description(path) | {"version": 1}
    index = tensors["index"].clone()
    places, accepted = range(40, len(index) - 8, 97), 0  # among them the lengths of vectors
    for place in places:
        index[place : place + 8] = torch.tensor([0, 0, 0, 0, 64, 0, 0, 0])
        safetensors.torch.save_file(tensors | {"index": index}, path, {"scorer": json.dumps(described)})
        with suppress(DamagedCache):
            load_scorer(path)
            accepted += 1
        index = tensors["index"].clone()
    assert accepted < len(places)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_no_temporary_file_remains_and_permissions_are_the_usual_ones(path: Path) -> None:
    create_scorer("energy").save(path)
    create_scorer("msp").save(path)
    (path.parent / "plain").touch()
    assert sorted(file.name for file in path.parent.iterdir()) == ["plain", path.name]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path.parent / "plain").stat().st_mode)
    assert load_scorer(path) == create_scorer("msp")


def test_the_folder_is_created(tmp_path: Path) -> None:
    create_scorer("energy").save(tmp_path / "a" / "b" / "energy.safetensors")
    assert load_scorer(tmp_path / "a" / "b" / "energy.safetensors") == create_scorer("energy")


@pytest.mark.parametrize("refused", ["write", "replace"])
def test_a_failed_write_keeps_the_old_file(refused: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_scorer("energy").save(path)
    before = path.read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            atomic.LockedFile if refused == "write" else os, "check" if refused == "write" else "replace", refuse
        )
        with pytest.raises(CacheWriteFailed, match=r"No space left on device.*choose another path"):
            create_scorer("msp").save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_full_disk_keeps_the_old_file(path: Path) -> None:
    """The system itself refuses the write, because the size of files is limited."""
    create_scorer("energy").save(path)
    before = path.read_bytes()
    code = f"""
        import resource, torch, ood_scores
        from ood_scores.errors import CacheWriteFailed
        feats = ood_scores.FeatureSet(torch.randn(500, 20))
        scorer = ood_scores.create_scorer("knn").fit(feats)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            scorer.save({str(path)!r})
        except CacheWriteFailed as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert f"could not write {path}" in done.stdout
    assert "File too large" in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_process_killed_while_writing_keeps_the_old_file(path: Path) -> None:
    create_scorer("energy").save(path)
    before = path.read_bytes()
    code = f"""
        import os, signal, ood_scores
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        ood_scores.create_scorer("msp").save({str(path)!r})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
    create_scorer("msp").save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# --- other models -----------------------------------------------------------------------------------------------------


class Classifier(nn.Sequential):
    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def extracted(seed: int, rows: int = 40) -> FeatureSet:
    """The feature set of some data by the classifier of a seed."""
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    data = TensorDataset(inputs, torch.arange(rows) % 3)
    return ood_scores.extract(Classifier(seed), DataLoader(data, batch_size=16), progress=False)


MESSAGE = "comes from Classifier with weights {}…, .*from Classifier with weights {}….*from the same model"


def message(one: FeatureSet, other: FeatureSet) -> str:
    assert one.provenance is not None
    assert other.provenance is not None
    return MESSAGE.format(one.provenance.weights_sha256[:12], other.provenance.weights_sha256[:12])


@pytest.mark.parametrize("name", ["mahalanobis", "vim", "react"])
def test_features_of_another_model_of_the_same_shape_are_refused(name: str, path: Path) -> None:
    here, there = extracted(0), extracted(1)
    scorer = create_scorer(name).fit(here)
    for refusing in (scorer, saved(scorer, path)):
        with pytest.raises(OtherModel, match=f"this set {message(there, here)}") as refusal:
            refusing.score(there)
        assert f"the set that '{name}' was fitted on" in str(refusal.value)
        assert refusing.score(extracted(0, rows=30)).shape == (30,)


def test_a_refit_replaces_the_model() -> None:
    scorer = create_scorer("mahalanobis").fit(extracted(0)).fit(extracted(1))
    assert scorer.score(extracted(1)).shape == (40,)
    with pytest.raises(OtherModel):
        scorer.score(extracted(0))


def test_sets_without_provenance_are_accepted() -> None:
    known = extracted(0)
    unknown = FeatureSet(known.features, known.logits, known.labels, known.head)
    for fit, feats in ((known, unknown), (unknown, known), (unknown, unknown)):
        assert create_scorer("mahalanobis").fit(fit).score(feats).shape == (40,)


def test_a_scorer_without_a_fit_accepts_any_model() -> None:
    scorer = create_scorer("energy").fit(extracted(0))
    assert scorer.score(extracted(1)).shape == (40,)


def test_different_widths_are_reported_first() -> None:
    scorer = create_scorer("mahalanobis").fit(extracted(0))
    narrow = extracted(1)
    with pytest.raises(ShapeMismatch, match="features of width 8, but this set has width 7"):
        scorer.score(FeatureSet(narrow.features[:, :7], provenance=narrow.provenance))


def test_evaluate_accepts_sets_of_one_model_only() -> None:
    here, there = extracted(0), extracted(1)
    with pytest.raises(OtherModel, match=f"the OoD set 'far' {message(there, here)}"):
        evaluate(["energy"], id=here, ood={"near": extracted(0, 30), "far": there})
    with pytest.raises(OtherModel, match=f"the fit set {message(there, here)}"):
        evaluate(["mahalanobis"], id=here, ood={"near": extracted(0, 30)}, fit=there)
    fitted = create_scorer("mahalanobis").fit(there)
    with pytest.raises(OtherModel, match=f"this set {message(here, there)}"):
        evaluate([fitted], id=here, ood={"near": extracted(0, 30)})
    assert len(evaluate(["mahalanobis"], id=here, ood={"near": extracted(0, 30)}, fit=extracted(0, 60))) == 1
