"""A cheaper first pass: SAM whose perturbation comes from a part of the batch.

`SAMStep(ascent_fraction=...)` runs the first pass on the first samples of the batch only, so that a step costs
1 + fraction passes. A smaller part is a noisier and a sharper question, as in m-sharpness.
"""

from typing import Any

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "fraction": [1.0, 0.5, 0.24, 0.1], "noise": [0.0, 0.3]}
QUICK = {"seeds": 2}
THEIRS: tuple[tuple[str, str, str], ...] = ()


def run(settings: dict[str, Any]) -> list[Record]:
    """SGD (a fraction of 0), and SAM with each fraction."""
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            for fraction in [0.0, *settings["fraction"]]:
                options = {"step": {"ascent_fraction": fraction}} if fraction else {}
                found = training(settings, seed, SAM if fraction else SGD, noise, **options).run().found()
                method = SGD if not fraction else f"SAM, {100 * fraction:g} %"
                records.append({"noise": noise, "method": method, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """The table."""
    return accuracy_table(document["records"], ["noise", "method"], {"method": SGD}) + "\n\n" + note(document)


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by the fraction."""
    records = [{**r, "labels": f"{100 * r['noise']:g} % wrong labels"} for r in document["records"]]
    figure, axes = new_figure(1, 6.4)
    draw(axes, records, "method", "labels")
    axes.set(xlabel="")
    return figure
