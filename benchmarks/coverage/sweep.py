"""Run ``extract`` on every architecture of timm with random weights, and write the outcomes.

    python -m benchmarks.coverage.sweep --out benchmarks/coverage/results.csv --summary benchmarks/coverage/README.md

Architectures in the table are not run again, so an interrupted sweep continues where it stopped. Those without classes
come first, then one of each family, then the others.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from ood_scores.errors import HeadNotFound

EXACT, ENCODER, REFUSED, FAILED, TOO_LARGE = "exact", "encoder", "refused", "failed", "too large"
OUTCOMES = (EXACT, ENCODER, REFUSED, FAILED, TOO_LARGE)
FEWER_BLOCKS = ({"depth": 2}, {"depths": (1, 1, 2, 1)})
"""Arguments for architectures that are too large: their blocks are alike, so that few of them show what all do."""
BATCH = 2
GIVEN_CLASSES = 10
TOLERANCE = 1e-4
NOTES = """\
- VOLO adds half the maximum over its patches' logits to those of the class token, so no one map gives the sum.
- `resnet*_clip`: attention pooling applies its last linear layer to every position and then takes one.
- `*_enc` and `mobilenetv5_300m_enc` return tokens or a feature map for a language model, whatever `num_classes` says:
  they are encoders with `pool="mean"`, and refused without a pooling.
- `resnet*_clip` declare the width of their embedding as `num_classes`; `model.num_classes = 0` makes them encoders.
"""


@dataclass
class Result:
    """A row of the table."""

    model: str
    family: str
    outcome: str
    error: str = ""
    message: str = ""
    head: str = ""
    features: int | str = ""
    classes: int | str = ""
    difference: str = ""
    num_classes: int | str = ""
    parameters: int | str = ""
    input: str = ""
    seconds: str = ""
    given_classes: str = ""
    """The outcome with ``num_classes=GIVEN_CLASSES`` of an architecture without a classifier."""
    pool: str = ""
    """The pooling of an encoder that returns tokens or maps."""
    blocks: str = ""
    """The number of blocks of an architecture that is too large to run with all of them."""


class TooLarge(Exception):
    """The model has more parameters than the limit of the sweep."""


def main() -> None:
    options = _parser().parse_args()
    done = read_table(options.out)
    names = [name for name in _architectures(options.pattern) if name not in done]
    print(f"{len(done)} architectures are in the table, {len(names)} to run")
    worker = Worker(options.max_parameters)
    try:
        for name in names:
            result = worker.run(name, options.timeout)
            append_row(options.out, result)
            print(f"{result.outcome:9} {name} {result.seconds} {result.error} {result.message}"[:160], flush=True)
    finally:
        worker.stop()
    results = write_sorted(options.out)
    if options.summary:
        options.summary.write_text(summary(results, options.max_parameters))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV table with one row for each architecture")
    parser.add_argument("--summary", type=Path, help="Markdown file with counts over the whole table")
    parser.add_argument("--pattern", default="*", help="pattern of the names of architectures, e.g. 'vit_*'")
    parser.add_argument("--max-parameters", type=float, default=1.5e9, help="limit; larger models do not run")
    parser.add_argument("--timeout", type=float, default=180, help="time limit for one architecture in seconds")
    return parser


def _architectures(pattern: str) -> list[str]:
    """Return the names of architectures: those without classes, then one of each family, then the others."""
    import timm

    names = timm.list_models(pattern)
    examples = set({family_of(name): name for name in reversed(names)}.values())

    def order(name: str) -> tuple[bool, bool]:
        config: Any = timm.get_pretrained_cfg(name)
        return config.num_classes != 0, name not in examples

    return sorted(names, key=order)


def read_table(path: Path) -> dict[str, Result]:
    """Return the rows by architecture; none if the file does not exist."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["model"]: Result(**row) for row in csv.DictReader(file)}


def append_row(path: Path, result: Result) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))


def write_sorted(path: Path) -> list[Result]:
    """Write the table again, sorted by architecture, and return its rows."""
    results = [result for _, result in sorted(read_table(path).items())]
    path.unlink(missing_ok=True)
    for result in results:
        append_row(path, result)
    return results


class Worker:
    """A process that runs architectures; if it hangs or dies, it is replaced and one row fails."""

    def __init__(self, max_parameters: float) -> None:
        self.max_parameters = max_parameters
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.max_parameters), daemon=True)
        self.process.start()
        other.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def run(self, name: str, timeout: float) -> Result:
        self.pipe.send(name)
        error, message = "Timeout", f"no answer in {timeout:.0f} s"
        try:
            if self.pipe.poll(timeout):
                return self.pipe.recv()
        except EOFError:
            error, message = "WorkerDied", "the process ended, perhaps because memory ran out"
        self.stop()
        self._start()
        return Result(name, family_of(name), FAILED, error, message)


def _serve(pipe: Connection, max_parameters: float) -> None:
    import torch

    torch.set_num_threads(1)
    with quick_initialisers():
        while True:
            pipe.send(try_architecture(pipe.recv(), max_parameters))


def family_of(name: str) -> str:
    """Return the timm module that defines an architecture."""
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def try_architecture(name: str, max_parameters: float = 1.5e9) -> Result:
    """Create an architecture and extract from it; if it has no classes, also with some."""
    started = time.perf_counter()
    fewer: dict[str, Any] = {}
    result = _try(name, max_parameters)
    if result.outcome == TOO_LARGE:
        result, fewer = _try_fewer_blocks(result, max_parameters)
    if result.num_classes == 0:
        result.given_classes = _try(name, max_parameters, num_classes=GIVEN_CLASSES, **fewer).outcome
    result.seconds = f"{time.perf_counter() - started:.1f}"
    return result


def _try_fewer_blocks(too_large: Result, max_parameters: float) -> tuple[Result, dict[str, Any]]:
    """Return the outcome of an architecture with few of its blocks, and the argument that leaves out the others."""
    for fewer in FEWER_BLOCKS:
        result = _try(too_large.model, max_parameters, **fewer)
        if result.outcome not in (FAILED, TOO_LARGE):
            result.blocks = ", ".join(map(str, fewer.values()))
            return result, fewer
    return too_large, {}


def _try(name: str, max_parameters: float, **given: Any) -> Result:
    """Determine the outcome of an architecture at the smallest input size that works."""
    result = Result(name, family_of(name), FAILED)
    for kwargs, size in _attempts(name):
        try:
            _extract(result, name, kwargs | given, size, max_parameters)
        except TooLarge as error:
            result.outcome, result.message = TOO_LARGE, str(error)
        except HeadNotFound as error:
            result.outcome, result.error, result.message = REFUSED, type(error).__name__, str(error)
        except Exception as error:
            result.outcome, result.error, result.message = FAILED, type(error).__name__, " ".join(str(error).split())
        if result.outcome != FAILED:
            break
    return result


def _attempts(name: str) -> Iterator[tuple[dict[str, Any], tuple[int, int, int]]]:
    """Yield arguments and input sizes to try: small ones first, the default last."""
    from timm.models import get_pretrained_cfg

    config: Any = get_pretrained_cfg(name)
    channels, height, width = config.input_size
    if config.fixed_input_size:
        side = 4 * next((int(patch) for patch in re.findall(r"patch(\d+)", name)), 32)
        if side < height:
            yield {"img_size": side}, (channels, side, side)
    else:
        small = config.min_input_size or (channels, 64, 64)
        if small[1] < height:
            yield {}, small
        if height > 128 > small[1]:
            yield {}, (channels, 128, 128)
    yield {}, (channels, height, width)


def _extract(result: Result, name: str, kwargs: dict[str, Any], size: tuple[int, ...], max_parameters: float) -> None:
    import timm
    import torch

    from ood_scores import extract

    torch.manual_seed(0)
    with at_most(max_parameters):
        model: Any = timm.create_model(name, pretrained=False, **kwargs)
    randomise_zeros(model)
    result.num_classes = model.num_classes
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    result.input = "x".join(map(str, size))
    images = torch.randn(BATCH, *size)
    try:
        features = extract(model, [images], device="cpu", progress=False)
    except HeadNotFound:
        with torch.inference_mode():
            if model.eval()(images).ndim == 2:
                raise
        result.pool = "mean"
        features = extract(model, [images], device="cpu", progress=False, pool="mean")
    head, logits, provenance = features.head, features.logits, features.provenance
    result.features = features.num_features
    if logits is None:
        _check_encoder(model.eval(), images, features.features, result)
        return
    assert head is not None
    assert provenance is not None
    difference = float((head(features.features) - logits).abs().max() / logits.abs().max())
    result.head = provenance.head_modules
    result.classes = logits.shape[1]
    result.difference = f"{difference:.1e}"
    if difference > TOLERANCE or torch.equal(logits[0], logits[1]):
        raise AssertionError("the head does not reproduce the logits, or they are the same for every input")
    result.outcome, result.error, result.message = EXACT, "", ""


def _check_encoder(model: Any, images: Any, features: Any, result: Result) -> None:
    """Check that the features of an encoder are its output, bit for bit, or the mean over its tokens or positions."""
    import torch

    with torch.inference_mode():
        output = model(images)
    if result.pool:
        last = output.shape[-1] == features.shape[1]
        output = output.mean(dim=1) if output.ndim == 3 else output.mean(dim=(1, 2) if last else (2, 3))
        same = torch.allclose(features, output, rtol=1e-5, atol=1e-6)
    else:
        same = torch.equal(features, output.flatten(1))
    if not same or torch.equal(features[0], features[1]):
        raise AssertionError("the features are not the output of the model, or they are the same for every input")
    result.outcome, result.error, result.message = ENCODER, "", ""


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Stop the creation of a model when it has more than ``limit`` parameters."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    counted = 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal counted
        counted += 0 if parameter is None else parameter.numel()
        if counted > limit:
            raise TooLarge(f"more than {limit:.3g} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def randomise_zeros(model: Any) -> None:
    """Replace parameters that start at or near zero, because a zero head would hide every mistake."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.02)


@contextmanager
def quick_initialisers() -> Iterator[None]:
    """Fill weights from one pool of random numbers, which is much faster than drawing all of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1_000_003, generator=generator)
    uniform = torch.rand(1_000_003, generator=generator)

    def fill_normal(self: Any, mean: float = 0.0, std: float = 1.0, **_: Any) -> Any:
        return _fill(self, normal, std, mean)

    def fill_uniform(self: Any, low: float = 0.0, high: float = 1.0, **_: Any) -> Any:
        return _fill(self, uniform, high - low, low)

    def keep(self: Any) -> Any:
        return self

    replacements: dict[str, Any] = {"normal_": fill_normal, "uniform_": fill_uniform, "erfinv_": keep}
    with mock.patch.multiple(torch.Tensor, **replacements):
        yield


def _fill(tensor: Any, pool: Any, scale: float, shift: float) -> Any:
    values = pool * scale + shift
    count = tensor.numel()
    repeated = values[:count] if count <= len(values) else values.repeat(-(-count // len(values)))[:count]
    return tensor.copy_(repeated.view(tensor.shape))


def summary(results: list[Result], max_parameters: float) -> str:
    """Write the counts and the reasons of refusals as Markdown."""
    import timm
    import torch

    counts = Counter(result.outcome for result in results)
    few = [result for result in results if result.blocks]
    given = Counter(result.given_classes for result in results if result.given_classes)
    pooled = sum(result.outcome == ENCODER and bool(result.pool) for result in results)
    listed = len(timm.list_models())
    families = {result.family for result in results if EXACT in (result.outcome, result.given_classes)}
    largest = max((float(result.difference) for result in results if result.outcome == EXACT), default=0.0)
    lines = [
        "# Coverage of timm's architectures",
        "",
        f"`extract` on timm {timm.__version__} (torch {torch.__version__}), random weights, {BATCH} random inputs, "
        f"float32 on the CPU, the smallest input size that works: {len(results)} of the {listed} architectures.",
        "",
        "| outcome | architectures | meaning |",
        "| --- | ---: | --- |",
        f"| exact | {counts[EXACT]} | `head(features)` is the logits; largest difference relative to the largest logit "
        f"{largest:.1e} |",
        f"| encoder | {counts[ENCODER]} | no classifier: the features are the output, bit for bit; {pooled} return "
        "tokens or maps and need `pool` |",
        f"| refused | {counts[REFUSED]} | no affine map gives the logits: `HeadNotFound` or `HeadMismatch` |",
        f"| failed | {counts[FAILED]} | anything else |",
        f"| too large | {counts[TOO_LARGE]} | over {max_parameters:.3g} parameters, not run |",
        "",
        f"{len(few)} others are as large, and ran with few of their blocks, which are alike: the column `blocks` has "
        "their number.",
        "",
        f"{given.total()} have no classifier of their own (`num_classes=0` in timm). With "
        f"`num_classes={GIVEN_CLASSES}`: " + ", ".join(f"{given[outcome]} {outcome}" for outcome in OUTCOMES) + ".",
        "",
        f"Of timm's {len(timm.list_modules())} modules (families), {len(families)} have an exact architecture; without "
        f"one: {', '.join(sorted({result.family for result in results} - families)) or 'none'}.",
        "",
        *_reasons(results),
        NOTES,
        *_listing(results, FAILED, "Failed"),
        *_listing(results, TOO_LARGE, "Too large"),
        "`results.csv` has one row for each architecture. To make both again, remove it and run",
        "",
        "```",
        "python -m benchmarks.coverage.sweep --out benchmarks/coverage/results.csv \\",
        "    --summary benchmarks/coverage/README.md",
        "```",
        "",
    ]
    return "\n".join(lines)


def _reasons(results: list[Result]) -> list[str]:
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome == REFUSED:
            groups[result.family, reason(result)].append(result)
    lines = [
        "## Refused, by family",
        "",
        f"| family | refused | reason | of these exact with `num_classes={GIVEN_CLASSES}` | for example |",
        "| --- | ---: | --- | ---: | --- |",
    ]
    for (family, why), members in sorted(groups.items()):
        exact = sum(member.given_classes == EXACT for member in members)
        lines.append(f"| {family} | {len(members)} | {why} | {exact} | `{members[0].model}` |")
    return [*lines, ""]


def reason(result: Result) -> str:
    """Describe a refusal in a few words."""
    for found, words in (
        ("not logits [batch, classes]", "returns a map or tokens"),
        ("a classifier returns a tensor", "returns no tensor"),
        ("no affine module", "no affine module gives the outputs"),
        ("nor a weighted mean of several", "the outputs are neither those of an affine module nor a mean of them"),
        ("but not as weight", "the module that gives the outputs is not affine"),
    ):
        if found in result.message:
            return f"no classifier: {words}" if str(result.num_classes) == "0" else words
    return result.message.split(".")[0]


def _listing(results: list[Result], outcome: str, title: str) -> list[str]:
    chosen = [result for result in results if result.outcome == outcome]
    if not chosen:
        return []
    return [f"## {title}", "", *(f"- `{r.model}`: {f'{r.error} {r.message[:160]}'.strip()}" for r in chosen), ""]


if __name__ == "__main__":
    main()
