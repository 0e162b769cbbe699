"""Known datasets, and remedies for missing data."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
from pathlib import Path

import pytest

from ood_scores.data.catalog import CATALOG
from ood_scores.data.dataset_spec import parse
from ood_scores.data.known_set import KnownSet
from ood_scores.data.sources import open_dataset, remedy
from ood_scores.errors import MissingData

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.mark.parametrize("known", CATALOG, ids=lambda known: known.name)
def test_every_known_dataset_that_is_missing_has_a_remedy(known: KnownSet, tmp_path: Path) -> None:
    spec = known.spec.replace("&download=true", f"&root={tmp_path}")
    with pytest.raises(MissingData) as missing:
        open_dataset(spec, root=tmp_path)
    assert missing.value.remedy == remedy(spec, tmp_path) != ""
    assert "{data}" not in missing.value.remedy
    assert str(missing.value).endswith(f". To get it: {missing.value.remedy}")
    assert known.get == "" or str(tmp_path) in missing.value.remedy or "{data}" not in known.get


def test_names_of_known_datasets_are_unique() -> None:
    names = [known.name for known in CATALOG]
    folders = [folder for known in CATALOG for folder in known.folders]
    assert len(set(names)) == len(names)
    assert len(set(folders)) == len(folders)
    assert all(folder == folder.lower().replace("-", "_") for folder in folders)
    assert all(re.fullmatch(r"https?://\S+", known.page) for known in CATALOG)


def test_every_known_dataset_states_its_license_size_and_checksums() -> None:
    by_name = {known.name: known for known in CATALOG}
    assert all(known.license for known in CATALOG)
    assert by_name["ninco"].license == by_name["cifar10_c"].license == "CC BY 4.0"
    assert by_name["cifar10"].license == by_name["cifar100"].license == "none stated by its authors"
    assert "non-commercial" in by_name["svhn"].license
    assert "non-commercial" in by_name["places365"].license
    plain_unknown = [known.name for known in CATALOG if known.license == "unknown"]
    assert plain_unknown == ["gtsrb", "stanford_cars", "cifar100_c"]
    assert all(re.fullmatch(r"[\d.]+ (MB|GB|GiB)( .*)?|", known.size) for known in CATALOG)
    sums = [known.md5 if isinstance(known.md5, str) else " ".join(known.md5.values()) for known in CATALOG]
    assert all(re.fullmatch(r"([0-9a-f]{32}( |$))*", text) for text in sums)
    rows = re.findall(r"^\| `(\w+)` \|.*?\| [\d,]* \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(known.name, known.license) for known in CATALOG]


@pytest.mark.parametrize(
    ("spec", "root", "expected"),
    [
        (
            "imglist:$D/benchmark_imglist/imagenet/test_ninco.txt?root=$D/images_largescale",
            "/r",
            "ninco --save_dir $D ",
        ),
        ("imglist:benchmark_imglist/imagenet/test_ninco.txt", "/r", "--datasets ninco --save_dir /r "),
        ("imglist:/d/benchmark_imglist/cifar100/test_tin.txt", None, "--datasets ood_v1.5 --save_dir /d "),
        ("folder:x/images_classic/texture", None, "--datasets ood_v1.5 --save_dir x "),
        ("imglist:scood/data/imglist/benchmark_cifar10/test_tin.txt", "/my sc", "-d '/my sc'/scood"),
        ("imglist:tiny-imagenet-200/val_labels.txt?root=x", "/r", "cd /r/tiny-imagenet-200 && sort wnids.txt"),
        ("folder:/ood/iNaturalist", None, "wget -P /ood http://pages.cs.wisc.edu"),
        ("folder:/imagenet/ood/inaturalist", "/r", "folder:iNaturalist then opens it"),
        ("folder:~/LSUN", "/r", "-P ~ https://www.dropbox.com"),
        ("npz:data/300K_random_images.npz", None, "cd data && wget https://people.eecs.berkeley.edu"),
        (
            "imglist:data/ImageNet_LT_test.txt?root=data/imagenet",
            None,
            "wget -P data https://github.com/facebookresearch",
        ),
        ("imglist:ImageNet_LT_val.txt", "/r", "main/data/ImageNet_LT/ImageNet_LT_val.txt (see "),
        ("imglist:x/ImageNet-LT-test.txt", "/r", "imglist:ImageNet_LT_test.txt?root=imagenet then opens it"),
        ("folder:/data/cifar-10", None, "write torchvision:CIFAR10?split=test&download=true"),
        ("torchvision:ImageNet?split=val", None, "https://image-net.org/download.php"),
    ],
)
def test_remedy_for_a_path(spec: str, root: str | None, expected: str) -> None:
    assert expected in remedy(spec, root)


def test_remedy_is_empty_for_unknown_datasets() -> None:
    for spec in ["folder:mine", "npz:/x/y.npz", "sheets:/data/cifar10", "digits", "noise:uniform", "folder:"]:
        assert remedy(spec) == ""
    assert remedy("torchvision:SVHN?download=true") == ""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("torchvision:SVHN", "torchvision:SVHN?download=true"),
        ("torchvision:SVHN?split=test", "torchvision:SVHN?split=test&download=true"),
        ("torchvision:SVHN?download=false&split=test", "torchvision:SVHN?split=test&download=true"),
        ("torchvision:SVHN?split=test&download=false", "torchvision:SVHN?split=test&download=true"),
        ("torchvision:SVHN?download=false", "torchvision:SVHN?download=true"),
    ],
)
def test_remedy_of_torchvision_adds_the_download_option(spec: str, expected: str) -> None:
    code = f'from ood_scores.data.sources import open_dataset; open_dataset("{expected}")'
    assert remedy(spec) == f"add download=true to the spec, or run: python -c '{code}'"
    assert remedy(spec, Path("/r")).endswith(f'open_dataset("{expected}", root="/r")\'')


def test_remedy_of_torchvision_runs(tmp_path: Path) -> None:
    code = remedy(f"torchvision:MNIST?root={tmp_path}").partition("python -c '")[2].removesuffix("'")
    with pytest.raises(MissingData, match=f"cannot open MNIST in {tmp_path}"):
        exec(code.replace("&download=true", ""))


EVIL = '$(touch made)`touch made`;touch made&&touch made|touch made"\'"touch made"\'>made\n touch made # $D'


@pytest.mark.parametrize(
    "spec",
    [
        f"folder:{EVIL}/iNaturalist",
        f"folder:-P{EVIL}/iNaturalist",
        f"folder:~{EVIL}/iNaturalist",
        f"folder:${{D}}{EVIL}/iNaturalist",
        f"torchvision:SVHN?root={EVIL.replace('&', '')}",
        f"hf:{EVIL}?config={EVIL.replace('&', '')}",
    ],
)
def test_remedy_runs_nothing_of_a_spec(spec: str, tmp_path: Path) -> None:
    command = remedy(spec).removeprefix("add download=true to the spec, or run: ").partition(" (see ")[0]
    programs = 'wget() { :; }; tar() { :; }; pip() { :; }; python() { printf %s "$2" > code; }; D=x;'
    subprocess.run(["bash", "-c", f"{programs} {command}"], cwd=tmp_path, check=False, timeout=30)
    assert {path.name for path in tmp_path.iterdir()} <= {"code"}
    if spec.startswith(("torchvision", "hf")):
        code = ast.parse((tmp_path / "code").read_text())
        (call,) = [each for each in code.body if isinstance(each, ast.Expr)]
        assert isinstance(call.value, ast.Call)
        assert any(EVIL.replace("&", "") in ast.literal_eval(each) for each in call.value.args)


def test_remedy_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(MissingData("there is none.", "fetch it")))
    assert (str(error), error.reason, error.remedy) == (
        "there is none. To get it: fetch it",
        "there is none.",
        "fetch it",
    )
    assert str(MissingData("there is none")) == "there is none"


def test_docs_page_lists_every_known_dataset() -> None:
    listed = re.findall(r"^\| `(\w+)` \|.*\| `([^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(known.name, known.spec) for known in CATALOG]
    assert parse(listed[0][1]).kind == "torchvision"
