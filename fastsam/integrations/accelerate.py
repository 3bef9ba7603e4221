"""Accelerate: a whole SAM step over what `accelerator.prepare` gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsam.sam_step import SAMStep


def sam_step(
    accelerator: Any, model: Any, optimizer: Any, loss_fn: Callable[..., Tensor] | None = None, **options: Any
) -> SAMStep:
    """A `fastsam.SAMStep` with the model, the optimizer and the GradScaler of an Accelerator.

    It takes the place of `accelerator.backward`, `optimizer.step` and `accelerator.accumulate`: a batch that does not
    fit into memory is given whole, and run in `micro_batches` parts. `accelerator.accumulate` would leave all but the
    last micro-batch out of the second pass.

    Args:
        accelerator: an accelerate.Accelerator without `gradient_accumulation_steps`.
        model: as `accelerator.prepare` gave it; its forward pass has the Accelerator's autocast.
        optimizer: a FusedSAM as `accelerator.prepare` gave it.
        loss_fn: as for SAMStep.
        **options: of SAMStep (micro_batches, sharpness, perturb, ...).

    Raises:
        ValueError: the Accelerator accumulates gradients, or what SAMStep refuses.

    Example:
        >>> model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        >>> step = sam_step(accelerator, model, optimizer, loss_fn, micro_batches=4)
        >>> for x, y in loader:
        ...     loss = step(x, y)
        ...     scheduler.step()
    """
    count = accelerator.gradient_accumulation_steps
    if count != 1:
        raise ValueError(
            f"sam_step: gradient_accumulation_steps of the Accelerator must be 1, got {count}: give batches of the "
            f"whole step, and micro_batches={count} to sam_step"
        )
    return SAMStep(model, optimizer, loss_fn, scaler=accelerator.scaler, **options)
