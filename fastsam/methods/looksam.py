"""LookSAM: the second pass in every k-th step only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.algebra import pick
from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_no_decay, check_range
from fastsam.ops.reference import NORM_EPS
from fastsam.optimizer import FusedSAM
from fastsam.radius import unnormalized


class LookSAM(FusedSAM):
    """LookSAM (Liu et al., arXiv 2203.02714): what of g2 is orthogonal to g1 is used again in the steps between.

        steps 0, k, 2k, ...: climb along g1; step with g2; keep d = g2 - (<g1,g2> / |g1|^2) g1
        others (one pass):   step with g + alpha (|g| / |d|) d

    1 + 1/k passes a step; memory: two copies of the weights beside SAM's (layerwise three), of which d is saved, as
    `state[p]["orthogonal_grad"]`. Products are over all parameters. Where one is 0 or not finite, d stays as it was, or
    the step is the base optimizer's.

    With DistributedDataParallel the first pass must be synchronised (no `no_sync`): g1 is part of the updates.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM. The paper's layer-wise form wants its own.
        k: a SAM step in k steps, >= 1; 1 is SAM. The paper uses 5.
        alpha: the share of d, >= 0. The paper's 0.7 is for ViTs; others found 0.3 better for small ResNets.
        layerwise: Look-LayerSAM: each parameter climbs by e = rho (|w| / |g1|) g1 with its own norms, as LARS and LAMB
            scale a step. Its norms are made by torch, and it needs `p=2`.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("k", "alpha", "layerwise")
    buffers = {"orthogonal_grad": None}
    counts_steps = True
    mixes_passes = False  # lengths cancel wherever g1 is added

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        layerwise: bool = False,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"LookSAM: k must be an integer >= 1, got {k!r}")
        if layerwise and kwargs.get("radius") is not None:
            raise ValueError(f"LookSAM: layerwise=True has a radius of its own, got radius={kwargs['radius']!r}, too")
        if layerwise:
            check_no_decay("LookSAM", kwargs.get("perturb_with_weight_decay", False), "a gradient scaled by layer")
            kwargs["radius"] = unnormalized()
        self.k, self.alpha, self.layerwise = k, check_range("LookSAM", "alpha", alpha, 0.0), bool(layerwise)
        super().__init__(params, base_optimizer, rho, **kwargs)

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        super()._check_group(index, group)
        if self.layerwise and any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
            raise ValueError(
                "LookSAM: layerwise=True takes the norm of each parameter, of which FullyShardedDataParallel (FSDP1) "
                "leaves each rank a piece of the one flat parameter; use FSDP2 (fully_shard), or layerwise=False"
            )

    def takes_two_passes(self) -> bool:
        """Every k-th time, and where there is no d yet."""
        return self.steps % self.k == 0 or not self.holds("orthogonal_grad")

    def ascent(self, g1: Vector) -> Vector:
        """Climb along g1, and keep it."""
        self.keep(g1)
        return self._scaled_by_layer(g1) if self.layerwise else g1

    def _scaled_by_layer(self, g1: Vector) -> Vector:
        """(|w| / |g1|) g1 of each parameter, 0 where its gradient is."""
        out, directions = self.keep(g1, "layerwise"), self._sam.directions
        lengths, weights = directions.squared_lengths(out), directions.squared_lengths(out, of_params=True)
        for part, n, w in zip(out.parts, lengths, weights, strict=True):
            ratios = torch.where(n == 0, 0.0, (w / n).sqrt()).unbind()
            found = [(tensor, ratio) for tensor, ratio in zip(part, ratios, strict=True) if tensor is not None]
            if found:
                torch._foreach_mul_([tensor for tensor, _ in found], [ratio for _, ratio in found])
        return out

    def descent(self, g2: Vector) -> Vector:
        """Step with g2, and keep `d = g2 - (<g1,g2> / |g1|^2) g1`."""
        g1, d = self.direction("kept"), self.direction("orthogonal_grad")
        products = self.dot(g1, g2)
        ok = products.finite & (products.aa > 0)
        share = pick(ok, -products.ab / products.aa, 0.0)
        self.combine(d, (pick(ok, 1.0, 0.0), g2), (share, g1), (pick(ok, 0.0, 1.0), d))
        return g2

    def plain(self, g: Vector) -> Vector:
        """Step with g + alpha (|g| / |d|) d."""
        d = self.direction("orthogonal_grad")
        products = self.dot(g, d)
        ok = products.finite & (products.bb > 0)
        share = self.alpha * products.aa.sqrt() / (products.bb.sqrt() + NORM_EPS)
        return self.combine("kept", (1.0, g), (pick(ok, share, 0.0), d))
