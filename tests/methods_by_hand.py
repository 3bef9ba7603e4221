"""The methods of the SAM family by hand, from their formulas around torch.optim; this shares no code with fastsam.

Vectors are dicts from a parameter to a tensor; a parameter without a gradient is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Vector = dict[Tensor, Tensor]


def dot(a: Vector, b: Vector) -> float:
    return float(
        sum(
            (torch.view_as_real(a[p]) * torch.view_as_real(b[p])).sum() if a[p].is_complex() else (a[p] * b[p]).sum()
            for p in a
            if p in b
        )
    )


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def add(*terms: tuple[float, Vector]) -> Vector:
    """The sum of c x, in the parameters that any of them has."""
    total: Vector = {}
    for c, x in terms:
        for p, value in x.items():
            total[p] = total[p] + c * value if p in total else c * value
    return total


def only(x: Vector, there: Vector) -> Vector:
    return {p: x[p] for p in x if p in there}


class ByHand:
    """SAM itself; methods override `ascent`, `descent`, `radius`, `one_pass` and `after`."""

    def __init__(self, groups: list[dict[str, Any]], base: type[torch.optim.Optimizer], rho: float, **options: Any):
        self.rho, self.t = rho, -1
        self.not_perturbed = {p for group in groups for p in group["params"] if not group.get("perturb", True)}
        self.base = base([{k: v for k, v in g.items() if k != "perturb"} for g in groups], **options)

    def ascent(self, g1: Vector) -> Vector:
        return g1

    def descent(self, g2: Vector) -> Vector:
        return g2

    def one_pass(self) -> bool:
        return False

    def plain(self, g: Vector) -> Vector:
        return g

    def divisor(self, d: Vector, g1: Vector) -> float:
        return norm(d)

    def length(self, n: float) -> float:
        return self.rho

    def after(self, old: Vector) -> None:
        pass

    @torch.no_grad()
    def step(self, gradient: Callable[[int], Vector]) -> None:
        """One step; `gradient(k)` gives the gradient of pass k at the weights of now."""
        self.t += 1
        if self.one_pass():
            self._base_step(self.plain(gradient(1)))
            return
        self.g1 = gradient(1)
        g1 = {p: g for p, g in self.g1.items() if p not in self.not_perturbed}
        d = only(self.ascent(g1), g1)
        n = self.divisor(d, g1)
        old = {p: p.clone() for p in d}
        if n > 0:
            for p, value in d.items():
                p.add_(value * (self.length(n) / n))
        self.g2 = gradient(2)
        for p, value in old.items():
            p.copy_(value)
        self._base_step(only(self.descent(self.g2), self.g2))
        self.after(old)

    def _base_step(self, g: Vector) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = g.get(p)
        self.base.step()

    def lr(self, p: Tensor) -> float:
        return next(float(g["lr"]) for g in self.base.param_groups if any(p is q for q in g["params"]))


class GSAM(ByHand):
    alpha = 0.3

    def descent(self, g2: Vector) -> Vector:
        """g2 - alpha (g1 - its part along g2)."""
        unit = add((1 / norm(g2), g2))
        orthogonal = add((1.0, self.g1), (-dot(self.g1, unit), unit))
        return add((1.0, g2), (-self.alpha, orthogonal))


class WSAM(ByHand):
    gamma, decoupled = 0.8, True

    def descent(self, g2: Vector) -> Vector:
        a = self.gamma / (1 - self.gamma)
        if self.decoupled:
            return {p: self.g1.get(p, torch.zeros_like(g2[p])) for p in g2}
        return add((a, g2), (1 - a, self.g1))

    def after(self, old: Vector) -> None:
        a = self.gamma / (1 - self.gamma)
        for p in self.g2 if self.decoupled else ():
            p.sub_(self.lr(p) * a * (self.g2[p] - self.g1.get(p, torch.zeros_like(p))))


class CoupledWSAM(WSAM):
    decoupled = False


class LookSAM(ByHand):
    k, alpha = 3, 0.6

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.d: Vector = {}

    def one_pass(self) -> bool:
        return self.t % self.k != 0

    def descent(self, g2: Vector) -> Vector:
        n1, n2 = norm(self.g1), norm(g2)
        cosine = dot(self.g1, g2) / (n1 * n2)
        self.d = {**self.d, **only(add((1.0, g2), (-n2 * cosine / n1, self.g1)), g2)}
        return g2

    def plain(self, g: Vector) -> Vector:
        return only(add((1.0, g), (self.alpha * norm(g) / norm(self.d), self.d)), g)


class LookLayerSAM(LookSAM):
    def ascent(self, g1: Vector) -> Vector:
        return {
            p: torch.linalg.vector_norm(p) / torch.linalg.vector_norm(g) * g if g.numel() and g.any() else 0 * g
            for p, g in g1.items()
        }

    def length(self, n: float) -> float:
        return self.rho * n


class FriendlySAM(ByHand):
    sigma, lmbda = 0.7, 0.8

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.m: Vector = {}

    def ascent(self, g1: Vector) -> Vector:
        d = {p: g - self.sigma * self.m[p] if p in self.m else g for p, g in g1.items()}
        for p, g in g1.items():
            self.m[p] = self.lmbda * self.m[p] + (1 - self.lmbda) * g if p in self.m else g.clone()
        return d


class VaSSO(ByHand):
    theta = 0.35

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.m: Vector = {}

    def ascent(self, g1: Vector) -> Vector:
        for p, g in g1.items():
            self.m[p] = (1 - self.theta) * self.m[p] + self.theta * g if p in self.m else g.clone()
        return self.m


class Unnormalized(ByHand):
    def length(self, n: float) -> float:
        return self.rho * n


class Mixed(ByHand):
    share = 0.3

    def length(self, n: float) -> float:
        return self.rho * ((1 - self.share) * n + self.share)


class LossBudget(ByHand):
    sigma = 0.4

    def length(self, n: float) -> float:
        return min(self.sigma / n, self.rho)


class StableSAM(ByHand):
    def descent(self, g2: Vector) -> Vector:
        return add((norm(self.g1) / norm(g2), g2))


class Preconditioned(ByHand):
    def ascent(self, g1: Vector) -> Vector:
        d = {}
        for group in self.base.param_groups:
            for p in group["params"]:
                if p in g1:
                    state = self.base.state.get(p)
                    if not state:
                        d[p] = g1[p]
                        continue
                    v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                    d[p] = g1[p] / (v.sqrt() + group["eps"])
        return d

    def divisor(self, d: Vector, g1: Vector) -> float:
        return math.sqrt(dot(d, g1))


class MSAM(ByHand):
    """One pass; `step` is called with the gradient of pass 1 at the perturbed weights."""

    momentum = "momentum_buffer"

    @torch.no_grad()
    def step(self, gradient: Callable[[int], Vector]) -> None:
        v = {
            p: s[self.momentum]
            for p, s in self.base.state.items()
            if s.get(self.momentum) is not None and p not in self.not_perturbed
        }
        old = {p: p.clone() for p in v}
        n = norm(v)
        for p, value in v.items():
            p.sub_(value * (self.rho / n))
        g = gradient(1)
        for p, value in old.items():
            p.copy_(value)
        self._base_step(g)


class Masked(ByHand):
    """ESAM's weight part and Sparse SAM, with the mask that was drawn or kept."""

    over_all, share = (
        False,
        1.0,
    )  # whether the norm is over all elements; the share that is kept, if rho is divided by it
    mask: Vector

    def ascent(self, g1: Vector) -> Vector:
        return {p: g * self.mask[p] for p, g in g1.items()}

    def divisor(self, d: Vector, g1: Vector) -> float:
        return norm(g1) if self.over_all else norm(d)

    def length(self, n: float) -> float:
        return self.rho / self.share
