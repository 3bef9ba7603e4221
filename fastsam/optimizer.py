"""FusedSAM: Sharpness-Aware Minimization (Foret et al., arXiv 2010.01412) around any base optimizer of torch.optim.

The arithmetic is in `ops/`, the flat memory in `buckets.py`, the base optimizers' rules in `rules.py`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam import ops
from fastsam.buckets import Buckets, serve
from fastsam.checkpoint import as_torch_saves, keep_wide, loadable
from fastsam.checks import (
    check_class,
    check_differentiable,
    check_instance,
    check_keys,
    check_max_grad_norm,
    check_name,
    check_p,
    check_param,
    check_precision,
    check_values,
)
from fastsam.fallback import step_base
from fastsam.ops.formats import Precision
from fastsam.rules import RULES
from fastsam.stats import Stats, read_stats

CLEAN, PERTURBED, PAUSED = "clean", "perturbed", "unperturbed()"  # phases of a step
OWN_KEYS = ("rho", "adaptive", "eta", "perturb", "rounding_seed", "rounding_step")  # the latter where they matter
KEPT = (  # in copies and pickles
    "base_optimizer",
    "closure_calls",
    "flatten",
    "max_grad_norm",
    "p",
    "perturb_with_weight_decay",
    "precision",
)
CLOSURE_RECIPE = (
    "either let the closure clear the gradients, run forward and backward and return the loss (FusedSAM calls it "
    "twice), or pass closure_calls=1, run the first forward and backward before step(closure) yourself"
)

F = TypeVar("F", bound=Callable[..., Any])


def untraced(method: F) -> F:
    """Keep torch.compile out: kernels write through addresses, which a trace cannot see."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(method)
    def entry(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:  # made on first use: importing torch._dynamo takes seconds
            disabled = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return entry  # type: ignore[return-value]


class _Progress:
    """Where the step is. One object, never re-bound: wrappers of an optimizer forward reads, but not writes."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.phase = CLEAN
        self.base_step_asked = False  # by base_step(), for the step() that it calls
        self.closure_checked = False  # whether the closure was seen to clear the gradients
        self.no_gradients_warned = False
        self.losses: tuple[Any, Any] = (None, None)  # of the last step(closure)


class FusedSAM(Optimizer):
    r"""SAM as a drop-in torch optimizer whose side of the step is three launches a device and dtype.

    Each step takes the gradient g1 at w, climbs to w + e with e = rho * g1 / (||g1|| + 1e-12), takes the gradient g2
    there, returns to the old w bit for bit and lets the base optimizer step with g2. ASAM (Kwon et al., arXiv
    2102.11600) measures the length of e in units of the weights: e = rho * T^2 g1 / (||T g1|| + 1e-12), T = abs(w) +
    eta in groups with `adaptive=True`. One norm is taken over all groups.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer; None with a base instance.
        base_optimizer: a class of torch.optim or its name, or an instance, whose parameter groups and state are taken
            over. SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam and `fastsam.Lion` ("lion") are fused, the others
            step by themselves.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM instead of SAM.
        eta: added to abs(w) in ASAM, >= 0; the paper's code uses 0.01 (see `asam_groups`).
        perturb: False leaves a group's weights, and its gradients in the norm, out of the perturbation.
        p: the norm in which the perturbation has length rho, in (1, inf] (eq. 2 of the paper). Another than 2 is slow,
            by its powers in float64, but for inf, which needs no norm: e = rho T sign(g1). Values near 1 are fine, too:
            with 1.001 nearly all of e lies where g1 is largest. Not saved, as the next two.
        perturb_with_weight_decay: perturb along the gradient of the loss with weight_decay/2 |w|^2 in it, as the
            paper's own code does; by default along the gradient alone, as the well-known PyTorch file does.
        max_grad_norm: clip the gradients of the second pass to this norm over all parameters, as
            torch.nn.utils.clip_grad_norm_ does before a step, but without writing to them.
        master_weights: keep float32 masters of bfloat16 and float16 parameters, and their states in float32. The
            perturbation and the step are made from the masters, which are the backup, too; weights are the masters,
            rounded. They are saved as `state[p]['master']`. Without them states have their parameter's dtype, as in
            torch. Weights must be written in place or as `p.data = ...`, not in place through `.data`, which torch
            does not count: such a write is undone by the next step.
        stochastic_rounding: round bfloat16 and float16 weights (and their states) up or down at random, so that
            perturbation and step are right on average, where rounding to nearest loses most of them; instead of
            masters.
        rounding_seed: of the random numbers, in every parameter group, >= 0 and below 2^53. They depend on nothing else
            but the step, the parameter's place and the element; replicas draw the same.
        state_dtype: torch.bfloat16 for states of float32 parameters and of masters, rounded stochastically, as rounding
            to nearest would never let `exp_avg_sq` decay.
        flatten: move the weights into flat buffers, one a device and dtype, at the first step or `prepare`, for who
            wants them in one piece (`flat_weights`). No step is faster by it, and what needs parameters with a storage
            of their own needs `unflatten` first: `safetensors.save_model` refuses them, `torch.save` of one writes the
            whole buffer, `pickle` does so for each. The move takes their memory twice for a moment; tensors that shared
            it (`p.detach()` from before) no longer follow. Complex parameters and those that have gaps or share a
            storage with others already (cuDNN's RNNs) stay where they are, with a warning. Those that leave later
            (`p.data = ...`, `model.cpu().cuda()`) stay out, with a warning; after `.to()` another dtype or device all
            are moved again, without one.
        closure_calls: 2: `step(closure)` calls the closure twice. 1: gradients are there before `step(closure)`, which
            calls it once.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; FASTSAM_BACKEND in the environment replaces "auto".
        **base_kwargs: what the base optimizer takes (lr, momentum, ...).

    Raises:
        ValueError: a value out of range, a base that SAM cannot wrap, a backend that is not available.

    Example:
        >>> opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
        >>> loss_fn(model(x), y).backward(); opt.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward(); opt.step()
    """

    # GradScaler then always reaches step(), which restores and, on overflow, does not update.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: type[Optimizer] | Optimizer | str = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        perturb: bool = True,
        p: float = 2.0,
        perturb_with_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        state_dtype: torch.dtype | None = None,
        flatten: bool = False,
        closure_calls: int = 2,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        """See the class."""
        if closure_calls not in (1, 2):
            raise ValueError(f"FusedSAM: closure_calls must be 1 or 2, got {closure_calls!r}")
        own = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": perturb}
        self.precision = Precision(master_weights, stochastic_rounding, state_dtype)
        check_precision(self.precision)
        if self.precision.draws:
            own |= {"rounding_seed": rounding_seed, "rounding_step": 0}
        elif rounding_seed != 0:
            raise ValueError("FusedSAM: rounding_seed is for stochastic_rounding or state_dtype, neither was asked for")
        check_values(own)
        check_max_grad_norm(max_grad_norm)
        check_p(p)
        chosen = ops.resolve(backend)
        if isinstance(base_optimizer, str):
            base_optimizer = check_name(base_optimizer)
        if isinstance(base_optimizer, Optimizer):
            check_instance(base_optimizer, params, base_kwargs)
            super().__init__(base_optimizer.param_groups, own)
            base = base_optimizer
        elif isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer):
            check_class(base_optimizer)
            if params is None:
                raise ValueError("FusedSAM: params may be None only with a base optimizer instance, got a class")
            super().__init__(params, own)
            base = base_optimizer(self.param_groups, **base_kwargs)
        else:
            raise ValueError(
                "FusedSAM: base_optimizer must be a torch.optim class, its name, or an instance of one, got "
                f"{base_optimizer!r}"
            )
        check_keys(base, own)
        for group in base.param_groups:
            check_differentiable(group)
        self.base_optimizer = base
        self.closure_calls, self.max_grad_norm = closure_calls, max_grad_norm
        self.p, self.perturb_with_weight_decay, self.flatten = p, perturb_with_weight_decay, flatten
        self.defaults = {**base.defaults, **own}
        self.param_groups = base.param_groups
        self.state = base.state
        self._sam = self._progress(chosen)
        for i, group in enumerate(self.param_groups):
            self._check_group(i, group)

    def _progress(self, backend: str) -> _Progress:
        """Where a step is that has not begun."""
        base = self.base_optimizer
        rule = RULES.get(type(base))
        return _Progress(Buckets(rule, backend, self.precision, base.defaults, self.param_groups, self.state))

    # The step.

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one SAM step, or finish the one that `first_step` began.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. Called twice (once at w, once at
                w + e), or once after `first_step`. With `closure_calls=1` the gradients at w must be there already and
                it is called once.

        Returns:
            The loss at w (with `closure_calls=1` or after `first_step`: the closure's own), None without a closure.

        Raises:
            RuntimeError: no closure, no `first_step` before, and there are gradients; a closure that does not clear the
                gradients; a closure under a GradScaler. The weights are restored first.
        """
        sam = self._sam
        if sam.base_step_asked or closure is None:
            return self._step_without_closure()
        loss = None
        with self._restored_on_error():
            if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
                raise RuntimeError(
                    "FusedSAM: scaler.step(optimizer, closure) cannot unscale the closure's gradients. Call "
                    "scaler.scale(loss).backward(); optimizer.first_step(zero_grad=True), then "
                    "scaler.scale(loss2).backward(); scaler.step(optimizer); scaler.update()"
                )
            if sam.phase == PERTURBED:
                loss = _call(closure)
            elif self.closure_calls == 1:
                self._require_gradients()
                self._perturb()
                self.zero_grad()
                loss = _call(closure)
            else:
                loss = _call(closure)  # gradient at w
                first = self._smallest_gradient()
                self._perturb()  # w <- w + e
                sam.losses = _detached(loss), _detached(_call(closure))  # gradient at w + e
                self._check_cleared(first)
            self._update()  # w <- base step from the old w with that gradient
        return loss

    def _step_without_closure(self) -> None:
        sam = self._sam
        if sam.phase == PERTURBED:
            with self._restored_on_error():
                self._update()
        elif sam.base_step_asked or all(float(group["lr"]) == 0 for group in self.param_groups):
            # A learning rate of 0 is how distributed checkpoints create state.
            self._update()
        elif any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "FusedSAM: step() needs a closure, or first_step() before it: SAM takes two gradients a step. Call "
                "first_step(zero_grad=True) after the first backward and step() after the second, or step(closure), or "
                "base_step() for a plain step of the base optimizer"
            )

    @untraced
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb from w to w + e along the gradients that are there, keeping w.

        Under a GradScaler the gradients may stay scaled: only their direction counts. If their norm is not finite there
        is no perturbation, and this step is the base optimizer's.

        Args:
            zero_grad: set the gradients to None afterwards.
        """
        if self._sam.phase == PERTURBED:
            warnings.warn(
                "FusedSAM: first_step() was called twice without a step() between; the weights are restored first",
                stacklevel=3,
            )
            self._leave()
        with self._restored_on_error():
            self._perturb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Finish the step: the same as `step()`.

        Args:
            zero_grad: set the gradients to None afterwards.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    def base_step(self) -> None:
        """Take a plain step of the base optimizer with the gradients that are there, hooks included.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_clean("base_step()")
        self._sam.base_step_asked = True
        try:
            self.step()
        finally:
            self._sam.base_step_asked = False

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back, bit for bit, without an update; nothing happens if they are not perturbed."""
        sam = self._sam
        if sam.phase == PERTURBED:
            sam.buckets.restore()
            sam.phase = CLEAN
            torch.clear_autocast_cache()

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the block the weights are the old ones: to save, evaluate or average between the two passes."""
        sam = self._sam
        if sam.phase != PERTURBED:
            yield
            return
        self._swap(PAUSED)
        try:
            yield
        finally:
            self._swap(PERTURBED)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are w + e: true between the two passes, also inside the second call of a closure."""
        return self._sam.phase == PERTURBED

    @property
    def backend(self) -> dict[torch.device, str]:
        """The backend that serves each device."""
        chosen: dict[torch.device, str] = {}
        for param in self._params():
            name = serve(param, self._sam.buckets.backend)[1]
            if chosen.get(param.device, "reference") == "reference":
                chosen[param.device] = name
        return chosen

    @untraced
    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate everything a step needs without taking one."""
        self._buckets()

    @untraced
    def refresh(self) -> None:
        """Take over changed weights and values of the groups (lr, rho); every step does, a replayed graph cannot."""
        if self._sam.phase == CLEAN:
            self._sam.buckets.meet_writes()
        self._sam.buckets.refresh()

    def flat_weights(self) -> list[Tensor]:
        """The flat buffers of `flatten=True`; none before the first step or `prepare`.

        One a device and dtype, and one more for parameters that were added or thawed later. The weights are there in
        the order of the parameter groups, each in its storage order and from a multiple of 64 elements on, with zeros
        between them. Writing there is like writing through `.data`, which torch does not count: `master_weights=True`
        undoes it.
        """
        return self._sam.buckets.flat_weights()

    @untraced
    @torch.no_grad()
    def unflatten(self) -> None:
        """Give every weight a storage of its own again, for good, as what saves or shares a model may ask for.

        The buffers are freed with the last view of them; CUDA graphs must be captured again.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_clean("unflatten()")
        self._sam.buckets.flat.move_out(self._params())
        self.flatten = False

    def stats(self) -> Stats:
        """Norms, loss increase and overflow counts so far; nothing waits for the device until a value is read."""
        return read_stats(self._sam.buckets, self._sam.losses, self.max_grad_norm is not None)

    def check_capture(self) -> None:
        """Check that a captured step will read today's gradients; for graphs that hold no backward pass of their own.

        Raises:
            RuntimeError: a gradient is elsewhere than when the graph was captured, or appeared, or is gone; or what
                `refresh` refuses.
        """
        self._sam.buckets.captures.check(self._sam.buckets.states_in_use())
        for bucket in self._sam.buckets.items:
            bucket.check_capture()

    # Parts of a step. They are called without gradients enabled.

    def _buckets(self) -> Buckets:
        """The buckets, caught up with the parameter groups and the state."""
        self._meet_base()
        for group in self.param_groups:
            for key in OWN_KEYS:  # a group that came in through the base optimizer
                if key not in group and key in self.defaults:
                    group[key] = self.defaults[key]
        buckets = self._sam.buckets
        buckets.q = 1.0 if self.p == float("inf") else self.p / (self.p - 1)
        buckets.decays = self.perturb_with_weight_decay
        buckets.flat.wanted = self.flatten
        buckets.follow(self.param_groups, self.state)
        return buckets

    def _meet_base(self) -> None:
        """Share groups and state with the base optimizer again after one of the two was given others."""
        base, buckets = self.base_optimizer, self._sam.buckets
        if base.state is self.state and base.param_groups is self.param_groups:
            return
        if self.state is buckets.state and self.param_groups is buckets.groups:
            self.state, self.param_groups = base.state, base.param_groups
        else:
            base.state, base.param_groups = self.state, self.param_groups

    def _perturb(self) -> None:
        sam = self._sam
        if sam.phase == PAUSED:
            raise RuntimeError("FusedSAM: leave the `with optimizer.unperturbed():` block before taking a step")
        buckets = self._buckets()
        grads = buckets.gather(ascent=True)
        buckets.meet_writes()
        sam.phase = PERTURBED
        buckets.perturb(grads)
        torch.clear_autocast_cache()

    def _update(self) -> None:
        sam = self._sam
        if sam.phase == PAUSED:
            raise RuntimeError("FusedSAM: leave the `with optimizer.unperturbed():` block before taking a step")
        buckets = self._buckets()
        grads = buckets.gather(ascent=False)
        if sam.phase == CLEAN:
            buckets.meet_writes()
        amp = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if buckets.rule is not None:
            self._warn_without_gradients(grads)
            buckets.update(grads, *amp, self.max_grad_norm)
        else:
            step_base(self.base_optimizer, buckets, grads, *amp, self.max_grad_norm)
        sam.phase = CLEAN
        torch.clear_autocast_cache()
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers on the base optimizer

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._sam.phase == PERTURBED:
                self._leave()
            raise

    def _leave(self) -> None:
        """End the perturbed phase by another door than `step`: weights that somebody wrote in the meantime are kept."""
        buckets = self._sam.buckets
        if buckets.undisturbed():
            self.restore()
            return
        buckets.forget()
        self._sam.phase = CLEAN
        buckets.warn_once(
            "FusedSAM: the weights were written between the two passes (load_state_dict?); they are kept, and the "
            "perturbation is dropped"
        )

    @untraced
    @torch.no_grad()
    def _swap(self, phase: str) -> None:
        self._sam.buckets.swap()
        self._sam.phase = phase
        torch.clear_autocast_cache()

    # What a user may have got wrong.

    def _require_clean(self, what: str) -> None:
        if self._sam.phase == PERTURBED:
            raise RuntimeError(
                f"FusedSAM: {what} needs the unperturbed weights, but the step is between its two passes. Finish it "
                "with step(), undo it with restore(), or use `with optimizer.unperturbed():`"
            )

    def _require_gradients(self) -> None:
        if all(p.grad is None for p in self._params()):
            raise RuntimeError(
                f"FusedSAM: closure_calls=1 needs the gradients at w before step(closure), found none; {CLOSURE_RECIPE}"
            )

    def _smallest_gradient(self) -> tuple[Tensor, Tensor, int] | None:
        """In an optimizer's first step: a parameter, its gradient (the smallest: it is kept alive) and its version."""
        if self._sam.closure_checked:
            return None
        # A view is a data-parallel bucket's, which the reducer writes to in place.
        grads = ((p, p.grad) for group in self.param_groups for p in group["params"])
        with_grad = [p for p, grad in grads if grad is not None and not grad._is_view()]
        param = min(with_grad, key=torch.numel, default=None)
        return None if param is None else (param, param.grad, param.grad._version)

    def _check_cleared(self, first: tuple[Tensor, Tensor, int] | None) -> None:
        """Refuse closures that add the second gradient to the first; one in-place addition gives them away."""
        self._sam.closure_checked = True
        if first is not None and first[0].grad is first[1] and first[1]._version == first[2] + 1:
            raise RuntimeError(
                "FusedSAM: the closure does not clear the gradients, so the second pass would add to the first: "
                f"{CLOSURE_RECIPE}"
            )

    def _warn_without_gradients(self, grads: list[Any]) -> None:
        sam = self._sam
        if not sam.no_gradients_warned and sam.phase == PERTURBED and not any(g is not None for b in grads for g in b):
            sam.no_gradients_warned = True
            warnings.warn(
                "FusedSAM: no parameter had a gradient in this step. Was the optimizer built before the model's "
                "parameters were replaced (load_state_dict(assign=True), model surgery)?",
                stacklevel=6,
            )

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        check_values(group)
        for param in group["params"]:
            check_param(param, index, self.param_groups, self._sam.buckets.backend)

    # State: what torch's own optimizer has, under torch's names.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any torch optimizer; it may have its own rho, adaptive, eta and perturb."""
        if "_sam" in self.__dict__:
            self._require_clean("add_param_group()")
        super().add_param_group(param_group)
        if "_sam" in self.__dict__:
            try:
                self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state under torch's names, and the groups with rho, adaptive, eta and perturb.

        It loads into the base optimizer's class and into FusedSAM, and holds no copy of the weights.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_clean("state_dict()")
        self._meet_base()
        buckets = self._sam.buckets
        for bucket in buckets.items:
            if self.state is not buckets.state or bucket.replaced(self.state):
                bucket.absorb(self.state, bucket.segments)
        buckets.meet_writes()
        self._note_rounding_step()
        out = super().state_dict()
        as_torch_saves(out["state"], self._params(), buckets)
        return out

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of FusedSAM, of the base optimizer's class, or of the 63-line SAM file.

        Keys that the checkpoint's groups lack keep their values here. The 63-line file saves no state of the base
        optimizer, which then starts afresh.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_clean("load_state_dict()")
        fused = self._sam.buckets.rule is not None
        ignored = ("old_p", "master") if fused and not self.precision.master_weights else ("old_p",)
        given = loadable(state_dict, self.param_groups, ignored)
        super().load_state_dict(given)
        keep_wide(self.state, self._params(), given, self.precision)
        if self.precision.draws:
            self._sam.buckets.set_rounding_step(max(int(group.get("rounding_step", 0)) for group in self.param_groups))
        if self._sam.buckets.items and self._sam.phase == CLEAN:
            self._buckets()  # copies into the flat tensors: addresses stay

    def _params(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [param for group in self.param_groups for param in group["params"]]

    def _note_rounding_step(self) -> None:
        """Write the step of the random numbers, which the device counts, into the groups."""
        if self.precision.draws:
            step = self._sam.buckets.rounding_step()
            for group in self.param_groups:
                group["rounding_step"] = step

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied: no tables of addresses, no backup."""
        self._require_clean("copying or pickling the optimizer")
        self._note_rounding_step()
        kept = {name: getattr(self, name) for name in KEPT}
        flat = self._sam.buckets.flat
        in_buffer = [i for i, param in enumerate(self._params()) if flat.home(param) is not None]
        return {**super().__getstate__(), **kept, "_backend": self._sam.buckets.backend, "_in_buffer": in_buffer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy, or take over what `load_state_dict` loaded."""
        backend, in_buffer = state.pop("_backend", None), state.pop("_in_buffer", ())
        super().__setstate__(state)
        if backend is not None:
            self._sam = self._progress(backend)
            params = self._params()
            self._sam.buckets.flat.adopt(params[i] for i in in_buffer)
        type(self.base_optimizer).__setstate__(
            self.base_optimizer, {"state": self.state, "param_groups": self.param_groups}
        )


def _detached(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, Tensor) else loss


def _call(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()
