"""Several FusedSAM optimizers under one norm: one perturbation of length rho over the parameters of all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.averaging import copy_averages, paired
from fastsam.checks import check_max_grad_norm
from fastsam.closures import entry
from fastsam.joint_checks import check_clipping, check_owners, check_parts, check_same, name_of
from fastsam.joint_state import JointState
from fastsam.memory.checkpoint import changed_by_hooks
from fastsam.ops.reference import Clip, clip_factor
from fastsam.optimizer import FusedSAM
from fastsam.passes import (
    NO_FIRST_STEP,
    Passes,
    creates_state,
)
from fastsam.progress import Progress
from fastsam.scaling import ATTRIBUTES, forget_scaler
from fastsam.step_order import StepOrder


def joint(*optimizers: FusedSAM, max_grad_norm: float | None = None) -> Joint:
    r"""Bring several FusedSAM optimizers under one norm, as one optimizer.

    SAM's perturbation has length rho over all parameters. Where these are shared out, as for Muon beside AdamW or the
    parts of a pipeline, optimizers on their own would each climb by rho. Here the e of each is

        e_i = rho_i g_i / (sqrt(sum_j ||g_j||^2) + 1e-12)

    which is what one FusedSAM over all the groups climbs by. The norms are added on the device; nothing waits.

    Args:
        *optimizers: two or more. They may differ in base optimizer, method, groups, devices and dtypes. From here on
            steps are the joint's: `first_step` and `step(closure)` of its parts refuse for as long as it lives.
        max_grad_norm: clip the gradients of the second pass, of all optimizers together, to this 2-norm, as
            `FusedSAM(max_grad_norm=...)` does. They are measured before the parts' own `step`, so before its hooks.

    Returns:
        A torch optimizer with the methods of FusedSAM. Its `param_groups` and `state` are those of the parts, so a
        scheduler or a GradScaler is given this one object; a scheduler on one of the parts works as well.

    Raises:
        ValueError: what cannot be joint: another p or closure_calls than the first one's, MSAM and PreconditionedSAM,
            `max_grad_norm`, `renormalize=True` and `when=by_grad_norm()` of one of them, which go by its gradients
            alone, a parameter in two of them, and an optimizer that is in a joint already; with the joint's
            `max_grad_norm` methods whose base optimizer steps with something else than the second gradients (GSAM,
            WSAM, LookSAM).

    What a method itself measures (the products of GSAM and LookSAM, SparseSAM's mask) is over its own parameters. A
    `radius` maps the common norm. `stats()` is that of each part.

    Example:
        >>> matrices = FusedSAM(weights, Muon, lr=0.02, rho=0.05)
        >>> others = FusedSAM(rest, "adamw", lr=3e-4, rho=0.05)
        >>> optimizer = fastsam.joint(matrices, others)  # for SAMStep, or by hand:
        >>> loss_fn(model(x), y).backward(); optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward(); optimizer.step()
    """
    return Joint(*optimizers, max_grad_norm=max_grad_norm)


class Joint(StepOrder):
    """What `fastsam.joint` returns.

    Attributes:
        optimizers: its parts, in the order in which they were given.
        max_grad_norm: what the gradients of the second pass are clipped to.
    """

    optimizers: tuple[FusedSAM, ...]
    max_grad_norm: float | None
    _step_supports_amp_scaling = True

    profile_hook_step = staticmethod(Passes.profile_hook_step)

    def __init__(self, *optimizers: FusedSAM, max_grad_norm: float | None = None) -> None:
        """See `joint`."""
        check_parts(optimizers)
        check_max_grad_norm(max_grad_norm)
        if max_grad_norm is not None:
            check_clipping(optimizers)
        # Optimizer's constructor would make groups and a state of its own; this makes the places of its hooks alone.
        defaults = _common_defaults(optimizers)
        self.__setstate__({"optimizers": optimizers, "defaults": defaults, "max_grad_norm": max_grad_norm})

    # What it is made of.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts; the dicts are theirs, so what is written there counts."""
        return [group for part in self.optimizers for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        counts = [len(part.param_groups) for part in self.optimizers]
        if len(groups) != sum(counts):
            raise ValueError(f"fastsam.joint: there must be {sum(counts)} parameter groups, got {len(groups)}")
        for part, count in zip(self.optimizers, counts, strict=True):
            part.param_groups, groups = list(groups[:count]), groups[count:]

    @property
    def state(self) -> JointState:  # type: ignore[override]
        """The state of all parts."""
        return JointState(self.optimizers)

    def check_added_group(self) -> None:
        """Refuse what one of the parts was given.

        Raises:
            ValueError: a parameter is in two of them.
        """
        check_owners(self.optimizers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: nothing says which part a group is for.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "fastsam.joint: a group must be added to one of the optimizers, joint.optimizers[i].add_param_group(...)"
        )

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    # The step.

    @entry
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one SAM step, or finish the one that `first_step` began; as `FusedSAM.step`.

        Every part steps by its own `step()`, so hooks and schedulers of the parts see it, too.
        """
        if closure is None or self._one_pass_begun:
            return self._step_without_closure()
        return self._step_with_closure(closure)

    def _step_without_closure(self) -> None:
        begun = self.perturbed or self._one_pass_begun or any(part._sam.begun for part in self.optimizers)
        second_pass = self._progress.second_pass
        if not begun and not creates_state(self, second_pass is not None):
            if all(p.grad is None for p in self._params()):
                return
            if second_pass is None:
                raise RuntimeError(NO_FIRST_STEP)
            self._step_with_second_pass(second_pass)
            return
        try:
            self._update()
        except BaseException:
            self._leave_perturbed()
            raise

    @property
    def closure_calls(self) -> int:
        """How often `step(closure)` calls the closure, as all parts say."""
        return self.optimizers[0].closure_calls

    @property
    def _progress(self) -> Progress:
        return self.optimizers[0]._sam

    @property
    def _one_pass_begun(self) -> bool:
        return any(part._sam.one_pass is not None for part in self.optimizers)

    def _begin_one_pass(self) -> None:
        for part in self.optimizers:
            part._begin_one_pass()

    def _note_scale(self, scaler: torch.amp.GradScaler | None) -> None:
        for part in self.optimizers:
            part._note_scale(scaler, known_as=self)

    def _note_losses(self, first: Any, second: Any) -> None:
        for part in self.optimizers:
            part._note_losses(first, second)

    def _perturb(self) -> None:
        """First all measure, then all climb."""
        check_same(self.optimizers, "p")
        measured = [part._measure() for part in self.optimizers]
        sums = self._together([part._sam.buckets.sums for part in self.optimizers])
        for part, own in zip(self.optimizers, measured, strict=True):
            part._climb(own, sums)

    def _together(self, parts: Sequence[Mapping[torch.device, Tensor]]) -> Mapping[torch.device, Tensor]:
        """[n] float64 on each device: the sums of squares of all buckets of all optimizers, in order.

        One FusedSAM with the same buckets has the same numbers in the same order, so the norm has the same bits; also
        where p is not 2, as norms are then taken of the buckets' norms. Optimizers whose parameters would share a
        bucket have two sums instead of one, and the norm may differ from that in its last bit. One that has parameters
        on other ranks only (`norm_group=`) has their sum.
        """
        parts = [sums for sums in parts if sums]
        common = {}
        for device in {bucket.tables.device for part in self.optimizers for bucket in part._sam.buckets.items}:
            own = [sums[device] if device in sums else next(iter(sums.values())) for sums in parts]
            common[device] = torch.cat([one.to(device, non_blocking=device.type == "cuda") for one in own])
        return common

    def _update(self) -> None:
        """Let every part restore and step, with what a GradScaler said of all gradients."""
        said = {name: getattr(self, name) for name in ATTRIBUTES if hasattr(self, name)}
        with self._clipping(said.get("grad_scale")):
            for part in self.optimizers:
                vars(part).update(said)
                try:
                    part.step()
                finally:
                    forget_scaler(part)

    @contextmanager
    def _clipping(self, grad_scale: Tensor | None) -> Iterator[None]:
        """Within the block parts clip their gradients by one factor, of the norm of all of them."""
        if self.max_grad_norm is None:
            yield
            return
        check_clipping(self.optimizers)
        sums = self._together([part._measure_update() for part in self.optimizers])
        clip = {
            device: clip_factor(
                Clip(self.max_grad_norm, squares, None if grad_scale is None else grad_scale.to(device)), squares
            )
            for device, squares in sums.items()
        }
        try:
            for part in self.optimizers:
                part._sam.common_clip = clip
            yield
        finally:
            for part in self.optimizers:
                part._sam.common_clip = None

    def _leave_perturbed(self) -> None:
        self._in_all(FusedSAM._leave_perturbed)

    def _in_all(self, what: Callable[[FusedSAM], None]) -> None:
        """Do something in all parts, whatever fails in one of them."""
        with ExitStack() as stack:
            for part in reversed(self.optimizers):
                stack.callback(what, part)

    @entry
    def begin_step(self) -> bool:
        """Begin a step before its first pass; whether it has a second one. As `FusedSAM.begin_step`.

        Raises:
            RuntimeError: some parts take two passes in this step and others one.
        """
        answers = [part.begin_step() for part in self.optimizers]
        if any(answers) != all(answers):
            self.restore()
            named = ", ".join(
                f"{name_of(part, i)} {2 if two else 1}"
                for i, (part, two) in enumerate(zip(self.optimizers, answers, strict=True))
            )
            raise RuntimeError(
                f"fastsam.joint: all optimizers must take the same number of passes in a step, got {named}; give all "
                "of them the same when= (and, of one method, the same options), and load checkpoints into the joint"
            )
        return all(answers)

    def base_step(self) -> None:
        """Take a plain step of every base optimizer with the gradients that are there.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        for part in self.optimizers:
            part._sam.require_clean("base_step()")
        with self._clipping(None):
            for part in self.optimizers:
                part.base_step()

    def restore(self) -> None:
        """Bring the weights of all parts back, bit for bit, without an update."""
        self._in_all(FusedSAM.restore)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the block the weights are the old ones; as `FusedSAM.unperturbed`."""
        with ExitStack() as stack:
            for part in self.optimizers:
                stack.enter_context(part.unperturbed())
            yield

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the weights of all parts are their averages; as `FusedSAM.averaged_weights`."""
        self._require_averages()
        with ExitStack() as stack:
            for part in self.optimizers:
                stack.enter_context(part.averaged_weights())
            yield

    @entry
    def copy_ema_to(self, target: nn.Module | Iterable[Tensor], model: nn.Module | None = None) -> None:
        """Copy the averages of all parts; as `FusedSAM.copy_ema_to`."""
        self._require_averages()
        for part in self.optimizers:
            part._sam.require_clean("copy_ema_to()")
        averages = [pair for part in self.optimizers for pair in part._averages()]
        copy_averages(averages, paired(target, model, self._params()))

    def _require_averages(self) -> None:
        for i, part in enumerate(self.optimizers):
            if part.ema_decay is None:
                raise RuntimeError(
                    f"fastsam.joint: all optimizers must average their weights, but {name_of(part, i)} has no "
                    "ema_decay; build all of them with ema_decay=0.999, say"
                )

    @property
    def perturbed(self) -> bool:
        """Whether the weights are w + e."""
        return any(part.perturbed for part in self.optimizers)

    # What SAMStep asks for, as of a FusedSAM.

    @entry
    def _climb_again(self, scaler: torch.amp.GradScaler | None) -> None:
        """In a step with several perturbations: climb along the gradients that are there now."""
        self._note_scale(scaler)
        self._perturb()

    def _take_direction(self) -> list[tuple[Tensor, Tensor]]:
        """After a second pass: restore, and give what the base optimizers would step with, parameter by parameter."""
        return [pair for part in self.optimizers for pair in part._take_direction()]

    def _step_with_gradients(self) -> None:
        """Let the next `step()` be one with the gradients that are there."""
        self._in_all(FusedSAM._step_with_gradients)

    def _end_replay(self) -> None:
        """A captured step was replayed: what the host notes at the end of a step."""
        self._in_all(FusedSAM._end_replay)

    def prepare(self) -> None:
        """Allocate what a step needs, in all parts; as `FusedSAM.prepare`."""
        for part in self.optimizers:
            part.prepare()

    def refresh(self) -> None:
        """Take over changed weights and values of the groups, in all parts; as `FusedSAM.refresh`."""
        for part in self.optimizers:
            part.refresh()

    def check_capture(self) -> None:
        """Check that a captured step will read today's gradients; as `FusedSAM.check_capture`."""
        for part in self.optimizers:
            part.check_capture()

    # What is saved.

    def state_dict(self) -> dict[str, Any]:
        """That of one optimizer with the groups of all parts, in order; it loads into a FusedSAM with these, too.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        out: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for part in self.optimizers:
            own = part.state_dict()
            out["state"].update({first + key: value for key, value in own["state"].items()})
            out["param_groups"] += [
                {**group, "params": [first + key for key in group["params"]]} for group in own["param_groups"]
            ]
            first += sum(len(group["params"]) for group in own["param_groups"])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, out)
            out = out if changed is None else changed
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of such a joint, or of one optimizer with the groups of all parts.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: it is of other groups or parameters; nothing was loaded then.
        """
        for part in self.optimizers:
            part._sam.require_clean("load_state_dict()")
        given = changed_by_hooks(self, state_dict)
        groups = list(given["param_groups"])
        sizes = [len(group["params"]) for group in self.param_groups]
        if (found := [len(group["params"]) for group in groups]) != sizes:
            raise ValueError(
                f"fastsam.joint: the checkpoint must have parameter groups of {sizes} parameters, as the optimizers "
                f"have in the order in which joint() was given them, got {found}"
            )
        checkpoints = []
        for part in self.optimizers:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            keys = {key for group in own for key in group["params"]}
            state = {key: value for key, value in given["state"].items() if key in keys}
            checkpoints.append({**given, "state": state, "param_groups": own})
            part._check_loadable(checkpoints[-1])
        for part, checkpoint in zip(self.optimizers, checkpoints, strict=True):
            part.load_state_dict(checkpoint)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied: the parts."""
        return {"optimizers": self.optimizers, "defaults": self.defaults, "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the parts over, from the constructor, a pickle or a deep copy."""
        super().__setstate__(state)
        for part in self.optimizers:
            part._sam.joint = weakref.ref(self)

    def __repr__(self) -> str:
        """The parts, one after the other."""
        return "\n".join(f"{name_of(part, i)}: {part!r}" for i, part in enumerate(self.optimizers))


def _common_defaults(optimizers: Sequence[FusedSAM]) -> dict[str, Any]:
    """What all parts have a default of; schedulers look there for `momentum` and `betas`."""
    first, *others = (part.defaults for part in optimizers)
    return {key: value for key, value in first.items() if all(key in other for other in others)}
