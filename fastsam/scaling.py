"""torch.amp.GradScaler: what it leaves on an optimizer, and gradients of the second pass that it did not unscale."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

ATTRIBUTES = ("grad_scale", "found_inf")  # GradScaler sets them before step() and deletes them after it
LEAST_SCALE = 64.0  # a smaller one cannot be told from gradients that differ between the passes
RECIPE = (
    "The first pass needs no unscale_, as its loss scale cancels: call first_step(zero_grad=True), then "
    "scaler.scale(loss2).backward(), scaler.unscale_(optimizer) where you clip or inspect gradients, "
    "scaler.step(optimizer), scaler.update(). Who wants to see unscaled gradients in the first pass, too, calls "
    "scaler.unscale_(optimizer) before first_step() and scaler.update() after it"
)


def forget_scaler(optimizer: Any) -> None:
    """Delete what a GradScaler sets for step() and leaves behind if that raises."""
    for name in ATTRIBUTES:
        vars(optimizer).pop(name, None)


def scaler_of_caller() -> torch.amp.GradScaler | None:
    """The GradScaler whose step() is running; None if there is none, or one that is not enabled and scales nothing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step" and isinstance(scaler := frame.f_locals.get("self"), torch.amp.GradScaler):
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


def scale_of_caller() -> float | None:
    """The loss scale of the GradScaler whose step() is running; None if there is none. Waits for the device."""
    scaler = scaler_of_caller()
    return None if scaler is None else float(scaler.get_scale())


def note_overflow(scaler: torch.amp.GradScaler, optimizer: Any) -> None:
    """Within scaler.step(optimizer): let the gradients that are there now say whether there was an overflow."""
    found = scaler._check_inf_per_device(optimizer).values()
    optimizer.found_inf = sum(flag.to(optimizer.found_inf.device, non_blocking=True) for flag in found)


def scale_of(scaler: torch.amp.GradScaler, optimizer: Any) -> float | torch.Tensor:
    """What the optimizer's gradients are multiplied by now: 1 after unscale_, else [] float64, which nothing waits for.

    Raises:
        ValueError: it is no GradScaler.
    """
    if not isinstance(scaler, torch.amp.GradScaler):
        raise ValueError(f"FusedSAM: scaler must be a torch.amp.GradScaler, got {scaler!r}")
    scale = scaler._scale if scaler.is_enabled() else None
    if scale is None:
        return 1.0
    known = scaler._per_optimizer_states.get(id(optimizer))
    return 1.0 if known is not None and known["stage"].name == "UNSCALED" else scale.double().reshape(())


class UnscalingCheck:
    """Whether a GradScaler unscaled the gradients of the second pass, where it says that the user asked it to.

    `scaler.unscale_(optimizer)` counts until `scaler.update()`: called in the first pass alone, it lets `scaler.step`
    take the second pass's gradients for unscaled. No trace of it is on a gradient: the operation does not count as a
    write. What remains is their length, which is about that of the first pass's times the loss scale. To compare waits
    for the device, so it is done in such steps 1, 2, 4, 8, ...
    """

    def __init__(self) -> None:
        """No step was looked at yet."""
        self.steps = 0

    def looks(self) -> bool:
        """Count a step whose gradients are said to be unscaled, and tell whether it is to be looked at."""
        self.steps += 1
        return self.steps & (self.steps - 1) == 0


def are_scaled(growth: float, scale: float | None) -> bool:
    """Whether gradients that are `growth` times as long as the first pass's, which were unscaled, still are scaled.

    Not the other way round: with gradients of the first pass that are still scaled, `growth` is below 1.
    """
    return scale is not None and scale >= LEAST_SCALE and scale / 8 < growth < float("inf")
