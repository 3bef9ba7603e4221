"""What the passes of a step do: the parts that `FusedSAM.step` tells in order, and what is refused in them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.algebra import Algebra
from fastsam.averaging import Averaging
from fastsam.bases.fallback import has_own_step, has_pre_hooks, run_post_hooks, run_pre_hooks, step_base
from fastsam.bases.rules import lr_is_zero
from fastsam.closures import entry
from fastsam.memory.buckets import Buckets, MaxNorm, Measured, Steer
from fastsam.ops.local import is_distributed
from fastsam.ops.tables import Gradients
from fastsam.progress import CLEAN, PERTURBED, SAM
from fastsam.scaling import RECIPE as SCALER_RECIPE
from fastsam.scaling import are_scaled, forget_scaler, scale_of_caller

# Of every group; the last three where they matter.
OWN_KEYS = ("rho", "adaptive", "eta", "perturb", "rounding_seed", "rounding_step", "sam_steps")
ADDED_GRADIENTS = (
    "FusedSAM: a second backward pass added to the gradients of a step that has one pass. first_step() says whether "
    "there is to be a second one: `if optimizer.first_step(zero_grad=True): loss_fn(model(x), y).backward()`, then "
    "optimizer.step()"
)
CALLED_TWICE = "FusedSAM: first_step() was called twice without a step() between; the weights are restored first"
CLOSURE_UNDER_SCALER = (
    "FusedSAM: scaler.step(optimizer, closure) cannot unscale the closure's gradients. Call "
    "scaler.scale(loss).backward(); optimizer.first_step(zero_grad=True), then "
    "scaler.scale(loss2).backward(); scaler.step(optimizer); scaler.update(). Accelerate: accelerator.backward(loss); "
    "fastsam.unwrap(optimizer).first_step(zero_grad=True); accelerator.backward(loss2); optimizer.step()"
)
NO_FIRST_STEP = (
    "FusedSAM: step() needs a closure, or first_step() before it: SAM takes two gradients a step. Call "
    "first_step(zero_grad=True) after the first backward and step() after the second, or step(closure), or "
    "base_step() for a plain step of the base optimizer. A loop that cannot be changed is given its second pass by "
    "attach_second_pass(forward_backward)"
)
UNSCALED_BEFORE_SECOND_PASS = (
    "FusedSAM: the second pass that was attached comes after scaler.unscale_ here, which would leave its gradients "
    "multiplied by the loss scale. Leave unscale_ out and clip with FusedSAM's max_grad_norm=; or call "
    "first_step(zero_grad=True) after the first backward, and run the second one before unscale_. A wrapper of the "
    "optimizer (Lookahead) under a GradScaler is unscaled, too: train it in bfloat16 or float32"
)


def creates_state(optimizer: Any, second_pass: bool) -> bool:
    """Whether this step is one by which distributed checkpoints create state, with a learning rate of 0.

    A warm-up may begin at 0, too. Where there is a second pass to run, its gradients tell it from a checkpoint's; where
    there is none, the base optimizer steps.
    """
    if not all(lr_is_zero(group) for group in optimizer.param_groups):
        return False
    if not second_pass:
        return True
    grads = (p.grad for p in optimizer._params())
    return not optimizer.state and not any(grad is not None and bool(grad.any()) for grad in grads)


class Passes(Averaging):
    """The parts of `FusedSAM`'s step. They are called without gradients enabled.

    Attributes:
        p: the norm in which the perturbation has length rho.
        perturb_with_weight_decay: whether it is that of the loss with the weight decay in it.
    """

    p: float
    perturb_with_weight_decay: bool

    def _sync(self) -> Buckets:
        """The buckets, caught up with the parameter groups."""
        buckets, shared = self._sam.buckets, self._sam.buckets.shared
        self._share_state_with_base()
        q = 1.0 if self.p == float("inf") else self.p / (self.p - 1)
        options = q, self.perturb_with_weight_decay, self.flatten
        if options == (shared.q, shared.decays, buckets.flat.wanted) and buckets.same_groups(
            self.param_groups, self.state
        ):
            return buckets
        shared.q, shared.decays, buckets.flat.wanted = options
        for group in self.param_groups:
            if type(group["params"]) is not list:
                group["params"] = list(group["params"])
            for key in OWN_KEYS:  # a group that came in through the base optimizer
                if key not in group and key in self.defaults:
                    group[key] = self.defaults[key]
        if type(self.param_groups) is not list:  # as other libraries may write them
            self.param_groups = self.base_optimizer.param_groups = list(self.param_groups)
        buckets.sync_with_groups(self.param_groups, self.state)
        return buckets

    def _perturb(self) -> None:
        self._sam.require_own_norm()
        self._begin_ascent().perturb(
            self._steer_ascent if self._steers_ascent() else None, None if self.radius is None else self._map_sums
        )
        torch.clear_autocast_cache()

    def _begin_ascent(self) -> Buckets:
        sam = self._sam
        sam.require_running()
        if not any(param.grad is not None for group in self.param_groups for param in group["params"]):
            self._refuse_gradients_kept_back()
        buckets = self._sync()
        sam.phase, sam.common_sums = PERTURBED, None
        return buckets

    def _refuse_gradients_kept_back(self) -> None:
        """Refuse a first pass without any gradient of DTensors, which FSDP2 keeps back where it is not to communicate.

        Raises:
            RuntimeError: there are DTensors.
        """
        if any(is_distributed(param) for param in self._params()):
            raise RuntimeError(
                "FusedSAM: no parameter has a gradient. FSDP2 keeps gradients to itself (p.grad is None) after "
                "set_requires_gradient_sync(False), so each rank cannot climb by its own (m-sharpness): call "
                "model.set_requires_gradient_sync(True) before the backward pass of the first pass, too. With plain "
                "replicas, DistributedDataParallel and no_sync(), it can"
            )

    # The two halves of `_perturb`, for several optimizers under one norm: first all measure, then all climb.

    def _measure(self) -> Measured:
        buckets = self._begin_ascent()
        buckets.begin_ascent()
        return buckets.measure(self._steer_ascent if self._steers_ascent() else None)

    def _climb(self, measured: Measured, sums: Mapping[torch.device, Tensor]) -> None:
        self._sam.common_sums = sums
        self._sam.buckets.climb(*measured, sums if self.radius is None else self._map_sums(sums))
        torch.clear_autocast_cache()

    @entry
    def _climb_again(self, scaler: torch.amp.GradScaler | None) -> None:
        """In a step with several perturbations: climb along the gradients that are there now."""
        self._note_scale(scaler)
        self._perturb()

    def _update(self) -> None:
        sam, base = self._sam, self.base_optimizer
        sam.require_running()
        own_step = has_own_step(base)
        args, kwargs = self._run_pre_hooks() if has_pre_hooks(base) and not own_step else ((base,), {})
        buckets = self._sync()
        if sam.phase == CLEAN:
            buckets.refresh_masters()
        else:
            buckets.weight_watch.close()
        self._begin_average()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._refuse_mixed_scales(grad_scale, found_inf)
        grad_scale = self._common_scale(grad_scale, found_inf)
        sam.scaling = grad_scale, found_inf
        steer, overflow = self._steer_descent if self._steers_descent() else None, False
        if buckets.shared.rule is not None and not own_step and len(args) == 1 and not kwargs:
            grads = buckets.update(grad_scale, found_inf, self._clips_to(), steer, self._length_to_take())
            self._warn_without_gradients(grads)
        else:
            grads, overflow = self._update_by_base(buckets, grad_scale, found_inf, args, kwargs, steer)
        if sam.turn == SAM and not overflow and type(self).after_update is not Algebra.after_update:
            self.after_update()
        self._average()
        if buckets.shared.buffers:
            sam.directions.publish(grads, stepped=not overflow)
        if self._measures():
            self._observe(grad_scale)
        sam.begun = False
        if sam.phase == PERTURBED:
            buckets.weight_watch.learn()
        sam.phase = CLEAN
        torch.clear_autocast_cache()
        base._opt_called = True  # type: ignore[attr-defined]  # for schedulers on the base optimizer
        if not overflow and not own_step:
            run_post_hooks(base, args, kwargs)

    def _clips_to(self) -> MaxNorm | None:
        return self.max_grad_norm if self._sam.common_clip is None else self._sam.common_clip

    @entry
    def _measure_update(self) -> Mapping[torch.device, Tensor]:
        """[n] float64 on each device: sums of squares of the gradients that are there, before `_update`."""
        buckets = self._sync()
        grads = buckets.gather(ascent=False)
        buckets.require_memory(grads, ascent=False)
        buckets.sync_values()
        buckets.clip(grads, float("inf"), None)  # for the norm
        return buckets.second_sums

    def _run_pre_hooks(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Call the base optimizer's own pre-hooks on the restored weights; what it is to step with."""
        base, found_inf = self.base_optimizer, getattr(self, "found_inf", None)
        self._restore_below_autograd()
        self._sam.phase = CLEAN
        if self._sam.buckets.shared.rule is None and found_inf is not None and found_inf.item() != 0:
            return (base,), {}  # it will not step
        return run_pre_hooks(base)

    def _update_by_base(
        self,
        buckets: Buckets,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        steer: Steer | None,
    ) -> tuple[list[Gradients], bool]:
        """Restore, and let the base optimizer take a step of its own.

        Returns:
            The gradients, and whether an overflow kept it from stepping.
        """
        grads = buckets.gather(ascent=False)
        buckets.require_memory(grads, ascent=False)
        buckets.sync_values()
        along = grads if steer is None else steer(grads)
        factors = buckets.factors_for(along, self._clips_to(), grad_scale, self._length_to_take())
        self._restore_below_autograd()
        overflow = found_inf is not None and found_inf.item() != 0  # waits for the device
        directions: dict[Tensor, Tensor | None] = {}
        for bucket, part in zip(buckets.items, along if along is not grads else (), strict=False):
            directions.update(bucket.as_distributed(part))
        if not overflow:
            step_base(self.base_optimizer, buckets.masters(), grad_scale, factors, args, kwargs, directions)
        buckets.finish_base_step(overflow)
        return grads, overflow

    def _restore_below_autograd(self) -> None:
        """Restore the weights for the base optimizer, which may differentiate the gradients once more (AdaHessian).

        Their graph then counts the weights as it saw them, as where the well-known SAM file writes `p.data = old`.
        """
        buckets = self._sam.buckets
        params = tuple(param for bucket in buckets.items for param in bucket.params)
        if any(param.grad is not None and param.grad.requires_grad for param in params):
            with torch.autograd.grad_mode._unsafe_preserve_version_counter(params):
                buckets.restore()
        else:
            buckets.restore()

    def _leave_perturbed(self) -> None:
        """End the perturbed phase by another way than `step`: weights that were loaded in the meantime are kept."""
        buckets = self._sam.buckets
        if self._sam.phase != PERTURBED:
            return
        if not buckets.weights_loaded():
            self.restore()
            return
        buckets.drop_perturbation()
        self._sam.phase = CLEAN
        buckets.shared.warn_once(
            "FusedSAM: all weights were written between the two passes (load_state_dict?); they are kept, and the "
            "perturbation is dropped"
        )

    @entry
    def _swap(self, phase: str) -> None:
        self._sam.buckets.swap()
        self._sam.phase = phase
        torch.clear_autocast_cache()

    def _end_one_pass(self) -> bool:
        """Where a step of one pass has begun, end that; whether a second backward pass added to its gradients."""
        watched, self._sam.one_pass = self._sam.one_pass, None
        if watched is None:
            return False
        watched.close()
        return watched.added_to

    def _forget_step(self) -> None:
        sam = self._sam
        self._end_one_pass()
        sam.steps -= sam.begun  # taken again it is the same one: a SAM step in k steps is not lost by an exception
        sam.begun = False

    @entry
    def restore(self) -> None:
        """Bring the weights back, bit for bit, without an update; nothing happens if they are not perturbed."""
        sam = self._sam
        self._forget_step()
        if sam.phase == PERTURBED:
            sam.buckets.restore()
            sam.phase = CLEAN
            torch.clear_autocast_cache()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Run the hooks around `step`, as torch does; whatever ends it early leaves nothing of a GradScaler behind."""
        hooked: Callable[..., Any] = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: Passes, *args: Any, **kwargs: Any) -> Any:
            try:
                return hooked(self, *args, **kwargs)
            except BaseException:
                forget_scaler(self)
                raise

        return step

    def _refuse_scaled_gradients(self) -> None:
        """Refuse gradients of the second pass that `unscale_` in the first one kept a GradScaler from unscaling."""
        if getattr(self, "found_inf", None) is None or getattr(self, "grad_scale", None) is not None:
            return
        sam = self._sam
        if sam.unscaling.looks():
            buckets = self._sync()
            grads = buckets.gather(ascent=True)
            buckets.sync_values()
            if are_scaled(buckets.growth(grads), scale := scale_of_caller()):
                raise RuntimeError(
                    "FusedSAM: scaler.unscale_(optimizer) must be called in the pass whose gradients it is for, but "
                    f"those of the second pass are still multiplied by the loss scale {scale}: it was called in the "
                    f"first pass, and scaler.update() not since. {SCALER_RECIPE}"
                )

    def _warn_without_gradients(self, grads: list[Any]) -> None:
        sam = self._sam
        if self.norm_group is not None:  # other ranks may have all gradients
            return
        if sam.no_gradients_warned or sam.phase != PERTURBED or (grads and grads[0] and grads[0][0] is not None):
            return
        if not any(grad is not None for bucket in grads for grad in bucket):
            sam.no_gradients_warned = True
            warnings.warn(
                "FusedSAM: no parameter had a gradient in this step. Was the optimizer built before the model's "
                "parameters were replaced (load_state_dict(assign=True), model surgery), or FSDP2 told to keep "
                "gradients back (set_requires_gradient_sync(False))?",
                stacklevel=6,
            )
