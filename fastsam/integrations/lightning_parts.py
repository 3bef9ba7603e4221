"""What `lightning` and `pytorch_lightning` share: one code under two names, whose classes do not know each other."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.optim import Optimizer

from fastsam.generators import Generators
from fastsam.integrations import generators_of, has_first_step
from fastsam.training import freeze_running_stats
from fastsam.wrappers import innermost, unwrap

Closure = Callable[[], Any]

ACCUMULATION = (
    "SAMCallback: accumulate_grad_batches must be 1, got {}: Lightning would run the last micro-batch alone again in "
    "the second pass, and leave the gradients of the first pass in place. Either let the callback run all of them "
    "again, SAMCallback(replay_micro_batches=True), which keeps them in memory until the step; or set "
    "automatic_optimization = False and, in training_step, call optimizer.step(closure) with a closure that clears "
    "the gradients and calls self.manual_backward for each micro-batch"
)


def does_nothing(closure: Closure) -> bool:
    """Whether this is what Lightning passes for a closure where the user gave none."""
    while isinstance(closure, functools.partial):
        closure = closure.args[-1] if closure.args else closure.func
    return getattr(closure, "__name__", "") == "do_nothing_closure"


class CallbackParts:
    """What `SAMCallback` does."""

    def __init__(self, same_rng: bool = True, replay_micro_batches: bool = False) -> None:
        """See `SAMCallback`."""
        super().__init__()
        self.same_rng, self.replay_micro_batches = same_rng, replay_micro_batches
        self._handles: list[Any] = []
        self._micro_batches: list[tuple[Any, int]] = []
        self._generators: Generators | None = None  # as they were before the first of these

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizers, and wrap the closures that they are given."""
        found = [innermost(optimizer) for optimizer in trainer.optimizers if has_first_step(optimizer)]
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise ValueError(
                f"SAMCallback: configure_optimizers must give a FusedSAM whose steps have two passes, got {kinds}"
            )
        self._remove_hooks()
        for optimizer in found:
            hook = functools.partial(self._before_step, trainer)
            self._handles.append(optimizer.register_step_pre_hook(hook))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep micro-batches, or refuse to accumulate them."""
        count = trainer.accumulate_grad_batches
        if count == 1 or not pl_module.automatic_optimization:
            return
        if not self.replay_micro_batches:
            raise ValueError(ACCUMULATION.format(count))
        if batch_idx % count == 0:
            self._micro_batches, self._generators = [], self._generators_of(pl_module)
        self._micro_batches.append((batch, batch_idx))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Bring the weights back, as in manual optimization nobody else does."""
        for optimizer in trainer.optimizers:
            if has_first_step(optimizer):
                unwrap(optimizer).restore()
        self._remove_hooks()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the optimizers as they were."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._micro_batches, self._generators = [], [], None

    def _before_step(self, trainer: Any, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook before `optimizer.step(closure)`; what to call that with instead."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or optimizer.perturbed:
            return None
        if does_nothing(closure):  # of a step() without closure, to which it means more than two calls of nothing
            closure()
            return args[:1], {}
        return (args[0], self.around(trainer, optimizer, closure)), {}

    def around(self, trainer: Any, optimizer: Any, closure: Closure) -> Closure:
        """A closure whose second call has the batches and random numbers of the first, and is not in any statistic."""
        model = trainer.lightning_module
        generators = self._generators or self._generators_of(model)

        def run() -> Any:
            if not optimizer.perturbed:
                return closure()
            generators.rewind()
            with freeze_running_stats(model):
                self._run_earlier_micro_batches(trainer)
                loss = closure()
            generators.forward()
            return loss

        return run

    def _generators_of(self, model: Any) -> Generators:
        return generators_of(model, self.same_rng)

    def _run_earlier_micro_batches(self, trainer: Any) -> None:
        """Those before the last one of this step, whose closure is what the optimizer was given."""
        epoch = trainer.fit_loop.epoch_loop
        unsynchronised = getattr(trainer.strategy, "block_backward_sync", nullcontext)  # where there are several ranks
        for batch, batch_idx in self._micro_batches[:-1]:
            arguments = epoch._build_kwargs(OrderedDict(), batch, batch_idx)
            with unsynchronised():
                epoch.automatic_optimization._make_closure(arguments, trainer.optimizers[0], batch_idx)()


class MixedPrecisionParts:
    """What `SAMMixedPrecision` does."""

    scaler: Any
    clip_grad_by_norm: Callable[..., None]
    clip_grad_by_value: Callable[..., None]
    _after_closure: Callable[..., None]

    def optimizer_step(self, optimizer: Any, model: Any, closure: Closure, **kwargs: Any) -> Any:
        """Run both passes, and let the GradScaler step."""
        if self.scaler is None or not has_first_step(optimizer):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)  # type: ignore[misc]
        sam = unwrap(optimizer)
        callback = next((one for one in model.trainer.callbacks if isinstance(one, CallbackParts)), None)
        run = closure if callback is None else callback.around(model.trainer, sam, closure)
        to_finish = sam.perturbed or does_nothing(closure)
        try:
            loss = run()
            if loss is None and model.automatic_optimization:  # training_step skipped this batch
                return None
            if not to_finish and sam.first_step(zero_grad=True, scaler=self.scaler):
                run()
            self._after_closure(model, optimizer)
            self.scaler.step(optimizer, **kwargs)
            self.scaler.update()
        except BaseException:
            sam.restore()
            raise
        return loss

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: int | float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clip the second pass's gradients, without their loss scale."""
        if not has_first_step(optimizer):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[misc]
        elif clip_val > 0:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            clip = self.clip_grad_by_value if gradient_clip_algorithm == "value" else self.clip_grad_by_norm
            clip(optimizer, clip_val)
