"""The order of a SAM step, which one FusedSAM and several under one norm (`fastsam.joint`) have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.closures import NO_FIRST_GRADIENTS, call, detached, entry
from fastsam.passes import CALLED_TWICE, CLOSURE_UNDER_SCALER, UNSCALED_BEFORE_SECOND_PASS
from fastsam.progress import Progress
from fastsam.scaling import ATTRIBUTES, note_overflow, scaler_of_caller


class StepOrder(Optimizer):
    """Gradients at w, climb, gradients at w + e, update; w comes back whatever goes wrong in between.

    The parts of a step are those of the class that inherits this, `FusedSAM` or `Joint`, as are the attributes below.
    """

    begin_step: Callable[[], bool]
    _params: Callable[[], list[Tensor]]
    _perturb: Callable[[], None]
    _update: Callable[[], None]
    _leave_perturbed: Callable[[], None]
    _begin_one_pass: Callable[[], None]
    _note_scale: Callable[[torch.amp.GradScaler | None], None]
    _note_losses: Callable[[Any, Any], None]
    if TYPE_CHECKING:  # read here only

        @property
        def closure_calls(self) -> int:
            """How often `step(closure)` calls the closure."""

        @property
        def perturbed(self) -> bool:
            """Whether the weights are w + e."""

        @property
        def _one_pass_begun(self) -> bool:
            """Whether `first_step` began a step of one pass."""

        @property
        def _progress(self) -> Progress:
            """What is known of the step; of several optimizers the first one's."""

    def _step_with_closure(self, closure: Callable[[], Any]) -> Any:
        loss = None
        try:
            if any(getattr(self, name, None) is not None for name in ATTRIBUTES):
                raise RuntimeError(CLOSURE_UNDER_SCALER)
            if self.perturbed:
                loss = call(closure)
            elif self.closure_calls == 1:
                if all(p.grad is None for p in self._params()):
                    raise RuntimeError(NO_FIRST_GRADIENTS)
                if self.begin_step():
                    self._perturb()
                    self.zero_grad()
                    loss = call(closure)
            else:
                loss = call(closure)  # gradient at w
                if self.begin_step():
                    self._perturb()  # w <- w + e
                    again = self._progress.clearing.call_again(closure, self._params)  # gradient at w + e
                    self._note_losses(detached(loss), detached(again))
            self._update()  # w <- base step from the old w with that gradient
        except BaseException:
            self._leave_perturbed()
            raise
        return loss

    def _step_with_second_pass(self, forward_backward: Callable[[], Any]) -> None:
        scaler = scaler_of_caller()
        if scaler is not None and getattr(self, "grad_scale", None) is None:
            raise RuntimeError(UNSCALED_BEFORE_SECOND_PASS)
        try:
            if self.begin_step():
                self._note_scale(scaler)
                self._perturb()
                self.zero_grad()
                call(forward_backward)
                if scaler is not None:
                    note_overflow(scaler, self)
            self._update()
        except BaseException:
            self._leave_perturbed()
            raise

    def attach_second_pass(self, forward_backward: Callable[[], Any] | None) -> None:
        """Say what `step()` is to run at w + e, for loops of others that call it without a closure.

        From then on `step()` takes a whole SAM step with the gradients that are there: it climbs, clears them, calls
        `forward_backward`, and the base optimizer steps with what that left. It is not called in steps of one pass
        (`when=`), after `first_step`, and by `step(closure)`. Neither checkpoints nor copies hold it.

        Under a GradScaler it must scale its loss by the same, `scaler.scale(loss).backward()`, and nothing may call
        `unscale_` before: clip with `max_grad_norm=`.

        Args:
            forward_backward: runs forward and backward of the batch whose gradients are there; it need not clear
                gradients. None for nothing, as in the beginning.

        Example:
            >>> optimizer.attach_second_pass(lambda: loss_fn(model(x), y).backward())
            >>> for x, y in loader:
            ...     optimizer.zero_grad()
            ...     loss_fn(model(x), y).backward()
            ...     optimizer.step()
        """
        self._progress.second_pass = forward_backward  # not of self: wrappers of an optimizer forward reads only

    @entry
    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Climb from w to w + e along the gradients that are there, keeping w.

        With `when=`, or a method that takes two passes in some steps only, it returns False in a step of one pass: then
        nothing was perturbed, the gradients are left in place whatever `zero_grad` says, and `step` steps with them.

        Under a GradScaler the gradients may stay scaled: only their direction counts. If their norm is not finite there
        is no perturbation, and this step is the base optimizer's.

        The next call is `step` or `restore`. If it is `first_step` again, or an exception leaves the closure, the old
        weights come back, also where a forward pass wrote to the perturbed ones (`Embedding(max_norm)`, masks, forced
        normalisation). Only weights that were loaded in between are kept: `model.load_state_dict` writes all
        parameters, a forward pass the same as in the last step. So a model that is loaded in part, or whose forward
        writes all parameters, is given its old weights; `restore` always does so, and should come before loading.

        Args:
            zero_grad: set the gradients to None afterwards.
            scaler: the GradScaler that scaled the loss, for methods whose gradients of several steps are added up, for
                `radius`, and, where `unscale_` is called in one of the passes, for methods that add those of both
                passes and for `renormalize`.

        Returns:
            Whether the step has a second pass.
        """
        if self._one_pass_begun:  # asked again
            return False
        if self.perturbed:
            warnings.warn(CALLED_TWICE, stacklevel=3)
            self._leave_perturbed()
        two_passes = self.begin_step()
        self._note_scale(scaler)
        if not two_passes:
            self._begin_one_pass()
            return False
        try:
            self._perturb()
        except BaseException:
            self._leave_perturbed()
            raise
        if zero_grad:
            self.zero_grad()
        return True

    def second_step(self, zero_grad: bool = False) -> None:
        """Finish the step: the same as `step()`.

        Args:
            zero_grad: set the gradients to None afterwards.
        """
        self.step()
        if zero_grad:
            self.zero_grad()
