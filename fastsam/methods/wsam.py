"""WSAM: the sharpness as a weighted term of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_range
from fastsam.optimizer import FusedSAM


class WSAM(FusedSAM):
    """WSAM (Yue et al., arXiv 2305.15817): the loss plus a = gamma / (1 - gamma) times the sharpness, L(w + e) - L(w).

        climb along g1; decoupled: the base optimizer steps with g1, then w <- w - lr a (g2 - g1)
                        coupled:   the base optimizer steps with a g2 + (1 - a) g1

    Decoupled, the sharpness bypasses momentum and the second moments. Two passes a step; memory: one copy of the
    weights beside SAM's, decoupled two. After an overflow in the first pass it steps with g2. Decoupled it cannot be
    captured in a CUDA graph.

    With DistributedDataParallel the first pass must be synchronised (no `no_sync`): g1 is part of the update.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM.
        gamma: the weight of the sharpness, in [0, 1); 0 is the base optimizer, 1/2 SAM (coupled). The paper finds 0.8
            to 0.95 good.
        decoupled: which form.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("gamma", "decoupled")

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        gamma: float = 0.9,
        decoupled: bool = True,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.gamma, self.decoupled = check_range("WSAM", "gamma", gamma, 0.0), bool(decoupled)
        if self.gamma >= 1:
            raise ValueError(f"WSAM: gamma must be in [0, 1), got {gamma!r}")
        super().__init__(params, base_optimizer, rho, **kwargs)

    def ascent(self, g1: Vector) -> Vector:
        """Climb along g1, and keep it."""
        self.keep(g1)
        return g1

    def descent(self, g2: Vector) -> Vector:
        """Decoupled: step with g1, and keep a (g2 - g1). Coupled: step with a g2 + (1 - a) g1."""
        a, g1 = self.gamma / (1 - self.gamma), self.direction("kept")
        ok = self.climbed if self._norm_is_of_all() else self.squared_norm(g1).isfinite()
        if not self.decoupled:
            return self.combine(g1, (pick(ok, a, 1.0), g2), (pick(ok, 1 - a, 0.0), g1))
        self.combine("sharpness", (pick(ok, a, 0.0), g2), (pick(ok, -a, 0.0), g1))
        return self.combine(g1, (pick(ok, 0.0, 1.0), g2), (pick(ok, 1.0, 0.0), g1))

    def _norm_is_of_all(self) -> bool:
        """Whether the norm that the perturbation was scaled by says that all of g1 is finite."""
        return self.p != float("inf") and all(group["perturb"] for group in self.param_groups)

    def after_update(self) -> None:
        """Decoupled: w <- w - lr a (g2 - g1)."""
        if self.decoupled:
            self.descend(self.direction("sharpness"))
