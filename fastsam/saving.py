"""What stands beside the step: what of an optimizer is saved, loaded, copied and shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.bases.rules import RULES
from fastsam.closures import entry
from fastsam.memory.buckets import Buckets
from fastsam.memory.checkpoint import (
    as_torch_saves,
    changed_by_hooks,
    check_shapes,
    hooks_were_called,
    keep_wide,
    loadable,
)
from fastsam.memory.placing import backend_of
from fastsam.memory.ranks import NormGroup
from fastsam.memory.segments import has_storage, is_uninitialized
from fastsam.memory.shared import AVERAGES
from fastsam.ops.formats import Precision
from fastsam.progress import CLEAN, Progress
from fastsam.stats import Stats, read_stats
from fastsam.when import When

COPIED = (  # attributes that copies and pickles have, too
    "base_optimizer",
    "closure_calls",
    "ema_decay",
    "flatten",
    "max_grad_norm",
    "norm_group",
    "p",
    "perturb_with_weight_decay",
    "precision",
    "radius",
    "renormalize",
    "when",
)


class SavedOptimizer(Optimizer):
    """The part of `FusedSAM` that saves, loads, copies and shows its memory; it takes no step.

    Attributes:
        base_optimizer: a real instance of the base's class on the same `param_groups` and the same `state`.
        precision: how parameters, states and their rounding are kept.
        flatten: whether the weights are in flat buffers.
        max_grad_norm: what the gradients of the second pass are clipped to.
        closure_calls: how often `step(closure)` calls the closure, 1 or 2.
        ema_decay: of the averages of the weights; None for none.
        norm_group: over which ranks sums are added up beside those that DTensors are split over; None for no others.
        when: which steps are SAM steps; None for all.
        buffers: names of the directions that are saved, as `optimizer.state[p][name]` from p's first update on, with
            their dtype; None for float32 (or the weights' own, where they are float64, or 16-bit and rounded
            stochastically).
        options: names of the attributes that copies and pickles have, too.
    """

    base_optimizer: Optimizer
    precision: Precision
    flatten: bool
    max_grad_norm: float | None
    closure_calls: int
    ema_decay: float | None
    norm_group: NormGroup | None
    when: When | None
    _sam: Progress

    buffers: ClassVar[Mapping[str, torch.dtype | None]] = {}
    options: ClassVar[tuple[str, ...]] = ()

    def _new_progress(self, backend: str) -> Progress:
        """Where a step is that has not begun, with buckets that are still to be filled."""
        base = self.base_optimizer
        rule = RULES.get(type(base))
        buckets = Buckets(rule, backend, self.precision, base.defaults, self.param_groups, self.state)
        buckets.shared.buffers = self.buffers if self.ema_decay is None else {**self.buffers, AVERAGES: None}
        buckets.ranks.norm_group = None if self.norm_group is None else self.norm_group.group
        progress = Progress(buckets)
        progress.steps = int(self.param_groups[0].get("sam_steps", 0)) if self.param_groups else 0
        return progress

    def _params(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [param for group in self.param_groups for param in group["params"]]

    def _share_state_with_base(self) -> None:
        """Share groups and state with the base optimizer again after one of the two was given others."""
        base, buckets = self.base_optimizer, self._sam.buckets
        if base.state is self.state and base.param_groups is self.param_groups:
            return
        if self.state is buckets.state and self.param_groups is buckets.shared.groups:
            self.state, self.param_groups = base.state, base.param_groups
        else:
            base.state, base.param_groups = self.state, self.param_groups

    @property
    def backend(self) -> dict[torch.device, str]:
        """The backend that serves each device."""
        chosen: dict[torch.device, str] = {}
        for param in self._params():
            if is_uninitialized(param):
                continue
            name = backend_of(param, self._sam.buckets.backend)
            if chosen.get(param.device, "reference") == "reference":
                chosen[param.device] = name
        return chosen

    def flat_weights(self) -> list[Tensor]:
        """The flat buffers of `flatten=True`; none before the first step or `prepare`.

        One a device and dtype, and one more for parameters that were added or thawed later. The weights are there in
        the order of the parameter groups, each in its storage order and from a multiple of 64 elements on, with zeros
        between them. Writing there is like writing through `.data`, which torch does not count: `master_weights=True`
        undoes it.
        """
        return self._sam.buckets.flat_weights()

    @entry
    def unflatten(self) -> None:
        """Give every weight memory of its own again, for good, as what resizes or sends its storage may ask for.

        The buffers are freed with the last view of them; CUDA graphs must be captured again.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._sam.require_clean("unflatten()")
        self._sam.buckets.flat.move_out(param for param in self._params() if has_storage(param))
        self.flatten = False

    def stats(self) -> Stats:
        """Norms, loss increase and overflow counts so far; nothing waits for the device until a value is read."""
        return read_stats(self._sam.buckets, self._sam.losses, self.max_grad_norm is not None)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state under torch's names, and the groups with rho, adaptive, eta and perturb.

        It loads into the base optimizer's class and into FusedSAM, and holds no copy of the weights.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._sam.require_clean("state_dict()")
        self._share_state_with_base()
        buckets = self._sam.buckets
        buckets.state = self.state
        buckets.sync_state()
        buckets.refresh_masters()
        self._note_counters()
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
            ValueError: it is of other parameters; nothing was loaded then.
        """
        self._sam.require_clean("load_state_dict()")
        state_dict = changed_by_hooks(self, state_dict)
        self._check_loadable(state_dict)
        self._note_counters()  # which are in the groups' place where a checkpoint lacks them
        self._forget_step()
        buckets = self._sam.buckets
        fused = buckets.shared.rule is not None
        ignored = ["old_p"]
        if fused:  # others may have state of these names
            ignored += [] if self.precision.master_weights else ["master"]
            ignored += [] if self.ema_decay is not None else [AVERAGES]
        given = loadable(state_dict, self.param_groups, ignored)
        with hooks_were_called(self):
            super().load_state_dict(given)
        keep_wide(self.state, self._params(), given, self.precision, buckets.shared.buffers)
        if self.precision.draws:
            buckets.set_rounding_step(max(int(group.get("rounding_step", 0)) for group in self.param_groups))
        first = self.param_groups[0]
        self._sam.steps = int(first.get("sam_steps", 0))
        if self.when is not None:
            prefix = "when_"
            self.when.load({key.removeprefix(prefix): first[key] for key in first if key.startswith(prefix)})
        if buckets.items and self._sam.phase == CLEAN:
            self._sync().sync_values()  # copies into the flat tensors: addresses stay

    def _check_loadable(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other parameters."""
        shared = self._sam.buckets.shared
        names = {"master", *shared.buffers, *(() if shared.rule is None else shared.rule.states)}
        check_shapes(state_dict, self._params(), names, self.param_groups)

    def _sync(self) -> Buckets:
        """The buckets, caught up with the parameter groups."""
        raise NotImplementedError

    def _forget_step(self) -> None:
        """Give up a step of one pass that was begun."""
        raise NotImplementedError

    def _note_counters(self) -> None:
        """Write into the groups what is counted elsewhere: steps of the random numbers, steps, what `when` knows."""
        counted: dict[str, Any] = {}
        if self.precision.draws:
            counted["rounding_step"] = self._sam.buckets.rounding_step()
        if "sam_steps" in self.defaults:
            counted["sam_steps"] = self._sam.steps
        if self.when is not None:
            counted |= {f"when_{key}": value for key, value in self.when.state().items()}
        for group in self.param_groups:
            group.update(counted)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied: no tables of addresses, no backup."""
        self._sam.require_clean("copying or pickling the optimizer")
        self._sam.buckets.sync_state()
        self._note_counters()
        copied = {name: getattr(self, name) for name in (*COPIED, *self.options)}
        return {**super().__getstate__(), **copied, "_backend": self._sam.buckets.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy, or take over what `load_state_dict` loaded."""
        backend = state.pop("_backend", None)
        super().__setstate__(state)
        if backend is not None:
            self._sam = self._new_progress(backend)
        type(self.base_optimizer).__setstate__(
            self.base_optimizer, {"state": self.state, "param_groups": self.param_groups}
        )
