"""Friendly SAM: climb along the noise of the batch's gradient, not along what all batches share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_no_decay, check_range
from fastsam.optimizer import FusedSAM


class FriendlySAM(FusedSAM):
    """Friendly SAM (Li et al., arXiv 2403.12350): the average of the gradients so far is left out of the perturbation.

        climb along g1 - sigma m; then m <- lmbda m + (1 - lmbda) g1; step with g2

    A parameter's m begins with its first g1, along which it climbs. Two passes a step; memory: two copies of the
    weights beside SAM's, of which m is saved, as `state[p]["grad_ema"]`. A first pass that overflows leaves m alone.
    Under a GradScaler: `first_step(zero_grad=True, scaler=scaler)`, as m averages steps of different loss scales.

    With DistributedDataParallel the first pass must be synchronised (no `no_sync`), or each rank's m is its own.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM; the paper's code has 0.2 for CIFAR-100.
        sigma: the share of m that is left out, >= 0; 0 is SAM.
        lmbda: the decay of m, in [0, 1); the paper's code has 0.6 for ResNet-18, and 0.9 or 0.95.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("sigma", "lmbda")
    buffers = {"grad_ema": None}
    mixes_steps = True

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.sigma = check_range("FriendlySAM", "sigma", sigma, 0.0)
        self.lmbda = check_range("FriendlySAM", "lmbda", lmbda, 0.0, 1.0)
        check_no_decay("FriendlySAM", kwargs.get("perturb_with_weight_decay", False), "an average of gradients")
        super().__init__(params, base_optimizer, rho, **kwargs)

    def ascent(self, g1: Vector) -> Vector:
        """Climb along g1 - sigma m, with the m of before; then m <- lmbda m + (1 - lmbda) g1."""
        m, scale = self.direction("grad_ema"), self.loss_scale
        known = self.dot(g1, m)
        finite, begins = known.aa.isfinite(), known.bb == 0
        out = self.combine("ascent", (1.0, g1), (-self.sigma * scale, m))
        share = pick(begins, 1.0, 1 - self.lmbda) / scale
        begun = pick(finite, 1.0, 0.0) / scale
        self.combine(m, (pick(finite, self.lmbda, 1.0), m), (pick(finite, share, 0.0), g1), first=(begun, g1))
        return out
