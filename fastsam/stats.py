"""What happened in the last step, without waiting for the device."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastsam.memory.buckets import Buckets
from fastsam.ops.numbers import q_norm


class Stats(NamedTuple):
    """What `FusedSAM.stats()` gives: 0-dim tensors on the parameters' device, None where there is nothing to tell.

    Attributes:
        first_norm: float64, the length of the last first gradient (of T g in ASAM), loss scale included.
        second_norm: float64, the same of the last second gradient, always without T; only with `max_grad_norm`.
        loss_increase: the loss at w + e minus the loss at w, of the last `step(closure)` with two calls, or of the last
            `SAMStep` with two passes over the same samples (not with its `capture`, `second_order` and
            `sharpness="micro"`, nor with `select` or `ascent_fraction` below 1).
        first_overflows: int64, steps without a perturbation because the first norm was not finite.
        second_overflows: int64, steps without an update because a GradScaler found an overflow.
    """

    first_norm: Tensor | None
    second_norm: Tensor | None
    loss_increase: Tensor | None
    first_overflows: Tensor | None
    second_overflows: Tensor | None


def _first_norm(sums: Tensor, q: float) -> Tensor | None:
    """The norm that `perturb_` took; for p = inf, q = 1, there is none."""
    return None if q == 1 else sums.sum().sqrt() if q == 2 else q_norm(sums, q)


def read_stats(buckets: Buckets, losses: tuple[Any, Any], clipped: bool) -> Stats:
    """What the operations have written down, and the losses at w and at w + e where they are tensors."""
    loss, second_loss = losses
    known = isinstance(loss, Tensor) and isinstance(second_loss, Tensor)
    if buckets.overflows is None:
        return Stats(None, None, None, None, None)
    device = buckets.overflows.device
    return Stats(
        _first_norm(buckets.sums[device], buckets.shared.q),
        buckets.second_sums[device].sum().sqrt() if clipped else None,
        second_loss - loss if known else None,
        *buckets.overflows.clone(),
    )
