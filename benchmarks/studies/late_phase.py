"""Late-phase SAM: base steps first, SAM from a part of the training on.

`when=fastsam.when.after(step)`: a start of 0 % is SAM all along, 100 % is SGD. A step before the start has one pass, so
a start of 75 % costs 1.25 times SGD. The learning rate's cosine is the same for all: SAM gets its tail.
"""

from typing import Any

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training
from fastsam import when

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "start": [0.0, 0.25, 0.5, 0.75, 0.9], "noise": [0.0, 0.3]}
QUICK = {"seeds": 2}
THEIRS = (
    (
        "SAM in the last few epochs only",
        "nearly the same accuracy and sharpness as SAM throughout",
        "Zhou et al., [arXiv 2410.10373](https://arxiv.org/abs/2410.10373), abstract",
    ),
)


def run(settings: dict[str, Any]) -> list[Record]:
    """SAM from each start, and SGD."""
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            steps = len(training(settings, seed, SGD, noise).batches)
            for start in [*settings["start"], 1.0]:
                options = {"when": when.after(round(start * steps))} if 0 < start < 1 else {}
                found = training(settings, seed, SGD if start == 1 else SAM, noise, **options).run().found()
                records.append({"noise": noise, "start": start, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """Against SGD, and against SAM all along."""
    records = document["records"]
    tables = [accuracy_table(records, ["noise", "start"], {"start": 1.0}, SGD)]
    if 0 in document["settings"]["start"]:
        tables.append(accuracy_table(records, ["noise", "start"], {"start": 0.0}, "SAM all along"))
    return "\n\n".join([*tables, note(document)])


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by the start."""
    records = [{**r, "labels": f"{100 * r['noise']:g} % wrong labels"} for r in document["records"]]
    figure, axes = new_figure()
    draw(axes, records, "start", "labels")
    axes.set(xlabel="SAM begins after this part of the training")
    return figure
