"""Sparse SAM: only a part of the weights is perturbed, chosen by their Fisher information or by trying others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.closures import entry
from fastsam.memory.directions import Vector
from fastsam.memory.placements import ranks_of
from fastsam.methods.checks import check_no_decay, check_range
from fastsam.optimizer import FusedSAM


class SparseSAM(FusedSAM):
    """SSAM (Mi et al., arXiv 2210.05177): SAM with a mask on the perturbation.

        climb by e = mask * rho g1 / |g1|, with the norm over all; step with g2

    The mask has 1 - `sparsity` of the elements of the perturbed groups, and begins at random. It is renewed when you
    say so, every epoch, say:

    - SSAM-F: after each of some backward passes of a single sample's loss `observe_sample()`, then `fisher_mask()`:
      the elements whose gradients' squares have the largest sum.
    - SSAM-D: after a backward pass `dynamic_mask(progress)`: of the live elements the least are dropped, and as many
      of the others grow.

    Two passes a step; memory: a quarter of a copy of the weights for the mask, which is saved, as `state[p]["mask"]`,
    and one copy for the direction, beside SAM's; another for the Fisher information while it is gathered.

    With DistributedDataParallel masks must be made from synchronised gradients, or ranks perturb different weights;
    that is allowed (as is a first pass under `no_sync`), as the second pass is synchronised.

    Args:
        params: as for FusedSAM.
        base_optimizer: as for FusedSAM.
        rho: as for FusedSAM; the paper's code has 0.1 for CIFAR-10, 0.2 for CIFAR-100.
        sparsity: the share of elements that are not perturbed, in [0, 1); 0 is SAM.
        drop_rate: SSAM-D: the largest share of live elements that one renewal exchanges, in [0, 1].
        drop: SSAM-D: "weight" or "gradient", whose least magnitudes are dropped, or "random".
        grow: SSAM-D: "gradient", whose largest magnitudes grow, or "random".
        seed: of random masks.
        **kwargs: as for FusedSAM, and for the base optimizer.
    """

    options = ("sparsity", "drop_rate", "drop", "grow", "seed")
    buffers = {"mask": torch.bool}
    counts_steps = True
    _observed = False

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.1,
        *,
        sparsity: float = 0.5,
        drop_rate: float = 0.5,
        drop: str = "weight",
        grow: str = "gradient",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.sparsity = check_range("SparseSAM", "sparsity", sparsity, 0.0)
        if self.sparsity >= 1:
            raise ValueError(f"SparseSAM: sparsity must be in [0, 1), got {sparsity!r}")
        decays = self.sparsity > 0 and kwargs.get("perturb_with_weight_decay", False)
        check_no_decay("SparseSAM", decays, "masked gradients")
        self.drop_rate = check_range("SparseSAM", "drop_rate", drop_rate, 0.0, 1.0)
        for name, value, known in (
            ("drop", drop, ("weight", "gradient", "random")),
            ("grow", grow, ("gradient", "random")),
        ):
            if value not in known:
                raise ValueError(f"SparseSAM: {name} must be one of {known}, got {value!r}")
        self.drop, self.grow, self.seed = drop, grow, int(seed)
        super().__init__(params, base_optimizer, rho, **kwargs)

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        super()._check_group(index, group)
        split = self.norm_group is not None or any(ranks_of(param) for param in group["params"])
        if self.sparsity > 0 and split:
            raise ValueError(
                "SparseSAM: its mask takes the largest of all elements, which no rank has where parameters are split "
                "over ranks (FSDP, tensor parallelism) or norm_group= is given; use DistributedDataParallel, or ESAM, "
                "whose mask is drawn"
            )

    def ascent(self, g1: Vector) -> Vector:
        """Climb along mask * g1, divided by |g1|."""
        if self.sparsity == 0:
            return g1
        mask, out = self._mask(), self.keep(g1)
        for page, kept in zip(out.pages(), mask.pages(), strict=True):
            page.mul_(kept)
        self.divide_by(g1)
        return out

    def create_buffers(self) -> None:
        """With the mask that a first step would begin with."""
        self._mask()

    def _mask(self) -> Vector:
        """The mask, with random elements in parameters that have none yet."""
        directions, mask = self._sam.directions, self.direction("mask")
        fresh = directions.elements(mask, fresh_only=True)
        if len(fresh) > 0:
            directions.write(mask, _largest(self._random(fresh), self._live(len(fresh))), fresh_only=True)
        return mask

    def _live(self, n: int) -> int:
        """How many of n elements are perturbed."""
        return round((1 - self.sparsity) * n)

    def _random(self, like: Tensor) -> Tensor:
        """[n] float32 in [0, 1), the same on all ranks and in resumed runs."""
        generator = torch.Generator(like.device)
        generator.manual_seed((self.seed * 1_000_003 + self._sam.steps) % 2**63)
        return torch.rand(len(like), generator=generator, device=like.device)

    @entry
    def observe_sample(self) -> None:
        """After a backward pass of one sample's loss: add the squares of the gradients to the Fisher information."""
        gradients = self._gradients()
        self._observed = True
        fisher = self.direction("fisher")
        for flat, part in zip(fisher.flats, gradients.parts, strict=True):
            for i, grad in enumerate(part):
                if grad is not None:
                    sample = grad.to(flat.page.dtype) if not grad.is_complex() else grad
                    target = flat.tensors[i]
                    if sample.is_complex():
                        target, sample = torch.view_as_real(target), torch.view_as_real(sample)
                    target.addcmul_(sample, sample)

    @entry
    def fisher_mask(self) -> None:
        """Perturb the elements of the largest Fisher information that was observed, and begin to observe afresh.

        Raises:
            RuntimeError: nothing was observed.
        """
        if not self._observed:
            raise RuntimeError(
                "SparseSAM: fisher_mask() needs observe_sample() before it, after the backward pass of each sample"
            )
        self._observed = False
        directions, fisher, mask = self._sam.directions, self.direction("fisher"), self._mask()
        scores = directions.elements(fisher)
        directions.write(mask, _largest(scores, self._live(len(scores))))
        for page in fisher.pages():
            page.zero_()
        self._publish()

    @entry
    def dynamic_mask(self, progress: float = 0.0) -> None:
        """After a backward pass: exchange a share of the live elements for others.

        The share is drop_rate (1 + cos(pi progress)) / 2.

        Args:
            progress: of the training, in [0, 1].

        Raises:
            RuntimeError: there are no gradients.
        """
        progress = check_range("SparseSAM.dynamic_mask", "progress", progress, 0.0, 1.0)
        gradients, directions, mask = self._gradients(), self._sam.directions, self._mask()
        if not gradients.written:
            raise RuntimeError("SparseSAM: dynamic_mask() goes by gradients; call it after a backward pass")
        live = directions.elements(mask)
        exchanged = round(self._live(len(live)) * self.drop_rate * (1 + math.cos(math.pi * progress)) / 2)
        exchanged = min(exchanged, len(live) - int(live.sum()))
        for page in self.direction("scores").pages():
            page.zero_()  # of parameters without a gradient it has weights, from the last time
        sizes = directions.elements(self.keep(gradients, "scores")).abs()
        by = {"gradient": sizes, "random": self._random(live)}
        if self.drop == "weight":
            scores = self.direction("scores")
            params, tensors = scores.pairs()
            torch._foreach_copy_(tensors, [param.to(t.dtype) for param, t in zip(params, tensors, strict=True)])
            by["weight"] = directions.elements(scores).abs()
        lowest = torch.where(live, -by[self.drop], -torch.inf)
        dropped = _largest(lowest, exchanged)
        grown = _largest(torch.where(live, -torch.inf, by[self.grow]), exchanged)
        directions.write(mask, (live & ~dropped) | grown)
        self._publish()

    def _gradients(self) -> Vector:
        """Those that are there now, in the groups that are perturbed."""
        buckets = self._sync()
        grads = buckets.gather(ascent=True)
        buckets.sync_values()
        return self._sam.directions.begin(grads)

    def _publish(self) -> None:
        buckets = self._sam.buckets
        self._sam.directions.publish([bucket.gradients.gather(ascent=True)[0] for bucket in buckets.items])


def _largest(scores: Tensor, k: int) -> Tensor:
    """[n] bool: the k largest; the first of equal ones."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    order = scores.sort(descending=True, stable=True).indices
    chosen[order[:k]] = True
    return chosen
