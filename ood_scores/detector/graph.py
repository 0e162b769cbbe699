"""A detector as one module, from images to logits, score and decision, that can be traced into a graph.

The graph is the model and the scorer's own ``score_block``: there is no second definition of any score. Scorers that
are not tensor expressions after their fit are refused by name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, MissingInput, NotFitted
from ood_scores.extraction import heads
from ood_scores.extraction.hooks import Capture
from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import create_scorer, list_scorers


class DetectorGraph(nn.Module):
    """Images ``[B, ...]``, as the model takes them, to logits ``[B, C]``, score float64 ``[B]``, is_ood bool ``[B]``.

    Holds a copy of the model, on the CPU and in eval mode. Called as it is, it scores as the Python detector does; a
    traced one does without what a graph cannot hold (an index, looking at values). A score that is NaN is OoD.

    A row is OoD where its score is more than ``margin`` below the threshold. The margin is 0 here; a traced graph,
    which rounds otherwise, gets one, so that rows at the threshold itself, as calibration rows are, are decided alike.

    Args:
        model: the classifier.
        scorer: fitted, if it is one that is fitted.
        threshold: of the score; ``[C]`` has one for each predicted class.
        images: a batch on which the head is found.
        head: which module is the head, as ``extract`` takes it.
        stored: what features and logits are rounded to, where the scorer was fitted on such.

    Raises:
        NotFitted: the scorer is one that is fitted, and has not been.
        BadInput: the scorer has no graph; the message says why.
        MissingInput: the scorer reads the head's weights, and ``head=False``.
        HeadNotFound, HeadMismatch: as ``extract``.
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
        head: str | nn.Module | bool | None = None,
        stored: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not scorer.is_fitted:
            raise NotFitted(f"{scorer.name!r} is fitted on in-distribution features before it is exported.")
        reason = scorer.why_no_graph()
        if reason:
            raise BadInput(f"{scorer.name!r} cannot be exported: {reason}. Those that can: {', '.join(exportable())}.")
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.scorer, self.stored = scorer, stored
        requested, module = heads.resolve_module(self.model, head)
        with torch.no_grad(), heads.record_calls(self.model, module) as calls:
            self.found = heads.find_head(calls, heads.logits_of(self.model(images.cpu())), requested)
        if "head" in scorer.needs and self.found.head is None:
            raise MissingInput(f"{scorer.name!r} reads the head's weights: export with its head.")
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=torch.float64).cpu())
        self.register_buffer("margin", torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        capture = Capture(self.found.modules)
        with capture.running():
            logits = heads.logits_of(self.model(images))
            features = heads.features_of(capture.received).to(self.stored)
        block = Block(features, logits.to(self.stored), head=self.found.head)
        score = self.scorer.score_block(block).double()
        threshold = self.threshold[block.prediction()] if self.threshold.ndim else self.threshold
        return logits, score, ~(score + self.margin >= threshold)

    def __repr__(self) -> str:
        return f"{type(self.model).__name__} with {self.scorer.name!r}"


def exportable() -> list[str]:
    """Names of the scorers of this package that have a graph, with their default parameters."""
    scorers = [create_scorer(name) for name in list_scorers()]
    return [
        one.name for one in scorers if type(one).__module__.startswith("ood_scores.") and one.why_no_graph() is None
    ]
