"""Two functions of two variables: where SGD, Adam and Adagrad go, with SAM around them and without.

Easom's function is flat but for one hole at (pi, pi), where it is -1. Eggholder has hundreds of valleys; the lowest,
-959.64, is at (512, 404.23). The picture has one start on each, chosen on Eggholder so that SAM makes a difference; the
table has random starts, near the hole (further away its gradient is nothing) and all over Eggholder, and says how often
SAM makes a good one. Its radius is in the units of the function: about a third of the hole's width on Easom, a tenth of
a valley's on Eggholder. Crosses are starts, dots ends without SAM, stars ends with it.

There is no data here, so nothing generalises. What the pictures show is how SAM moves: it does not stop where the
gradient is zero but keeps crossing the bottom at a distance of about rho, and leaves valleys narrower than that, for
better or worse.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.framework import COLOURS, Record, gain, markdown, new_figure, spread, values
from fastsam import FusedSAM

DEFAULTS = {"starts": 30, "steps": 150, "seed": 0}
QUICK = {"starts": 6}
THEIRS: tuple[tuple[str, str, str], ...] = ()
BASES = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "Adagrad": torch.optim.Adagrad}


def easom(x: Tensor, y: Tensor) -> Tensor:
    """-cos x cos y exp(-(x - pi)^2 - (y - pi)^2)."""
    return -x.cos() * y.cos() * (-((x - torch.pi) ** 2) - (y - torch.pi) ** 2).exp()


def eggholder(x: Tensor, y: Tensor) -> Tensor:
    """-(y + 47) sin sqrt|x/2 + y + 47| - x sin sqrt|x - y - 47|."""
    return -(y + 47) * (x / 2 + y + 47).abs().sqrt().sin() - x * (x - y - 47).abs().sqrt().sin()


FUNCTIONS: dict[str, dict[str, Any]] = {
    "Easom": {
        "f": easom,
        "rho": 0.3,
        "lr": {"SGD": 0.1, "Adam": 0.05, "Adagrad": 0.2},
        "start": (1.7, 2.1),
        "box": (1.2, 5.1),
        "from": (1.6, 4.7),
        "view": ((1.2, 5.1), (1.2, 5.1)),
        "lowest": -1.0,
    },
    "Eggholder": {
        "f": eggholder,
        "rho": 15.0,
        "lr": {"SGD": 2.0, "Adam": 4.0, "Adagrad": 20.0},
        "start": (-424.0, 270.0),
        "box": (-512, 512),
        "from": (-450, 450),
        "view": ((-512, -300), (180, 470)),
        "lowest": -959.6407,
    },
}


def descend(function: dict[str, Any], base: str, rho: float, start: tuple[float, float], steps: int) -> list[Any]:
    """The path, [steps + 1] pairs; it stays within the function's box."""
    point = torch.tensor(start, requires_grad=True)
    options = {"lr": function["lr"][base]}
    optimizer = FusedSAM([point], BASES[base], rho=rho, **options) if rho else BASES[base]([point], **options)
    path = [point.tolist()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function["f"](*point)
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)
        with torch.no_grad():
            point.clamp_(*function["box"])
        path.append(point.tolist())
    return path


def run(settings: dict[str, Any]) -> list[Record]:
    """The path of the picture, and the ends from random starts."""
    records = []
    for name, function in FUNCTIONS.items():
        generator = torch.Generator().manual_seed(settings["seed"])
        low, high = function["from"]
        starts = torch.rand(settings["starts"], 2, generator=generator) * (high - low) + low
        for base in BASES:
            for method, rho in ((base, 0.0), (f"{base} + SAM", function["rho"])):
                path = descend(function, base, rho, function["start"], settings["steps"])
                for seed, start in enumerate(starts.tolist()):
                    end = torch.tensor(descend(function, base, rho, start, settings["steps"])[-1])
                    value = float(function["f"](*end))
                    records.append({"function": name, "method": method, "seed": seed, "value": value})
                records.append({"function": name, "method": method, "seed": -1, "value": None, "path": path})
    return records


def report(document: dict[str, Any]) -> str:
    """Values at the end, from the random starts."""
    records, rows = [r for r in document["records"] if r["seed"] >= 0], []
    for name, function in FUNCTIONS.items():
        for base in BASES:
            alone, with_sam = (values(records, "value", function=name, method=m) for m in (base, f"{base} + SAM"))
            mean, error = gain(with_sam, alone)
            lower = sum(a < b - 1e-3 * abs(b) for a, b in zip(with_sam, alone, strict=True))
            higher = sum(a > b + 1e-3 * abs(b) for a, b in zip(with_sam, alone, strict=True))
            rows.append([name, f"{function['lowest']:g}", base, spread(alone), spread(with_sam)])
            rows[-1] += [f"{mean:+.3f} ± {error:.3f}", f"{lower}, {higher}"]
    header = ["function", "lowest value", "base optimizer", "alone", "with SAM", "difference", "SAM ends lower, higher"]
    count = document["settings"]["starts"]
    text = (
        f"Value after {document['settings']['steps']} steps, mean and standard deviation over {count} random starts; "
        "lower is better, and the difference is of equal starts, with its standard error."
    )
    return markdown(header, rows) + "\n\n" + text


def plot(document: dict[str, Any]) -> Any:
    """The paths over the functions' contours."""
    figure, all_axes = new_figure(2, 6.0, 5.2)
    for axes, (name, function) in zip(all_axes, FUNCTIONS.items(), strict=True):
        x, y = torch.meshgrid(*(torch.linspace(*ends, 201) for ends in function["view"]), indexing="ij")
        axes.contourf(x.numpy(), y.numpy(), function["f"](x, y).numpy(), levels=16, cmap="Greys_r", alpha=0.75)
        for i, base in enumerate(BASES):
            for method, style in ((base, "-"), (f"{base} + SAM", "--")):
                (path,) = (r["path"] for r in document["records"] if r["seed"] < 0 and r["method"] == method
                           and r["function"] == name)  # fmt: skip
                colour = COLOURS[(1, 2, 3)[i]]
                axes.plot(*zip(*path, strict=True), style, color=colour, lw=1.6, label=method)
                axes.plot(*path[-1], "o" if style == "-" else "*", color=colour, mec="white", ms=9)
        axes.plot(*function["start"], "X", color="black", mec="white", ms=9)
        axes.set(title=f"{name}, rho {function['rho']:g}", xlabel="x", ylabel="y")
        axes.set(xlim=function["view"][0], ylim=function["view"][1])
        axes.legend(fontsize=8, loc="upper right")
    return figure
