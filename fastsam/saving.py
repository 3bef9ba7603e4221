"""What of an optimizer is saved, loaded and copied: the base optimizer's state under torch's names, and the groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.bases.rules import RULES
from fastsam.memory.buckets import Buckets
from fastsam.memory.checkpoint import as_torch_saves, keep_wide, loadable
from fastsam.ops.formats import Precision
from fastsam.progress import CLEAN, Progress

COPIED = (  # attributes that copies and pickles have, too
    "base_optimizer",
    "closure_calls",
    "flatten",
    "max_grad_norm",
    "p",
    "perturb_with_weight_decay",
    "precision",
)


class SavedOptimizer(Optimizer):
    """The part of `FusedSAM` that saves, loads and copies; it owns no step.

    Attributes:
        base_optimizer: a real instance of the base's class on the same `param_groups` and the same `state`.
        precision: how parameters, states and their rounding are kept.
        flatten: whether the weights are in flat buffers.
    """

    base_optimizer: Optimizer
    precision: Precision
    flatten: bool
    _sam: Progress

    def _new_progress(self, backend: str) -> Progress:
        """Where a step is that has not begun, with buckets that are still to be filled."""
        base = self.base_optimizer
        rule = RULES.get(type(base))
        return Progress(Buckets(rule, backend, self.precision, base.defaults, self.param_groups, self.state))

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
        self._sam.require_clean("load_state_dict()")
        buckets = self._sam.buckets
        fused = buckets.shared.rule is not None
        ignored = ("old_p", "master") if fused and not self.precision.master_weights else ("old_p",)
        given = loadable(state_dict, self.param_groups, ignored)
        super().load_state_dict(given)
        keep_wide(self.state, self._params(), given, self.precision)
        if self.precision.draws:
            buckets.set_rounding_step(max(int(group.get("rounding_step", 0)) for group in self.param_groups))
        if buckets.items and self._sam.phase == CLEAN:
            self._sync().sync_values()  # copies into the flat tensors: addresses stay

    def _sync(self) -> Buckets:
        """The buckets, caught up with the parameter groups."""
        raise NotImplementedError

    def _note_rounding_step(self) -> None:
        """Write the step of the random numbers, which the device counts, into the groups."""
        if self.precision.draws:
            step = self._sam.buckets.rounding_step()
            for group in self.param_groups:
                group["rounding_step"] = step

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied: no tables of addresses, no backup."""
        self._sam.require_clean("copying or pickling the optimizer")
        self._sam.buckets.sync_state()
        self._note_rounding_step()
        copied = {name: getattr(self, name) for name in COPIED}
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
