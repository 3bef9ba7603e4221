"""The family: every method's accuracy beside its passes a step.

The task, the radii and the training are those of `benchmarks/methods.py`, which has times and bytes, too;
this study is its short form with a picture. Each method's radius was chosen on two other seeds from a grid of four, by
the mean of clean and noisy labels; with so few seeds most differences between the methods are chance.
"""

import importlib
from typing import Any

from benchmarks.studies.framework import COLOURS, Record, accuracy_table, fmean, new_figure, note, values
from benchmarks.studies.training import seeds
from fastsam.commands.methods import FAMILY

DEFAULTS = {"seeds": 3, "first_seed": 0, "noise": [0.3], "methods": ["all"]}
QUICK = {"seeds": 1}
THEIRS = (
    (
        "CIFAR-100, WRN-28-10, one laboratory: base, SAM, LookSAM, ESAM, MESA, MSAM",
        "81.51, 84.16, 83.31, 82.71, 82.75, 83.21 %",
        "Becker et al., [arXiv 2401.12033](https://arxiv.org/abs/2401.12033), table 1",
    ),
    (
        "the same: speed relative to the base",
        "1.00, 0.52, 0.84, 0.62, 0.77, 0.99",
        "the same",
    ),
)
BASE = "base sgd"


def run(settings: dict[str, Any]) -> list[Record]:
    """The base optimizer, and each method that is wanted and works with SGD."""
    script = importlib.import_module("methods")  # benchmarks/methods.py
    wanted = [
        m for m in FAMILY if m.base == "sgd" and (settings["methods"] == ["all"] or m.name in settings["methods"])
    ]
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            for method in [None, *wanted]:
                rho = script.RHO[method.name] if method else 0.0
                test, passes = script.accuracy(method, "sgd", noise, seed, rho)
                name = method.name if method else BASE
                records.append({"noise": noise, "method": name, "passes": passes, "seed": seed, "test": test})
    return records


def report(document: dict[str, Any]) -> str:
    """The table."""
    return accuracy_table(document["records"], ["noise", "method"], {"method": BASE}) + "\n\n" + note(document)


def plot(document: dict[str, Any]) -> Any:
    """Mean accuracy of each method, with its passes."""
    noise = document["settings"]["noise"][-1]
    records = [r for r in document["records"] if r["noise"] == noise]
    mean = {name: fmean(values(records, "test", method=name)) for name in {r["method"] for r in records}}
    order = sorted(mean, key=lambda name: mean[name])
    figure, axes = new_figure(1, 7.0, 0.9 + 0.24 * len(order))
    for place, name in enumerate(order):
        mine = [r for r in records if r["method"] == name]
        passes = fmean(r["passes"] for r in mine)
        colour = COLOURS[0] if name == BASE else COLOURS[2] if passes > 1.9 else COLOURS[1]
        axes.plot([r["test"] for r in mine], [place] * len(mine), ".", color=colour, alpha=0.5)
        axes.plot(mean[name], place, "o", color=colour, ms=6)
        axes.annotate(
            f" {passes:.2f} passes", (1.0, place), xycoords=("axes fraction", "data"), fontsize=8, va="center"
        )
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set(xlabel=f"test accuracy, %, with {100 * noise:g} % wrong labels")
    return figure
