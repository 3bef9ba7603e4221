"""Lightning's Trainer, as the package `lightning` has it: a callback and the plugin for float16."""

from __future__ import annotations

from fastsam.integrations import require
from fastsam.integrations.lightning_parts import CallbackParts, MixedPrecisionParts

require("lightning.pytorch")

from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

__all__ = ["SAMCallback", "SAMMixedPrecision"]


class SAMCallback(CallbackParts, Callback):
    """Protects the second pass of a FusedSAM in `Trainer.fit`; everything else works without it.

    In the second pass running statistics of normalisation layers are left alone, and dropout draws the masks of the
    first. In manual optimization that is so for `optimizer.step(closure)`; with `first_step` and `step` use
    `fastsam.freeze_running_stats`. A manual `optimizer.step()` without `first_step` before it is refused, which
    without the callback would be a plain step of the base optimizer. If training ends by an exception the weights come
    back.

    `training_step` runs twice a step, so what it logs with `self.log` is there twice: of a value logged on a step the
    second pass counts, at w + e, and a mean over the epoch has both. `self.optimizers().perturbed` is true in the
    second pass: `if not self.optimizers().perturbed: self.log(...)`.

    Args:
        same_rng: whether the second pass draws the random numbers of the first.
        replay_micro_batches: with `accumulate_grad_batches`, keep the micro-batches of a step on their device and run
            all of them again in the second pass: one perturbation from all of them. Otherwise accumulation is refused.

    Raises:
        ValueError: when training starts: there is no FusedSAM; when a batch starts: micro-batches are accumulated.
    """


class SAMMixedPrecision(MixedPrecisionParts, MixedPrecision):  # type: ignore[misc]  # its arguments are Lightning's
    """The plugin for `precision="16-mixed"`: two passes under one loss scale, clipped after it was taken off.

    Lightning's own runs one pass only, which FusedSAM refuses. With "bf16-mixed" this one is needed for
    `gradient_clip_val` only, which Lightning's refuses with optimizers that unscale gradients themselves. The scaler is
    updated once a step; an overflow in the first pass makes that a step of the base optimizer, one in the second skips
    it.

    It takes what Lightning's takes: the precision, "cuda" or "cpu", and perhaps a torch.amp.GradScaler of your own.

    Example:
        >>> Trainer(plugins=[SAMMixedPrecision("16-mixed", "cuda")], callbacks=[SAMCallback()])
    """
