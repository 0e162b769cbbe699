"""CIFAR-sized networks of the OoD detection literature. Importing this package registers them with timm:

>>> import timm
>>> import ood_scores.models.networks
>>> model = timm.create_model("cifar_resnet20", num_classes=10, checkpoint_path="cifar10.safetensors")
"""

from .cct import CompactTransformer, haas_cct7_3x1
from .cifar_densenet import CifarDenseNet, cifar_densenet100
from .cifar_resnet import CifarResNet, cifar_resnet20, cifar_resnet56
from .convnext import OodConvNeXt, haas_convnext_tiny
from .l2_head import L2Head, with_l2_head
from .ood_resnet import OodResNet, haas_resnet18, haas_resnet50, rna_resnet18, rna_resnet50
from .spectral import SpectralConv2d
from .vgg import OodVgg, haas_vgg16

__all__ = [
    "CifarDenseNet",
    "CifarResNet",
    "CompactTransformer",
    "L2Head",
    "OodConvNeXt",
    "OodResNet",
    "OodVgg",
    "SpectralConv2d",
    "cifar_densenet100",
    "cifar_resnet20",
    "cifar_resnet56",
    "haas_cct7_3x1",
    "haas_convnext_tiny",
    "haas_resnet18",
    "haas_resnet50",
    "haas_vgg16",
    "rna_resnet18",
    "rna_resnet50",
    "with_l2_head",
]
