"""What the passes of a step do: the parts that `FusedSAM.step` tells in order, and what is refused in them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.algebra import Algebra
from fastsam.bases.fallback import has_own_step, has_pre_hooks, run_post_hooks, run_pre_hooks, step_base
from fastsam.closures import CLOSURE_RECIPE, OnePass, call, entry
from fastsam.memory.buckets import Buckets, Steer
from fastsam.memory.directions import Vector
from fastsam.ops.tables import Gradients
from fastsam.progress import BASE, CLEAN, PERTURBED, PLAIN, SAM
from fastsam.radius import Radius
from fastsam.scaling import RECIPE as SCALER_RECIPE
from fastsam.scaling import are_scaled, forget_scaler, scale_of, scale_of_caller

# Of every group; the last three where they matter.
OWN_KEYS = ("rho", "adaptive", "eta", "perturb", "rounding_seed", "rounding_step", "sam_steps")
ADDED_GRADIENTS = (
    "FusedSAM: a second backward pass added to the gradients of a step that has one pass. first_step() says whether "
    "there is to be a second one: `if optimizer.first_step(zero_grad=True): loss_fn(model(x), y).backward()`, then "
    "optimizer.step()"
)


class Passes(Algebra):
    """The parts of `FusedSAM`'s step. They are called without gradients enabled.

    Attributes:
        p: the norm in which the perturbation has length rho.
        perturb_with_weight_decay: whether it is that of the loss with the weight decay in it.
        radius: how the length of the perturbation follows from that of the gradients; None for rho.
        renormalize: whether the second gradients are scaled to the length of the first.
    """

    p: float
    perturb_with_weight_decay: bool
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

    def _steer_ascent(
        self, grads: Sequence[Gradients]
    ) -> tuple[Sequence[Gradients], Tensor | Sequence[Gradients] | None]:
        sam = self._sam
        g1 = sam.directions.begin(grads)
        sam.directions.divisor = None
        if self.renormalize or self._measures():
            sam.first_squares = self.squared_norm(g1)
        along = sam.directions.here(self.ascent(g1))
        divisor, sam.directions.divisor = sam.directions.divisor, None  # it may hold the gradients
        return along, sam.directions.here(divisor) if isinstance(divisor, Vector) else divisor

    def _steer_descent(self, grads: Sequence[Gradients]) -> Sequence[Gradients]:
        sam = self._sam
        g = sam.directions.begin(grads)
        if sam.turn != SAM and self._measures():
            sam.first_squares = self.squared_norm(g)
        if sam.turn == BASE:
            return grads
        return sam.directions.here(self.descent(g) if sam.turn == SAM else self.plain(g))

    def _measures(self) -> bool:
        return self.when is not None and self.when.measures

    def _map_sums(self, sums: Mapping[torch.device, Tensor]) -> Mapping[torch.device, Tensor]:
        """What `perturb_` takes for the sums of squares, so that the perturbation has the radius' length."""
        assert self.radius is not None
        rho = next((float(group["rho"]) for group in self.param_groups if group["perturb"]), 0.0)
        mapped = {}
        for device, parts in sums.items():
            scale = self.loss_scale.to(device) if isinstance(self.loss_scale, Tensor) else self.loss_scale
            mapped[device] = torch.zeros_like(parts)
            mapped[device][0] = self.radius.map(parts.sum(), scale, rho)
        return mapped

    def _refuse_mixed_scales(self, grad_scale: Tensor | None) -> None:
        """Refuse what cannot be right where gradients at w are still multiplied by a GradScaler's scale."""
        needs = self.mixes_steps or (self.radius is not None and self.radius.measures)
        if needs and grad_scale is not None and self._sam.turn == SAM and not self._sam.first_scaled:
            who = type(self).__name__ if self.mixes_steps else f"radius={self.radius}"
            raise RuntimeError(
                f"FusedSAM: {who} needs to know the loss scale of the first pass: call "
                "optimizer.first_step(zero_grad=True, scaler=scaler)"
            )

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
        sam = self._sam
        sam.require_running()
        buckets = self._sync()
        sam.phase = PERTURBED
        steers = type(self).ascent is not Algebra.ascent or self.renormalize or self._measures()
        buckets.perturb(self._steer_ascent if steers else None, None if self.radius is None else self._map_sums)
        torch.clear_autocast_cache()

    @entry
    def _climb_again(self, scaler: torch.amp.GradScaler | None) -> None:
        """In a step with several perturbations: climb along the gradients that are there now."""
        self._note_scale(scaler)
        self._perturb()

    def _note_scale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Note what the gradients at w are multiplied by, where somebody says so."""
        if scaler is not None:
            self._sam.loss_scale, self._sam.first_scaled = scale_of(scaler, self), True

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
            tensors = zip(bucket.params, part, strict=True)
            kept += [(param, tensor * factor) for param, tensor in tensors if tensor is not None]
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

        buckets.perturb(steer, instead=lambda: sam.directions.in_perturbed_groups(source()))
        torch.clear_autocast_cache()

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
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        sam.scaling = grad_scale, found_inf
        self._refuse_mixed_scales(grad_scale)
        steer, overflow = self._steer_descent if self._steers_descent() else None, False
        if buckets.shared.rule is not None and not own_step and len(args) == 1 and not kwargs:
            grads = buckets.update(grad_scale, found_inf, self.max_grad_norm, steer, self._length_to_take())
            self._warn_without_gradients(grads)
        else:
            grads, overflow = self._update_by_base(buckets, grad_scale, found_inf, args, kwargs, steer)
        if sam.turn == SAM and not overflow and type(self).after_update is not Algebra.after_update:
            self.after_update()
        if self.buffers:
            sam.directions.publish(grads)
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

    def _steers_descent(self) -> bool:
        """Whether the base optimizer is to step with anything else than the gradients, or these are to be measured."""
        cls, turn = type(self), self._sam.turn
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
        factors = buckets.factors_for(along, self.max_grad_norm, grad_scale, self._length_to_take())
        self._restore_below_autograd()
        overflow = found_inf is not None and found_inf.item() != 0  # waits for the device
        directions: dict[Tensor, Tensor | None] = {}
        for bucket, part in zip(buckets.items, along if along is not grads else (), strict=False):
            directions.update(zip(bucket.params, part, strict=True))
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

    @entry
    def restore(self) -> None:
        """Bring the weights back, bit for bit, without an update; nothing happens if they are not perturbed."""
        sam = self._sam
        self._end_one_pass()
        sam.begun = False
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

    def _require_gradients(self) -> None:
        if all(p.grad is None for p in self._params()):
            raise RuntimeError(
                f"FusedSAM: closure_calls=1 needs the gradients at w before step(closure), found none; {CLOSURE_RECIPE}"
            )

    def _call_again(self, closure: Callable[[], Any]) -> Any:
        """The second call; refuses closures that add the second gradient to the first."""
        clearing = self._sam.clearing
        marked = clearing.mark(self._params)
        try:
            loss = call(closure)
        except BaseException:
            clearing.put_back(marked)
            raise
        if clearing.adds(marked):
            raise RuntimeError(
                "FusedSAM: the closure does not clear the gradients, so the second pass would add to the first: "
                f"{CLOSURE_RECIPE}"
            )
        return loss

    def _warn_without_gradients(self, grads: list[Any]) -> None:
        sam = self._sam
        if sam.no_gradients_warned or sam.phase != PERTURBED or (grads and grads[0] and grads[0][0] is not None):
            return
        if not any(grad is not None for bucket in grads for grad in bucket):
            sam.no_gradients_warned = True
            warnings.warn(
                "FusedSAM: no parameter had a gradient in this step. Was the optimizer built before the model's "
                "parameters were replaced (load_state_dict(assign=True), model surgery)?",
                stacklevel=6,
            )
