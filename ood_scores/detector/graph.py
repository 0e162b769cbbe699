"""A detector as one module, from images to logits, score and decision, that can be traced into a graph.

The graph contains the model and the scorer's own ``score_block``: no score is defined a second time. Scorers that are
not tensor expressions after their fit are refused by name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, MissingInput, NotFitted
from ood_scores.extraction.heads import FirstPass
from ood_scores.extraction.hooks import Capture
from ood_scores.features import Block, Head
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import create_scorer, list_scorers


class DetectorGraph(nn.Module):
    """Maps inputs ``[B, ...]`` to logits ``[B, C]``, scores float64 ``[B]``, and decisions ``is_ood`` bool ``[B]``.

    It contains a copy of the model, on the CPU and in eval mode. Without tracing, it computes the scores of the Python
    detector; when traced, it omits everything that a graph cannot contain (an index, branches on values). A row whose
    score is NaN is OoD.

    A row is OoD if its score is more than ``margin`` below the threshold. The margin is 0 here; a traced graph, whose
    rounding differs, has a positive margin, so that rows at the threshold, such as calibration rows, are decided in the
    same way.

    Args:
        model: the classifier.
        scorer: the scorer, fitted if it needs a fit.
        threshold: the threshold of the score; ``[C]`` for one threshold per predicted class.
        images: a batch of inputs on which the head is found.
        head: the head, as in ``extract``.
        stored: the type to which features and logits are rounded: that of the sets the scorer was fitted on.

    Raises:
        NotFitted: if the scorer needs a fit and has none.
        BadInput: if the scorer has no graph; the message names the reason.
        MissingInput: if the scorer needs the head's weights, and ``head=False``.
        HeadNotFound, HeadMismatch: as in ``extract``.
    """

    threshold: Tensor
    margin: Tensor

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        threshold: float | Tensor,
        images: Tensor,
        *,
        head: str | nn.Module | bool | Head | None = None,
        stored: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not scorer.is_fitted:
            raise NotFitted(f"{scorer.name!r} is not fitted: fit it on ID features before exporting it.")
        reason = scorer.why_no_graph()
        if reason:
            raise BadInput(f"cannot export {scorer.name!r}, because {reason}: choose one of {', '.join(exportable())}.")
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.scorer, self.stored = scorer, stored
        first = FirstPass(self.model, images.cpu(), head)
        with torch.no_grad():
            with first.recorded():
                output = self.model(images.cpu())
            self.found = first.find(output)
            _, logits = first.rows(self.found, output)
        if logits is None:
            raise BadInput("an encoder has no logits to export: calibrate on sets with the head of a linear probe.")
        if "head" in scorer.needs and self.found.head is None:
            raise MissingInput(f"{scorer.name!r} needs the head's weights: export the model with its head.")
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=torch.float64).cpu())
        self.register_buffer("margin", torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        capture = Capture(self.found.places)
        with capture.running(), capture.recording():
            features, logits = self.found.read(capture, self.model(images), images)
            assert logits is not None
        block = Block(features.to(self.stored), logits.to(self.stored), head=self.found.head)
        score = self.scorer.score_block(block).double()
        threshold = self.threshold[block.prediction()] if self.threshold.ndim else self.threshold
        return logits, score, ~(score + self.margin >= threshold)

    def __repr__(self) -> str:
        return f"{type(self.model).__name__} with {self.scorer.name!r}"


def exportable() -> list[str]:
    """Return the names of the scorers of this package that have a graph with their default parameters."""
    scorers = [create_scorer(name) for name in list_scorers()]
    return [
        one.name for one in scorers if type(one).__module__.startswith("ood_scores.") and one.why_no_graph() is None
    ]
