"""The norm of the ball: SAM with p of 1.5, 2, 4 and infinity.

e is what raises the loss most, to first order, among all with ||e||_p <= rho (equation 2 of the paper). A ball of one
radius is very different in size under each p, so each has a radius of its own: the one that makes e, of the gradient
of this network at its first weights, as long in the usual norm as with p = 2 on average. They were not tuned further,
which is fair to none; read the table as "does p matter much", not as a ranking.
"""

from typing import Any

import torch
from torch.nn import functional

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "p": [1.5, 2.0, 4.0, float("inf")], "noise": [0.0, 0.3]}
QUICK = {"seeds": 2}
THEIRS = (
    (
        "CIFAR-10, p = 2, infinity, and a random direction: test error",
        "p = 2 is best",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), appendix C.5",
    ),
)


def radius(settings: dict[str, Any], p: float) -> float:
    """In this p-norm, of a perturbation that is as long in the 2-norm as rho."""
    first = training(settings, 100, SGD)
    images, labels = first.task.train
    loss = functional.cross_entropy(first.model(images), labels)
    g = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(first.model.parameters()))]).double()
    e = g.sign() if p == float("inf") else g.sign() * g.abs() ** (1 / (p - 1))
    return float(settings["rho"] * e.norm(p) / e.norm(2))


def run(settings: dict[str, Any]) -> list[Record]:
    """SGD, and SAM with each p."""
    radii = {f"SAM, p = {p:g}": (p, radius(settings, p)) for p in settings["p"]}
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            found = training(settings, seed, SGD, noise).run().found()
            records.append({"method": SGD, "rho": 0.0, "noise": noise, "seed": seed, **found})
            for method, (p, rho) in radii.items():
                found = training(settings, seed, SAM, noise, p=p, rho=rho).run().found()
                records.append({"method": method, "rho": float(f"{rho:.3g}"), "noise": noise, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """The table."""
    records = [{**r, "method": f"{r['method']} (rho {r['rho']:g})" if r["rho"] else SGD} for r in document["records"]]
    return accuracy_table(records, ["noise", "method"], {"method": SGD}) + "\n\n" + note(document)


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by p."""
    records = [{**r, "labels": f"{100 * r['noise']:g} % wrong labels"} for r in document["records"]]
    figure, axes = new_figure(1, 6.4)
    draw(axes, records, "method", "labels")
    axes.set(xlabel="")
    return figure
