"""GSAM: the surrogate gap is made smaller, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_range
from fastsam.optimizer import FusedSAM


class GSAM(FusedSAM):
    """GSAM (Zhuang et al., arXiv 2203.08065): SAM's gradient less what of g1 is orthogonal to it.

        climb along g1; step with g2 - alpha (g1 - (<g1,g2> / |g2|^2) g2)

    That is `(1 + alpha <g1,g2> / |g2|^2) g2 - alpha g1`. Two passes a step; memory: one copy of the weights beside
    SAM's. Where a product is 0 or not finite it steps with g2. The paper ties rho to the learning rate:
    `fastsam.schedules.RhoFollowsLR`.

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
        """Step with `(1 + alpha <g1,g2> / |g2|^2) g2 - alpha g1`."""
        g1 = self.direction("kept")
        d = self.dot(g1, g2)
        ok = d.finite & (d.bb > 0)
        return self.combine(g1, (pick(ok, 1 + self.alpha * d.ab / d.bb, 1.0), g2), (pick(ok, -self.alpha, 0.0), g1))
