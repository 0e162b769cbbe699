"""Concurrent writing, checking, and copying change no number, lose no row, and hide no error; options that speed up the
model (channels-last, torch.compile) are recorded."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.errors import BadInput, NotFinite, StaleCache
from ood_scores.extraction import forward
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.writers import AHEAD, BackgroundWriter
from ood_scores.features.finite import require_finite
from ood_scores.features.storage import cache as caches
from ood_scores.models.networks import cifar_resnet20
from ood_scores.models.running import prefers_channels_last
from ood_scores.transfers import Arriving, Transfers

GENERATOR = torch.Generator().manual_seed(0)
ROWS, BATCH = 72, 8
IMAGES = torch.randn(ROWS, 3, 6, 6, generator=GENERATOR)
LABELS = torch.randint(5, (ROWS,), generator=GENERATOR)


class Network(nn.Module):
    """A network that records the memory format of its inputs; its logits are the mean of ``heads`` linear maps."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3)
            self.heads = nn.ModuleList(nn.Linear(16, 5) for _ in range(heads))
        self.orders: set[tuple[bool, bool]] = set()

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            last = torch.channels_last
            self.orders.add((x.is_contiguous(memory_format=last), self.conv.weight.is_contiguous(memory_format=last)))
        logits = torch.stack([head(self.features(x)) for head in self.heads])
        return logits.mean(0) if len(self.heads) > 1 else logits[0]


def loader(images: Tensor = IMAGES, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images, LABELS), batch_size=BATCH, **options)


def extract(model: nn.Module, data: Any = None, *arguments: Any, **options: Any) -> ood_scores.FeatureSet:
    return ood_scores.extract(model, loader() if data is None else data, *arguments, progress=False, **options)


def state(path: Path) -> caches.CacheState:
    with caches.open_to_read(path) as h5:
        return caches.state(h5)


# --- the writer -------------------------------------------------------------------------------------------------------


class Sink:
    """A sink that stores batches once it is released, and fails at batch ``fails``."""

    def __init__(self, fails: int | None = None) -> None:
        self.rows, self.fails, self.let = 0, fails, threading.Event()
        self.batches: list[list[float]] = []
        self.threads: set[threading.Thread] = set()

    def append(self, rows: Mapping[str, Tensor], gaps: Sequence[int] = ()) -> None:
        assert self.let.wait(10)
        if len(self.batches) == self.fails:
            raise OSError("the disk is full")
        self.threads.add(threading.current_thread())
        self.batches.append(rows["features"].tolist())
        self.rows += len(rows["features"])


def batch(start: int, rows: int = 2) -> Arriving:
    return Arriving({"features": torch.arange(float(start), start + rows)})


def write(sink: Sink, batches: int, then: type[BaseException] | None = None) -> list[int]:
    """Write batches of two rows, then perhaps raise an error; return the reported counts."""
    counted: list[int] = []
    with BackgroundWriter(sink, 0, counted.append) as writer:
        for start in range(0, 2 * batches, 2):
            writer.put(start, batch(start))
        if then:
            raise then
    return counted


def test_batches_are_written_in_order_by_another_thread_and_counted() -> None:
    sink = Sink()
    sink.let.set()
    assert write(sink, 10) == [*range(2, 21, 2)]
    assert sink.batches == [[start, start + 1] for start in range(0, 20, 2)]
    assert threading.main_thread() not in sink.threads
    assert len(sink.threads) == 1


def test_the_number_of_waiting_batches_is_limited() -> None:
    sink, put = Sink(), []
    with BackgroundWriter(sink, 0, lambda rows: None) as writer:

        def fill() -> None:
            for start in range(0, 2 * (AHEAD + 4), 2):
                writer.put(start, batch(start))
                put.append(start)

        producer = threading.Thread(target=fill)
        producer.start()
        producer.join(0.3)
        assert producer.is_alive()
        assert len(put) == AHEAD + 1  # and the one that is being written
        sink.let.set()
        producer.join(10)
        assert not producer.is_alive()
    assert sink.rows == 2 * (AHEAD + 4)


def test_rows_that_the_sink_already_has_are_skipped() -> None:
    sink = Sink()
    sink.let.set()
    sink.rows = 3  # rows 10, 11 and 12 of the dataset
    with BackgroundWriter(sink, 10, lambda rows: None) as writer:
        writer.put(12, batch(12))
        writer.put(14, batch(14))
    assert sink.batches == [[13], [14, 15]]


def test_an_error_is_raised_and_later_batches_are_dropped() -> None:
    sink = Sink(fails=1)
    sink.let.set()
    with pytest.raises(OSError, match="the disk is full"):
        write(sink, 1000)
    assert sink.batches == [[0, 1]]
    with pytest.raises(OSError, match="the disk is full"):
        write(sink, 1)  # raised on leaving
    assert sink.batches == [[0, 1]]


@pytest.mark.parametrize(
    ("later", "wins"), [(RuntimeError, OSError), (NotFinite, OSError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_the_error_of_earlier_rows_is_raised(later: type[BaseException], wins: type[BaseException]) -> None:
    sink = Sink(fails=0)
    sink.let.set()
    with pytest.raises(wins):
        write(sink, 1, later)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_row_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    extras = torch.zeros(6, 2, 3, dtype=dtype)
    columns = {"features": torch.ones(6, 4, dtype=dtype), "labels": torch.arange(6), "extras/maps": extras}
    require_finite(columns, 40)
    extras[4, 1, 2] = extras[5] = value
    with pytest.raises(NotFinite, match="extras/maps hold NaN or infinite values, first in row 44"):
        require_finite(columns, 40)


# --- extraction with it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 17, 71])
def test_rows_before_one_that_is_not_finite_are_stored(row: int, tmp_path: Path) -> None:
    path, images = tmp_path / "feats.h5", IMAGES.clone()
    images[row] = torch.nan
    with pytest.raises(NotFinite, match=f"first in row {row}:"):
        extract(Network(), loader(images), path, name="data")
    if row == 0:
        assert not path.exists()
    else:
        assert (state(path).rows, state(path).finished) == (row // BATCH * BATCH, False)


class Failing(Network):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 6:
            raise RuntimeError("out of luck")
        return super().forward(x)


def test_batches_before_a_failure_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    with pytest.raises(BadInput, match=r"cannot take a batch of shape .*out of luck"):
        extract(Failing(), None, path)
    assert state(path).rows == 5 * BATCH
    assert extract(Network(), None, tmp_path / "whole.h5").features[: 5 * BATCH].equal(_rows(path, 5 * BATCH))
    assert not [thread for thread in threading.enumerate() if thread.name == "ood_scores writer"]


def _rows(path: Path, count: int) -> Tensor:
    with caches.open_to_read(path) as h5:
        return torch.from_numpy(h5["features"][:count])


def refilled(inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every batch in the same memory."""
    x, y = torch.empty(BATCH, *inputs.shape[1:]), torch.empty(BATCH, dtype=torch.int64)
    for start in range(0, ROWS, BATCH):
        x.copy_(inputs[start : start + BATCH])
        y.copy_(LABELS[start : start + BATCH])
        yield x, y


class OneBuffer(nn.Module):
    """A model that returns its logits in the same memory every time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(108, 5)
        self.buffer = torch.empty(BATCH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.buffer.copy_(self.fc(x))


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("model", [nn.Linear(108, 5), OneBuffer()], ids=["its features are its inputs", "one buffer"])
def test_memory_that_is_reused_while_rows_wait(
    model: nn.Module, to_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = IMAGES.flatten(1)
    slow = threading.Event()
    write = BackgroundWriter._write

    def late(self: BackgroundWriter, start: int, rows: Arriving, gaps: Collection[int]) -> None:
        slow.wait(0.01)
        write(self, start, rows, gaps)

    monkeypatch.setattr(BackgroundWriter, "_write", late)
    feats = extract(model, refilled(inputs), tmp_path / "feats.h5" if to_disk else None)
    assert feats.features.equal(inputs)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)
    linear = model if isinstance(model, nn.Linear) else model.fc
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, linear(inputs))


def test_copies_to_the_host_have_the_requested_type() -> None:
    values, labels = torch.randn(4, 3), torch.arange(4)
    transfers = Transfers(torch.device("cpu"))
    rows = transfers.to_host(transfers.own_copies({"a": (values, torch.float32), "labels": (labels, torch.int64)}))
    kept = values.clone()
    values.zero_()
    labels.zero_()
    assert rows.wait()["a"].equal(kept)
    assert rows.wait()["labels"].tolist() == [0, 1, 2, 3]
    assert transfers.own_copies({"a": (kept, torch.float16)})["a"].equal(kept.half())


class Limited(Network):
    """A network for which the memory does not suffice with more than three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_batches_that_do_not_fit_into_memory_are_halved_and_one_warning_says_so() -> None:
    model = Limited()
    with pytest.warns(UserWarning, match="does not suffice for a batch of 8 rows") as caught:
        feats = extract(model)
    assert len(caught) == 1
    assert model.sizes == [8, 4] + [2] * (ROWS // 2)
    expected = extract(Network())
    torch.testing.assert_close(feats.features, expected.features)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)


# --- channels-last ----------------------------------------------------------------------------------------------------


def test_channels_last_is_used_recorded_and_restored() -> None:
    model = Network()
    before, place = model.conv.weight.detach().clone(), model.conv.weight.data_ptr()
    plain, feats = extract(Network()), extract(model, channels_last=True, device="cpu")
    assert model.orders == {(True, True)}
    assert model.conv.weight.is_contiguous()
    assert model.conv.weight.data_ptr() == place
    assert model.conv.weight.equal(before)
    assert feats.provenance is not None
    assert feats.provenance.precision == "model float32, autocast off, channels last, stored float32"
    torch.testing.assert_close(feats.features, plain.features)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)


def test_channels_last_is_restored_after_an_error() -> None:
    model = Failing()
    with pytest.raises(BadInput, match=r"cannot take a batch of shape .*out of luck"):
        extract(model, channels_last=True)
    assert model.conv.weight.is_contiguous()
    model.conv.weight.sum().backward()
    assert model.conv.weight.grad is not None


def test_channels_last_weights_stay_channels_last() -> None:
    model = Network().to(memory_format=torch.channels_last)
    extract(model, channels_last=True)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_requires_images() -> None:
    with pytest.raises(BadInput, match=r"channels_last requires inputs \[batch, channels, height, width\], got 2-D"):
        extract(nn.Linear(3, 5), [torch.zeros(4, 3)], channels_last=True)


class Viewing(nn.Module):
    """A convolutional network that views a map as vectors, which channels-last maps cannot be."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
            self.fc = nn.Linear(32, 5)
        self.accepted: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.convs(x).view(len(x), -1)
        self.accepted.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.fc(features)


class Reshaping(Viewing):
    def forward(self, x: Tensor) -> Tensor:
        self.accepted.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.fc(self.convs(x).flatten(1))


@pytest.fixture
def channels_last_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU prefer the format as a GPU does."""
    rule = forward.prefers_channels_last
    monkeypatch.setattr(forward, "prefers_channels_last", lambda model, _: rule(model, torch.device("cuda")))


def test_convolutional_models_prefer_channels_last_on_a_gpu_alone() -> None:
    models = {"convolutional": timm.create_model("cifar_resnet20"), "one": Network(), "none": nn.Linear(2, 3)}
    models["transformer"] = timm.create_model("vit_tiny_patch16_224", depth=1)
    preferring = {name for name, model in models.items() if prefers_channels_last(model, torch.device("cuda", 1))}
    assert preferring == {"convolutional"}
    assert not prefers_channels_last(models["convolutional"], torch.device("cpu"))


@pytest.mark.usefixtures("channels_last_pays")
@pytest.mark.parametrize("kind", [Reshaping, Viewing])
@pytest.mark.parametrize("options", [{}, {"layers": ["convs.0"], "probes": ["odin", "gradnorm"]}])
def test_channels_last_is_the_default_where_the_model_accepts_it(kind: type[Viewing], options: dict[str, Any]) -> None:
    model = kind()
    before = [weight.data_ptr() for weight in model.parameters()]
    options = options | {"device": "cpu"}
    feats, plain = extract(model, **options), extract(kind(), channels_last=False, **options)
    assert set(model.accepted) == {kind is Reshaping}
    assert [weight.data_ptr() for weight in model.parameters()] == before
    torch.testing.assert_close(feats.features, plain.features)
    for name, values in plain.extras.items():
        torch.testing.assert_close(feats.extras[name], values, atol=1e-5, rtol=1e-4)
    model.fc(model.convs(IMAGES).flatten(1)).sum().backward()


@pytest.mark.usefixtures("channels_last_pays")
def test_a_model_that_refuses_channels_last_is_asked_once() -> None:
    model = Viewing()
    run, seen = forward.Forward(model), []
    model.convs[0].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(2):
        with run.ready():
            run(IMAGES)
    assert (seen, model.accepted) == ([True, False, False], [False, False])
    with pytest.raises(BadInput, match="cannot take a batch"):
        extract(Viewing(), channels_last=True)


@pytest.mark.usefixtures("channels_last_pays")
def test_one_batch_does_not_change_the_format_of_a_model() -> None:
    model = Reshaping()
    run = forward.Forward(model)
    run.feature_set(IMAGES)
    assert model.accepted == [False]
    run.feature_set(IMAGES.contiguous(memory_format=torch.channels_last))
    assert model.accepted == [False, True]


@pytest.mark.usefixtures("channels_last_pays")
def test_a_format_chosen_for_the_device_is_not_part_of_the_identity_of_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.h5"
    feats = extract(Reshaping(), None, path)
    assert feats.provenance is not None
    assert feats.provenance.channels_last is None
    assert ExtractionOptions.of(feats.provenance).channels_last is None
    for same in (None, False):
        extract(reopened := Reshaping(), None, path, channels_last=same)
        assert reopened.accepted == []
    with pytest.raises(StaleCache, match="now model float32, autocast off, channels last, stored float32"):
        extract(Reshaping(), None, path, channels_last=True)


@pytest.mark.gpu
def test_channels_last_is_the_default_of_convolutional_models_on_a_gpu() -> None:
    for kind in (Reshaping, Viewing):
        feats, plain = extract(model := kind(), device="cuda"), extract(kind(), device="cpu")
        assert set(model.accepted) == {kind is Reshaping}
        torch.testing.assert_close(feats.features, plain.features, atol=1e-3, rtol=1e-3)  # TF32


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run compiled code without code generation: the same bits, and no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.usefixtures("eager_backend")
def test_compiled_models_have_the_same_features_and_logits(heads: int) -> None:
    data = DataLoader(loader().dataset, batch_size=20)  # the last batch has 12
    model = Network(heads)
    plain, feats = extract(Network(heads), data), extract(model, data, compile=True)
    assert feats.features.equal(plain.features)
    assert feats.logits is not None
    assert feats.logits.equal(plain.logits)  # type: ignore[arg-type]
    assert feats.provenance is not None
    assert feats.provenance.precision == "model float32, autocast off, compiled, stored float32"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert extract(model, data, compile=True).features.equal(plain.features)


@pytest.mark.usefixtures("eager_backend")
def test_models_that_were_already_compiled() -> None:
    model, plain = Network().eval(), extract(Network())
    compiled: Any = torch.compile(model)
    with torch.inference_mode(), torch.no_grad():
        compiled(IMAGES[:BATCH])  # compiled code without the hooks
    assert extract(model, compile=True).features.equal(plain.features)
    assert extract(compiled, compile=True).features.equal(plain.features)
    same = extract(compiled)
    assert same.features.equal(plain.features)
    assert same.provenance is not None
    assert same.provenance.differences(plain.provenance) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"layers": ["conv"]}, {"probes": ["odin"]}])
def test_compile_cannot_be_combined_with_layers_or_probes(option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="compile=True cannot be combined with layers or probes"):
        extract(Network(), compile=True, **option)


def test_caches_with_different_precision_are_distinguished(tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    extract(Network(), None, path)
    with pytest.raises(StaleCache, match=r"autocast off, stored float32, now .*, channels last, compiled, stored"):
        extract(Network(), None, path, channels_last=True, compile=True)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def note(model: nn.Module, data: Any, cache: Path, **options: Any) -> ood_scores.FeatureSet:
        given.update(options)
        return ood_scores.FeatureSet(np.zeros((2, 3), np.float32))

    monkeypatch.setattr(ood_scores, "extract", note)
    weights = tmp_path / "weights.safetensors"
    save_file(cifar_resnet20(num_classes=10).state_dict(), weights)
    words = ["extract", "cifar_resnet20", "digits", str(tmp_path / "c.h5"), "--checkpoint", str(weights)]
    given_as = {
        "--channels-last --compile": {"channels_last": True, "compile": True},
        "--no-channels-last": {"channels_last": False},
    }
    for flags, expected in ([], {}), *((text.split(), options) for text, options in given_as.items()):
        given.clear()
        result = CliRunner().invoke(app, [*words, *flags])
        assert result.exit_code == 0, result.output
        assert {key: given[key] for key in given if key in vars(ExtractionOptions())} == expected


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["pageable", "pinned", "on the device"])
@pytest.mark.parametrize("to_disk", [True, False])
def test_overlapping_copies_do_not_change_a_bit(where: str, to_disk: bool, tmp_path: Path) -> None:
    """Large batches of different sizes: missing synchronization of copies with the model would mix rows."""
    torch.manual_seed(0)
    sizes = [512, 64, 512, 1, 300] * 6
    images = [torch.randn(size, 3, 64, 64) for size in sizes]
    labels = [torch.randint(5, (size,)) for size in sizes]
    model = Network().cuda()
    expected = []
    with torch.inference_mode(), torch.no_grad():
        expected = [model.features(x.cuda()).cpu() for x in images]
        logits = [model(x.cuda()).cpu() for x in images]
    place = {"pageable": lambda x: x, "pinned": Tensor.pin_memory, "on the device": Tensor.cuda}[where]
    batches = [(place(x), place(y)) for x, y in zip(images, labels, strict=True)]
    for _ in range(3):
        feats = extract(model, batches, tmp_path / "feats.h5" if to_disk else None, overwrite=to_disk)
        assert feats.features.equal(torch.cat(expected))
        assert feats.logits is not None
        assert feats.logits.equal(torch.cat(logits))
        assert feats.labels is not None
        assert feats.labels.equal(torch.cat(labels))


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device() -> None:
    values = torch.randn(4096, 4096, device="cuda")
    transfers = Transfers(values.device)
    for _ in range(50):
        values = (values @ values).clamp(-1, 1)
    rows = transfers.to_host(transfers.own_copies({"a": (values, torch.float16)}))
    assert rows.arrived is not None
    assert not rows.arrived.query()
    assert rows.columns["a"].is_pinned()
    assert rows.wait()["a"].equal(values.half().cpu())
