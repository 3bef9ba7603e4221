"""What the measurements give: small records of numbers and numpy arrays, saved as JSON or npz."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
R = TypeVar("R", bound="Result")


@dataclass(frozen=True)
class Result:
    """A record that can be saved and loaded: `result.save("x.json")`, `Sharpness.load("x.json")`."""

    def save(self, path: str | Path) -> Path:
        """Write it.

        Args:
            path: ends in .json (to be read by others; infinities and NaN are strings there) or .npz (small).

        Returns:
            The path.

        Raises:
            ValueError: another ending.
        """
        path, values = Path(path), {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if value is not None}
        if _is_json(path):
            path.write_text(json.dumps({name: _encoded(value) for name, value in values.items()}) + "\n")
        else:
            np.savez_compressed(path, **values)
        return path

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` of the same class wrote.

        Raises:
            ValueError: an ending that `save` does not write.
        """
        path = Path(path)
        if _is_json(path):
            values = {name: _decoded(value) for name, value in json.loads(path.read_text()).items()}
        else:
            with np.load(path) as file:
                values = {name: file[name] if file[name].ndim else file[name].item() for name in file.files}
        return cls(**values)


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"fastsam.analysis: results are saved as .json or .npz, got {path.name!r}")
    return path.suffix == ".json"


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        numbers = (
            value.tolist() if value.dtype != np.float64 or np.isfinite(value).all() else value.astype(str).tolist()
        )
        return {"dtype": value.dtype.name, "values": numbers}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return np.array(value["values"], dtype=value["dtype"])
    return float(value) if value in ("nan", "inf", "-inf") else value


@dataclass(frozen=True)
class Sharpness(Result):
    """By how much the loss rises within a distance of the weights.

    Attributes:
        rho: the distance.
        direction: "gradient" or "random".
        adaptive: whether the distance is in units of the weights.
        loss: L(w), over all data.
        before: [n], the losses at w of what was perturbed for: all data, or each group of m samples.
        after: [n], the same at w + e.
        weights: [n], how much each counts; they sum up to 1.
    """

    rho: float
    direction: str
    adaptive: bool
    loss: float
    before: Array
    after: Array
    weights: Array

    @property
    def value(self) -> float:
        """The mean rise: the sharpness."""
        return float(np.sum((self.after - self.before) * self.weights))

    @property
    def highest(self) -> float:
        """The highest loss found at a distance of rho."""
        return float(np.max(self.after))


@dataclass(frozen=True)
class Eigenvalues(Result):
    """The Hessian's eigenvalues of largest magnitude.

    Attributes:
        values: [k], in the order found: by falling magnitude.
        vectors: [k, n] float32 or float64, of length 1, over the parameters that require gradients, in their order.
        residuals: [k], |H v - value v|: no further is an eigenvalue from each value.
        iterations: [k], products with the Hessian.
        converged: [k], whether the residual came below the tolerance.
    """

    values: Array
    vectors: NDArray[Any]
    residuals: Array
    iterations: NDArray[np.int64]
    converged: NDArray[np.bool_]


@dataclass(frozen=True)
class Spectrum(Result):
    """The density of the Hessian's eigenvalues.

    Attributes:
        grid: [points], eigenvalues.
        density: [points]; its integral is 1.
    """

    grid: Array
    density: Array


@dataclass(frozen=True)
class Landscape(Result):
    """The loss along one or two directions, or between two models.

    Attributes:
        kind: "random", "hessian", "given" or "interpolation".
        x: [n], where along the first direction.
        losses: [n], or [n, m] with the second direction along the columns.
        y: [m], where along the second direction, or None.
        loss: at the model itself; of an interpolation at its start.
    """

    kind: str
    x: Array
    losses: Array
    loss: float
    y: Array | None = None
