"""Every study runs, in a tiny form, and writes its three files; the loaders of data read what they say."""

import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # what curvlinops imports uses torch.jit.script
    for package in ("curvlinops", "matplotlib", "numpy", "scipy", "sklearn"):
        pytest.importorskip(package)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.studies import NAMES, data, framework, page  # noqa: E402

TINY = {
    "toy": "--starts 2 --steps 3",
    "label_noise": "--noise 0.3",
    "significance": "--widths 2 --noise 0.3 --seeds 2 --radii 0.2",
    "p_norm": "--p 2 inf --noise 0",
    "m_sharpness": "--m 50 25 --noise 0",
    "second_order": "--noise 0 --radii 0.2",
    "hessian": "--eigenvalues 1 --points 3",
    "ascent_fraction": "--fraction 0.5 --noise 0",
    "late_phase": "--start 0.5 --noise 0",
    "methods": "--methods SAM --noise 0.3",
    "finetune": "--shots 5",
}
SMALL = "--seeds 1 --epochs 1 --width 2 --train-images 100 --data digits"


def options(name):
    """What a study is run with: the smallest of everything that it knows."""
    known, words = framework.study(name).DEFAULTS, SMALL.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [w for pair in pairs if pair[0][2:].replace("-", "_") in known for w in pair] + TINY[name].split()


@pytest.mark.parametrize("name", NAMES)
def test_a_study_writes_its_files(name, tmp_path):
    arguments = [*options(name), "--out", str(tmp_path)]
    if name == "methods":  # it imports a script beside which there is another `cases` than the tests'
        subprocess.run([sys.executable, "-m", "benchmarks.studies", name, *arguments], cwd=ROOT, check=True)
    else:
        threads = torch.get_num_threads()
        try:
            framework.run(name, arguments)
        finally:
            torch.set_num_threads(threads)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{ending}" for ending in ("json", "png", "md")}
    document = json.loads((tmp_path / f"{name}.json").read_text())
    table = framework.study(name).report(document)
    text = (tmp_path / f"{name}.md").read_text()
    assert table in text and f"]({name}.png)" in text and document["command"] in text
    for line in re.findall(r"(?m)^\|.*\|$", text):
        assert "nan" not in line
    assert (tmp_path / f"{name}.png").stat().st_size < 150_000


def test_the_differences_are_of_equal_seeds():
    records = [
        {"method": method, "seed": seed, "test": test}
        for method, tests in (("SGD", (90.0, 80.0, 70.0)), ("SAM", (92.0, 82.1, 71.9)))
        for seed, test in enumerate(tests)
    ]
    table = framework.accuracy_table(list(reversed(records)), ["method"], {"method": "SGD"})
    assert "| SAM | 82.00 ± 10.05 | +2.00 ± 0.06 | a gain |" in table
    assert framework.verdict([2.0, 1.0, 3.0], [0.0, 0.0, 0.0]) == "no clear difference"  # 3.5 errors, of 4.3
    assert framework.verdict([1.0, 2.0], [2.0, 1.0]) == "no clear difference"
    assert framework.verdict([1.0, 2.0], [3.0, 4.1]) == "a loss"
    assert framework.verdict([1.0], [2.0]) == "one seed cannot tell"


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path, monkeypatch):
    if not framework.RESULTS.is_dir():
        pytest.skip("no results of studies here")
    pages = framework.PAGES
    monkeypatch.setattr(page, "PAGES", tmp_path)
    page.write_pages()
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (pages / made.name).read_bytes(), f"{made.name}: python -m benchmarks.studies page"


def test_wrong_labels_are_as_many_as_asked_for():
    clean, noisy = (data.load({}, noise, torch.Generator().manual_seed(3)) for noise in (0.0, 0.3))
    assert torch.equal(clean.train[0], noisy.train[0])
    assert (clean.train[1] != noisy.train[1]).sum() == 120
    assert torch.equal(clean.test[1], noisy.test[1])


def test_data_of_torchvision_that_is_not_here_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="install a torchvision of this torch"):
        data.load({"data": "cifar10", "folder": ""}, 0.0, torch.Generator())


@pytest.fixture
def stand_in(monkeypatch):
    """Something that reads like torchvision, for a machine without it."""

    class ImageFolder:
        def __init__(self, root, transform):
            classes = sorted(p.name for p in Path(root).iterdir())
            self.items = [(p, i) for i, c in enumerate(classes) for p in sorted((Path(root) / c).iterdir())]
            self.transform = transform

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return self.transform(self.items[i][0]), self.items[i][1]

    class CIFAR10:
        def __init__(self, folder, train, download):
            assert not download
            if not Path(folder).is_dir():
                raise RuntimeError("Dataset not found")
            count = 20 if train else 6
            self.data = torch.arange(count * 4 * 4 * 3, dtype=torch.uint8).view(count, 4, 4, 3).numpy()
            self.targets = [i % 10 for i in range(count)]

    def compose(steps):
        def apply(item):
            for step in steps:
                item = step(item)
            return item

        return apply

    def read(path):  # in the place of ToTensor
        return torch.full((3, 8, 8), float(path.read_text()))

    transforms = types.SimpleNamespace(
        Compose=compose, Resize=lambda n: lambda x: x, CenterCrop=lambda n: lambda x: x, ToTensor=lambda: read
    )
    module = types.ModuleType("torchvision")
    module.datasets, module.transforms = types.SimpleNamespace(ImageFolder=ImageFolder, CIFAR10=CIFAR10), transforms
    monkeypatch.setitem(sys.modules, "torchvision", module)


def image_folder(root, count):
    for label, name in enumerate(("n01-beagle", "n02-boxer")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.txt").write_text(str(label + i / 100))


def test_an_image_folder_is_read(stand_in, tmp_path):
    image_folder(tmp_path / "dogs", 10)
    task = data.load({"data": "images", "folder": str(tmp_path / "dogs")}, 0.0, torch.Generator().manual_seed(0))
    assert (task.classes, task.channels, len(task.train[1]), len(task.test[1])) == (2, 3, 16, 4)
    order = task.train[0][:, 0, 0, 0].argsort()
    assert task.train[1][order].diff().min() >= 0  # labels go with their images
    image_folder(tmp_path / "parted" / "train", 5)
    image_folder(tmp_path / "parted" / "val", 2)
    settings = {"data": "images", "folder": str(tmp_path / "parted"), "train_images": 8}
    task = data.load(settings, 0.0, torch.Generator())
    assert (len(task.train[1]), len(task.test[1])) == (8, 4)
    with pytest.raises(SystemExit, match="there is no folder"):
        data.load({"data": "images", "folder": str(tmp_path / "none")}, 0.0, torch.Generator())


def test_cifar_is_read_and_learned(stand_in, tmp_path):
    arguments = ["--data", "cifar10", "--folder", str(tmp_path), "--seeds", "1", "--epochs", "1", "--width", "2"]
    document = framework.run("label_noise", [*arguments, "--noise", "0.5", "--out", str(tmp_path / "out")])
    assert [record["seed"] for record in document["records"]] == [0, 0, 0]
    with pytest.raises(SystemExit, match="not in --folder .*Dataset not found"):
        data.load({"data": "cifar10", "folder": str(tmp_path / "none")}, 0.0, torch.Generator())
