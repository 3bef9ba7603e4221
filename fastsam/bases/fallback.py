"""What a base optimizer does itself: its step where that is not fused or was patched, and the hooks around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def has_own_step(base: Optimizer) -> bool:
    """Whether this instance was given a step that is not its class's; a scheduler's wrapper around that is none."""
    step = vars(base).get("step")
    if step is None:
        return False
    return not (hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(base).step)


def has_pre_hooks(base: Optimizer) -> bool:
    """Whether hooks were registered on the base optimizer before its step; wrappers need not have a place for any."""
    return bool(getattr(base, "_optimizer_step_pre_hooks", None))


def run_pre_hooks(base: Optimizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call the hooks registered on the base optimizer before its step; the arguments that they leave it to step with.

    Raises:
        RuntimeError: a hook returned something else than None or a pair of new arguments.
    """
    args: tuple[Any, ...] = (base,)
    kwargs: dict[str, Any] = {}
    for hook in list(base._optimizer_step_pre_hooks.values()):
        result = hook(base, args, kwargs)
        if result is None:
            continue
        if not (isinstance(result, tuple) and len(result) == 2):
            raise RuntimeError(
                f"FusedSAM: a step pre-hook of {type(base).__name__} must return None or a tuple (new_args, "
                f"new_kwargs), as for any torch optimizer, got {result!r}"
            )
        args, kwargs = result
    return args, kwargs


def run_post_hooks(base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the hooks registered on the base optimizer after its step, if there are any."""
    if hooks := getattr(base, "_optimizer_step_post_hooks", None):
        for hook in list(hooks.values()):
            hook(base, args, kwargs)


def step_base(
    base: Optimizer,
    masters: Mapping[Tensor, Tensor],
    grad_scale: Tensor | None,
    factors: Mapping[torch.device, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    directions: Mapping[Tensor, Tensor | None],
) -> None:
    """Let the base optimizer step, below its hooks. Loss scales and clip factors are applied to copies of gradients.

    A step that this instance was given itself is called as it is, and calls the hooks, too, if it calls the class's.

    Args:
        base: the optimizer.
        masters: what it steps on instead of these parameters, float32; the same are in its state as "master".
        grad_scale: [] or [1] float32, the loss scale to divide the gradients by, or None.
        factors: [] float64, the factor on the gradients of each device; none without clipping.
        args: what the class's step is called with, the optimizer first.
        kwargs: the same, by keyword.
        directions: what it steps with instead of these parameters' gradients.
    """
    step = type(base).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    own = has_own_step(base)
    with _lent(base, masters) as owners:
        params = [p for group in base.param_groups for p in group["params"]]
        grads = [owners.get(id(p), p).grad for p in params]
        try:
            for p, own_grad in zip(params, grads, strict=True):
                grad = directions.get(owners.get(id(p), p), own_grad)
                if own_grad is not None and grad is not None:
                    grad = grad if id(p) in owners else grad.to(own_grad.dtype)
                    grad = grad.to(p.dtype) if id(p) in owners else grad
                    p.grad = _prepared(grad, grad_scale, factors.get(grad.device))
            if own:
                base.step()
            else:
                step(*args, **kwargs)
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = None if id(p) in owners else grad


def _prepared(grad: Tensor, grad_scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """A gradient without its loss scale, clipped; itself if nothing is to be done."""
    with torch.set_grad_enabled(grad.requires_grad):  # some bases differentiate a gradient once more
        if grad_scale is not None:
            grad = (grad * grad_scale.double().reciprocal().to(grad.device)).to(grad.dtype)
        if factor is not None:
            grad = grad * factor.to(grad.dtype.to_real() if grad.is_complex() else grad.dtype)
    return grad


@contextmanager
def _lent(base: Optimizer, masters: Mapping[Tensor, Tensor]) -> Iterator[dict[int, Tensor]]:
    """Within the block the base optimizer has masters in the place of their parameters, with the same state.

    Gives the parameter of each master, by the master's id.
    """
    if not masters:
        yield {}
        return
    members = [group["params"] for group in base.param_groups]
    for param, master in masters.items():
        state = base.state.pop(param, {})
        if own := {name: value for name, value in state.items() if name != "master"}:
            base.state[master] = own
    try:
        for group, params in zip(base.param_groups, members, strict=True):
            group["params"] = [masters.get(p, p) for p in params]
        yield {id(master): param for param, master in masters.items()}
    finally:
        for group, params in zip(base.param_groups, members, strict=True):
            group["params"] = params
        for param, master in masters.items():
            base.state[param] = {**base.state.pop(master, {}), "master": master}
