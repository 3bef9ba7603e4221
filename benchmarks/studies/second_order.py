"""The second-order term: the exact gradient of the loss at w + e(w), of which SAM leaves a term out.

SAM takes the gradient at w + e as if e did not depend on w. `SAMStep(second_order=True)` differentiates through it by
double backward, which costs time and memory. The paper found the exact gradient to be worse (appendix C.4). The
network is half as wide as in the other studies, so that the larger radius, chosen for those, is large for it.
"""

from typing import Any

from benchmarks.studies.framework import Record, accuracy_table, draw, new_figure, note, spread, values
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "width": 8, "noise": [0.0, 0.3], "radii": [0.2, 0.5]}
DEFAULTS.pop("rho")
QUICK = {"seeds": 2}
METHODS: dict[str, dict[str, Any]] = {"SAM": {}, "SAM, exact gradient": {"step": {"second_order": True}}}
THEIRS = (
    (
        "CIFAR-10, WRN-28-10: SAM with the second-order term",
        "worse than without",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), appendix C.4",
    ),
)


def run(settings: dict[str, Any]) -> list[Record]:
    """SGD, SAM, and SAM with the term."""
    records = []
    for noise in settings["noise"]:
        for seed in seeds(settings):
            found = training(settings, seed, SGD, noise).run().found()
            records.append({"noise": noise, "rho": 0.0, "method": SGD, "seed": seed, **found})
            for rho in settings["radii"]:
                for method, options in METHODS.items():
                    found = training(settings, seed, SAM, noise, rho=rho, **options).run().found()
                    records.append({"noise": noise, "rho": rho, "method": method, "seed": seed, **found})
    return records


def report(document: dict[str, Any]) -> str:
    """Against SAM, and the time of a step."""
    records = document["records"]
    with_radius = [r for r in records if r["rho"]]
    table = accuracy_table(with_radius, ["noise", "rho", "method"], {"method": SAM})
    alone = [f"{spread(values(records, 'test', method=SGD, noise=n))} % with {100 * n:g} % wrong labels"
             for n in document["settings"]["noise"]]  # fmt: skip
    table += f"\n\n{SGD}: {', '.join(alone)}."
    times = ", ".join(f"{m} {spread(values(records, 'step_ms', method=m), 1)}" for m in (SGD, *METHODS))
    return f"{table}\n\n{note(document)}\n\nMilliseconds a step on a machine that others used: {times}."


def plot(document: dict[str, Any]) -> Any:
    """Accuracy by method."""
    records = [
        {
            **r,
            "method": r["method"].replace(", ", ",\n") + (f",\nrho {r['rho']:g}" if r["rho"] else ""),
            "labels": f"{100 * r['noise']:g} % wrong labels",
        }
        for r in document["records"]
    ]
    figure, axes = new_figure(1, 6.4)
    draw(axes, records, "method", "labels", joined=False)
    axes.set(xlabel="")
    return figure
