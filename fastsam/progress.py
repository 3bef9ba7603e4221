"""Where a step is: between which of its passes, and what was noticed so far."""

from __future__ import annotations

from typing import Any

from fastsam.closures import ClearingCheck
from fastsam.memory.buckets import Buckets
from fastsam.scaling import UnscalingCheck

CLEAN, PERTURBED, PAUSED = "clean", "perturbed", "unperturbed()"  # phases of a step


class Progress:
    """Where the step is. One object, never re-bound: wrappers of an optimizer forward reads, but not writes.

    Attributes:
        buckets: the memory.
        phase: CLEAN, PERTURBED, or PAUSED in `with optimizer.unperturbed():`.
        base_step_asked: by base_step(), for the step() that it calls.
        clearing: whether closures clear the gradients.
        unscaling: whether a GradScaler unscaled the gradients of the second pass.
        no_gradients_warned: whether a step without any gradient was warned of.
        losses: at w and at w + e, of the last step(closure).
    """

    def __init__(self, buckets: Buckets) -> None:
        """No step was taken yet."""
        self.buckets = buckets
        self.phase = CLEAN
        self.base_step_asked = False
        self.clearing = ClearingCheck()
        self.unscaling = UnscalingCheck()
        self.no_gradients_warned = False
        self.losses: tuple[Any, Any] = (None, None)

    def require_clean(self, what: str) -> None:
        """Refuse what needs the unperturbed weights.

        Raises:
            RuntimeError: the step is between its two passes.
        """
        if self.phase == PERTURBED:
            raise RuntimeError(
                f"FusedSAM: {what} needs the unperturbed weights, but the step is between its two passes. Finish it "
                "with step(), undo it with restore(), or use `with optimizer.unperturbed():`"
            )

    def require_running(self) -> None:
        """Refuse a pass within `with optimizer.unperturbed():`.

        Raises:
            RuntimeError: that block was not left yet.
        """
        if self.phase == PAUSED:
            raise RuntimeError("FusedSAM: leave the `with optimizer.unperturbed():` block before taking a step")
