"""FusedSAM: Sharpness-Aware Minimization (Foret et al., arXiv 2010.01412) around any base optimizer of torch.optim.

The arithmetic is in `ops/`, the flat memory in `memory/`, the base optimizers' rules in `bases/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam import ops
from fastsam.checks import (
    check_class,
    check_differentiable,
    check_ema_decay,
    check_instance,
    check_keys,
    check_keywords,
    check_max_grad_norm,
    check_name,
    check_not_sharded,
    check_p,
    check_precision,
    check_radius,
    check_swapping,
    check_values,
    taken_apart,
)
from fastsam.closures import OnePass, entry
from fastsam.memory.placing import check_duplicates, check_param, is_unused
from fastsam.memory.ranks import NormGroup
from fastsam.ops.formats import Precision
from fastsam.passes import (
    ADDED_GRADIENTS,
    NO_FIRST_STEP,
    Passes,
    creates_state,
)
from fastsam.progress import BASE, CLEAN, PAUSED, PERTURBED, SAM, Progress
from fastsam.radius import Radius
from fastsam.step_order import StepOrder
from fastsam.when import When, as_when


class FusedSAM(Passes, StepOrder):
    r"""SAM as a drop-in torch optimizer whose side of the step is three launches a device and dtype.

    Each step takes the gradient g1 at w, climbs to w + e with e = rho * g1 / (||g1|| + 1e-12), takes the gradient g2
    there, returns to the old w bit for bit and lets the base optimizer step with g2. ASAM (Kwon et al., arXiv
    2102.11600) measures the length of e in units of the weights: e = rho * T^2 g1 / (||T g1|| + 1e-12), T = abs(w) +
    eta in groups with `adaptive=True`. One norm is taken over all groups.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer; None with a base instance.
        base_optimizer: a class of torch.optim or its name, a functools.partial of one, or an instance, whose parameter
            groups and state are taken over. SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam and `fastsam.Lion`
            ("lion") are fused, the others step by themselves.
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
            torch.nn.utils.clip_grad_norm_ does before a step, but without writing to them. Also what to use instead of
            Lightning's `gradient_clip_val`, which it refuses in mixed precision for optimizers that unscale gradients
            (`fastsam.integrations.lightning.SAMMixedPrecision` does not).
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
            wants them in one piece (`flat_weights`). No step is faster by it. Each weight keeps a storage of its own,
            over its part of the buffer, so that saving and copying a model are as ever; that storage cannot be resized,
            nor sent to another process on a GPU, before `unflatten`. The move takes the weights' memory twice for a
            moment; tensors that shared it (`p.detach()` from before) no longer follow. Complex parameters and those
            that have gaps or share a storage with others already (cuDNN's RNNs) stay where they are, with a warning.
            Those that leave later (`p.data = ...`, `model.cpu().cuda()`, `share_memory_()`) stay out, with a warning;
            after `.to()` another dtype or device all are moved again, without one.
        when: which steps are SAM steps, from `fastsam.when` (`every(5)`, `after(9000)`, ...), or a function of the
            step's number; all by default. The others are the base optimizer's own, with one pass: `step(closure)` calls
            the closure once, and `first_step` returns False.
        radius: how the length of the perturbation follows from that of the gradients, from `fastsam.radius`; rho by
            default.
        renormalize: scale the second gradients to the length of the first before the base optimizer steps with them
            (StableSAM: Tan et al., arXiv 2401.07250), and before they are clipped.
        ema_decay: keep an exponential moving average of the weights, averaged <- ema_decay * averaged +
            (1 - ema_decay) * w after each update, from the weights after the first one on. The model gets them in `with
            optimizer.averaged_weights():`. They are `state[p]['ema']`, saved with the optimizer, in float32 for 16-bit
            weights, and of the masters where there are some. One copy of the weights more, and 12 bytes a parameter of
            memory traffic a step in float32. The same bits as torch's AveragedModel with `get_ema_multi_avg_fn` called
            after each step, so also after one that a GradScaler skips: then the old weights count once more (but for
            the first steps of a base optimizer that is not fused, which has no state yet).
        closure_calls: 2: `step(closure)` calls the closure twice. 1: gradients are there before `step(closure)`, which
            calls it once.
        norm_group: a process group, or a DeviceMesh of one dimension, over whose ranks the sums of squares (and what a
            method measures) are added up, where each has other parameters or parts of them: the stages of a pipeline,
            experts, FullyShardedDataParallel (FSDP1). Parameters that several of its ranks have whole are counted as
            often. DTensors need none: their placements say over which ranks they are split. Kept by copies, not saved.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; FASTSAM_BACKEND in the environment replaces "auto".
        **base_kwargs: what the base optimizer takes (lr, momentum, ...). A keyword that is FusedSAM's, too, reaches the
            base optimizer through a partial or an instance.

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
        base_optimizer: type[Optimizer] | Optimizer | str | functools.partial[Optimizer] = torch.optim.SGD,
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
        when: When | Callable[[int], bool] | None = None,
        radius: Radius | None = None,
        renormalize: bool = False,
        ema_decay: float | None = None,
        closure_calls: int = 2,
        norm_group: Any = None,
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
        self.when, self.radius, self.renormalize = as_when(when), radius, renormalize
        if self.when is not None or self.counts_steps:
            own["sam_steps"] = 0
        check_values(own)
        check_max_grad_norm(max_grad_norm)
        check_ema_decay(ema_decay)
        check_p(p)
        check_radius(radius, p)
        chosen = ops.resolve(backend)
        check_not_sharded()
        if isinstance(base_optimizer, str):
            base_optimizer = check_name(base_optimizer)
        if isinstance(base_optimizer, functools.partial):
            base_optimizer, base_kwargs = taken_apart(base_optimizer, base_kwargs)
        elif isinstance(base_optimizer, type):
            options = dict(
                p=p,
                perturb_with_weight_decay=perturb_with_weight_decay,
                max_grad_norm=max_grad_norm,
                master_weights=master_weights,
                stochastic_rounding=stochastic_rounding,
                rounding_seed=rounding_seed,
                state_dtype=state_dtype,
                flatten=flatten,
                when=when,
                radius=radius,
                renormalize=renormalize,
                ema_decay=ema_decay,
                closure_calls=closure_calls,
                norm_group=norm_group,
                backend=backend,
            )
            check_keywords(base_optimizer, options, FusedSAM.__init__.__kwdefaults__ or {})
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
                "FusedSAM: base_optimizer must be a torch.optim class, its name, a partial or an instance of one, got "
                f"{base_optimizer!r}"
            )
        check_keys(base, own)
        for group in base.param_groups:
            check_differentiable(group)
        self.base_optimizer = base
        self.closure_calls, self.max_grad_norm, self.ema_decay = closure_calls, max_grad_norm, ema_decay
        self.norm_group = None if norm_group is None else NormGroup(norm_group)
        self.p, self.perturb_with_weight_decay, self.flatten = p, perturb_with_weight_decay, flatten
        self.defaults = {**base.defaults, **own}
        self.param_groups = base.param_groups
        self.state = base.state
        self._sam = self._new_progress(chosen)
        for i, group in enumerate(self.param_groups):
            self._check_group(i, group)

    # The step.

    @entry
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one SAM step, or finish the one that `first_step` began.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. Called twice (once at w, once at
                w + e), or once after `first_step`; once, at w, in a step of one pass. With `closure_calls=1` the
                gradients at w must be there already and it is called once, or not at all in a step of one pass.

        Returns:
            The loss at w (with `closure_calls=1` or after `first_step`: the closure's own), None without a closure.

        Without a closure and without `first_step` before it runs what was given to `attach_second_pass`. Without that
        it raises if there are gradients, with one exception: where all groups have a learning rate of 0 it is a step
        of the base optimizer, as distributed checkpoints take one to create state. A loop that forgot `first_step` is
        then told so in the first step after a warm-up's 0.

        Raises:
            RuntimeError: no closure, no `first_step` before, and there are gradients; a closure that does not clear the
                gradients; a closure under a GradScaler; `unscale_` in the first pass alone. The weights are restored
                first.
        """
        sam = self._sam
        if sam.base_step_asked or closure is None or sam.one_pass is not None:
            return self._step_without_closure()
        return self._step_with_closure(closure)

    def _step_without_closure(self) -> None:
        sam = self._sam
        if sam.phase == PERTURBED:
            try:
                self._refuse_scaled_gradients()
                self._update()
            except BaseException:
                self._leave_perturbed()
                raise
        elif sam.one_pass is not None or (sam.begun and sam.turn != SAM):
            if self._end_one_pass():
                raise RuntimeError(ADDED_GRADIENTS)
            sam.turn = BASE if sam.base_step_asked else sam.turn
            self._update()
        elif sam.base_step_asked or creates_state(self, sam.second_pass is not None):
            sam.turn = BASE
            self._update()
            if self.buffers and not sam.base_step_asked:
                self.create_buffers()
                sam.directions.publish_created()
        elif any(p.grad is not None for p in self._params()):
            if sam.second_pass is None:
                raise RuntimeError(NO_FIRST_STEP)
            self._step_with_second_pass(sam.second_pass)

    def base_step(self) -> None:
        """Take a plain step of the base optimizer with the gradients that are there, hooks included.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._sam.require_clean("base_step()")
        self._sam.base_step_asked = True
        try:
            self.step()
        finally:
            self._sam.base_step_asked = False

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the block the weights are the old ones: to save, evaluate or average between the two passes.

        Under FSDP a forward pass in the block leaves them gathered: `model.reshard()` (docs/distributed.md).
        """
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
    def _progress(self) -> Progress:
        return self._sam

    @property
    def _one_pass_begun(self) -> bool:
        return self._sam.one_pass is not None

    def _begin_one_pass(self) -> None:
        self._sam.one_pass = OnePass(self._params())

    def _note_losses(self, first: Any, second: Any) -> None:
        self._sam.losses = first, second

    @property
    def perturbed(self) -> bool:
        """Whether the weights are w + e: true between the two passes, also inside the second call of a closure."""
        return self._sam.phase == PERTURBED

    @entry
    def prepare(self) -> None:
        """Allocate everything that a step in which every parameter has a gradient needs, without taking one.

        Otherwise a parameter gets memory when it has its first gradients.
        """
        buckets = self._sync()
        for ascent in (True, False):
            buckets.require_memory(None, ascent=ascent)
        buckets.sync_values()
        self._allocate_averages()

    @entry
    def refresh(self) -> None:
        """Take over changed weights and values of the groups (lr, rho); every step does, a replayed graph cannot.

        Raises:
            RuntimeError: the captured graph lacks something that was added or switched on since; or a graph is being
                captured, whose replays would write today's values back each time.
        """
        self._sam.buckets.refuse_refresh()
        if self._sam.phase == CLEAN:
            self._sam.buckets.refresh_masters()
        self._sam.buckets.refresh()

    def check_capture(self) -> None:
        """Check that a captured step will read today's gradients; for graphs that hold no backward pass of their own.

        Raises:
            RuntimeError: a gradient is elsewhere than when the graph was captured, or appeared, or is gone; or what
                `refresh` refuses.
        """
        shared = self._sam.buckets.shared
        shared.captures.require_current(shared.states_in_use(), shared.perturbs())
        for bucket in self._sam.buckets.items:
            bucket.check_capture()

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        check_values(group)
        check_duplicates(self.param_groups[: index + 1])
        for param in group["params"]:
            if not is_unused(param):
                check_param(
                    param, index, self.param_groups, self._sam.buckets.backend, sharded=self.norm_group is not None
                )
        check_swapping(self.base_optimizer, group["params"], self.precision)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any torch optimizer; it may have its own rho, adaptive, eta and perturb."""
        if "_sam" in self.__dict__:
            self._sam.require_clean("add_param_group()")
        super().add_param_group(param_group)
        if "_sam" in self.__dict__:
            try:
                self._check_group(len(self.param_groups) - 1, self.param_groups[-1])
                if (joint := self._sam.joint()) is not None:
                    joint.check_added_group()
            except ValueError:
                self.param_groups.pop()
                raise
