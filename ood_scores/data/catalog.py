"""The datasets on which papers compare OoD scores: what they show, where they are, and what opens them."""

from __future__ import annotations

from ood_scores.data.known_set import (
    IMAGENET_TERMS,
    IMAGES_OF_IMAGENET,
    NONE_STATED,
    KnownSet,
    repository_under,
    unpacked,
)
from ood_scores.data.long_tail_catalog import LONG_TAIL_SETS
from ood_scores.data.open_set_catalog import OPEN_SETS, SSB


def _openood(*names: str) -> str:
    """Return the command of OpenOOD's script for the image lists and some datasets; by default all of version 1.5."""
    which = f"--dataset_mode dataset --datasets {' '.join(names)}" if names else "--datasets ood_v1.5"
    return (
        "git clone https://github.com/Jingkang50/OpenOOD && pip install gdown && "
        f"python OpenOOD/scripts/download/download.py --contents datasets {which} --save_dir {{data}}"
    )


def _large(name: str) -> str:
    return f"imglist:benchmark_imglist/imagenet/test_{name}.txt?root=images_largescale"


_OPENOOD_PAGE = "https://github.com/Jingkang50/OpenOOD"
_MOS = "https://github.com/deeplearning-wisc/large_scale_ood"
_MOS_FILES = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_ODIN = "https://github.com/facebookresearch/odin"
_IMAGENET = "https://image-net.org/download.php"
_PLACES_TERMS = "non-commercial research and education, without redistribution"

OPENOOD = KnownSet(
    "openood",
    "OpenOOD v1.5 (Zhang et al. 2023): image lists for CIFAR-10, CIFAR-100, ImageNet-200 and ImageNet-1k, and the test "
    "images in these lists. The training images of ImageNet are not included.",
    0,
    _OPENOOD_PAGE,
    _openood(),
    "imglist:benchmark_imglist/cifar10/test_cifar10.txt?root=images_classic",
    ("benchmark_imglist", "images_classic", "images_largescale"),
    "that of each dataset",
)

CATALOG: tuple[KnownSet, ...] = (
    KnownSet(
        "cifar10",
        "10 classes of objects, 32 x 32 (Krizhevsky 2009): 50,000 for training, 10,000 for test",
        60000,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "",
        "torchvision:CIFAR10?split=test&download=true",
        ("cifar10", "cifar_10"),
        NONE_STATED,
        size="163 MB",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    KnownSet(
        "cifar100",
        "100 classes of objects, 32 x 32 (Krizhevsky 2009): 50,000 for training, 10,000 for test",
        60000,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "",
        "torchvision:CIFAR100?split=test&download=true",
        ("cifar100", "cifar_100"),
        NONE_STATED,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        size="161 MB",
    ),
    KnownSet(
        "svhn",
        "house numbers, 32 x 32 (Netzer et al. 2011): 73,257 for training, 26,032 for test",
        99289,
        "http://ufldl.stanford.edu/housenumbers/",
        "",
        "torchvision:SVHN?split=test&download=true",
        ("svhn",),
        "non-commercial use only",
        md5={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
        size="246 MB",
    ),
    KnownSet(
        "mnist",
        "handwritten digits, 28 x 28, gray (LeCun et al. 1998): 60,000 for training, 10,000 for test",
        70000,
        "http://yann.lecun.com/exdb/mnist/",
        "",
        "torchvision:MNIST?split=test&download=true",
        ("mnist",),
        "CC BY-SA 3.0, according to https://keras.io/api/datasets/mnist/",
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    KnownSet(
        "gtsrb",
        "German traffic signs, 43 classes (Stallkamp et al. 2012); test images",
        12630,
        "https://benchmark.ini.rub.de",
        "",
        "torchvision:GTSRB?split=test&download=true",
        ("gtsrb",),
        md5={
            "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
            "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
        },
    ),
    KnownSet(
        "textures",
        "Describable Textures (Cimpoi et al. 2014), 47 classes, all three splits, as OoD papers use them; torchvision "
        "opens one split of 1,880",
        5640,
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        unpacked("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"),
        "folder:dtd/images",
        ("textures", "texture", "dtd"),
        "for research",
        md5="fff73e5086ae6bdbea199a49dfb8a4c1",
        size="625 MB",
    ),
    KnownSet(
        "places365",
        "scenes, 256 x 256 (Zhou et al. 2017); test images, of which papers on CIFAR draw 10,000",
        328500,
        "http://places2.csail.mit.edu/download.html",
        unpacked("http://data.csail.mit.edu/places/places365/test_256.tar"),
        "folder:test_256",
        ("places365", "test_256"),
        _PLACES_TERMS,
        md5="f532f6ad7b582262a2ec8009075e186b",
    ),
    KnownSet(
        "inaturalist",
        "plants, 110 classes that are not in ImageNet-1k (Huang & Li 2021, MOS)",
        10000,
        _MOS,
        unpacked(f"{_MOS_FILES}/iNaturalist.tar.gz"),
        "folder:iNaturalist",
        ("inaturalist",),
        repository_under("Apache 2.0"),
    ),
    KnownSet(
        "sun",
        "scenes, 50 classes that are not in ImageNet-1k (Huang & Li 2021, MOS)",
        10000,
        _MOS,
        unpacked(f"{_MOS_FILES}/SUN.tar.gz"),
        "folder:SUN",
        ("sun",),
        repository_under("Apache 2.0"),
    ),
    KnownSet(
        "places",
        "scenes, 50 classes that are not in ImageNet-1k (Huang & Li 2021, MOS)",
        10000,
        _MOS,
        unpacked(f"{_MOS_FILES}/Places.tar.gz"),
        "folder:Places",
        ("places",),
        f"{repository_under('Apache 2.0')}; the terms of Places are {_PLACES_TERMS}",
    ),
    KnownSet(
        "lsun_crop",
        "LSUN's test scenes, a random crop of 32 x 32 (Liang et al. 2018, ODIN)",
        10000,
        _ODIN,
        unpacked("https://www.dropbox.com/s/fhtsw1m3qxlwj6h/LSUN.tar.gz"),
        "folder:LSUN",
        ("lsun", "lsun_c", "lsun_crop"),
        repository_under("CC BY-NC 4.0"),
    ),
    KnownSet(
        "lsun_resize",
        "LSUN's test scenes, resized to 32 x 32 (Liang et al. 2018, ODIN)",
        10000,
        _ODIN,
        unpacked("https://www.dropbox.com/s/moqh2wh8696c3yl/LSUN_resize.tar.gz"),
        "folder:LSUN_resize",
        ("lsun_r", "lsun_resize"),
        repository_under("CC BY-NC 4.0"),
    ),
    KnownSet(
        "isun",
        "iSUN's scenes, resized to 32 x 32 (Liang et al. 2018, ODIN)",
        8925,
        _ODIN,
        unpacked("https://www.dropbox.com/s/ssz7qxfqae0cca5/iSUN.tar.gz"),
        "folder:iSUN",
        ("isun",),
        repository_under("CC BY-NC 4.0"),
    ),
    KnownSet(
        "tinyimagenet_resize",
        "TinyImageNet's test images, resized to 32 x 32 (Liang et al. 2018, ODIN)",
        10000,
        _ODIN,
        unpacked("https://www.dropbox.com/s/kp3my3412u5k9rl/Imagenet_resize.tar.gz"),
        "folder:Imagenet_resize",
        ("imagenet_resize", "tinyimagenet_resize"),
        f"{repository_under('CC BY-NC 4.0')}; {IMAGES_OF_IMAGENET}",
    ),
    KnownSet(
        "tinyimagenet_crop",
        "TinyImageNet's test images, a random crop of 32 x 32 (Liang et al. 2018, ODIN)",
        10000,
        _ODIN,
        unpacked("https://www.dropbox.com/s/avgm2u562itwpkl/Imagenet.tar.gz"),
        "folder:Imagenet",
        ("imagenet_crop", "tinyimagenet_crop"),
        f"{repository_under('CC BY-NC 4.0')}; {IMAGES_OF_IMAGENET}",
    ),
    KnownSet(
        "tinyimagenet",
        "200 of ImageNet's classes, 64 x 64 (Le & Yang 2015): 100,000 for training, 10,000 for validation, for which "
        "the command writes an image list, and 10,000 for test, without labels",
        120000,
        "https://www.kaggle.com/c/tiny-imagenet",
        unpacked("http://cs231n.stanford.edu/tiny-imagenet-200.zip")
        + " && cd {data}/tiny-imagenet-200 && sort wnids.txt | "
        "awk 'NR==FNR {n[$1]=NR-1; next} {print $1, n[$2]}' - val/val_annotations.txt > val_labels.txt",
        "folder:tiny-imagenet-200/test/images",
        ("tiny_imagenet_200", "tinyimagenet", "tiny_imagenet", "tin"),
        f"unknown; {IMAGES_OF_IMAGENET}",
    ),
    KnownSet(
        "imagenet",
        "ImageNet-1k, ILSVRC 2012 (Russakovsky et al. 2015): 1,281,167 for training, 50,000 for validation; "
        "the archives are unpacked when the dataset is first opened",
        1331167,
        _IMAGENET,
        "register, then put ILSVRC2012_img_val.tar, ILSVRC2012_img_train.tar and ILSVRC2012_devkit_t12.tar.gz into "
        "the folder that root names",
        "torchvision:ImageNet?split=val&root=imagenet",
        ("imagenet", "imagenet_1k", "imagenet1k", "ilsvrc_2012", "ilsvrc2012"),
        IMAGENET_TERMS,
        size="138 GB for training, 6.3 GB for validation",
        md5={
            "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
            "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
            "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
        },
    ),
    KnownSet(
        "imagenet200",
        "200 of ImageNet's classes, those of ImageNet-R (OpenOOD v1.5); test images",
        0,
        _OPENOOD_PAGE,
        _openood("imagenet_1k"),
        "imglist:benchmark_imglist/imagenet200/test_imagenet200.txt?root=images_largescale",
        ("imagenet200", "imagenet_200"),
        IMAGENET_TERMS,
    ),
    KnownSet(
        "ssb_hard",
        "980 classes of ImageNet-21k that are close to those of ImageNet-1k (Vaze et al. 2022)",
        49000,
        SSB,
        _openood("ssb_hard"),
        _large("ssb_hard"),
        ("ssb_hard",),
        f"{repository_under('MIT')}; {IMAGES_OF_IMAGENET}",
    ),
    KnownSet(
        "ninco",
        "64 classes, each image checked to show no class of ImageNet-1k (Bitterwolf et al. 2023); the authors' archive "
        "is at https://zenodo.org/record/8013288",
        5879,
        "https://github.com/j-cb/NINCO",
        _openood("ninco"),
        _large("ninco"),
        ("ninco",),
        "CC BY 4.0",
        md5={"NINCO_all.tar.gz": "b9ffae324363cd900a81ce3c367cd834"},
    ),
    KnownSet(
        "openimage_o",
        "natural images of OpenImages V3 without classes of ImageNet-1k (Wang et al. 2022, ViM)",
        17632,
        "https://github.com/haoqiwang/vim",
        _openood("openimage_o"),
        _large("openimage_o"),
        ("openimage_o",),
        f"{repository_under('Apache 2.0')}; Open Images lists its images as CC BY 2.0, without warranty, at "
        "https://storage.googleapis.com/openimages/web/factsfigures_v7.html",
    ),
    KnownSet(
        "imagenet_c",
        "corrupted validation images of ImageNet (Hendrycks & Dietterich 2019), as sampled by OpenOOD v1.5; all are "
        "at https://zenodo.org/record/2235448",
        0,
        "https://github.com/hendrycks/robustness",
        _openood("imagenet_c"),
        _large("imagenet_c"),
        ("imagenet_c",),
        f"unknown; {IMAGES_OF_IMAGENET}",
    ),
    KnownSet(
        "imagenet_r",
        "renditions of 200 classes of ImageNet: art, toys, sketches (Hendrycks et al. 2021); the authors' archive is "
        "at https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        30000,
        "https://github.com/hendrycks/imagenet-r",
        _openood("imagenet_r"),
        _large("imagenet_r"),
        ("imagenet_r",),
        repository_under("MIT"),
        md5={"imagenet-r.tar": "a61312130a589d0ca1a8fca1f2bd3337"},
    ),
    KnownSet(
        "imagenet_v2",
        "new test images of ImageNet's classes (Recht et al. 2019). The folders of the authors' archive are named 0, "
        "1, 2, …, which folder: sorts as numbers",
        10000,
        "https://github.com/modestyachts/ImageNetV2",
        _openood("imagenet_v2"),
        _large("imagenet_v2"),
        ("imagenet_v2", "imagenetv2", "imagenetv2_matched_frequency_format_val"),
        "that of each image on Flickr; to be used as ImageNet",
    ),
    KnownSet(
        "imagenet_es",
        "ImageNet images on a screen, photographed under many lights and camera settings (Baek et al. 2024)",
        202000,
        "https://github.com/Edw2n/ImageNet-ES",
        "",
        _large("imagenet_es"),
        ("imagenet_es",),
        NONE_STATED,
    ),
    KnownSet(
        "scood",
        "SC-OOD (Yang et al. 2021): OoD datasets for CIFAR-10 and -100 whose lists label images of ID classes with "
        "their class, and others with -1",
        0,
        "https://jingkang50.github.io/projects/scood",
        "pip install gdown && gdown 1cbLXZ39xnJjxXnDM7g2KODHIjE0Qj4gu -O {data}/scood_benchmark.zip && "
        "unzip {data}/scood_benchmark.zip -d {data}/scood",
        "imglist:scood/data/imglist/benchmark_cifar10/test_tin.txt?root=scood/data/images",
        ("benchmark_cifar10", "benchmark_cifar100", "scood", "scood_benchmark"),
        repository_under("MIT"),
    ),
    KnownSet(
        "300k_random_images",
        "from 80 Million Tiny Images, 32 x 32, without CIFAR's and Places' classes; auxiliary OoD images (Hendrycks et "
        "al. 2019). Published as one array, which the command converts to an archive",
        300000,
        "https://github.com/hendrycks/outlier-exposure",
        "cd {data} && wget https://people.eecs.berkeley.edu/~hendrycks/300K_random_images.npy && python -c "
        "\"import numpy as np; np.savez('300K_random_images.npz', images=np.load('300K_random_images.npy'))\"",
        "npz:300K_random_images.npz",
        ("300k_random_images",),
        repository_under("Apache 2.0"),
    ),
    *LONG_TAIL_SETS,
    *OPEN_SETS,
    OPENOOD,
)
"""The datasets on which OoD scores are compared. Figures come from the papers, addresses from the authors."""
