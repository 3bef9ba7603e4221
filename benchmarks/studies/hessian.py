"""Flat or sharp: the Hessian at the end of SGD and of SAM, and the loss around both.

Measured by `fastsam.analysis` on the training images with their right labels, in evaluation mode: the largest
eigenvalues, the Hessian's trace, the density of its eigenvalues, sharpness (the rise of the loss at a distance rho
along the gradient, in random directions, and in the scale-invariant form of ASAM), and a filter-normalised line through
the weights. Plain sharpness depends on the scale of the weights, to which batch normalisation is blind: the adaptive
form is the one to compare models by.
"""

from typing import Any

from table import markdown
from torch.nn import functional

from benchmarks.studies.framework import COLOURS, Record, gain, new_figure, spread, values, verdict
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training
from fastsam import analysis

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "noise": 0.0, "eigenvalues": 2, "points": 21}
QUICK = {"seeds": 2, "eigenvalues": 1}
THEIRS = (
    (
        "a wide residual network on CIFAR-10: the Hessian's eigenvalues at the end",
        "the largest is much smaller after SAM",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), section 4.2",
    ),
)
MEASURED = {
    "test": "test accuracy, %",
    "loss": "training loss",
    "eigenvalue": "largest eigenvalue",
    "ratio": "first / second eigenvalue",
    "trace": "trace",
    "sharpness": "sharpness, rho 0.5",
    "random": "in random directions, rho 2",
    "adaptive": "adaptive, rho 1",
}


def run(settings: dict[str, Any]) -> list[Record]:
    """Train both, then measure."""
    records = []
    for seed in seeds(settings):
        for method in (SGD, SAM):
            trained = training(settings, seed, method, settings["noise"]).run()
            what = trained.model, functional.cross_entropy, trained.task.train
            top = analysis.top_eigenvalues(*what, settings["eigenvalues"], tolerance=1e-2)
            scan = analysis.landscape(*what, points=settings["points"], distance=0.5, seed=seed)
            record = {"method": method, "seed": seed, **trained.found(), "loss": scan.loss}
            record |= {"eigenvalue": top.values[0].item(), "ratio": None}
            if len(top.values) > 1:
                record["ratio"] = (top.values[0] / top.values[1]).item()
            record["trace"] = analysis.trace(*what, products=30, seed=seed)
            record["sharpness"] = analysis.sharpness(*what, 0.5).value
            record["random"] = analysis.sharpness(*what, 2.0, direction="random", draws=10, seed=seed).value
            record["adaptive"] = analysis.sharpness(*what, 1.0, adaptive=True).value
            record |= {"x": scan.x.tolist(), "line": scan.losses.tolist()}
            if seed == settings["first_seed"]:
                found = analysis.spectrum(*what, lanczos_vectors=40, points=256, seed=seed)
                record |= {"grid": found.grid.tolist(), "density": found.density.tolist()}
            records.append(record)
    return records


def report(document: dict[str, Any]) -> str:
    """Everything that was measured, of both."""
    rows = []
    for field, name in MEASURED.items():
        sgd, sam = (values(document["records"], field, method=method) for method in (SGD, SAM))
        if any(value != value for value in sgd + sam):  # not measured
            continue
        mean, error = gain(sam, sgd)
        says = {"a gain": "higher with SAM", "a loss": "lower with SAM"}.get(verdict(sam, sgd), verdict(sam, sgd))
        rows.append([name, spread(sgd, 3), spread(sam, 3), f"{mean:+.3f} ± {error:.3f}".replace(" ± nan", ""), says])
    text = f"{document['settings']['seeds']} seeds, mean and standard deviation; differences are of equal seeds."
    return markdown(["", SGD, SAM, "difference", "which is"], rows) + "\n\n" + text


def plot(document: dict[str, Any]) -> Any:
    """The density of the eigenvalues, and the loss around the weights."""
    figure, (left, right) = new_figure(2)
    for colour, method in zip(COLOURS, (SGD, SAM), strict=False):
        mine = [record for record in document["records"] if record["method"] == method]
        (with_density,) = (record for record in mine if "density" in record)
        found = analysis.Spectrum(*(analysis.extras.np.array(with_density[key]) for key in ("grid", "density")))
        left.plot(found.grid, found.density.clip(1e-5), color=colour, lw=1.5, label=method)
        for record in mine:
            label = method if record is mine[0] else None
            right.plot(record["x"], record["line"], color=colour, lw=1.2, alpha=0.8, label=label)
    left.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
    right.set(xlabel="filter-normalised distance from the weights", ylabel="training loss", yscale="log")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return figure
