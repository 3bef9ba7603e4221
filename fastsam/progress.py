"""Where a step is: between which of its passes, and what was noticed so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.closures import ClearingCheck, OnePass
from fastsam.memory.buckets import Buckets
from fastsam.memory.directions import Directions
from fastsam.scaling import UnscalingCheck

# Phases of a step; the last two are blocks of a `with` statement.
CLEAN, PERTURBED, PAUSED, AVERAGED = "clean", "perturbed", "unperturbed()", "averaged_weights()"
SAM, PLAIN, BASE = "two passes", "one pass", "the base optimizer's own"


class Progress:
    """Where the step is. One object, never re-bound: wrappers of an optimizer forward reads, but not writes.

    Attributes:
        buckets: the memory.
        phase: CLEAN, PERTURBED, PAUSED in `with optimizer.unperturbed():`, or AVERAGED in `with
            optimizer.averaged_weights():`.
        base_step_asked: by base_step(), for the step() that it calls.
        clearing: whether closures clear the gradients.
        unscaling: whether a GradScaler unscaled the gradients of the second pass.
        no_gradients_warned: whether a step without any gradient was warned of.
        losses: at w and at w + e, where somebody knows them: step(closure), SAMStep.
        directions: what methods compute with.
        turn: what the step that began last is: SAM, PLAIN with one pass, or BASE, the base optimizer's own.
        begun: whether that is known for the step that is being taken.
        one_pass: the gradients that a step of one pass began with, from first_step() to step().
        second_pass: what step() runs at w + e where it is given no closure; None for nothing.
        steps: how many steps began.
        loss_scale: what the gradients at w are multiplied by.
        first_scaled: whether `first_step` was told so.
        second_factor: [] float64, what brings the second gradients to the loss scale of the first; None for nothing.
        scaling: the loss scale and the overflow flag of the update that is being made.
        common_sums: what stood for the sums of squares in the last climb under a norm with other optimizers.
        common_clip: [] float64 on each device: what clips the gradients of this update and those of other optimizers.
        joint: a weak reference to the `fastsam.joint` that this optimizer is in, or what gives None.
        first_squares: [] float64, the squared length of the gradients at w, where it is needed later.
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
        self.directions = Directions(buckets)
        self.turn = SAM
        self.begun = False
        self.one_pass: OnePass | None = None
        self.second_pass: Callable[[], Any] | None = None
        self.steps = 0
        self.loss_scale: float | Tensor = 1.0
        self.first_scaled = False
        self.second_factor: Tensor | None = None
        self.scaling: tuple[Tensor | None, Tensor | None] = (None, None)
        self.first_squares: Tensor | None = None
        self.common_sums: Mapping[torch.device, Tensor] | None = None
        self.common_clip: Mapping[torch.device, Tensor] | None = None
        self.joint: Callable[[], Any] = lambda: None

    def require_clean(self, what: str) -> None:
        """Refuse what needs the unperturbed weights.

        Raises:
            RuntimeError: the step is between its two passes, or the weights are averages.
        """
        if self.phase == AVERAGED:
            raise RuntimeError(f"FusedSAM: {what} within `with optimizer.averaged_weights():`; leave that block first")
        if self.phase == PERTURBED:
            raise RuntimeError(
                f"FusedSAM: {what} needs the unperturbed weights, but the step is between its two passes. Finish it "
                "with step(), undo it with restore(), or use `with optimizer.unperturbed():`"
            )

    def require_own_norm(self) -> None:
        """Refuse to climb alone in a joint, whose perturbation is one over all its optimizers.

        Raises:
            RuntimeError: the optimizer is in a joint.
        """
        if self.joint() is not None:
            raise RuntimeError(
                "fastsam.joint: this optimizer shares its norm with others, so that only all can climb together: call "
                "first_step() or step(closure) of the joint optimizer, or drop that (del) to use this one alone"
            )

    def require_running(self) -> None:
        """Refuse a pass within `with optimizer.unperturbed():` or `with optimizer.averaged_weights():`.

        Raises:
            RuntimeError: that block was not left yet.
        """
        if self.phase in (PAUSED, AVERAGED):
            raise RuntimeError(f"FusedSAM: leave the `with optimizer.{self.phase}:` block before taking a step")
