"""Label noise: how much SAM keeps of the accuracy where a share of the training labels is wrong.

The network has time to learn wrong labels by heart; the training accuracy (on the labels that were learned) says how
far it did. The larger radius was chosen for the demo on other seeds, with 0 and 30 % wrong labels; the smaller shows
that the more labels are wrong, the less SAM can take: where gradients are mostly noise, the larger one keeps this
network from learning at all. Learning rate and weight decay are SGD's best on clean labels.
"""

from typing import Any

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "noise": [0.0, 0.2, 0.3, 0.4, 0.6, 0.8], "radii": [0.2, 0.5]}
DEFAULTS.pop("rho")
QUICK = {"seeds": 2}
THEIRS = (
    (
        "CIFAR-10 with 20/40/60/80 % wrong labels: accuracy of SGD, of SAM",
        "84.8/68.8/48.2/26.2 %, 95.1/93.4/90.5/77.9 %",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), section 3.3",
    ),
)


def run(settings: dict[str, Any]) -> list[Record]:
    """All methods for each share and seed."""
    methods = {SGD: 0.0} | {f"SAM, rho {rho:g}": rho for rho in settings["radii"]}
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            for method, rho in methods.items():
                found = training(settings, seed, SAM if rho else SGD, noise, rho=rho).run().found()
                records.append({"noise": noise, "method": method, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """The table."""
    return accuracy_table(document["records"], ["noise", "method"], {"method": SGD}) + "\n\n" + note(document)


def plot(document: dict[str, Any]) -> Any:
    """Accuracy on test and on training images by the share."""
    figure, (left, right) = new_figure(2)
    draw(left, document["records"], "noise", "method")
    draw(right, document["records"], "noise", "method", "train")
    right.set(ylabel="accuracy on the labels learned, %")
    for axes in (left, right):
        axes.set(xlabel="training labels that are wrong")
    return figure
