"""The fused base optimizers: which torch class, which state, and what of a parameter group a kernel needs to know.

Adding one: a `Rule` here, a function in `ops/reference.py`, a functor in `csrc/math.h` (and its Triton twin). The
formulas stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Bits of Row.flags; the same in csrc/math.h.
ADAPTIVE = 1
NESTEROV = 2
MAXIMIZE = 4
DECOUPLED = 8
AMSGRAD = 16
LR_FLOAT64 = 32  # lr_address is that of a float64
DECAYS = 64  # the perturbation is that of the loss with the weight decay in it

LR_DTYPES = (torch.float32, torch.float64)

Group = Mapping[str, Any]


class Row(NamedTuple):
    """What a kernel reads of one parameter group: ten float64, the flags and an address as exact integers among them.

    float64 because `1 - beta2` taken from a float32 table is off by 1e-5 relative at 0.999.
    """

    lr: float
    weight_decay: float
    beta1: float  # SGD: momentum
    beta2: float  # SGD: dampening
    eps: float
    rho: float
    eta: float
    flags: int
    extra: float = 0.0  # what else a rule needs
    lr_address: int = 0  # not 0: kernels read lr there, a float32 (or float64: LR_FLOAT64) on their device


@dataclass(frozen=True)
class Rule:
    """A base optimizer whose step is fused with the restore.

    Attributes:
        name: the functor's name.
        code: how the native library calls it.
        states: torch's names of the per-element state, in slot order.
        used: how many of `states` a group needs.
        counts: whether a step of this group advances the parameters' step count. SGD counts the steps with momentum,
            because torch's "first step" is the first that finds no momentum buffer.
        scalars: `(beta1, beta2, eps, flags)` of a group.
    """

    name: str
    code: int
    states: tuple[str, ...]
    used: Callable[[Group], int]
    counts: Callable[[Group], bool]
    scalars: Callable[[Group], tuple[float, float, float, int]]
    has_step: bool


def _sgd_scalars(group: Group) -> tuple[float, float, float, int]:
    return float(group["momentum"]), float(group["dampening"]), 0.0, NESTEROV * bool(group["nesterov"])


def _adam_scalars(group: Group) -> tuple[float, float, float, int]:
    beta1, beta2 = group["betas"]
    flags = DECOUPLED * bool(group["decoupled_weight_decay"]) | AMSGRAD * bool(group["amsgrad"])
    return float(beta1), float(beta2), float(group["eps"]), flags


SGD = Rule(
    name="sgd",
    code=0,
    states=("momentum_buffer",),
    used=lambda group: int(group["momentum"] != 0),
    counts=lambda group: bool(group["momentum"] != 0),
    scalars=_sgd_scalars,
    has_step=False,
)
ADAM = Rule(
    name="adam",
    code=1,
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    used=lambda group: 3 if group["amsgrad"] else 2,
    counts=lambda group: True,
    scalars=_adam_scalars,
    has_step=True,
)

# By exact class: a subclass may do anything in its step.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
}


def row(group: Group, rule: Rule | None, device: torch.device | None = None, decays: bool = False) -> Row:
    """Read one parameter group. Values are read every step: schedulers change `lr`, `momentum` and `betas`.

    Args:
        group: the parameter group.
        rule: the fused base optimizer.
        device: where kernels can read a tensor lr themselves. Elsewhere it is read here, which waits for a GPU.
        decays: whether the perturbation is that of the loss with the weight decay in it.
    """
    flags = ADAPTIVE * bool(group["adaptive"]) | MAXIMIZE * bool(group.get("maximize", False))
    beta1, beta2, eps, rule_flags = rule.scalars(group) if rule else (0.0, 0.0, 0.0, 0)
    weight_decay = float(group.get("weight_decay", 0.0))
    flags |= DECAYS * (decays and weight_decay != 0)
    rho, eta = float(group["rho"]), float(group["eta"])
    lr, address = group["lr"], 0
    if isinstance(lr, torch.Tensor) and lr.device == device and lr.numel() == 1 and lr.dtype in LR_DTYPES:
        flags |= LR_FLOAT64 * (lr.dtype == torch.float64)
        address, lr = lr.data_ptr(), 0.0
    return Row(float(lr), weight_decay, beta1, beta2, eps, rho, eta, flags | rule_flags, extra=0.0, lr_address=address)
