"""GSAM: the surrogate gap is made smaller, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_range
from fastsam.optimizer import FusedSAM


class GSAM(FusedSAM):
    """GSAM (Zhuang et al., arXiv 2203.08065): SAM's gradient less what of g1 is orthogonal to it.

        climb along g1; step with g2 - alpha (g1 - (<g1,g2> / |g2|^2) g2)

    That is (1 + alpha <g1,g2> / |g2|^2) g2 - alpha g1. Two passes a step; memory: one copy of the weights beside
    SAM's. Where a product is 0 or not finite it steps with g2. The paper ties rho to the learning rate: `RhoFollowsLR`.

    With DistributedDataParallel the first pass must be synchronised (no `no_sync`): g1 is part of the update.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM.
        alpha: the share of g1's orthogonal part, >= 0; 0 is SAM. The paper has 0.4 for ViT-S/32 and ViT-B/16, 0.6 for
            ViT-B/32, 1 for ViT-S/16 and 0.01 for ResNet-50.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("alpha",)

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        alpha: float = 0.4,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.alpha = check_range("GSAM", "alpha", alpha, 0.0)
        super().__init__(params, base_optimizer, rho, **kwargs)

    def ascent(self, g1: Vector) -> Vector:
        """Climb along g1, and keep it."""
        self.keep(g1)
        return g1

    def descent(self, g2: Vector) -> Vector:
        """Step with (1 + alpha <g1,g2> / |g2|^2) g2 - alpha g1."""
        g1 = self.direction("kept")
        d = self.dot(g1, g2)
        ok = d.finite & (d.bb > 0)
        return self.combine(g1, (pick(ok, 1 + self.alpha * d.ab / d.bb, 1.0), g2), (pick(ok, -self.alpha, 0.0), g1))


class RhoFollowsLR:
    """Ties rho to the learning rate: rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min), in each group.

    GSAM's schedule (arXiv 2203.08065, section 4.3). Call `step()` after that of the scheduler of the learning rate.
    Nothing of it needs saving: rho and lr are in the parameter groups.

    Args:
        optimizer: a FusedSAM or one of `fastsam.methods`.
        rho_max: rho where the learning rate is lr_max.
        rho_min: rho where it is lr_min.
        lr_max: the largest learning rate; that of the first group now, by default.
        lr_min: the least.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho_max: float,
        rho_min: float = 0.0,
        *,
        lr_max: float | None = None,
        lr_min: float = 0.0,
    ) -> None:
        """Set rho for the learning rates of now."""
        self.optimizer = optimizer
        lr_max = float(optimizer.param_groups[0]["lr"]) if lr_max is None else lr_max
        if not 0 <= rho_min <= rho_max or not lr_min < lr_max:
            raise ValueError(
                "RhoFollowsLR: 0 <= rho_min <= rho_max and lr_min < lr_max must hold, got rho_min="
                f"{rho_min!r}, rho_max={rho_max!r}, lr_min={lr_min!r}, lr_max={lr_max!r}"
            )
        self.rho_min, self.rho_max, self.lr_min, self.lr_max = rho_min, rho_max, lr_min, lr_max
        self.step()

    def step(self) -> None:
        """Set rho for the learning rates of now; a learning rate out of range counts as its end."""
        for group in self.optimizer.param_groups:
            share = (float(group["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
            group["rho"] = self.rho_min + (self.rho_max - self.rho_min) * min(max(share, 0.0), 1.0)
