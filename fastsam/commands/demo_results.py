"""What the demo makes of its runs: a table, a plot, files, and what they say."""

from __future__ import annotations

import csv
import json
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from fastsam.commands.demo_training import BATCH_SIZE, RADII, TRAIN_IMAGES, Run, Settings, Timing, backend_of, evaluated
from fastsam.commands.diagnosis import aligned


def spread(values: Sequence[float]) -> float:
    """Standard deviation, NaN for a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def summarise(runs: list[Run], timings: dict[str, Timing], settings: Settings) -> list[dict[str, Any]]:
    """One record for each condition and optimizer."""
    records = []
    for noise in settings.noise:
        by_method = {m: [run for run in runs if run.method == m and run.noise == noise] for m in settings.methods}
        base = by_method[settings.methods[0]]
        for method, mine in by_method.items():
            differences = [a.accuracy - b.accuracy for a, b in zip(mine, base, strict=True)]
            records.append(
                {
                    "noise": noise,
                    "optimizer": method,
                    "accuracy": fmean(run.accuracy for run in mine),
                    "accuracy_sd": spread([run.accuracy for run in mine]),
                    "gain": fmean(differences),
                    "gain_se": spread(differences) / math.sqrt(len(differences)),
                    "better": sum(d > 0 for d in differences),
                    "worse": sum(d < 0 for d in differences),
                    "loss": fmean(run.loss for run in mine),
                    "loss_perturbed": fmean(run.loss_perturbed for run in mine),
                    "step_ms": median(run.step_ms for run in mine),
                    "optimizer_ms": timings[method].ours,
                    "eager_ms": timings[method].eager,
                }
            )
    return records


def condition(noise: float) -> str:
    """The condition's name for readers."""
    return f"{100 * noise:g} % of the training labels wrong" if noise else "Clean training labels"


def verdict(record: dict[str, Any], base: str, seeds: int) -> str:
    """What the seeds say about one optimizer against the base; two standard errors are the bar."""
    gain, error = record["gain"], record["gain_se"]
    who = f"{record['optimizer']} against {base}: {gain:+.2f} points"
    if math.isnan(error):
        return f"{who}; one seed cannot tell"
    judgement = "no clear difference" if abs(gain) <= 2 * error else "a gain" if gain > 0 else "a loss"
    counts = f"better with {record['better']} and worse with {record['worse']} of {seeds} seeds"
    return f"{who}, standard error {error:.2f}, {counts}: {judgement}"


def report(records: list[dict[str, Any]], settings: Settings) -> str:
    """The table as text."""
    base = settings.methods[0]
    recipe = settings.recipe
    values = ", ".join(f"{k}={v:g}" for k, v in recipe.kwargs.items())
    lines = [
        f"scikit-learn digits, {TRAIN_IMAGES} training images, {settings.epochs} epochs in batches of {BATCH_SIZE}, "
        f"{recipe.label}({values}),",
        f"SAM rho={settings.rho:g}, ASAM rho={settings.asam_rho:g} eta={settings.asam_eta:g}; "
        f"fastsam backend {backend_of(settings)}, {settings.threads} thread{'s'[: settings.threads > 1]}",
        "",
    ]
    for noise in settings.noise:
        mine = [record for record in records if record["noise"] == noise]
        titles = "optimizer|test accuracy %|minus {}|loss at w|at w + e|step ms|optimizer ms|eager ms"
        rows = [titles.format(base).split("|")]
        for r in mine:
            timing = [f"{r['optimizer_ms']:.3f}", "" if math.isnan(r["eager_ms"]) else f"{r['eager_ms']:.3f}"]
            gain = "" if r["optimizer"] == base else f"{r['gain']:+.2f} +- {r['gain_se']:.2f}"
            accuracy = f"{r['accuracy']:.2f} +- {r['accuracy_sd']:.2f}"
            losses = [f"{r['loss']:.3f}", f"{r['loss_perturbed']:.3f}"]
            rows.append([r["optimizer"], accuracy, gain, *losses, f"{r['step_ms']:.2f}", *timing])
        lines += [condition(noise), *("  " + line for line in aligned(rows, right=range(1, 8))), ""]
        lines += [f"  {verdict(r, base, settings.seeds)}" for r in mine if r["optimizer"] != base]
        lines += [""]
    ratios = {r["optimizer"]: r["eager_ms"] / r["optimizer_ms"] for r in records if r["optimizer"] != base}
    notes = [
        f"Test accuracy: mean and standard deviation over {settings.seeds} seeds; minus {base}: mean of the paired "
        "differences and its standard error.",
        f"Loss: on the training images and labels; e is plain SAM's perturbation, {settings.rho:g} long, for every "
        "optimizer: a large rise is a sharp minimum.",
        "Times: medians. SAM and ASAM take two passes a step, so that equal epochs are about twice the time. "
        f"Optimizer: what a step takes outside the passes ({base}: by itself); eager: the same algorithm one tensor "
        "and one operation at a time, in turns on the same gradients. Eager / fastsam: "
        + ", ".join(f"{method} {ratio:.1f}x" for method, ratio in ratios.items())
        + ".",
    ]
    lines += [textwrap.fill(note, 110) for note in notes]
    return "\n".join(lines).replace(" +- nan", "")


def plot(runs: list[Run], settings: Settings, path: Path) -> None:
    """One row a condition: accuracy by epoch, accuracy by seed, loss along the perturbation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Okabe and Ito's palette, told apart with any colour vision; and a marker each.
    looks = dict(zip(settings.methods, (("#4d4d4d", "o"), ("#0072b2", "s"), ("#d55e00", "^")), strict=True))
    rows = len(settings.noise)
    figure = Figure(figsize=(12, 0.9 + 3.3 * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False, width_ratios=(1.15, 0.85, 1.15))
    radii = [2 * settings.rho * i / (RADII - 1) for i in range(RADII)]
    epochs = evaluated(settings.epochs)
    for noise, (curves, pairs, path_axes) in zip(settings.noise, axes, strict=True):
        finals = []
        for method, (colour, marker) in looks.items():
            mine = [run for run in runs if run.method == method and run.noise == noise]
            finals.append([run.accuracy for run in mine])
            _band(curves, epochs, [run.accuracies for run in mine], colour, method)
            _band(path_axes, radii, [run.losses for run in mine], colour, method)
            x = len(finals) - 1
            pairs.plot([x] * len(mine), finals[-1], marker, color=colour, ms=6, mec="white", mew=0.6, zorder=3)
            pairs.hlines(fmean(finals[-1]), x - 0.24, x + 0.24, color=colour, lw=2.2, zorder=2)
        pairs.plot(range(len(looks)), finals, color="#bbbbbb", lw=0.8, zorder=1)
        pairs.set_xticks(range(len(looks)), list(looks))
        pairs.set_xlim(-0.5, len(looks) - 0.5)
        curves.set(xlabel="epoch", ylabel="test accuracy (%)", title=condition(noise))
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        pairs.set(ylabel="test accuracy (%)", title="After training, lines join equal seeds")
        path_axes.set(
            xlabel="distance from w along its gradient", ylabel="training loss", title="Loss along SAM's perturbation"
        )
        path_axes.axvline(settings.rho, color="#888888", lw=0.9, ls=":", zorder=0)
        path_axes.annotate(r" $\rho$", (settings.rho, 1), xycoords=("data", "axes fraction"), va="top", color="#555555")
        low = min(min(run.accuracies[len(epochs) // 3 :]) for run in runs if run.noise == noise)
        curves.set_ylim(low - 0.1 * (100 - low), 100)
        curves.legend(frameon=False, loc="lower right")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e8e8e8", lw=0.8)
        ax.set_axisbelow(True)
        ax.title.set_fontsize(11)
    seeds = (
        f"mean of {settings.seeds} seeds, bands from the lowest to the highest" if settings.seeds > 1 else "one seed"
    )
    figure.suptitle(f"scikit-learn digits, {TRAIN_IMAGES} training images; {seeds}", fontsize=12)
    figure.savefig(path)


def _band(axes: Any, x: Sequence[float], series: list[list[float]], colour: str, label: str) -> None:
    """Mean over the seeds as a line, from the lowest to the highest as a band."""
    columns = list(zip(*series, strict=True))
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.13, lw=0)
    axes.plot(x, [fmean(c) for c in columns], "o-", color=colour, lw=1.8, ms=3, label=label)


def save(folder: Path, runs: list[Run], records: list[dict[str, Any]], text: str, settings: Settings) -> list[Path]:
    """Write table, results and plot; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("table.txt", "results.json", "runs.csv", "demo.png")]
    files[0].write_text(text + "\n", encoding="utf-8")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    recipe = {"optimizer": settings.recipe.label, **settings.recipe.kwargs, "batch_size": BATCH_SIZE}
    everything = {"settings": asdict(settings), "recipe": recipe, "versions": versions, "summary": records}
    everything["runs"] = [asdict(run) for run in runs]
    files[1].write_text(json.dumps(_without_nan(everything), indent=1) + "\n", encoding="utf-8")
    columns = ["noise", "method", "seed", "accuracy", "loss", "loss_perturbed", "step_ms"]
    with files[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(run) for run in runs)
    plot(runs, settings, files[3])
    return files


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# --- command line ----------------------------------------------------------------------------------------------------
