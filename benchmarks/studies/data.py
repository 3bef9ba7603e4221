"""What the studies learn: scikit-learn's digits, always there; what torchvision reads, if the user has it.

--data digits          1,797 scans of 8 x 8 pixels: 400 train (--train-images), the rest test
--data fashion-mnist   and cifar10, cifar100: from --folder, as torchvision stores them; nothing is downloaded
--data images          --folder has a folder a class (Stanford Dogs' Images), or train/ and test/ (or val/) with such
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam.commands import demo_training

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "images")
TEST_SHARE = 0.2  # of an image folder without a test part


class Task(NamedTuple):
    """Images [n, channels, h, w] float32, standardised, and labels [n] int64, some of the training ones wrong."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train[0].shape[1]


def load(settings: dict[str, Any], noise: float, generator: torch.Generator) -> Task:
    """Draw the training images, and a wrong label for a share `noise` of them.

    Raises:
        SystemExit: torchvision or the data are not here.
    """
    name, count = settings.get("data", "digits"), settings.get("train_images", 0)
    if name not in DATA:
        raise SystemExit(f"--data must be one of {', '.join(DATA)}, got {name!r}")
    if name == "digits":
        images, labels = demo_training.digits()
        order = torch.randperm(len(images), generator=generator)
        count = count or demo_training.TRAIN_IMAGES
        parts = [(images[part], labels[part]) for part in (order[:count], order[count:])]
    else:
        parts = _folder(settings, generator) if name == "images" else _known(name, settings["folder"])
        order = torch.randperm(len(parts[0][0]), generator=generator)[: count or None]
        parts[0] = (parts[0][0][order], parts[0][1][order])
    (images, labels), (test_images, test_labels) = parts
    mean, std = images.mean(dim=(0, 2, 3), keepdim=True), images.std(dim=(0, 2, 3), keepdim=True)
    classes = int(max(labels.max(), test_labels.max())) + 1
    wrong = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes
    return Task(((images - mean) / std, labels), ((test_images - mean) / std, test_labels), classes)


def _torchvision() -> Any:
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise SystemExit(
            f"these data are read by torchvision, which does not import here ({error}): install a torchvision of "
            f"this torch, {torch.__version__}, or take --data digits"
        ) from error
    return torchvision


def _known(name: str, folder: str) -> list[tuple[Tensor, Tensor]]:
    """Training and test part, in 0 to 1."""
    datasets = _torchvision().datasets
    kind = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    parts = []
    for train in (True, False):
        try:
            found = getattr(datasets, kind)(folder or "data", train=train, download=False)
        except RuntimeError as error:
            raise SystemExit(f"--data {name}: not in --folder {folder or 'data'!r}: {error}") from error
        images = torch.as_tensor(found.data).float() / 255  # [n, h, w] or [n, h, w, 3]
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        parts.append((images.contiguous(), torch.as_tensor(found.targets)))
    return parts


def _folder(settings: dict[str, Any], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Training and test part of a folder of images, cut to squares of --pixels, in 0 to 1."""
    vision, root = _torchvision(), Path(settings["folder"] or "data")
    if not root.is_dir():
        raise SystemExit(f"--data images: there is no folder {str(root)!r}; give --folder")
    pixels = settings.get("pixels", 64)
    transforms = vision.transforms
    prepare = transforms.Compose([transforms.Resize(pixels), transforms.CenterCrop(pixels), transforms.ToTensor()])

    def read(folder: Path) -> tuple[Tensor, Tensor]:
        pairs = list(vision.datasets.ImageFolder(str(folder), transform=prepare))
        return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        return [read(root / "train"), read(tests[0])]
    images, labels = read(root)
    order = torch.randperm(len(images), generator=generator)
    cut = len(order) - math.ceil(TEST_SHARE * len(order))
    return [(images[part], labels[part]) for part in (order[:cut], order[cut:])]


def network(task: Task, seed: int, width: int = 16) -> nn.Sequential:
    """The demo's network, for any number of channels and classes: three convolutions with BatchNorm, one linear."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = block(task.channels, width, 1) + block(width, 2 * width, 2) + block(2 * width, 2 * width, 1)
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, task.classes))
