"""ESAM's perturbation of a random part of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_no_decay, check_range
from fastsam.optimizer import FusedSAM
from fastsam.radius import Radius


class _Widened(Radius):
    """rho / beta, whatever the norm is."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        super().__init__(self._length, f"rho / {beta:g}", measures=False)

    def _length(self, n: torch.Tensor, rho: float) -> float:
        return rho / self.beta


class ESAM(FusedSAM):
    """The weight part of ESAM (Du et al., arXiv 2110.03141), stochastic weight perturbation.

        climb along b g1, b drawn for every weight from Bernoulli(beta), by rho / beta; step with g2

    The norm is that of the kept elements, as in the released code; that draws whole tensors, the paper single weights,
    as here. The other half of ESAM selects samples of the batch for the second pass, which is the training loop's.

    Two passes a step; memory: two copies of the weights beside SAM's, none saved. The draw depends on the seed, the
    number of the step, the place of parameter and element (and, of DTensors, of the part of them on this rank),
    so replicas and resumed runs agree; it is made by torch, and cannot be captured in a CUDA graph.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM.
        beta: the share of weights that is perturbed, in (0, 1]; 1 is SAM. The paper uses 0.6 and 0.5.
        seed: of the random numbers.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("beta", "seed")
    counts_steps = True
    capturable = False

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        beta: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.beta, self.seed = check_range("ESAM", "beta", beta, 0.0, 1.0), int(seed)
        if self.beta == 0:
            raise ValueError(f"ESAM: beta must be in (0, 1], got {beta!r}")
        check_no_decay("ESAM", self.beta < 1 and kwargs.get("perturb_with_weight_decay", False), "masked gradients")
        if kwargs.get("radius") is not None:
            raise ValueError(f"ESAM: the radius is rho / beta, got radius={kwargs['radius']!r}, too")
        kwargs["radius"] = None if self.beta == 1 else _Widened(self.beta)
        super().__init__(params, base_optimizer, rho, **kwargs)

    def ascent(self, g1: Vector) -> Vector:
        """Climb along b g1."""
        if self.beta == 1:
            return g1
        out = self.keep(g1)
        buckets = self._sam.buckets.items
        for place, (page, drawn) in enumerate(zip(out.pages(), self.direction("drawn").pages(), strict=True)):
            generator = torch.Generator(page.device)
            stream = place + buckets[place].first_stream  # which is another one for another part of DTensors
            generator.manual_seed(((self.seed * 1_000_003 + self.steps) * 1_000_003 + stream) % 2**63)
            page.mul_(drawn.bernoulli_(self.beta, generator=generator))
        return out
