"""Pictures of results. Each function returns a matplotlib Figure: `figure.savefig("x.png")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsam.analysis.extras import np, require
from fastsam.analysis.results import Landscape, Sharpness, Spectrum

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plot_landscape(
    scans: Landscape | Mapping[str, Landscape], *, surface: bool = False, log: bool = False, axes: Any = None
) -> Any:
    """One or several scans: lines in one picture, or contours (a surface each, if asked for) side by side.

    Args:
        scans: a scan, or several by name, all of one or all of two dimensions.
        surface: draw scans of two dimensions as surfaces.
        log: a logarithmic axis, or logarithmically spaced contours.
        axes: matplotlib Axes to draw lines into.

    Raises:
        ValueError: scans of one and of two dimensions together.
    """
    named = {"": scans} if isinstance(scans, Landscape) else dict(scans)
    if len({scan.y is None for scan in named.values()}) != 1:
        raise ValueError("plot_landscape: give scans of one dimension or of two, not both")
    if next(iter(named.values())).y is not None:
        return _contours(named, surface, log)
    axes = _axes(axes)
    for colour, (name, scan) in zip(_colours(len(named)), named.items(), strict=True):
        axes.plot(scan.x, scan.losses, color=colour, lw=1.8, label=name)
    between = next(iter(named.values())).kind == "interpolation"
    axes.set(xlabel="from start (0) to end (1)" if between else "distance along the direction", ylabel="loss")
    axes.set_yscale("log" if log else "linear")
    return _finished(axes, named)


def _contours(named: Mapping[str, Landscape], surface: bool, log: bool) -> Any:
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(named), 4.4), dpi=110, layout="constrained")
    finite = np.concatenate([scan.losses[np.isfinite(scan.losses)] for scan in named.values()])
    low, high = float(finite.min()), float(finite.max())
    spaced = np.geomspace(max(low, 1e-8), max(high, 2e-8), 21) if log else np.linspace(low, high + 1e-12, 21)
    for i, (name, scan) in enumerate(named.items()):
        axes: Any = figure.add_subplot(1, len(named), i + 1, projection="3d" if surface else None)
        x, y = np.meshgrid(scan.x, scan.y, indexing="ij")
        if surface:
            axes.plot_surface(x, y, scan.losses, cmap="viridis", vmin=low, vmax=high)
            axes.set(zlim=(low, high), zlabel="loss")
        else:
            filled = axes.contourf(x, y, scan.losses, levels=spaced, cmap="viridis", extend="both")
            axes.contour(x, y, scan.losses, levels=spaced[::2], colors="white", linewidths=0.4, alpha=0.6)
            axes.plot(0, 0, "+", color="white", ms=9)
            axes.set_aspect("equal")
            if i == len(named) - 1:
                figure.colorbar(filled, ax=axes, label="loss", format="%.3g")
        axes.set(xlabel="first direction", ylabel="second direction", title=name)
    return figure


def plot_spectrum(spectra: Spectrum | Mapping[str, Spectrum], *, floor: float = 1e-6, axes: Any = None) -> Any:
    """Densities of eigenvalues, on a logarithmic axis.

    Args:
        spectra: one, or several by name.
        floor: the lowest density that is shown.
        axes: matplotlib Axes to draw into.
    """
    named = {"": spectra} if isinstance(spectra, Spectrum) else dict(spectra)
    axes = _axes(axes)
    for colour, (name, found) in zip(_colours(len(named)), named.items(), strict=True):
        axes.plot(found.grid, np.maximum(found.density, floor), color=colour, lw=1.5, label=name)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
    axes.set_ylim(bottom=floor)
    return _finished(axes, named)


def plot_sharpness(measured: Mapping[str, Sequence[Sharpness]], *, axes: Any = None) -> Any:
    """The rise of the loss by distance.

    Args:
        measured: by name, sharpness at several rho.
        axes: matplotlib Axes to draw into.
    """
    axes = _axes(axes)
    for colour, (name, found) in zip(_colours(len(measured)), measured.items(), strict=True):
        ordered = sorted(found, key=lambda result: result.rho)
        axes.plot([r.rho for r in ordered], [r.value for r in ordered], "o-", color=colour, lw=1.8, ms=4, label=name)
    axes.set(xlabel="rho", ylabel="sharpness: rise of the loss")
    return _finished(axes, measured)


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    require("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, 3.8), dpi=110, layout="constrained").add_subplot()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _finished(axes: Any, named: Mapping[str, Any]) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8", lw=0.8)
    axes.set_axisbelow(True)
    if any(named):
        axes.legend(frameon=False)
    return axes.figure
