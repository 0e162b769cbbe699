"""Export a detector with ``torch.export`` or to ONNX, to run it without this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.atomic import replacing, user_path
from ood_scores.detector.graph import DetectorGraph
from ood_scores.detector.preprocessing import Transform, example_input
from ood_scores.errors import BadInput
from ood_scores.optional_packages import require

FORMAT_VERSION = 1
"""Version of the inputs, outputs, and metadata of the ONNX file."""

LARGEST_FILE = 2**31 - 2**20
"""Maximum bytes of parameters and constants: an ONNX file is limited to 2 GiB."""

CLOSE = 1e-4
"""Maximum difference between logits, or scores, of the graph and those computed here, relative to the largest."""

SAFETY = 4.0
"""Factor by which the differences caused by rounding may be larger on other images than on the compared ones."""

PLACEHOLDER = 7.3890560989306495e-3
"""The margin before it is known. No scorer contains this number: equal constants are merged when a graph is created."""

ROWS = 16
"""Number of images of noise to compare if no images are passed."""

OUTPUTS = ("logits", "score", "is_ood")


def export_onnx(
    graph: DetectorGraph, images: Tensor, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an ONNX file, after comparing its outputs in onnxruntime with those of the graph.

    The input is ``images``, a batch of any size. The outputs are ``logits``, ``score`` (float64), and ``is_ood``. The
    metadata contain ``ood_scores_format``, ``scorer``, ``threshold``, ``margin``, and the ``metadata`` argument.

    onnxruntime rounds differently from torch. A row is therefore OoD if its score is more than ``margin`` below the
    threshold, so that a row whose score equals the threshold, such as a calibration row, is decided as in Python. The
    margin is ``SAFETY`` times the largest difference of scores in the comparison.

    Args:
        graph: the graph of a detector.
        images: the inputs to compare, at least one; real images are best.
        path: the file, which is replaced atomically.
        metadata: further metadata, such as the hash of the weights.

    Raises:
        MissingPackage: if onnx, onnxscript, or onnxruntime is not installed.
        BadInput: if the model cannot be traced, or the outputs in onnxruntime differ.
        CacheWriteFailed: if the file cannot be written; a previous file is then still there.
    """
    onnx = _require_onnx()
    images = images.cpu()
    proto = _to_onnx(graph, _trace(graph, images))
    margin = _margin_onnx(graph, images, proto.SerializeToString())
    (held,) = (values for values in proto.graph.initializer if values.name == "margin")
    held.CopyFrom(onnx.numpy_helper.from_array(np.array(margin), "margin"))
    about = {
        "ood_scores_format": str(FORMAT_VERSION),
        "scorer": repr(graph.scorer),
        "threshold": str(graph.threshold.tolist()),
        "margin": repr(margin),
    }
    onnx.helper.set_model_props(proto, {**(metadata or {}), **about})
    content = proto.SerializeToString()
    _margin_onnx(graph, images, content)  # the written content is also compared
    with replacing(user_path(path)) as file:
        file.write(content)


def export_program(graph: DetectorGraph, images: Tensor) -> torch.export.ExportedProgram:
    """Trace the graph with ``torch.export``, for batches of any size.

    ``torch.export.save`` writes the result; ``torch.export.load(path).module()`` runs it without this package.

    Args:
        graph: the graph of a detector.
        images: example inputs, whose values do not matter.

    Raises:
        BadInput: if the model, or a scorer of another package, cannot be traced for batches of any size, or the outputs
            of the traced graph differ.
    """
    images = images.cpu()
    program = _trace(graph, images)
    with torch.no_grad():
        found = {name: values.numpy() for name, values in zip(OUTPUTS, program.module()(images), strict=True)}
    program.state_dict["margin"] = torch.tensor(_margin(graph, images, found, "torch.export"), dtype=torch.float64)
    return program


def noise(transform: Transform | None) -> Tensor:
    """Return noise to compare if there are no images: float32 ``[ROWS, C, H, W]``, of the size that images have.

    Raises:
        BadInput: if the size is unknown.
    """
    if transform is None:
        raise BadInput("the size of the detector's images is unknown: pass some as images=.")
    return torch.randn(ROWS, *example_input(transform).shape, generator=torch.Generator().manual_seed(0))


def run_onnx(model: str | os.PathLike[str] | bytes, images: Tensor) -> dict[str, NDArray[Any]]:
    """Return the outputs of onnxruntime on the CPU for a batch, by name; ``model`` is a path or the bytes of a file."""
    import onnxruntime

    source = model if isinstance(model, bytes) else os.fspath(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images.numpy()}), strict=True))


def _trace(graph: DetectorGraph, images: Tensor) -> torch.export.ExportedProgram:
    example = images[:1].repeat(2, *[1] * (images.ndim - 1))  # sizes 0 and 1 would become constants
    try:
        with torch.no_grad():
            graph(example)  # values that scorers cache on their first call are then numbers, not traced
            return torch.export.export(graph, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:  # anything that the code of the model or the scorer raises under tracing
        raise BadInput(f"torch.export cannot trace {graph}: {_root_of(error)}") from error


def _to_onnx(graph: DetectorGraph, program: torch.export.ExportedProgram) -> Any:
    held = sum(values.nbytes for values in {**program.state_dict, **program.constants}.values())
    if held > LARGEST_FILE:
        raise BadInput(f"{graph} has {held / 2**30:.1f} GiB, but an ONNX file is limited to 2 GiB: use torch.export.")
    try:
        program.state_dict["margin"] = torch.tensor(PLACEHOLDER, dtype=torch.float64)
        found = torch.onnx.export(
            program, input_names=["images"], output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise BadInput(f"cannot convert {graph} to ONNX: {_root_of(error)}") from error
    assert found is not None
    return found.model_proto


def _margin_onnx(graph: DetectorGraph, images: Tensor, content: bytes) -> float:
    """Return the ``_margin`` of a file's content in onnxruntime; raises BadInput if it does not run there."""
    try:
        found = run_onnx(content, images)
    except Exception as error:  # the errors of onnxruntime have no common class
        raise BadInput(f"{graph} does not run in onnxruntime: {_root_of(error)}") from error
    return _margin(graph, images, found, "onnxruntime")


def _margin(graph: DetectorGraph, images: Tensor, found: Mapping[str, NDArray[Any]], where: str) -> float:
    """Return ``SAFETY`` times the largest difference between the scores found and those of the graph here.

    Raises:
        BadInput: if the scores, or the logits, are not close.
    """
    with torch.no_grad():
        here = dict(zip(OUTPUTS, graph(images), strict=True))
    differences = {}
    for name in ("logits", "score"):
        expected = here[name].numpy()
        differences[name], largest = float(np.abs(found[name] - expected).max()), float(np.abs(expected).max())
        if not differences[name] <= CLOSE * largest:
            raise BadInput(
                f"{graph} was not exported: its values of {name} in {where} differ by {differences[name]:.3g} from "
                f"those here, whose largest is {largest:.3g}."
            )
    return SAFETY * differences["score"]


def _root_of(error: BaseException) -> str:
    """Return the first line of the error that was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]


def _require_onnx() -> Any:
    require("ONNX export needs", "export", "onnx", "onnxruntime", "onnxscript")
    import onnx

    return onnx
