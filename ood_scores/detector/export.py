"""A detector in one file, for ``torch.export`` or ONNX, that runs without this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.atomic import replacing
from ood_scores.detector.graph import DetectorGraph
from ood_scores.errors import BadInput, MissingInput

FORMAT_VERSION = 1
"""Of inputs, outputs and metadata of the ONNX file."""

LARGEST_FILE = 2**31 - 2**20
"""Bytes of parameters and constants: a file in ONNX's format holds less than 2 GiB."""

CLOSE = 1e-4
"""How far, relative to the largest, logits and scores of the graph may be from those computed here."""

SAFETY = 4.0
"""How many times the differences seen on some images rounding may make on others."""

PLACEHOLDER = 7.3890560989306495e-3
"""The margin before it is known: a number that no scorer has, for equal constants become one when a graph is made."""

ROWS = 16
"""How many images are compared where none are given."""

OUTPUTS = ("logits", "score", "is_ood")


def export_onnx(
    graph: DetectorGraph, images: Tensor, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one ONNX file, after onnxruntime has given with it what the graph gives here.

    Input: ``images``, the batch of any size. Outputs: ``logits``, ``score`` (float64), ``is_ood``. The metadata have
    ``ood_scores_format``, ``scorer``, ``threshold``, ``margin`` and what else is given.

    onnxruntime rounds otherwise than torch. So that a row whose score is the threshold, as that of a calibration row
    is, is decided as in Python, a row is OoD where its score is more than ``margin`` below the threshold: ``SAFETY``
    times the largest difference of scores that the comparison found.

    Args:
        graph: a detector's.
        images: what is compared, at least one; some real ones are best.
        path: of the file, replaced in one step.
        metadata: more of it, for instance the hash of the weights.

    Raises:
        MissingInput: onnx, onnxscript or onnxruntime is not installed.
        BadInput: the model cannot be traced, or onnxruntime gives something else.
        CacheWriteFailed: the disk refused; a file that was there before is still there.
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
    _margin_onnx(graph, images, content)  # what is written is what was compared
    with replacing(Path(path)) as file:
        file.write(content)


def export_program(graph: DetectorGraph, images: Tensor) -> torch.export.ExportedProgram:
    """The graph traced by ``torch.export``, for batches of any size.

    ``torch.export.save`` writes it, ``torch.export.load(path).module()`` runs it, without this package.

    Args:
        graph: a detector's.
        images: an example, of which the sizes matter and not the values.

    Raises:
        BadInput: the model cannot be traced for any size of batch, a scorer that is not of this package cannot, or the
            traced graph gives something else.
    """
    images = images.cpu()
    program = _trace(graph, images)
    with torch.no_grad():
        found = {name: values.numpy() for name, values in zip(OUTPUTS, program.module()(images), strict=True)}
    program.state_dict["margin"] = torch.tensor(_margin(graph, images, found, "torch.export"), dtype=torch.float64)
    return program


def noise(preprocessing: Mapping[str, Any] | None) -> Tensor:
    """Something to compare where there are no images: float32 ``[ROWS, *input_size]``.

    Raises BadInput where the size is not known.
    """
    if preprocessing is None:
        raise BadInput("the detector does not know the size of its images: pass some as images=.")
    return torch.randn(ROWS, *preprocessing["input_size"], generator=torch.Generator().manual_seed(0))


def run_onnx(model: str | os.PathLike[str] | bytes, images: Tensor) -> dict[str, NDArray[Any]]:
    """What onnxruntime gives on the CPU for a batch, by name of the output; ``model`` is a file's path or its bytes."""
    import onnxruntime

    source = model if isinstance(model, bytes) else os.fspath(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images.numpy()}), strict=True))


def _trace(graph: DetectorGraph, images: Tensor) -> torch.export.ExportedProgram:
    example = images[:1].repeat(2, *[1] * (images.ndim - 1))  # sizes 0 and 1 would be taken for constants
    try:
        with torch.no_grad():
            graph(example)  # what scorers keep from their first call is then made of numbers, not of a trace
            return torch.export.export(graph, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:  # whatever the code of the model or the scorer raises under tracing
        raise BadInput(f"torch.export cannot trace {graph}: {_root_of(error)}") from error


def _to_onnx(graph: DetectorGraph, program: torch.export.ExportedProgram) -> Any:
    held = sum(values.nbytes for values in {**program.state_dict, **program.constants}.values())
    if held > LARGEST_FILE:
        raise BadInput(f"{graph} holds {held / 2**30:.1f} GiB, and an ONNX file less than 2: use torch.export.")
    try:
        program.state_dict["margin"] = torch.tensor(PLACEHOLDER, dtype=torch.float64)
        found = torch.onnx.export(
            program, input_names=["images"], output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise BadInput(f"{graph} has no ONNX graph: {_root_of(error)}") from error
    assert found is not None
    return found.model_proto


def _margin_onnx(graph: DetectorGraph, images: Tensor, content: bytes) -> float:
    """``_margin`` of a file's content in onnxruntime; BadInput if it does not run there."""
    try:
        found = run_onnx(content, images)
    except Exception as error:  # onnxruntime's have no class in common
        raise BadInput(f"{graph} does not run in onnxruntime: {_root_of(error)}") from error
    return _margin(graph, images, found, "onnxruntime")


def _margin(graph: DetectorGraph, images: Tensor, found: Mapping[str, NDArray[Any]], where: str) -> float:
    """``SAFETY`` times how far the scores found are from those of the graph here.

    Raises BadInput if they, or the logits, are not close.
    """
    with torch.no_grad():
        here = dict(zip(OUTPUTS, graph(images), strict=True))
    differences = {}
    for name in ("logits", "score"):
        expected = here[name].numpy()
        differences[name], largest = float(np.abs(found[name] - expected).max()), float(np.abs(expected).max())
        if not differences[name] <= CLOSE * largest:
            raise BadInput(
                f"{graph} gives {name} in {where} that differ by {differences[name]:.3g} from those here, of which the "
                f"largest is {largest:.3g}: not exported."
            )
    return SAFETY * differences["score"]


def _root_of(error: BaseException) -> str:
    """The first line of what was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingInput(f"an ONNX file needs {error.name}: pip install 'ood_scores[export]'") from error
    return onnx
