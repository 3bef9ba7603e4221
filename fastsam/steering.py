"""How a method steers the passes of a step: which step has two, along what it climbs, with what the base steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.algebra import Algebra
from fastsam.closures import OnePass, entry
from fastsam.memory.directions import Vector
from fastsam.ops.tables import Gradients
from fastsam.progress import BASE, CLEAN, PERTURBED, PLAIN, SAM
from fastsam.radius import Radius
from fastsam.scaling import scale_of


class Steering(Algebra):
    """The part of `FusedSAM` between what a method says and what the buckets do.

    Attributes:
        radius: how the length of the perturbation follows from that of the gradients; None for rho.
        renormalize: whether the second gradients are scaled to the length of the first.
    """

    radius: Radius | None
    renormalize: bool

    def begin_step(self) -> bool:
        """Begin a step before its first pass; whether it has a second one.

        Not needed: `first_step` and `step` begin a step themselves. It is for loops that must know before the first
        pass, because they give that a part of the batch or spare its communication where a second one follows. Where
        none does, run one pass and call `step`.
        """
        sam = self._sam
        if sam.begun:
            return sam.turn == SAM
        sam.require_running()
        number, sam.begun = sam.steps, True
        sam.steps += 1
        sam.loss_scale, sam.first_scaled, sam.first_squares = 1.0, False, None
        if self.when is not None and not self.when.decide(number):
            sam.turn = BASE
        else:
            sam.turn = SAM if self.takes_two_passes() else PLAIN
        return sam.turn == SAM

    def _steers_ascent(self) -> bool:
        """Whether the weights are to climb along anything else than the gradients, or these are to be measured."""
        return type(self).ascent is not Algebra.ascent or self.renormalize or self._measures()

    def _steer_ascent(
        self, grads: Sequence[Gradients]
    ) -> tuple[Sequence[Gradients], Tensor | Sequence[Gradients] | None]:
        sam = self._sam
        measures = self.renormalize or self._measures()
        reads_all = sam.buckets.skips_any() and (measures or type(self).descent is not Algebra.descent)
        g1 = sam.directions.begin(sam.buckets.gather_all() if reads_all else grads)
        sam.directions.divisor = None
        if measures:
            sam.first_squares = self.squared_norm(g1)
        along = self.ascent(g1)
        divisor, sam.directions.divisor = sam.directions.divisor, None  # it may hold the gradients
        here = self._in_perturbed_groups if reads_all else sam.directions.here
        return here(along), here(divisor) if isinstance(divisor, Vector) else divisor

    def _in_perturbed_groups(self, vector: Vector) -> list[Gradients]:
        return list(self.in_perturbed_groups(vector).parts)

    def _steer_descent(self, grads: Sequence[Gradients]) -> Sequence[Gradients]:
        sam = self._sam
        g = sam.directions.begin(grads)
        if sam.turn != SAM and self._measures():
            sam.first_squares = self.squared_norm(g)
        if sam.turn == BASE:
            return grads
        if sam.second_factor is not None:
            g = self.combine("second", (sam.second_factor, g))
        return sam.directions.here(self.descent(g) if sam.turn == SAM else self.plain(g))

    def _measures(self) -> bool:
        return self.when is not None and self.when.measures

    def _map_sums(self, sums: Mapping[torch.device, Tensor]) -> Mapping[torch.device, Tensor]:
        """What `perturb_` takes for the sums of squares, so that the perturbation has the radius' length."""
        assert self.radius is not None
        radii = [float(group["rho"]) for group in self.param_groups if group["perturb"]]
        rho = next((value for value in radii if value > 0), 0.0)
        mapped = {}
        for device, parts in sums.items():
            scale = self.loss_scale.to(device) if isinstance(self.loss_scale, Tensor) else self.loss_scale
            mapped[device] = torch.zeros_like(parts)
            mapped[device][0] = self.radius.map(parts.sum(), scale, rho)
        return mapped

    def _refuse_mixed_scales(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Refuse what cannot be right where gradients at w may still be multiplied by a GradScaler's scale."""
        sam = self._sam
        if found_inf is None or sam.turn != SAM or sam.first_scaled:
            return
        if self.mixes_steps or (grad_scale is None and self._mixes_passes()):
            who = "renormalize=True" if self.renormalize and not self.mixes_steps else type(self).__name__
        elif self.radius is not None and self.radius.measures:
            who = f"radius={self.radius}"
        else:
            return
        raise RuntimeError(
            f"FusedSAM: {who} needs to know the loss scale of the first pass: call "
            "optimizer.first_step(zero_grad=True, scaler=scaler)"
        )

    def _mixes_passes(self) -> bool:
        """Whether the gradients of both passes must have one loss scale."""
        return self.renormalize or (self.mixes_passes and type(self).descent is not Algebra.descent)

    def _common_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        """The loss scale of what the base optimizer is to step with: that of both passes, if one was unscaled."""
        sam = self._sam
        sam.second_factor = None
        if found_inf is None or sam.turn != SAM or not sam.first_scaled or not self._mixes_passes():
            return grad_scale
        first = sam.loss_scale
        if isinstance(first, Tensor) and grad_scale is None:
            sam.second_factor = first
            return first.float()
        if not isinstance(first, Tensor) and grad_scale is not None:
            sam.second_factor = grad_scale.double().reshape(()).reciprocal()
            return None
        return grad_scale

    def _steers_descent(self) -> bool:
        """Whether the base optimizer is to step with anything else than the gradients, or these are to be measured."""
        cls, turn = type(self), self._sam.turn
        if self._sam.second_factor is not None:
            return True
        if turn == SAM:
            return cls.descent is not Algebra.descent or cls.after_update is not Algebra.after_update
        return self._measures() or (turn == PLAIN and cls.plain is not Algebra.plain)

    def _length_to_take(self) -> Tensor | None:
        """[] float64: the squared length that what the base optimizer steps with is scaled to; None for its own."""
        return self._sam.first_squares if self.renormalize and self._sam.turn == SAM else None

    def _observe(self, grad_scale: Tensor | None) -> None:
        """Tell `when` how long the gradients at w were."""
        squares = self._sam.first_squares
        if squares is None or self.when is None:
            return
        if grad_scale is not None and not self._sam.first_scaled:
            squares = squares / grad_scale.to(squares.device, non_blocking=True).double().reshape(()).square()
        elif self._sam.first_scaled:
            squares = squares / self.loss_scale**2
        self.when.observe(squares)

    # What training loops of our own ask for.

    def _note_scale(self, scaler: torch.amp.GradScaler | None, known_as: Optimizer | None = None) -> None:
        """Note what the gradients at w are multiplied by, where somebody says so.

        Args:
            scaler: the GradScaler of the loss.
            known_as: the optimizer that `scaler.unscale_` is called with; this one by default.
        """
        if scaler is not None:
            self._sam.loss_scale, self._sam.first_scaled = scale_of(scaler, known_as or self), True

    @entry
    def _take_direction(self) -> list[tuple[Tensor, Tensor]]:
        """After a second pass: restore, and give what the base optimizer would step with, parameter by parameter."""
        sam = self._sam
        buckets = self._sync()
        grads = buckets.gather(ascent=False)
        buckets.require_memory(grads, ascent=False)
        buckets.sync_values()
        along = self._steer_descent(grads) if self._steers_descent() else grads
        length = self._length_to_take()
        factors = {} if length is None else buckets.factors_for(along, None, None, length)
        kept = []
        for bucket, part in zip(buckets.items, along, strict=True):
            factor = factors.get(bucket.tables.device, 1.0)
            scaled = Gradients([None if tensor is None else tensor * factor for tensor in part])
            kept += [(param, tensor) for param, tensor in bucket.as_distributed(scaled) if tensor is not None]
        buckets.restore()
        sam.phase = CLEAN
        torch.clear_autocast_cache()
        return kept

    def _end_replay(self) -> None:
        """A captured step was replayed: what the host notes at the end of a step."""
        self._sam.begun = False

    def _step_with_gradients(self) -> None:
        """Let the next `step()` be one with the gradients that are there."""
        self._sam.turn, self._sam.one_pass = BASE, OnePass(())

    def _perturb_without_gradients(self, source: Callable[[], Vector], direction: Callable[[Vector], Vector]) -> None:
        """Climb along a direction that is made of something else than gradients, such as the base optimizer's state."""
        sam = self._sam
        buckets = self._sync()
        sam.phase = PERTURBED

        def steer(parts: Sequence[Gradients]) -> tuple[Sequence[Gradients], None]:
            return sam.directions.here(direction(sam.directions.begin(parts))), None

        buckets.perturb(steer, instead=lambda: list(self.in_perturbed_groups(source()).parts))
        torch.clear_autocast_cache()
