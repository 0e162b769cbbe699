"""The L2-normalizing classifier of Haas et al. (2022, 2024)."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import PooledClassifier, linear_classifier

Model = TypeVar("Model", bound=nn.Module)


class L2Head(nn.Linear):
    """Linear classifier of normalized features: ``W z/max(||z||_2, eps) + b``, one norm per row of ``[..., D]``.

    Source: Haas, Yolland & Rabus, "Linking Neural Collapse and L2 Normalization with Improved Out-of-Distribution
    Detection in Deep Neural Networks" (TMLR 2022), Eq. 2. The paper's snippet uses one norm of the whole batch;
    its equation, which this class follows, uses one per sample.

    In eval mode the classifier is the affine map ``W z + b`` of the unnormalized z, whose norm is the score of Haas et
    al. (2024). With a bias the two differ in accuracy; ``normalize_eval=True`` normalizes in eval mode too, as Haas et
    al. (2022) do. The input is normalized before ``forward``, so that the map itself is affine in both modes: with
    ``normalize_eval``, extraction keeps the unit features z/‖z‖.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-12,
        normalize_eval: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.eps = eps
        self.normalize_eval = normalize_eval
        self.register_forward_pre_hook(_normalized)


def _normalized(head: L2Head, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (features,) = inputs
    if head.training or head.normalize_eval:
        features = F.normalize(features, dim=-1, eps=head.eps)
    return (features,)


class PooledL2Classifier(PooledClassifier):
    """A ``PooledClassifier`` whose classifier is an ``L2Head`` if ``l2_head``, else a plain linear one."""

    def __init__(self, in_chans: int, num_features: int, l2_head: bool, normalize_eval: bool) -> None:
        super().__init__(in_chans, num_features)
        self.l2_head = l2_head
        self.normalize_eval = normalize_eval

    def make_head(self, num_classes: int) -> nn.Linear:
        if self.l2_head:
            return L2Head(self.num_features, num_classes, normalize_eval=self.normalize_eval)
        return super().make_head(num_classes)


def with_l2_head(model: Model, normalize_eval: bool = False) -> Model:
    """Replace the classifier of a timm-style model by an ``L2Head`` with the same weights, in place, and return it.

    The names of the weights stay, so a checkpoint of the wrapped model opens with plain ``timm.create_model``, whose
    classifier equals an ``L2Head`` in eval mode. With ``normalize_eval`` it does not: wrap the opened model again.

    The head normalizes its input. If that is the output of a LayerNorm (ConvNeXt, ViT), its norm hardly varies and is a
    poor score; ``haas_convnext_tiny`` omits the LayerNorm.

    Raises:
        HeadNotFound: if ``model.get_classifier()`` is not a single ``nn.Linear``, as in distilled models (two
            classifiers) and BiT (a 1x1 convolution).
    """
    linear = linear_classifier(model)
    head = L2Head(linear.in_features, linear.out_features, linear.bias is not None, normalize_eval=normalize_eval)
    head.weight, head.bias = linear.weight, linear.bias
    name = next(name for name, module in model.named_modules() if module is linear)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head.train(linear.training))
    return model
