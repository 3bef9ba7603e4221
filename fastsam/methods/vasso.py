"""VaSSO: climb along an average of gradients, whose variance is smaller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_no_decay, check_range
from fastsam.optimizer import FusedSAM


class VaSSO(FusedSAM):
    """VaSSO (Li and Giannakis, arXiv 2309.15639): the perturbation follows an average of the gradients so far.

        m <- (1 - theta) m + theta g1; climb along m; step with g2

    A parameter's m begins with its first g1. Two passes a step; memory: one copy of the weights beside SAM's, which is
    saved, as `state[p]["grad_ema"]`. A first pass that overflows leaves m alone, and climbs along it. Under a
    GradScaler: `first_step(zero_grad=True, scaler=scaler)`, as m averages steps of different loss scales.

    With DistributedDataParallel the first pass must be synchronised (no `no_sync`), or each rank's m is its own.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM.
        theta: the share of g1, in (0, 1]; 1 is SAM. The paper's code has 0.4, 0.2 or 0.9 by task.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("theta",)
    buffers = {"grad_ema": None}
    mixes_steps = True

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        theta: float = 0.4,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.theta = check_range("VaSSO", "theta", theta, 0.0, 1.0)
        check_no_decay("VaSSO", kwargs.get("perturb_with_weight_decay", False), "an average of gradients")
        super().__init__(params, base_optimizer, rho, **kwargs)

    def ascent(self, g1: Vector) -> Vector:
        """Climb along m <- (1 - theta) m + theta g1."""
        m, scale = self.direction("grad_ema"), self.loss_scale
        known = self.dot(g1, m)
        finite, begins = known.aa.isfinite(), known.bb == 0
        share = pick(begins, 1.0, self.theta) / scale
        begun = pick(finite, 1.0, 0.0) / scale
        rest = pick(finite, 1 - self.theta, 1.0)
        self.combine(m, (rest, m), (pick(finite, share, 0.0), g1), first=(begun, g1))
        if self.radius is None or not self.radius.measures or not isinstance(scale, torch.Tensor):
            return m
        return self.combine("ascent", (scale, m))  # a radius measures what is multiplied by the loss scale
