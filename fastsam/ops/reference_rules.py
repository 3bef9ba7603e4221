"""The base optimizers' formulas in plain PyTorch, one rounding a line; twins of csrc/math/rules.h and triton_rules.py.

A rule is two functions: the scalars of all segments at once, and the formula, which is given those of one segment in
the compute type. It takes the weights, the gradient (negated where the group maximizes) and the states by slot, and
gives back weights and states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.bases.rules import AMSGRAD, CENTERED, DECOUPLED, NESTEROV, Row
from fastsam.ops.numbers import fma, lerp, power, sqrt, sqrt32
from fastsam.ops.tables import Tables


class Columns(NamedTuple):
    """What scalars are computed from, float64 [n_segments] each; `t` is the count of the step being made."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    extra: Tensor
    t: Tensor  # int64
    mu_product: Tensor


def columns_of(tables: Tables) -> Columns:
    """What the scalars of a bucket's segments are computed from."""
    rows = [tables.rows[segment.group] for segment in tables.segments]
    values = [(row.lr, row.beta1, row.beta2, row.extra) for row in rows]
    table = torch.tensor(values, dtype=torch.float64, device="cpu").reshape(-1, 4).to(tables.device)
    lr, beta1, beta2, extra = table.unbind(1)
    numbers = [segment.progress for segment in tables.segments]
    progress = torch.stack(numbers) if numbers else table.new_zeros(0, 2)
    return Columns(lr, beta1, beta2, extra, progress[:, 0].to(torch.int64) + 1, progress[:, 1].double())


_States = list["Tensor | None"]
_Scalars = Callable[[Columns], list[Tensor]]
_Formula = Callable[[Tensor, Tensor, _States, Sequence[Tensor], Row], tuple[Tensor, _States]]


def _sgd_scalars(c: Columns) -> list[Tensor]:
    return [(c.t == 1).double()]  # whether there is no momentum yet (dampening does not apply there)


def _sgd(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.SGD."""
    lr, momentum, dampening = row.lr, row.beta1, row.beta2
    (first,) = scalars
    buf = states[0]
    if row.weight_decay != 0:
        g = fma(row.weight_decay, w, g)
    if momentum != 0 and buf is not None:
        buf = torch.where(first != 0, g, fma(1 - dampening, g, buf * momentum))
        g = fma(momentum, buf, g) if row.flags & NESTEROV else buf
    return fma(-lr, g, w), [buf, None, None]


def _decay(w: Tensor, g: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Weight decay of Adam's family: of the weights themselves (decoupled), or through the gradient."""
    if row.weight_decay == 0:
        return w, g
    if row.flags & DECOUPLED:
        return w * (1 - row.lr * row.weight_decay), g
    return w, fma(row.weight_decay, w, g)


def _adam_scalars(c: Columns) -> list[Tensor]:
    correction1, correction2 = 1 - power(c.beta1, c.t), 1 - power(c.beta2, c.t)
    return [-(c.lr / correction1), sqrt(correction2)]


def _adam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.Adam and AdamW (arXiv 1412.6980, 1711.05101); states: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    step_size, correction2_sqrt = scalars  # -lr / (1 - beta1^t), sqrt(1 - beta2^t)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    second = exp_avg_sq
    if row.flags & AMSGRAD and max_exp_avg_sq is not None:
        second = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = sqrt32(second) / correction2_sqrt + row.eps
    return w + (step_size * exp_avg) / denom, [exp_avg, exp_avg_sq, max_exp_avg_sq]


def _rmsprop(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.RMSprop (centered: Graves, arXiv 1308.0850); states: square_avg, momentum_buffer, grad_avg."""
    lr, momentum, alpha = row.lr, row.beta1, row.beta2
    square_avg, buf, grad_avg = states
    assert square_avg is not None
    if row.weight_decay != 0:
        g = fma(row.weight_decay, w, g)
    second = square_avg = fma((1 - alpha) * g, g, square_avg * alpha)
    if row.flags & CENTERED and grad_avg is not None:
        grad_avg = lerp(grad_avg, g, 1 - alpha)
        second = fma(-grad_avg, grad_avg, second)
    denom = sqrt32(second) + row.eps
    if momentum > 0 and buf is not None:
        buf = buf * momentum + g / denom
        return fma(-lr, buf, w), [square_avg, buf, grad_avg]
    return w + (-lr * g) / denom, [square_avg, buf, grad_avg]


def _adagrad_scalars(c: Columns) -> list[Tensor]:
    return [-(c.lr / (1 + (c.t - 1) * c.extra))]


def _adagrad(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.Adagrad (Duchi et al., JMLR 12, 2011); state: sum."""
    (neg_clr,) = scalars  # -lr / (1 + (t - 1) lr_decay)
    total = states[0]
    assert total is not None
    if row.weight_decay != 0:
        g = fma(row.weight_decay, w, g)
    total = fma(g, g, total)
    denom = sqrt32(total) + row.eps
    return w + (neg_clr * g) / denom, [total, None, None]


def _nadam_scalars(c: Columns) -> list[Tensor]:
    mu, next_mu = (c.beta1 * (1 - 0.5 * power(c.extra, t)) for t in (c.t, c.t + 1))
    product = (c.mu_product.float() * mu.float()).double()
    grad_size = (-c.lr * (1 - mu)) / (1 - product)
    avg_size = (-c.lr * next_mu) / (1 - product * next_mu)
    return [grad_size, avg_size, 1 - power(c.beta2, c.t), product]


def _nadam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.NAdam (Dozat, ICLR workshop 2016); states: exp_avg, exp_avg_sq."""
    grad_size, avg_size, correction2, _ = scalars
    exp_avg, exp_avg_sq, _ = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    denom = sqrt32(exp_avg_sq / correction2) + row.eps
    w = w + (grad_size * g) / denom
    return w + (avg_size * exp_avg) / denom, [exp_avg, exp_avg_sq, None]


def _radam_scalars(c: Columns) -> list[Tensor]:
    power2 = power(c.beta2, c.t)
    bias2 = 1 - power2
    rho_inf = 2 / (1 - c.beta2) - 1
    rho_t = rho_inf - 2.0 * c.t * power2 / bias2
    ratio = (rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)
    rectified = rho_t > 5
    rect = torch.where(rectified, sqrt(ratio), 0.0)
    return [1 - power(c.beta1, c.t), sqrt(bias2), rect, rectified.double()]


def _radam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.RAdam (Liu et al., arXiv 1908.03265), without denominator while rho_t <= 5; states as NAdam's."""
    correction1, correction2_sqrt, rect, rectified = scalars
    exp_avg, exp_avg_sq, _ = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    step = (exp_avg / correction1) * row.lr
    adaptive = (1 / (sqrt32(exp_avg_sq) + row.eps)) * correction2_sqrt
    return w - torch.where(rectified != 0, (step * adaptive) * rect, step), [exp_avg, exp_avg_sq, None]


def _lion(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """Lion (Chen et al., arXiv 2302.06675); state: exp_avg."""
    exp_avg = states[0]
    assert exp_avg is not None
    c = lerp(exp_avg, g, 1 - row.beta1)
    exp_avg = lerp(exp_avg, g, 1 - row.beta2)
    w = w * (1 - row.lr * row.weight_decay)  # a factor of 1 rounds nothing
    return fma(-row.lr, c.sign(), w), [exp_avg, None, None]


# By the name of the rule.
FORMULAS: dict[str, tuple[_Scalars | None, _Formula]] = {
    "sgd": (_sgd_scalars, _sgd),
    "adam": (_adam_scalars, _adam),
    "rmsprop": (None, _rmsprop),
    "adagrad": (_adagrad_scalars, _adagrad),
    "nadam": (_nadam_scalars, _nadam),
    "radam": (_radam_scalars, _radam),
    "lion": (None, _lion),
}
