"""Schedules: of rho, by the step or by the learning rate, and of the learning rate for SAM in a training's tail."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def rewarmed_tail(
    optimizer: Optimizer, steps: int, begins: int, *, warmup: int, peak: float = 0.5, least: float = 0.0
) -> LambdaLR:
    """A learning rate that falls twice: over the training, and from step `begins` on, warmed up again, over its tail.

    For `when=fastsam.when.after(begins)`. SAM in the tail was seen to help only where the tail has a fall of the
    learning rate of its own; begun in the last steps of one fall it has no time to reach other minima. Both falls are
    half a cosine, from 1 and from `peak` to `least`, in units of the groups' learning rates.

    Args:
        optimizer: whose groups' learning rates are scaled.
        steps: of the whole training.
        begins: the step from which on the tail is.
        warmup: steps in which the tail's learning rate rises to its peak.
        peak: of the tail, in units of the learning rate, > 0.
        least: what both falls end at.

    Returns:
        torch's scheduler; call `step()` once a step.

    Raises:
        ValueError: 0 <= begins <= begins + warmup < steps or 0 <= least < peak does not hold.
    """
    if not 0 <= begins <= begins + warmup < steps:
        raise ValueError(
            f"rewarmed_tail: 0 <= begins <= begins + warmup < steps must hold, got begins={begins!r}, "
            f"warmup={warmup!r}, steps={steps!r}"
        )
    if not (0 <= least < peak < float("inf")):
        raise ValueError(f"rewarmed_tail: 0 <= least < peak must hold, got least={least!r}, peak={peak!r}")
    return LambdaLR(optimizer, functools.partial(_factor, steps, begins, warmup, peak, least))


def _factor(steps: int, begins: int, warmup: int, peak: float, least: float, step: int) -> float:
    if step < begins:
        return _half_cosine(1.0, least, step / begins)
    if step < begins + warmup:
        return least + (peak - least) * (step - begins) / warmup
    return _half_cosine(peak, least, (step - begins - warmup) / (steps - begins - warmup))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class RhoScheduler(LRScheduler):
    """Sets rho in every parameter group, with the interface of torch's schedulers of the learning rate.

    Call `step()` once after each step of the optimizer, before or after the scheduler of the learning rate. It counts
    training steps, also those that `when=` gives one pass; what it sets counts from the next step on. `radius=` makes
    a length of rho as it always does. A rho that is a tensor is written in place, so that it stays the same tensor.

    It is a torch `LRScheduler`, so what takes one (Lightning, accelerate, torch's `ChainedScheduler`) takes it. The
    learning rate is left alone. torch's `SequentialLR` does reset it, whatever it is given: use `SequentialRho`.

    A schedule of your own is a subclass with `rho_at`.

    Attributes:
        optimizer: a FusedSAM, one of `fastsam.methods`, a `fastsam.joint` or their base optimizer.
        last_epoch: how many times `step()` was called, as torch names it.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        """Set rho for the first step; with another `last_epoch`, for the step after that one.

        Raises:
            ValueError: the optimizer has no rho, or none from before where `last_epoch` says that it was scheduled.
        """
        # LRScheduler's constructor would do the same to the learning rate, and warn of steps in another order.
        who, groups = type(self).__name__, optimizer.param_groups
        if any("rho" not in group for group in groups):
            raise ValueError(
                f"{who}: the optimizer must have rho in its parameter groups, as FusedSAM has, got "
                f"{type(optimizer).__name__} without"
            )
        if last_epoch != -1 and any("initial_rho" not in group for group in groups):
            raise ValueError(
                f"{who}: last_epoch={last_epoch!r} needs 'initial_rho' in all parameter groups, which a checkpoint of "
                "an optimizer with a scheduled rho has: load that first, or leave last_epoch out"
            )
        self.optimizer, self.last_epoch = optimizer, last_epoch
        self._last_rho: list[float] = []
        self._initial_step()

    def rho_at(self, step: int, index: int, group: dict[str, Any]) -> float:
        """The radius of a parameter group in a step.

        Args:
            step: the number of the training step, from 0 on.
            index: of the group.
            group: the group; `group["initial_rho"]` is its radius from before the first scheduler.

        Returns:
            rho, >= 0.
        """
        raise NotImplementedError

    def step(self, epoch: int | None = None) -> None:
        """Set rho for the next step, or for that of this number."""
        self._update_lr(epoch)

    def get_last_rho(self) -> list[float]:
        """The radii that were set last, by parameter group."""
        return list(self._last_rho)

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of now, for what logs those of any scheduler."""
        return [lr.clone() if isinstance(lr := g["lr"], Tensor) else lr for g in self.optimizer.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave and set rho for the step where that was, before or after the optimizer loads."""
        super().load_state_dict(state_dict)
        self._set_rho()

    @property
    def _step_count(self) -> int:  # type: ignore[override]
        """For what reads this of torch's schedulers."""
        return self.last_epoch + 1

    def _initial_step(self) -> None:
        self.step()

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._set_rho()

    def _set_rho(self) -> None:
        values, groups = [], self.optimizer.param_groups
        for group in groups if "rho" in self.optimizer.defaults else ():
            group.setdefault("rho", self.optimizer.defaults["rho"])  # a group that came in through the base
        groups = [group for group in groups if "rho" in group]  # the base itself waits for what FusedSAM's step gives
        for i, group in enumerate(groups):
            group.setdefault("initial_rho", float(group["rho"]))
            values.append(float(self.rho_at(self.last_epoch, i, group)))
            if not 0 <= values[-1] < math.inf:
                raise ValueError(
                    f"{type(self).__name__}: rho must be >= 0, got {values[-1]!r} for param_groups[{i}] in step "
                    f"{self.last_epoch}"
                )
        for group, rho in zip(groups, values, strict=True):
            if isinstance(group["rho"], Tensor):
                group["rho"].fill_(rho)
            else:
                group["rho"] = rho
        self._last_rho = values


class LambdaRho(RhoScheduler):
    """Multiplies each group's rho by a function of the step, as torch's LambdaLR does the learning rate.

    Args:
        optimizer: see RhoScheduler.
        rho_lambda: gives the factor of a step, from 0 on; or one such function for each group. Functions are not saved,
            but objects that can be called are.
        last_epoch: see RhoScheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        """See the class."""
        self.rho_lambdas = _by_group("LambdaRho", "rho_lambda", rho_lambda, optimizer)
        super().__init__(optimizer, last_epoch)

    def rho_at(self, step: int, index: int, group: dict[str, Any]) -> float:
        """See RhoScheduler."""
        return float(group["initial_rho"]) * float(_of_group(self.rho_lambdas, index)(step))

    def state_dict(self) -> dict[str, Any]:
        """As LambdaLR's: of the functions, what objects that can be called hold."""
        out = super().state_dict()
        functions = out.pop("rho_lambdas")
        out["rho_lambdas"] = [None if hasattr(f, "__code__") else dict(getattr(f, "__dict__", {})) for f in functions]
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        given = dict(state_dict)
        for function, held in zip(self.rho_lambdas, given.pop("rho_lambdas"), strict=True):
            if held:
                vars(function).update(held)
        super().load_state_dict(given)


class _Shaped(RhoScheduler):
    """From 0 to `start` in `warmup_steps`, from there to `end` until `total_steps`, and then `end`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None,
        *,
        start: float | Sequence[float] | None = None,
        end: float | Sequence[float] = 0.0,
        warmup_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        who = type(self).__name__
        if not 0 <= warmup_steps < (math.inf if total_steps is None else total_steps):
            raise ValueError(
                f"{who}: 0 <= warmup_steps < total_steps must hold, got warmup_steps={warmup_steps!r}, "
                f"total_steps={total_steps!r}"
            )
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.start = None if start is None else _by_group(who, "start", start, optimizer)
        self.end = _by_group(who, "end", end, optimizer)
        for name, values in (("start", self.start), ("end", self.end)):
            if values is not None and not all(0 <= value < math.inf for value in values):
                raise ValueError(f"{who}: {name} must be >= 0, got {values if len(values) > 1 else values[0]!r}")
        super().__init__(optimizer, last_epoch)

    def rho_at(self, step: int, index: int, group: dict[str, Any]) -> float:
        """See RhoScheduler."""
        start = float(group["initial_rho"]) if self.start is None else _of_group(self.start, index)
        if step < self.warmup_steps:
            return start * step / self.warmup_steps
        if self.total_steps is None:
            return start
        end = _of_group(self.end, index)
        share = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return end if share >= 1 else self._between(start, end, share)

    @staticmethod
    def _between(start: float, end: float, share: float) -> float:
        raise NotImplementedError


class ConstantRho(_Shaped):
    """Holds rho, after a warm-up from 0; from `total_steps` on, if given, it is `end`.

    Args:
        optimizer: see RhoScheduler.
        total_steps: how long rho is held, the warm-up included; None for good.
        start: rho, or one for each group; that of the groups by default.
        end: what it is from `total_steps` on, 0 by default. A step with rho = 0 still takes two passes; to save one of
            them, use `when=fastsam.when.between(0, total_steps)`.
        warmup_steps: in which rho rises from 0.
        last_epoch: see RhoScheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        *,
        start: float | Sequence[float] | None = None,
        end: float | Sequence[float] = 0.0,
        warmup_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        """See the class."""
        super().__init__(optimizer, total_steps, start=start, end=end, warmup_steps=warmup_steps, last_epoch=last_epoch)

    @staticmethod
    def _between(start: float, end: float, share: float) -> float:
        return start


class LinearRho(_Shaped):
    """Goes from one rho to another in a straight line, after a warm-up from 0.

    Args:
        optimizer: see RhoScheduler.
        total_steps: when it ends, the warm-up included; then it stays.
        start: rho at the end of the warm-up, or one for each group; that of the groups by default.
        end: the last rho, or one for each group; 0 by default. It may be larger than the first.
        warmup_steps: in which rho rises from 0.
        last_epoch: see RhoScheduler.
    """

    @staticmethod
    def _between(start: float, end: float, share: float) -> float:
        return start + (end - start) * share


class CosineRho(_Shaped):
    """Goes from one rho to another along half a cosine, after a warm-up from 0; arguments as for LinearRho."""

    @staticmethod
    def _between(start: float, end: float, share: float) -> float:
        return _half_cosine(start, end, share)


class SequentialRho(RhoScheduler):
    """One schedule of rho after the other, each from its own step 0 on, as torch's SequentialLR.

    Args:
        optimizer: see RhoScheduler.
        schedulers: of the same optimizer. From here on they are this one's: only its `step()` is called.
        milestones: the steps in which the second and the following ones begin.
        last_epoch: see RhoScheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[RhoScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        """See the class."""
        for i, scheduler in enumerate(schedulers):
            if not isinstance(scheduler, RhoScheduler) or scheduler.optimizer is not optimizer:
                raise ValueError(
                    "SequentialRho: all schedulers must be schedulers of rho of the same optimizer, got "
                    f"{type(scheduler).__name__} at place {i}"
                )
        rising = all(a < b for a, b in zip([0, *milestones], milestones, strict=False))
        if len(milestones) != len(schedulers) - 1 or not rising:
            raise ValueError(
                "SequentialRho: there must be one milestone between two schedulers, rising and > 0, got "
                f"{len(schedulers)} schedulers and milestones={list(milestones)!r}"
            )
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        super().__init__(optimizer, last_epoch)

    def rho_at(self, step: int, index: int, group: dict[str, Any]) -> float:
        """See RhoScheduler."""
        current = bisect.bisect_right(self.milestones, step)
        begins = self.milestones[current - 1] if current else 0
        return self.schedulers[current].rho_at(step - begins, index, group)

    def state_dict(self) -> dict[str, Any]:
        """Its own and those of its schedulers."""
        return {**super().state_dict(), "schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        given = dict(state_dict)
        for scheduler, own in zip(self.schedulers, given.pop("schedulers"), strict=True):
            scheduler.load_state_dict(own)
        super().load_state_dict(given)


class RhoFollowsLR(RhoScheduler):
    """Ties rho to the learning rate: rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min), in each group.

    GSAM's schedule (arXiv 2203.08065, section 4.3). Call `step()` after that of the scheduler of the learning rate;
    before it, rho is one step behind. A learning rate out of range counts as its end.

    Args:
        optimizer: see RhoScheduler.
        rho_max: rho where the learning rate is lr_max.
        rho_min: rho where it is lr_min.
        lr_max: the largest learning rate, or one for each group. By default each group's own: the largest of that of
            now, the `initial_lr` of its scheduler and the `max_lr` of OneCycleLR.
        lr_min: the least.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho_max: float,
        rho_min: float = 0.0,
        *,
        lr_max: float | Sequence[float] | None = None,
        lr_min: float = 0.0,
    ) -> None:
        """Set rho for the learning rates of now."""
        if lr_max is None:
            lr_max = [
                max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
                for group in optimizer.param_groups
            ]
        self.lr_max = _by_group("RhoFollowsLR", "lr_max", lr_max, optimizer)
        if not 0 <= rho_min <= rho_max or not all(lr_min < value for value in self.lr_max):
            raise ValueError(
                "RhoFollowsLR: 0 <= rho_min <= rho_max and lr_min < lr_max must hold, got rho_min="
                f"{rho_min!r}, rho_max={rho_max!r}, lr_min={lr_min!r}, lr_max={self.lr_max!r}"
            )
        self.rho_min, self.rho_max, self.lr_min = rho_min, rho_max, lr_min
        super().__init__(optimizer)

    def rho_at(self, step: int, index: int, group: dict[str, Any]) -> float:
        """See RhoScheduler."""
        share: float = (float(group["lr"]) - self.lr_min) / (_of_group(self.lr_max, index) - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * min(max(share, 0.0), 1.0)


def _by_group(who: str, name: str, value: Any, optimizer: Optimizer) -> list[Any]:
    """What stands for each group: one for all, or as many as there are groups."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if len(value) != len(optimizer.param_groups):
        raise ValueError(
            f"{who}: {name} must be one for all parameter groups, or one for each of the "
            f"{len(optimizer.param_groups)}, got {len(value)}"
        )
    return list(value)


def _of_group(values: list[Any], index: int) -> Any:
    """That of a group; one that was added later has the last one's."""
    return values[min(index, len(values) - 1)]
