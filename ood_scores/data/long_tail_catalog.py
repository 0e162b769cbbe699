"""Known datasets of long-tailed recognition: ImageNet-LT and the images of ImageNet-22k beside it."""

from __future__ import annotations

from ood_scores.data.known_set import IMAGENET_TERMS, KnownSet

_PASCL = "https://github.com/amazon-science/long-tailed-ood-detection"
_LT = "https://liuziwei7.github.io/projects/LongTail.html"


def _lt_list(split: str) -> str:
    lists = "https://github.com/facebookresearch/classifier-balancing/raw/main/data/ImageNet_LT"
    return f"wget -P {{data}} {lists}/ImageNet_LT_{split}.txt"


LONG_TAIL_SETS: tuple[KnownSet, ...] = (
    KnownSet(
        "imagenet_lt",
        "long-tailed list of ImageNet's training images (Liu et al. 2019), with 1,280 to 5 per class; the images are "
        "ImageNet's",
        115846,
        _LT,
        _lt_list("train"),
        "imglist:ImageNet_LT_train.txt?root=imagenet",
        ("imagenet_lt", "imagenet_lt_train"),
        IMAGENET_TERMS,
    ),
    KnownSet(
        "imagenet_lt_val",
        "list of ImageNet's training images for the validation of ImageNet-LT (Liu et al. 2019), 20 per class",
        20000,
        _LT,
        _lt_list("val"),
        "imglist:ImageNet_LT_val.txt?root=imagenet",
        ("imagenet_lt_val",),
        IMAGENET_TERMS,
    ),
    KnownSet(
        "imagenet_lt_test",
        "list of ImageNet's validation images for the test of ImageNet-LT (Liu et al. 2019), 50 per class",
        50000,
        _LT,
        _lt_list("test"),
        "imglist:ImageNet_LT_test.txt?root=imagenet",
        ("imagenet_lt_test",),
        IMAGENET_TERMS,
    ),
    KnownSet(
        "imagenet_1k_ood",
        "1,000 classes of ImageNet-22k that are not in ImageNet-1k, 50 of each: the OoD test set of ImageNet-LT (Wang "
        "et al. 2022, PASCL)",
        50000,
        _PASCL,
        "register with ImageNet, unpack https://image-net.org/data/imagenet10k_eccv2010.tar into {data}/imagenet10k, "
        "run PASCL's extract_ood_test_imagenet_1k.py --data_root_path {data}",
        "folder:imagenet_ood_test_1k",
        ("imagenet_ood_test_1k", "imagenet_1k_ood"),
        IMAGENET_TERMS,
    ),
    KnownSet(
        "imagenet_extra",
        "500 other classes of ImageNet-22k: auxiliary OoD images of ImageNet-LT (Wang et al. 2022, PASCL)",
        517711,
        _PASCL,
        "register with ImageNet, unpack https://image-net.org/data/imagenet10k_eccv2010.tar into {data}/imagenet10k, "
        "run PASCL's extract_extra_imagenet_1k.py --data_root_path {data}",
        "folder:imagenet_extra_1k",
        ("imagenet_extra_1k", "imagenet_extra"),
        IMAGENET_TERMS,
    ),
)
"""The datasets of ImageNet-LT. The images are ImageNet's."""
