"""Known datasets of open-set recognition, of medical images, of corruptions, and of adversarial images."""

from __future__ import annotations

from ood_scores.data.known_set import IMAGES_OF_IMAGENET, KnownSet, repository_under, unpacked

_NATURAL = "https://github.com/hendrycks/natural-adv-examples"
_ROBUSTNESS = "https://github.com/hendrycks/robustness"
_HENDRYCKS = "https://people.eecs.berkeley.edu/~hendrycks"
SSB = "https://github.com/sgvaze/osr_closed_set_all_you_need"
_OPENMIBOOD = "https://github.com/remic-othr/OpenMIBOOD"


def _arrays_of_corruptions(folder: str, url: str) -> str:
    """Return the command that gets the arrays of CIFAR-C, and writes one archive with labels for each corruption."""
    code = (
        "import glob, numpy as np; y = np.load('labels.npy'); [np.savez(f[:-4], images=np.load(f), labels=y) "
        "for f in glob.glob('*.npy') if f != 'labels.npy']"
    )
    return f'{unpacked(url)} && cd {{data}}/{folder} && python -c "{code}"'


OPENMIBOOD = KnownSet(
    "openmibood",
    "OpenMIBOOD (Gutbrod et al. 2025): three benchmarks of medical images, with lists for cells (MIDOG), endoscopy "
    "(PhaKIR), and brain scans (OASIS-3, volumes that no kind of dataset opens)",
    0,
    _OPENMIBOOD,
    f"git clone {_OPENMIBOOD} {{data}}/OpenMIBOOD, then run the scripts of the datasets in "
    "{data}/OpenMIBOOD/scripts/download/OpenMIBOOD, and download_classifiers.py there for the networks; PhaKIR needs a "
    "registration at https://zenodo.org/records/16753919",
    "imglist:OpenMIBOOD/data/benchmark_imglist/midog/test_midog.txt?root=OpenMIBOOD/data/midog",
    ("openmibood", "midog", "phakir"),
    "that of each dataset, listed in its repository",
)

OPEN_SETS: tuple[KnownSet, ...] = (
    KnownSet(
        "cub",
        "CUB-200-2011, 200 species of birds (Wah et al. 2011); a part of the semantic shift benchmark (Vaze et al. "
        "2022). The command writes an image list of the test images",
        11788,
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        unpacked("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz")
        + " && cd {data}/CUB_200_2011 && paste -d' ' images.txt image_class_labels.txt train_test_split.txt | "
        "awk '$6==0 {print $2, $4-1}' > test.txt",
        "imglist:CUB_200_2011/test.txt?root=CUB_200_2011/images",
        ("cub", "cub_200_2011"),
        "non-commercial research and education",
        size="1.1 GB",
        md5="97eceeb196236b17998738112f37df78",
    ),
    KnownSet(
        "aircraft",
        "FGVC-Aircraft, 100 variants of airplanes (Maji et al. 2013); a part of the semantic shift benchmark (Vaze et "
        "al. 2022)",
        10000,
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        "",
        "torchvision:FGVCAircraft?split=test&download=true",
        ("aircraft", "fgvc_aircraft", "fgvc_aircraft_2013b"),
        "non-commercial research",
        size="2.75 GB",
    ),
    KnownSet(
        "stanford_cars",
        "196 models of cars (Krause et al. 2013); a part of the semantic shift benchmark (Vaze et al. 2022). The "
        "authors' address no longer works",
        16185,
        SSB,
        "get cars_test and cars_test_annos_withlabels.mat from a mirror, and put them into {data}/stanford_cars, then "
        "cd {data}/stanford_cars && python -c \"from scipy.io import loadmat; open('test.txt', 'w').writelines("
        "f'{row[5][0]} {row[4][0][0] - 1}\\n' "
        "for row in loadmat('cars_test_annos_withlabels.mat')['annotations'][0])\"",
        "imglist:stanford_cars/test.txt?root=stanford_cars/cars_test",
        ("stanford_cars", "cars_test", "cars_train"),
        size="1.82 GiB",
    ),
    KnownSet(
        "imagenet_o",
        "classes that are not in ImageNet-1k, chosen so that a ResNet-50 is confident (Hendrycks et al. 2021)",
        2000,
        _NATURAL,
        unpacked(f"{_HENDRYCKS}/imagenet-o.tar"),
        "folder:imagenet-o",
        ("imagenet_o",),
        repository_under("MIT"),
        md5="86bd7a50c1c4074fb18fc5f219d6d50b",
    ),
    KnownSet(
        "imagenet_a",
        "200 classes of ImageNet, natural images that a ResNet-50 classifies wrongly (Hendrycks et al. 2021)",
        7500,
        _NATURAL,
        unpacked(f"{_HENDRYCKS}/imagenet-a.tar"),
        "folder:imagenet-a",
        ("imagenet_a",),
        repository_under("MIT"),
        size="688 MB",
        md5="c3e55429088dc681f30d81f4726b6595",
    ),
    KnownSet(
        "imagenet_c_noise",
        "ImageNet's validation images with three kinds of noise at five severities (Hendrycks & Dietterich 2019); "
        "the other corruptions are in blur.tar (7 GB), digital.tar (7 GB), weather.tar (12 GB) and extra.tar (15 GB) "
        "at the same address",
        750000,
        _ROBUSTNESS,
        unpacked("https://zenodo.org/record/2235448/files/noise.tar", "imagenet-c"),
        "folder:imagenet-c/gaussian_noise/5",
        ("gaussian_noise", "shot_noise", "impulse_noise"),
        f"unknown; {IMAGES_OF_IMAGENET}",
        size="21 GB",
        md5={
            "noise.tar": "e80562d7f6c3f8834afb1ecf27252745",
            "blur.tar": "2d8e81fdd8e07fef67b9334fa635e45c",
            "digital.tar": "89157860d7b10d5797849337ca2e5c03",
            "weather.tar": "33ffea4db4d93fe4a428c40a6ce0c25d",
            "extra.tar": "d492dfba5fc162d8ec2c3cd8ee672984",
        },
    ),
    KnownSet(
        "cifar10_c",
        "CIFAR-10's test images with 19 corruptions at five severities, 10,000 rows each (Hendrycks & Dietterich "
        "2019). Published as arrays, which the command converts to archives",
        950000,
        _ROBUSTNESS,
        _arrays_of_corruptions("CIFAR-10-C", "https://zenodo.org/record/2535967/files/CIFAR-10-C.tar"),
        "npz:CIFAR-10-C/gaussian_noise.npz?rows=40000:50000",
        ("cifar_10_c", "cifar10_c"),
        "CC BY 4.0",
        size="2.9 GB",
        md5="56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    KnownSet(
        "cifar100_c",
        "CIFAR-100's test images with 19 corruptions at five severities, as CIFAR-10-C",
        950000,
        _ROBUSTNESS,
        _arrays_of_corruptions("CIFAR-100-C", "https://zenodo.org/record/3555552/files/CIFAR-100-C.tar"),
        "npz:CIFAR-100-C/gaussian_noise.npz?rows=40000:50000",
        ("cifar_100_c", "cifar100_c"),
        size="2.9 GB",
        md5="11f0ed0f1191edbf9fa23466ae6021d3",
    ),
    KnownSet(
        "adversarial",
        "adversarial images of your own model, in folders of classes: they depend on the network that they attack, so "
        "that none are published for all",
        0,
        "https://github.com/bethgelab/foolbox",
        "create them, for instance with foolbox, and save them as PNG files in {data}/adversarial, in folders as those "
        "of the original images",
        "folder:adversarial",
        ("adversarial",),
        "that of the original images",
    ),
    OPENMIBOOD,
)
"""Datasets beyond those of OpenOOD's benchmarks; MNIST's splits for open-set recognition are classes of ``mnist``."""
