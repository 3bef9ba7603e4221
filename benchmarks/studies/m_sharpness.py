"""m-sharpness: a perturbation for each part of m samples of a batch of 50.

Section 4.1 of the SAM paper: each part climbs by its own gradient, and the step is made with the mean of the second
gradients. Smaller m is a sharper question. The price is one pair of perturb and restore a part, which is what fused
kernels make cheap; the passes are the same. The radius is one for all m (the paper's too).
"""

from typing import Any

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note
from benchmarks.studies.training import BATCH_SIZE, DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "rho": 0.2, "m": [50, 25, 10, 5], "noise": [0.0, 0.3]}
QUICK = {"seeds": 2, "m": [50, 25, 10]}
THEIRS = (
    (
        "CIFAR-10, SAM with m from 1 to 256",
        "smaller m generalises better",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), section 4.1",
    ),
)


def run(settings: dict[str, Any]) -> list[Record]:
    """SGD, and SAM with each m."""
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            for m in [None, *settings["m"]]:
                step = {} if m is None else {"micro_batches": BATCH_SIZE // m, "sharpness": "micro"}
                found = training(settings, seed, SGD if m is None else SAM, noise, **({"step": step} if m else {}))
                method = SGD if m is None else f"SAM, m = {m}"
                records.append({"noise": noise, "method": method, "seed": seed, **found.run().found()})
    return records


def report(document: dict[str, Any]) -> str:
    """Against SGD, and against SAM with one perturbation a batch."""
    records, whole = document["records"], f"SAM, m = {document['settings']['m'][0]}"
    tables = [accuracy_table(records, ["noise", "method"], {"method": SGD})]
    tables.append(
        accuracy_table([r for r in records if r["method"] != SGD], ["noise", "method"], {"method": whole}, whole)
    )
    batch_norm = "Each part has batch normalisation's statistics of its own, so that small m is handicapped here."
    return "\n\n".join([*tables, f"{note(document)} {batch_norm}"])


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by m."""
    records = [{**r, "labels": f"{100 * r['noise']:g} % wrong labels"} for r in document["records"]]
    figure, axes = new_figure(1, 6.4)
    draw(axes, records, "method", "labels")
    axes.set(xlabel="")
    return figure
