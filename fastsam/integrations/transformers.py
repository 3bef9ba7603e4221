"""Transformers' Trainer: the second pass over all micro-batches of a step, before it clips and steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from fastsam.integrations import generators_of, has_first_step, require
from fastsam.training import freeze_running_stats
from fastsam.wrappers import unwrap

require("transformers")
require("accelerate")

from transformers import TrainerCallback  # noqa: E402

__all__ = ["SAMCallback", "SAMTrainerMixin"]


class SAMTrainerMixin:
    """Makes a Trainer take SAM steps: `class SAMTrainer(SAMTrainerMixin, Trainer): pass`.

    The first pass is the Trainer's own: gradients of all micro-batches of `gradient_accumulation_steps` are added up.
    Then the weights are perturbed once and all of them are run again, so that the step is that of the whole batch.
    What follows is the Trainer's: `max_grad_norm` clips the second gradients, whose norm is logged, and the learning
    rate is scheduled. The loss that is logged is that at w. In the second pass running statistics are left alone.

    The optimizer comes by `optimizers=(FusedSAM(...), scheduler)` or `optimizer_cls_and_kwargs=(FusedSAM, {...})`; with
    any other than one of fastsam's nothing changes. Mixed precision, DistributedDataParallel, checkpoints and resuming
    are as ever.

    Attributes:
        same_rng: whether dropout draws the same masks in both passes.
    """

    same_rng: bool = True
    accelerator: Any
    optimizer: Any
    _sam_batches: list[Any] = []
    _sam_items: Any = None
    _sam_done: int = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of a step, and keep them for the second pass."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._sam_batches, self._sam_items, self._sam_done = batches, items, 0
        return batches, items

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch; after the last one of a step, the second pass."""
        if self._sam_done == 0:
            self._sam_generators = generators_of(model, self.same_rng)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._sam_done += 1
        if self._sam_done == len(self._sam_batches) and has_first_step(self.optimizer):
            self._second_pass(model, super().training_step)  # type: ignore[misc]
        return loss

    def _second_pass(self, model: torch.nn.Module, training_step: Any) -> None:
        optimizer, last = unwrap(self.optimizer), len(self._sam_batches) - 1
        if not optimizer.first_step(zero_grad=True, scaler=self.accelerator.scaler):
            return
        self._sam_generators.rewind()
        try:
            with freeze_running_stats(model):
                for i, inputs in enumerate(self._sam_batches):
                    with nullcontext() if i == last else self.accelerator.no_sync(model):
                        training_step(model, inputs, self._sam_items)
        except BaseException:
            optimizer.restore()
            raise
        self._sam_generators.forward()


class SAMCallback(TrainerCallback):
    """Makes a Trainer that is there already take SAM steps: `trainer.add_callback(SAMCallback(trainer))`.

    For trainers whose class somebody else chooses: it gives this one the methods of `SAMTrainerMixin`.

    Args:
        trainer: the Trainer, of whatever class.
        same_rng: whether dropout draws the same masks in both passes.
    """

    def __init__(self, trainer: Any, same_rng: bool = True) -> None:
        """See the class."""
        if not isinstance(trainer, SAMTrainerMixin):
            cls = type(trainer)
            trainer.__class__ = type(f"SAM{cls.__name__}", (SAMTrainerMixin, cls), {})
        trainer.same_rng = same_rng

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there is something to do.

        Raises:
            ValueError: the optimizer is none of fastsam's with two passes.
        """
        optimizer = kwargs.get("optimizer")
        if not has_first_step(optimizer):
            raise ValueError(
                "SAMCallback: the Trainer's optimizer must be a FusedSAM whose steps have two passes, got "
                f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__}; give it by optimizers=(optimizer, "
                "scheduler) or optimizer_cls_and_kwargs=(FusedSAM, {...})"
            )
