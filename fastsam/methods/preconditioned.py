"""Experimental: a perturbation that is preconditioned as Adam's step is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.memory.directions import Vector
from fastsam.methods.checks import check_no_decay
from fastsam.optimizer import FusedSAM


class PreconditionedSAM(FusedSAM):
    """Experimental: climb to the worst point of an ellipsoid, that of Adam's second moments, instead of a ball.

        climb by e = rho P g1 / sqrt(<P g1, g1>), P = 1 / (sqrt(v / (1 - beta2^t)) + eps); step with g2

    v is the base optimizer's `exp_avg_sq`. This e maximises `<e, g1>` where `<e / P, e> = rho^2`; the idea of
    preconditioning the perturbation is Singh et al.'s (arXiv 2502.02407) and Zhang, Li and Giannakis's (arXiv
    2501.06603), who choose other matrices and norms, so their figures and radii are not this class's. In a parameter's
    first step P is 1. It may change without notice.

    Two passes a step; memory: one copy of the weights beside SAM's, none saved. P is made by torch, in some launches a
    parameter. A GradScaler needs nothing: the length does not depend on the scale of g1.

    With DistributedDataParallel nothing is to be done: the first pass may be synchronised or not, as for SAM.

    The arguments are FusedSAM's; `base_optimizer` must be Adam, AdamW, NAdam or RAdam.
    """

    def _check_group(self, index: int, group: dict[str, object]) -> None:
        super()._check_group(index, group)
        check_no_decay("PreconditionedSAM", self.perturb_with_weight_decay, "a preconditioned gradient")
        if self.p != 2 or group["adaptive"]:
            raise ValueError(
                "PreconditionedSAM: it measures e by Adam's second moments, so p must be 2 and adaptive False, got "
                f"p={self.p!r}, adaptive={group['adaptive']!r}"
            )
        rule = self._sam.buckets.shared.rule
        if rule is None or "exp_avg_sq" not in rule.states:
            raise ValueError(
                "PreconditionedSAM: the base optimizer must be Adam, AdamW, NAdam or RAdam, got "
                f"{type(self.base_optimizer).__name__}"
            )

    def ascent(self, g1: Vector) -> Vector:
        """Climb along P g1, divided by `sqrt(<P g1, g1>)`."""
        out, second = self.keep(g1), self.base_state("exp_avg_sq")
        buckets = self._sam.buckets
        for bucket, part, squares in zip(buckets.items, out.parts, second.parts, strict=True):
            for segment, tensor, v in zip(bucket.segments, part, squares, strict=True):
                if tensor is not None and v is not None:
                    group = buckets.shared.groups[segment.group]
                    tensor.div_(_denominator(v, segment.step, group["betas"][1], group["eps"]))
        self.divide_by(self.dot(self.in_perturbed_groups(out), g1).ab)
        return out


def _denominator(v: Tensor, step: Tensor, beta2: float, eps: float) -> Tensor:
    """sqrt(v / (1 - beta2^step)) + eps, and 1 before the first step."""
    correction = 1 - beta2 ** step.double()
    root = (v / correction.to(v.real.dtype if v.is_complex() else v.dtype)).sqrt() + eps
    return torch.where(step > 0, root, torch.ones_like(root))
