"""Fine-tuning: a network that knows five digits learns the other five from few images.

It is trained by SGD on the digits 0 to 4 (all their images), gets a new last layer, and learns 5 to 9 from `shots`
images of each, by SGD or by SAM with a tenth of the learning rate, as long as it takes SGD to learn them by heart; the
test images are others. No larger pretrained network ships with a package that is always here.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.studies.data import Task, network
from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import RECIPE, SAM, SGD, TRAINING, Training, base, sam, seeds
from fastsam.commands.demo_training import digits

PRETRAINING = 5  # epochs
DEFAULTS = {**TRAINING, "epochs": 100, "shots": [5, 10, 20], "rho": 0.2, "lr": RECIPE.kwargs["lr"] / 10}
QUICK = {"seeds": 3}
THEIRS = (
    (
        "EfficientNet-L2 fine-tuned: error of SAM, of the best without, on ImageNet, CIFAR-10 and CIFAR-100",
        "11.39/0.30/3.92 %, 11.8/0.34/4.07 %",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), table 2",
    ),
)


def halves(shots: int, generator: torch.Generator) -> tuple[Task, Task]:
    """What is learned first, and then."""
    images, labels = digits()
    first, (images, labels) = (images[labels < 5], labels[labels < 5]), (images[labels >= 5], labels[labels >= 5] - 5)
    mean, std = first[0].mean(), first[0].std()
    order = torch.randperm(len(labels), generator=generator)
    images, labels = (images[order] - mean) / std, labels[order]
    rank = torch.zeros_like(labels)
    for digit in range(5):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    known = ((first[0] - mean) / std, first[1])
    few, rest = rank < shots, rank >= 20  # the same test images whatever the shots
    return Task(known, known, 5), Task((images[few], labels[few]), (images[rest], labels[rest]), 5)


def run(settings: dict[str, Any]) -> list[Record]:
    """Train once a seed, fine-tune by both methods."""
    records = []
    for seed in seeds(settings):
        for shots in settings["shots"]:
            generator = torch.Generator().manual_seed(seed)
            before, after = halves(shots, generator)
            known = network(before, seed, settings["width"])
            Training(before, known, base(known), PRETRAINING, generator).run()
            for method in (SGD, SAM):
                model = network(after, seed, settings["width"])
                model.load_state_dict(known.state_dict())
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model[-1] = nn.Linear(model[-1].in_features, 5)
                lr = {"lr": settings["lr"]}
                optimizer = base(model, **lr) if method == SGD else sam(model, settings["rho"], **lr)
                order = torch.Generator().manual_seed(seed)
                found = Training(after, model, optimizer, settings["epochs"], order).run().found()
                records.append({"shots": shots, "method": method, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """The table."""
    return accuracy_table(document["records"], ["shots", "method"], {"method": SGD}) + "\n\n" + note(document)


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by the number of images."""
    figure, axes = new_figure()
    draw(axes, document["records"], "shots", "method")
    axes.set(xlabel="images of each new digit")
    return figure
