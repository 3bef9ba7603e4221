"""What a method of the SAM family is written in: two directions, and what is computed with them on flat buffers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastsam.memory.directions import Products, Vector
from fastsam.ops.numbers import number_on
from fastsam.saving import SavedOptimizer


def pick(condition: Tensor, then: float | Tensor, otherwise: float | Tensor) -> Tensor:
    """[] float64: one of two numbers, as a [] bool on a device says; nothing waits for it."""
    one, other = (number_on(condition.device, value) for value in (then, otherwise))
    return torch.where(condition, one, other)


class Algebra(SavedOptimizer):
    """The part of `FusedSAM` that methods override, and what they compute with.

    A method says along which direction the weights climb (`ascent`), with which the base optimizer steps (`descent`),
    and with which it steps where a step has one pass only (`plain`, if `takes_two_passes` says so). Each is given the
    gradients of its pass and gives back a linear combination of them and of directions, which are flat buffers that the
    optimizer keeps. Where a parameter has no gradient in a pass, there is no direction.

    Attributes:
        mixes_steps: whether gradients of several steps are added, so that under a GradScaler `first_step` must be told
            the scaler: its scale may change between them.
        mixes_passes: whether `descent`, if there is one, adds gradients of both passes, so that they must have one loss
            scale; then the second ones are brought to that of the first.
        capturable: whether nothing is decided on the host in a step, so that a CUDA graph can repeat it.
        counts_steps: whether the number of the step decides anything, and is to be saved.
    """

    mixes_steps: ClassVar[bool] = False
    mixes_passes: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = False
    capturable: ClassVar[bool] = True

    # What a method overrides.

    def takes_two_passes(self) -> bool:
        """Whether the step that begins now is to have a second pass."""
        return True

    def ascent(self, g1: Vector) -> Vector:
        """The direction to climb along, in place of the gradients at w.

        Groups with `perturb=False` do not climb, whatever it says; where `descent` is overridden, too, g1 has their
        gradients all the same, for that to step with.
        """
        return g1

    def descent(self, g2: Vector) -> Vector:
        """What the base optimizer steps with, in place of the gradients at w + e."""
        return g2

    def plain(self, g: Vector) -> Vector:
        """What the base optimizer steps with in a step of one pass, in place of the gradients at w."""
        return g

    def after_update(self) -> None:
        """What is done to the weights after the base optimizer's step; see `descend`."""

    def create_buffers(self) -> None:
        """Give the directions of `buffers` something to load a checkpoint into, before there was a step: zeros.

        Overridden where a step that begins with zeros is another than one that begins with nothing.
        """
        for name in self.buffers:
            self._sam.directions.fill(self.direction(name))

    # What it computes with.

    @property
    def loss_scale(self) -> float | Tensor:
        """What the gradients at w are multiplied by: 1, or [] float64 where `first_step` was told a GradScaler."""
        return self._sam.loss_scale

    @property
    def steps(self) -> int:
        """How many steps began before this one; saved with the optimizer where `counts_steps`."""
        return max(self._sam.steps - 1, 0)

    def direction(self, name: str) -> Vector:
        """The flat buffer of that name; one of `buffers` is saved, another holds what this step wrote to it."""
        return self._sam.directions.named(name)

    def holds(self, name: str) -> bool:
        """Whether one of `buffers` holds anything yet; for `takes_two_passes`."""
        if not self._sync().items:  # without a parameter to train, as a rank under norm_group= may be: as the others
            return True
        return self.direction(name).written

    def combine(
        self,
        out: str | Vector,
        *terms: tuple[float | Tensor, Vector],
        first: tuple[float | Tensor, Vector] | None = None,
    ) -> Vector:
        """Write c0 x0 + c1 x1 + c2 x2 into a direction, in the parameters that have a gradient in this pass.

        One pass over the memory: 4 bytes a parameter for each term and for `out`, in float32. The first term is a
        product, the others fused multiply-adds, in order. A term with coefficient 0 is not read, so that 0 * inf is 0;
        one that holds nothing for a parameter is left out there.

        Args:
            out: a direction or its name; it may be one of the terms.
            *terms: one to three pairs of a coefficient (a number, or [] float64 on the device) and a vector.
            first: the term that `out` begins with, instead, in parameters of which it holds nothing yet.

        Returns:
            The direction.
        """
        directions = self._sam.directions
        return directions.combine(directions.named(out) if isinstance(out, str) else out, terms, first)

    def keep(self, vector: Vector, name: str = "kept") -> Vector:
        """Copy a vector into the direction of that name: gradients are gone in the next pass."""
        return self.combine(name, (1.0, vector))

    def dot(self, a: Vector, b: Vector) -> Products:
        """`<a,a>`, `<a,b>` and `<b,b>`, [] float64 each, in one pass over both; nothing waits for the device."""
        return self._sam.directions.dot(a, b)

    def squared_norm(self, a: Vector) -> Tensor:
        """`<a,a>`, [] float64."""
        return self._sam.directions.dot(a, None).aa

    def in_perturbed_groups(self, vector: Vector) -> Vector:
        """A vector of this pass without what it has in groups with `perturb=False`."""
        directions = self._sam.directions
        return directions.in_perturbed_groups(vector) if self._sam.buckets.skips_any() else vector

    @property
    def climbed(self) -> Tensor:
        """[] bool: whether there was a perturbation in this step, or an overflow in the first pass was in its way.

        That of the gradients in groups that are perturbed; with p = inf nothing is.
        """
        common = self._sam.common_sums
        sums = next(iter((self._sam.buckets.sums if common is None else common).values()), None)
        return torch.ones((), dtype=torch.bool) if sums is None else sums.isfinite().all()

    def divide_by(self, divisor: Vector | Tensor) -> None:
        """In `ascent`: climb by e = rho d / |v| for a vector v, or by rho d / sqrt(s) for s [] float64."""
        if self._sam.joint() is not None and isinstance(divisor, Tensor):
            raise RuntimeError(
                f"fastsam.joint: all optimizers climb under the norm that is common to them, but {type(self).__name__} "
                "divides by a number of its own; leave it out of the joint, or give divide_by() a vector, whose "
                "squares are added to the others'"
            )
        self._sam.directions.divisor = divisor

    def base_state(self, name: str) -> Vector:
        """The base optimizer's state of that name ("momentum_buffer", "exp_avg", ...), to be read.

        Raises:
            ValueError: the base optimizer is not fused, or has no such state.
        """
        return self._sam.directions.base_state(name)

    def descend(self, vector: Vector) -> None:
        """In `after_update`: w <- w - lr vector, beside the base optimizer; not where an overflow stopped its step."""
        sam = self._sam
        sam.buckets.descend(sam.directions.here(vector), *sam.scaling)
