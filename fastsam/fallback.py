"""The step of a base optimizer that is not fused: its own, on the restored weights or on their masters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from fastsam.bucket import Gradients
from fastsam.buckets import Buckets
from fastsam.segments import Segment, real_dtype


def step_base(
    base: Optimizer,
    buckets: Buckets,
    grads: Sequence[Gradients],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
) -> None:
    """Restore, and let the base optimizer step, below its hooks.

    A loss scale is undone, and clipping done, on copies of the gradients; whether they overflowed is read here, which
    waits for the device.
    """
    factors = {} if max_grad_norm is None else buckets.clip(grads, max_grad_norm, grad_scale)
    buckets.restore()
    overflow = found_inf is not None and found_inf.item() != 0
    buckets.finish_step(overflow)
    if overflow:
        return
    step = type(base).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    masters = {id(s.param): s for bucket in buckets.items for s in bucket.segments if s.master is not None}
    with _lent(base, masters) as stand_ins:
        params = [p for group in base.param_groups for p in group["params"]]
        held = [stand_ins.get(id(p), p).grad for p in params]
        try:
            for p, grad in zip(params, held, strict=True):
                if grad is not None:
                    grad = grad.to(p.dtype) if id(p) in stand_ins else grad
                    p.grad = _prepared(grad, grad_scale, factors.get(grad.device))
            step(base)
        finally:
            for p, grad in zip(params, held, strict=True):
                p.grad = None if id(p) in stand_ins else grad
    for segment in masters.values():
        if segment.param.grad is not None:
            segment.store(segment.kept())


def _prepared(grad: Tensor, grad_scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """A gradient without its loss scale, clipped; itself if nothing is to be done."""
    if grad_scale is not None:
        grad = (grad * grad_scale.double().reciprocal().to(grad.device)).to(grad.dtype)
    if factor is not None:
        grad = grad * factor.to(real_dtype(grad))
    return grad


@contextmanager
def _lent(base: Optimizer, masters: Mapping[int, Segment]) -> Iterator[dict[int, Tensor]]:
    """Within the block the base optimizer has masters in the place of their parameters, with the same state.

    Gives the parameter of each master, by the master's id.
    """
    if not masters:
        yield {}
        return
    lent = {key: segment.shaped(segment.kept()) for key, segment in masters.items()}
    members = [group["params"] for group in base.param_groups]
    for key, segment in masters.items():
        held = base.state.pop(segment.param, {})
        if own := {name: value for name, value in held.items() if name != "master"}:
            base.state[lent[key]] = own
    try:
        for group, params in zip(base.param_groups, members, strict=True):
            group["params"] = [lent.get(id(p), p) for p in params]
        yield {id(lent[key]): segment.param for key, segment in masters.items()}
    finally:
        for group, params in zip(base.param_groups, members, strict=True):
            group["params"] = params
        for key, segment in masters.items():
            base.state[segment.param] = {**base.state.pop(lent[key], {}), "master": segment.views["master"]}
