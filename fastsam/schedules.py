"""Schedules: of rho, tied to the learning rate, and of the learning rate for SAM in the tail of a training."""

from __future__ import annotations

import functools
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rewarmed_tail(
    optimizer: Optimizer, steps: int, begins: int, *, warmup: int, peak: float = 0.5, least: float = 0.0
) -> LambdaLR:
    """A learning rate that falls twice: over the training, and from step `begins` on, warmed up again, over its tail.

    For `when=fastsam.when.after(begins)`. SAM in the tail was seen to help only where the tail has a fall of the
    learning rate of its own; begun in the last steps of one fall it has no time to reach other minima. Both falls are
    half a cosine, from 1 and from `peak` to `least`, in units of the groups' learning rates.

    Args:
        optimizer: whose groups' learning rates are scaled.
        steps: of the whole training.
        begins: the step from which on the tail is.
        warmup: steps in which the tail's learning rate rises to its peak.
        peak: of the tail, in units of the learning rate, > 0.
        least: what both falls end at.

    Returns:
        torch's scheduler; call `step()` once a step.
    """
    if not 0 <= begins <= begins + warmup < steps:
        raise ValueError(
            f"rewarmed_tail: 0 <= begins <= begins + warmup < steps must hold, got begins={begins!r}, "
            f"warmup={warmup!r}, steps={steps!r}"
        )
    if not (0 <= least < peak < float("inf")):
        raise ValueError(f"rewarmed_tail: 0 <= least < peak must hold, got least={least!r}, peak={peak!r}")
    return LambdaLR(optimizer, functools.partial(_factor, steps, begins, warmup, peak, least))


def _factor(steps: int, begins: int, warmup: int, peak: float, least: float, step: int) -> float:
    if step < begins:
        return _half_cosine(1.0, least, step / begins)
    if step < begins + warmup:
        return least + (peak - least) * (step - begins) / warmup
    return _half_cosine(peak, least, (step - begins - warmup) / (steps - begins - warmup))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


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
