"""How long the perturbation is where that is not rho throughout: `FusedSAM(..., radius=unnormalized())`.

A rule says the length rho_t from rho and n, the norm of the gradients at w (of T g in ASAM): e = rho_t g / n. With rho
of several groups, that of the first one which is perturbed, by more than 0, is asked for, and the others' share is
theirs to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsam.ops import numbers


class Radius:
    """A rule for the length of the perturbation; a user's own is made as `Radius(lambda n, rho: ..., "its name")`."""

    def __init__(
        self, length: Callable[[Tensor, float], Tensor | float], name: str = "Radius", measures: bool = True
    ) -> None:
        """`length(n, rho)` gives rho_t >= 0 for n, [] float64 on the device, and must not read it back.

        `measures` says whether rho_t depends on n, so that a GradScaler's scale must be known.
        """
        self.length, self._name, self.measures = length, name, measures

    def __repr__(self) -> str:
        """Its name."""
        return self._name

    def map(self, squares: Tensor, loss_scale: float | Tensor, rho: float) -> Tensor:
        """[] float64: (rho n / rho_t)^2, by whose root rho g is divided; `squares` itself where it is not finite.

        Args:
            squares: [] float64, the squared norm of the gradients.
            loss_scale: what these are multiplied by.
            rho: the radius of the groups.
        """
        n = squares.sqrt()
        length = numbers.number_on(n.device, self.length(n / loss_scale, rho))
        mapped = (rho * n / length).square()
        return torch.where(mapped.isfinite(), mapped, squares)


class _Unnormalized(Radius):
    def __init__(self) -> None:
        super().__init__(self._length, "unnormalized()")

    def _length(self, n: Tensor, rho: float) -> Tensor:
        return rho * n


class _Mixed(Radius):
    def __init__(self, share: float) -> None:
        self.share = share
        super().__init__(self._length, f"mixed({share})")

    def _length(self, n: Tensor, rho: float) -> Tensor:
        return rho * ((1 - self.share) * n + self.share)


class _LossBudget(Radius):
    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        super().__init__(self._length, f"loss_budget({sigma})")

    def _length(self, n: Tensor, rho: float) -> Tensor:
        return (self.sigma / n).clamp(max=rho)


def unnormalized() -> Radius:
    """Climb by e = rho g: rho_t = rho n. Un-normalised SAM (Andriushchenko and Flammarion, arXiv 2206.06232).

    Then rho is no length. It needs a smaller or larger rho than SAM does, by the length of the gradients.

    Returns:
        What `FusedSAM(..., radius=...)` takes.
    """
    return _Unnormalized()


def mixed(share: float) -> Radius:
    """Between un-normalised SAM (share 0) and SAM (share 1): rho_t = rho ((1 - share) n + share); arXiv 2503.02225.

    Args:
        share: of SAM, in [0, 1].

    Returns:
        What `FusedSAM(..., radius=...)` takes.

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"fastsam.radius: share must be in [0, 1], got {share!r}")
    return _Mixed(float(share))


def loss_budget(sigma: float) -> Radius:
    """A fixed rise of the loss, to first order, instead of a fixed radius: rho_t = min(sigma / n, rho).

    LE-SAM, arXiv 2605.10183; rho is the longest that a perturbation may be.

    Args:
        sigma: the rise of the loss, in its own units, > 0.

    Returns:
        What `FusedSAM(..., radius=...)` takes.

    Raises:
        ValueError: `sigma` is out of range.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(f"fastsam.radius: sigma must be > 0, got {sigma!r}")
    return _LossBudget(float(sigma))
