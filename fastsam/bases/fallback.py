"""The step of a base optimizer that is not fused: its own, on the restored weights or on their masters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


def step_base(
    base: Optimizer,
    masters: Mapping[Tensor, Tensor],
    grad_scale: Tensor | None,
    factors: Mapping[torch.device, Tensor],
) -> None:
    """Let the base optimizer step, below its hooks. Loss scales and clip factors are applied to copies of gradients.

    Args:
        base: the optimizer.
        masters: what it steps on instead of these parameters, float32; the same are in its state as "master".
        grad_scale: [] or [1] float32, the loss scale to divide the gradients by, or None.
        factors: [] float64, the factor on the gradients of each device; none without clipping.
    """
    step = type(base).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    with _lent(base, masters) as owners:
        params = [p for group in base.param_groups for p in group["params"]]
        grads = [owners.get(id(p), p).grad for p in params]
        try:
            for p, grad in zip(params, grads, strict=True):
                if grad is not None:
                    grad = grad.to(p.dtype) if id(p) in owners else grad
                    p.grad = _prepared(grad, grad_scale, factors.get(grad.device))
            step(base)
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = None if id(p) in owners else grad


def _prepared(grad: Tensor, grad_scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """A gradient without its loss scale, clipped; itself if nothing is to be done."""
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
