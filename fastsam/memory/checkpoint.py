"""Checkpoints: what torch's own optimizer would have saved, and what of one can be loaded."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.bases.rules import Group
from fastsam.memory.buckets import Buckets
from fastsam.memory.segments import is_uninitialized, name_of, real_dtype
from fastsam.memory.shared import State
from fastsam.ops.formats import Precision


def as_torch_saves(state: dict[int, dict[str, Any]], params: Sequence[Tensor], buckets: Buckets) -> None:
    """Change what the base class gathered, by number of the parameter, to what torch's optimizer would have saved.

    Counters are copies on the CPU, and there is no state of a parameter whose first step an overflow kept from
    happening, but for its master.
    """
    rule = buckets.shared.rule
    if rule is None:
        return
    segments = {id(segment.param): segment for segment in buckets.segments()}
    for i, param in enumerate(params):
        segment = segments.get(id(param))
        if i not in state or segment is None or not segment.published:
            continue
        if segment.step > 0 or rule.eager:
            state[i] = {**state[i], **{name: segment.views[name].cpu().clone() for name in rule.counters}}
        else:
            kept = ("master", *buckets.shared.buffers)
            state[i] = {name: value for name, value in state[i].items() if name in kept}
            if not state[i]:
                del state[i]


def changed_by_hooks(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the hooks before `load_state_dict` leave to be loaded."""
    given = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, given)
        given = given if changed is None else changed
    return given


@contextmanager
def hooks_were_called(optimizer: Optimizer) -> Iterator[None]:
    """Within the block torch's `load_state_dict` does not call the hooks before it."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


def loadable(state_dict: Mapping[str, Any], groups: Sequence[Group], ignored: Collection[str]) -> dict[str, Any]:
    """A state dict without the state of these names, its groups completed by the values of the live ones."""
    saved, live = state_dict["param_groups"], [{k: v for k, v in g.items() if k != "params"} for g in groups]
    if any("old_p" in held for held in state_dict["state"].values()):
        warnings.warn(
            "FusedSAM: this checkpoint's state holds copies of the weights (old_p) instead of the base optimizer's "
            "state; they are ignored, and what the base optimizer's state lacks starts afresh",
            stacklevel=3,
        )
    state = {k: {n: v for n, v in held.items() if n not in ignored} for k, held in state_dict["state"].items()}
    completed = [{**mine, **theirs} for mine, theirs in zip(live, saved, strict=False)] + list(saved[len(live) :])
    return {"state": {k: held for k, held in state.items() if held}, "param_groups": completed}


def check_shapes(
    state_dict: Mapping[str, Any], params: Sequence[Tensor], names: Collection[str], groups: Sequence[Group]
) -> None:
    """Refuse states of these names that have another shape than their parameter, before any of them is loaded.

    Raises:
        ValueError: one has.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for param, key in zip(params, keys, strict=False):
        for name, value in state_dict["state"].get(key, {}).items() if not is_uninitialized(param) else ():
            if name not in names or not isinstance(value, Tensor) or value.dtype == torch.bool:
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"FusedSAM: state[{name!r}] of {name_of(param, groups)} must have its parameter's shape "
                    f"{list(param.shape)}, got {list(value.shape)}; load a checkpoint of this model. Nothing was loaded"
                )


def keep_wide(
    state: State, params: Sequence[Tensor], loaded: Mapping[str, Any], precision: Precision, buffers: Collection[str]
) -> None:
    """Put into `state` what torch has cast to the parameters' dtype: NAdam's number, masters and states, `buffers`."""
    keys = [key for group in loaded["param_groups"] for key in group["params"]]
    for param, held in zip(params, (loaded["state"].get(key, {}) for key in keys), strict=True):
        masters = precision.format_of(real_dtype(param)).masters
        for name, value in held.items():
            if name == "mu_product":
                device = value.device if isinstance(value, Tensor) else torch.device("cpu")
                state[param][name] = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
            elif name in buffers and isinstance(value, Tensor):
                state[param][name] = value.detach().to(param.device, copy=True)
            elif masters and name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                state[param][name] = value.detach().to(param.device, copy=True)
