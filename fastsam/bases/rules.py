"""The fused base optimizers: which torch class, which state, and what of a parameter group a kernel needs to know.

Adding one: a `Rule` here, a function in `ops/reference.py`, a functor in `csrc/math/rules.h`, and its Triton twin. The
formulas stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch

from fastsam.bases.lion import Lion

# Bits of Row.flags; the same in csrc/tables.h.
ADAPTIVE = 1
NESTEROV = 2
MAXIMIZE = 4
DECOUPLED = 8
AMSGRAD = 16
LR_FLOAT64 = 32  # lr_address is that of a float64
CENTERED = 64
DECAYS = 128  # the perturbation is that of the loss with the weight decay in it

LR_DTYPES = (torch.float32, torch.float64)

Group = Mapping[str, Any]


class Row(NamedTuple):
    """What a kernel reads of one parameter group: float64, flags, address and seed as exact integers among them.

    float64 because `1 - beta2` taken from a float32 table is off by 1e-5 relative at 0.999.
    """

    lr: float
    weight_decay: float
    beta1: float  # SGD, RMSprop: momentum
    beta2: float  # SGD: dampening; RMSprop: alpha
    eps: float
    rho: float
    eta: float
    flags: int
    extra: float = 0.0  # Adagrad: lr_decay; NAdam: 0.96^momentum_decay
    lr_address: int = 0  # not 0: kernels read lr there, a float32 (or float64: LR_FLOAT64) on their device
    seed: int = 0  # of stochastic rounding, below 2^53


class Values(NamedTuple):
    """What a rule reads of a parameter group, for the columns of `Row` of these names."""

    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    flags: int = 0
    extra: float = 0.0


@dataclass(frozen=True)
class Rule:
    """A base optimizer whose step is fused with the restore.

    Attributes:
        name: the functor's name.
        code: how the native library calls it: csrc/tables.h.
        values: what it reads of a group.
        states: torch's names of the per-element state, in slot order.
        used: which of `states` a group needs.
        counters: torch's names of the per-parameter numbers: none, the step count, or with it NAdam's `mu_product`.
        counts: whether a step of this group advances the parameters' step count. SGD counts the steps with momentum,
            because torch's "first step" is the first that finds no momentum buffer.
        initial: what states begin with, from the base optimizer's defaults.
        eager: whether torch has the state before the first step.
    """

    name: str
    code: int
    values: Callable[[Group], Values]
    states: tuple[str, ...]
    used: Callable[[Group], tuple[str, ...]]
    counters: tuple[str, ...] = ("step",)
    counts: Callable[[Group], bool] = lambda group: True
    initial: Callable[[Group], float] = lambda defaults: 0.0
    eager: bool = False


MOMENTS = ("exp_avg", "exp_avg_sq")


def _moment_values(group: Group) -> tuple[float, float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2), float(group["eps"])


SGD = Rule(
    name="sgd",
    code=0,
    values=lambda group: Values(
        float(group["momentum"]), float(group["dampening"]), flags=NESTEROV * bool(group["nesterov"])
    ),
    states=("momentum_buffer",),
    used=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    counters=(),
    counts=lambda group: bool(group["momentum"] != 0),
)
ADAM = Rule(
    name="adam",
    code=1,
    values=lambda group: Values(
        *_moment_values(group),
        DECOUPLED * bool(group["decoupled_weight_decay"]) | AMSGRAD * bool(group["amsgrad"]),
    ),
    states=(*MOMENTS, "max_exp_avg_sq"),
    used=lambda group: (*MOMENTS, "max_exp_avg_sq") if group["amsgrad"] else MOMENTS,
)
RMSPROP = Rule(
    name="rmsprop",
    code=2,
    values=lambda group: Values(
        float(group["momentum"]), float(group["alpha"]), float(group["eps"]), CENTERED * bool(group["centered"])
    ),
    states=("square_avg", "momentum_buffer", "grad_avg"),
    used=lambda group: (
        "square_avg",
        *(("momentum_buffer",) if group["momentum"] > 0 else ()),
        *(("grad_avg",) if group["centered"] else ()),
    ),
)
ADAGRAD = Rule(
    name="adagrad",
    code=3,
    values=lambda group: Values(eps=float(group["eps"]), extra=float(group["lr_decay"])),
    states=("sum",),
    used=lambda group: ("sum",),
    initial=lambda defaults: float(defaults["initial_accumulator_value"]),
    eager=True,
)
NADAM = Rule(
    name="nadam",
    code=4,
    values=lambda group: Values(
        *_moment_values(group),
        DECOUPLED * bool(group["decoupled_weight_decay"]),
        0.96 ** float(group["momentum_decay"]),
    ),
    states=MOMENTS,
    used=lambda group: MOMENTS,
    counters=("step", "mu_product"),
)
RADAM = Rule(
    name="radam",
    code=5,
    values=lambda group: Values(*_moment_values(group), DECOUPLED * bool(group["decoupled_weight_decay"])),
    states=MOMENTS,
    used=lambda group: MOMENTS,
)
LION = Rule(
    name="lion",
    code=6,
    values=lambda group: Values(float(group["betas"][0]), float(group["betas"][1])),
    states=("exp_avg",),
    used=lambda group: ("exp_avg",),
    counters=(),
)

# By exact class: a subclass may do anything in its step.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    Lion: LION,
}


# The names that `base_optimizer` may be given by, in lower case.
NAMES: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): item
    for name, item in {**vars(torch.optim), "Lion": Lion}.items()
    if isinstance(item, type) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
}


def lr_is_zero(group: Group) -> bool:
    """Whether a group's learning rate is the number 0; bases may have none, or another thing of that name."""
    lr = group.get("lr")
    if isinstance(lr, torch.Tensor):
        return lr.numel() == 1 and bool(lr == 0)
    return isinstance(lr, Real) and lr == 0


def _decay_for_the_climb(group: Group) -> float:
    """The weight decay of a base that is not fused, where the perturbation is to have it in it."""
    decay = group.get("weight_decay", 0.0)
    if isinstance(decay, torch.Tensor) and decay.numel() == 1:
        return float(decay)
    if decay is not None and not isinstance(decay, Real):
        raise ValueError(
            "FusedSAM: perturb_with_weight_decay=True needs a number as weight_decay in every parameter group, got "
            f"{decay!r}; use perturb_with_weight_decay=False"
        )
    return float(decay or 0.0)


def row(group: Group, rule: Rule | None, device: torch.device | None = None, decays: bool = False) -> Row:
    """Read one parameter group. Values are read every step: schedulers change `lr`, `momentum` and `betas`.

    Args:
        group: the parameter group.
        rule: the fused base optimizer; without one only what the perturbation needs is read, as lr and weight_decay may
            be missing then, or be no numbers.
        device: where kernels can read a tensor lr themselves. Elsewhere it is read here, which waits for a GPU.
        decays: whether the perturbation is that of the loss with the weight decay in it.
    """
    flags = ADAPTIVE * bool(group["adaptive"]) | MAXIMIZE * bool(group.get("maximize", False))
    beta1, beta2, eps, rule_flags, extra = rule.values(group) if rule else Values()
    rho, eta = float(group["rho"]), float(group["eta"])
    if rule is None:
        weight_decay, (lr, address, lr_flag) = _decay_for_the_climb(group) if decays else 0.0, (0.0, 0, 0)
    else:
        weight_decay, (lr, address, lr_flag) = float(group.get("weight_decay", 0.0)), _lr(group, device)
    flags |= DECAYS * (decays and weight_decay != 0) | lr_flag | rule_flags
    seed = int(group.get("rounding_seed", 0))
    return Row(lr, weight_decay, beta1, beta2, eps, rho, eta, flags, extra, address, seed)


def descent_row(group: Group, device: torch.device | None = None) -> Row:
    """What `SGD`'s kernels read of a group for a step without momentum and decay, whatever its base optimizer is."""
    lr, address, lr_flag = _lr(group, device)
    flags = MAXIMIZE * bool(group.get("maximize", False)) | lr_flag
    seed = int(group.get("rounding_seed", 0))
    return Row(lr, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, flags, lr_address=address, seed=seed)


def _lr(group: Group, device: torch.device | None) -> tuple[float, int, int]:
    """A group's learning rate, or 0 and the address where kernels of that device read it, with its dtype's flag."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device == device and lr.numel() == 1 and lr.dtype in LR_DTYPES:
        return 0.0, lr.data_ptr(), LR_FLOAT64 * (lr.dtype == torch.float64)
    return float(lr), 0, 0
