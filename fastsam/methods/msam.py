"""MSAM: one pass a step, at weights that are perturbed along the momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastsam.closures import call, entry
from fastsam.methods.checks import check_no_decay
from fastsam.optimizer import FusedSAM
from fastsam.progress import CLEAN, PERTURBED, SAM

MOMENTA = ("momentum_buffer", "exp_avg")  # torch's names


class MSAM(FusedSAM):
    """MSAM (Becker, Altrock and Risse, arXiv 2401.12033): SAM at the cost of the base optimizer.

        w <- base optimizer's step from w with the gradient at w - rho v / |v|, v the momentum

    Between the steps the model is at w - rho v / |v|, which goes on in the direction of the last update; v is the base
    optimizer's `momentum_buffer` or `exp_avg`. One pass a step; memory: one copy of the weights beside SAM's.

    The gradient is that of the weights that the model has, so a loop has nothing to add: backward, then `step()`, or
    `step(closure)`, which calls the closure once. To evaluate or to save, `optimizer.eval()` brings the weights w back,
    bit for bit, and `optimizer.train()` perturbs them again, as with schedule-free optimizers; `with
    optimizer.unperturbed():` does both. After `load_state_dict` it is in evaluation mode. Recalibrate BatchNorm's
    statistics for w before evaluating: they were taken at the perturbed weights. A model that is loaded in part only
    must be loaded in evaluation mode, or it is given its old weights.

    With DistributedDataParallel nothing is to be done: v is the same on all ranks.

    Args:
        params: as for FusedSAM.
        base_optimizer: a fused one with momentum: SGD with `momentum`, Adam, AdamW, NAdam, RAdam, Lion, or RMSprop with
            `momentum`.
        rho: the length of the perturbation. The paper's code uses 3 with SGD and for ViTs; 0 while the learning rate
            warms up.
        **kwargs: as for FusedSAM, and for the base optimizer. `when` decides whether the weights are perturbed for a
            step. What goes by the gradients of a first pass is refused: `radius`, `renormalize`, `by_grad_norm()`.
    """

    options = ("training",)

    def __init__(
        self, params: Iterable[Any] | None, base_optimizer: Any = torch.optim.SGD, rho: float = 3.0, **kwargs: Any
    ) -> None:
        """See the class."""
        when = kwargs.get("when")
        if kwargs.get("radius") is not None or kwargs.get("renormalize") or getattr(when, "measures", False):
            raise ValueError(
                "MSAM: radius=..., renormalize=True and when=by_grad_norm() go by the gradients of a first pass, which "
                "MSAM does not have; leave them out"
            )
        check_no_decay("MSAM", kwargs.get("perturb_with_weight_decay", False), "the momentum")
        self.training = True
        super().__init__(params, base_optimizer, rho, **kwargs)

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        super()._check_group(index, group)
        rule = self._sam.buckets.shared.rule
        if rule is None or not set(rule.used(group)) & set(MOMENTA):
            raise ValueError(
                "MSAM: the base optimizer must be a fused one with momentum (SGD or RMSprop with momentum=..., Adam, "
                f"AdamW, NAdam, RAdam, Lion), got {type(self.base_optimizer).__name__} without"
            )
        if group.get("maximize"):
            raise ValueError("MSAM: maximize=True is not supported; minimize the negative loss instead")

    @entry
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients that are there, or that the closure, called once, makes.

        Returns:
            The closure's loss, None without one.

        Raises:
            RuntimeError: in evaluation mode.
        """
        if not self.training:
            raise RuntimeError(
                "MSAM: step() in evaluation mode; call optimizer.train() before the forward pass (after "
                "load_state_dict(), too), so that the gradient is that of the perturbed weights"
            )
        sam = self._sam
        loss = None if closure is None else call(closure)
        self._keep_loaded_weights()
        sam.turn = SAM
        sam.steps += 1
        self._update()
        self._perturb_along_momentum()
        return loss

    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Refuse: there is no first pass.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("MSAM: a step has one pass: call step() after backward, or step(closure)")

    def _perturb_along_momentum(self) -> None:
        """Go to w - rho v / |v|."""
        if self.when is not None and not self.when.decide(self._sam.steps):
            return
        rule = self._sam.buckets.shared.rule
        assert rule is not None
        name = next(name for name in rule.states if name in MOMENTA)
        self._perturb_without_gradients(lambda: self.base_state(name), lambda v: self.combine("ascent", (-1.0, v)))

    def _keep_loaded_weights(self) -> None:
        """Let go of the perturbation where the model was given other weights since: they are no perturbed ones."""
        sam = self._sam
        if sam.phase == PERTURBED and sam.buckets.weight_watch.loaded():
            sam.buckets.drop_perturbation()
            sam.phase = CLEAN

    def eval(self) -> None:
        """Bring the weights w back, to evaluate or to save; weights that the whole model was given since are kept.

        Raises:
            RuntimeError: within `with optimizer.unperturbed():`, at whose end the weights are perturbed again.
        """
        if self.training:
            self._sam.require_running()
            self._keep_loaded_weights()
            self.restore()
            self.training = False

    @entry
    def train(self) -> None:
        """Perturb the weights again, to go on training."""
        if not self.training:
            self._sam.require_running()
            self.training = True
            if self._sam.phase == CLEAN:
                self._perturb_along_momentum()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """As for FusedSAM; in training mode the weights are perturbed again at the end of the block."""
        training = self.training
        self.eval()
        try:
            with super().averaged_weights():
                yield
        finally:
            if training:
                self.train()

    def state_dict(self) -> dict[str, Any]:
        """As for FusedSAM, in evaluation mode.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        if self._sam.phase == PERTURBED:
            raise RuntimeError(
                "MSAM: the weights are perturbed between the steps; call optimizer.eval() before saving model and "
                "optimizer, and optimizer.train() after it"
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for FusedSAM; call `train()` when the model's weights are loaded, too, before or after this."""
        training = self.training
        self.eval()
        try:
            super().load_state_dict(state_dict)
        except ValueError:  # nothing was loaded
            if training:
                self.train()
            raise
