"""Significance: SGD with momentum against SAM over many seeds, in two sizes, with the cost in seconds.

Both train side by side, a step of one and a step of the other in turns, so that the ratio of their times (medians)
means something on a machine that others use, too. The t-tests (scipy) ask whether the difference of the mean test
accuracies may be chance: Welch's for two samples that are not paired, and the one for pairs of equal seeds, which knows
more. Equal epochs: SAM takes twice the passes; so SGD is given twice the epochs, too. The larger radius was chosen for
the wider network; in the narrow one it is too large, and SAM loses.
"""

from typing import Any

from table import markdown

from benchmarks.studies.framework import Record, draw, gain, new_figure, spread, values, verdict
from benchmarks.studies.training import DATA_OPTIONS, SAM, SGD, TRAINING, seeds, training

DEFAULTS = {**TRAINING, **DATA_OPTIONS, "seeds": 10, "widths": [8, 16], "noise": [0.0, 0.3], "radii": [0.2, 0.5]}
for unused in ("width", "rho"):
    DEFAULTS.pop(unused)
QUICK = {"seeds": 3}
LONGER = f"{SGD}, twice the epochs"
THEIRS = (
    (
        "CIFAR-10, WRN-28-10, 200 epochs: error of SAM, of SGD (better of 1x and 2x epochs); mean of 5",
        "2.7 %, 3.5 %",
        "Foret et al., [arXiv 2010.01412](https://arxiv.org/abs/2010.01412), table 1",
    ),
    (
        "ImageNet, ResNet-50: speed of SAM relative to SGD",
        "49.3 %",
        "Du et al., [arXiv 2205.14083](https://arxiv.org/abs/2205.14083), table 1",
    ),
    (
        "ResNet-20, CIFAR: SAM's time over SGD's (80 and 50 minutes)",
        "1.6",
        "README of moskomule's SAM in PyTorch's foreach functions",
    ),
)


def run(settings: dict[str, Any]) -> list[Record]:
    """All methods in turns, then SGD for twice the epochs."""
    radii = radii_of(settings)
    records = []
    for width in settings["widths"]:
        for noise in settings["noise"]:
            for seed in seeds(settings):
                sized = {**settings, "width": width}
                rivals = {SGD: training(sized, seed, SGD, noise)}
                rivals |= {name: training(sized, seed, SAM, noise, rho=rho) for name, rho in radii.items()}
                for index in range(len(rivals[SGD].batches)):
                    for each in rivals.values():
                        each.step(index)
                rivals[LONGER] = training({**sized, "epochs": 2 * settings["epochs"]}, seed, SGD, noise).run()
                for method, each in rivals.items():
                    found = each.found() | {"seconds": sum(each.times)}
                    records.append({"width": width, "noise": noise, "method": method, "seed": seed, **found})
    return records


def radii_of(settings: dict[str, Any]) -> dict[str, float]:
    """Each radius of SAM by the name of the method."""
    return {f"SAM, rho {rho:g}": rho for rho in settings["radii"]}


def report(document: dict[str, Any]) -> str:
    """Accuracies, ratios, and what the tests say."""
    from scipy.stats import ttest_ind, ttest_rel

    records, settings, rows, wins = document["records"], document["settings"], [], []
    radii = radii_of(settings)
    for width in settings["widths"]:
        for noise in settings["noise"]:
            where = {"width": width, "noise": noise}
            found = {m: {f: values(records, f, method=m, **where) for f in ("test", "train", "step_ms", "seconds")}
                     for m in (SGD, *radii, LONGER)}  # fmt: skip
            for method, mine in found.items():
                row = [f"{width}, {100 * noise:g} %", method, spread(mine["test"]), spread(mine["train"])]
                row.append(spread(mine["seconds"]))
                if method in radii:
                    ratios = [a / b for a, b in zip(mine["step_ms"], found[SGD]["step_ms"], strict=True)]
                    row.append(spread(ratios))
                else:
                    row.append("1" if method == SGD else "")
                if method == SGD:
                    rows.append([*row, "", "", ""])
                    continue
                mean, error = gain(mine["test"], found[SGD]["test"])
                p = [test(mine["test"], found[SGD]["test"], **options).pvalue
                     for test, options in ((ttest_ind, {"equal_var": False}), (ttest_rel, {}))]  # fmt: skip
                chances = ["-" if value != value else f"{value:.2g}" for value in p]  # NaN: all seeds alike
                rows.append([*row, f"{mean:+.2f} ± {error:.2f}", *chances])
            for name in radii:
                says = "; ".join(f"{verdict(found[name]['test'], found[r]['test'])} against {r}" for r in (SGD, LONGER))
                wins.append(f"- width {width}, {100 * noise:g} % wrong labels, {name}: {says}")
    header = ["width, wrong labels", "method", "test, %", "train, %", "seconds", "time of a step / SGD's, in turns"]
    header += ["minus SGD, points", "p (Welch)", "p (pairs)"]
    text = (
        f"{settings['seeds']} seeds, mean and standard deviation; training accuracy is on the labels that were "
        "learned. Seconds are wall time; the ratio is of steps in turns. Below: what the "
        "test of the pairs says, at 5 %."
    )
    return markdown(header, rows) + f"\n\n{text}\n\n" + "\n".join(wins)


def plot(document: dict[str, Any]) -> Any:
    """Test accuracies in each condition."""
    records = [{**r, "condition": f"width {r['width']},\n{100 * r['noise']:g} % wrong"} for r in document["records"]]
    figure, axes = new_figure(1, 7.0)
    draw(axes, records, "condition", "method", joined=False)
    axes.set(xlabel="")
    return figure
