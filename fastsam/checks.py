"""What a user may have got wrong: refused where it is said, with who, what must hold, what came and what to do."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.bases.rules import NAMES, Group
from fastsam.memory.segments import real_dtype
from fastsam.ops.formats import LOW_DTYPES, Precision
from fastsam.radius import Radius

REFUSED = {
    torch.optim.LBFGS: "its line search evaluates the closure at points of its own choice",
    torch.optim.SparseAdam: "it takes sparse gradients only, and a perturbation along all weights is dense",
}


NOT_SHARDED = (
    "Let FusedSAM climb and the sharded optimizer step: sam = FusedSAM(model.parameters(), 'sgd', lr=0.0, rho=...) and "
    "zero = ZeroRedundancyOptimizer(model.parameters(), AdamW, ...), then in each step backward(), "
    "sam.first_step(zero_grad=True), backward(), sam.restore(), zero.step(). Or use FSDP2 (fully_shard), which shards "
    "FusedSAM's state as well"
)


def check_not_sharded() -> None:
    """Refuse to be built by a ZeroRedundancyOptimizer, which gives the parameters of this rank alone."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    builder, frame = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__, sys._getframe(1)
    while frame is not None:
        if frame.f_code is builder:
            raise ValueError(
                "FusedSAM: it must be given all parameters, but ZeroRedundancyOptimizer builds it with those of this "
                f"rank. {NOT_SHARDED}"
            )
        frame = frame.f_back  # type: ignore[assignment]


def taken_apart(base: partial[Optimizer], base_kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A partial's class, and its keywords completed and replaced by those given here, as a call would."""
    if base.args:
        raise ValueError(
            f"FusedSAM: a partial as base_optimizer must hold keywords only, got {len(base.args)} positional ones; "
            "the parameters are FusedSAM's first argument"
        )
    return base.func, {**base.keywords, **base_kwargs}


def check_keywords(base: type[Optimizer], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a keyword that is FusedSAM's and the base optimizer's, too: nothing says which is meant.

    Args:
        base: the base optimizer's class.
        given: the values of FusedSAM's keywords.
        defaults: their defaults, which count as not given.
    """
    try:
        own = inspect.signature(base).parameters
    except ValueError:  # a class that does not tell
        return
    clash = [name for name, value in given.items() if name in own and value != defaults[name]]
    if clash:
        name = base.__name__
        raise ValueError(
            f"FusedSAM: a keyword must be FusedSAM's or the base optimizer's, but {clash} are both FusedSAM's and "
            f"{name}'s. For {name}'s own write functools.partial({name}, {clash[0]}=...) or build the instance, "
            f"FusedSAM(None, {name}(params, {clash[0]}=...)); for FusedSAM's give a partial or an instance without it"
        )


def check_swapping(base: Optimizer, params: Iterable[Tensor], precision: Precision) -> None:
    """Refuse masters of weights that the base optimizer exchanges itself, as schedule-free ones do."""
    swaps = callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None))
    if precision.master_weights and swaps and any(real_dtype(param) in LOW_DTYPES for param in params):
        raise ValueError(
            f"FusedSAM: master_weights=True needs weights that only FusedSAM writes, but train() and eval() of "
            f"{type(base).__name__} exchange them for others. Use float32 parameters with autocast, or "
            "stochastic_rounding=True instead"
        )


def check_values(group: Group) -> None:
    """Refuse radii out of range."""
    for name in ("rho", "eta"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"FusedSAM: {name} must be >= 0, got {group[name]!r}")
    seed = group.get("rounding_seed", 0)
    if not (isinstance(seed, int) and 0 <= seed < 2**53):
        raise ValueError(f"FusedSAM: rounding_seed must be an integer in [0, 2^53), got {seed!r}")


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Refuse a norm that no gradient can be clipped to."""
    if max_grad_norm is not None and not 0 < max_grad_norm < float("inf"):
        raise ValueError(f"FusedSAM: max_grad_norm must be > 0, or None for no clipping, got {max_grad_norm!r}")


def check_ema_decay(ema_decay: float | None) -> None:
    """Refuse averages that do not average."""
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"FusedSAM: ema_decay must be in [0, 1), or None for no averages, got {ema_decay!r}")


def check_p(p: float) -> None:
    """Refuse norms that have no dual norm to perturb by."""
    if not p > 1:
        raise ValueError(f"FusedSAM: p must be in (1, inf], got {p!r}; p = 1 would put all of rho on one weight")


def check_radius(radius: Radius | None, p: float) -> None:
    """Refuse what is no rule for the radius, and one where the length is not that of the second norm."""
    if radius is not None and not isinstance(radius, Radius):
        raise ValueError(
            "FusedSAM: radius must be one of fastsam.radius (unnormalized(), mixed(0.5), loss_budget(0.1), "
            f"Radius(...)), got {radius!r}; a number is rho"
        )
    if radius is not None and p != 2:
        raise ValueError(f"FusedSAM: radius= needs p=2, got p={p!r}")


def check_precision(precision: Precision) -> None:
    """Refuse contradictions between masters, stochastic rounding and the states' dtype."""
    if precision.master_weights and precision.stochastic_rounding:
        raise ValueError(
            "FusedSAM: master_weights=True and stochastic_rounding=True exclude each other: weights with masters are "
            "the masters, rounded to nearest. Choose one"
        )
    if precision.state_dtype not in (None, torch.bfloat16):
        raise ValueError(
            "FusedSAM: state_dtype must be torch.bfloat16, or None for the dtype of the parameters or their masters, "
            f"got {precision.state_dtype!r}"
        )


def did_you_mean(given: Iterable[str], known: Iterable[str]) -> str:
    """The end of a message about names that nobody knows: those that are near to them, if any are."""
    nearest = (difflib.get_close_matches(name.lower(), list(known), n=1) for name in given)
    near = [repr(found[0]) for found in nearest if found]
    return f"; did you mean {', '.join(near)}?" if near else ""


def check_name(name: str) -> type[Optimizer]:
    """The class of that name, or refuse."""
    if name.lower() not in NAMES:
        raise ValueError(
            f"FusedSAM: there is no base_optimizer {name!r}; known are {', '.join(sorted(NAMES))}"
            f"{did_you_mean([name], NAMES)}"
        )
    return NAMES[name.lower()]


def check_class(base: type[Optimizer]) -> None:
    """Refuse base optimizers that SAM cannot wrap."""
    for refused, reason in REFUSED.items():
        if issubclass(base, refused):
            raise ValueError(f"FusedSAM: {base.__name__} cannot be the base optimizer: {reason}")
    if any(parent.__name__ == "ZeroRedundancyOptimizer" for parent in base.__mro__):
        raise ValueError(
            f"FusedSAM: {base.__name__} cannot be the base optimizer: it steps a part of the parameters on each rank, "
            f"and its state is not that of its parameters. {NOT_SHARDED}"
        )
    if base.__name__ == "FusedSAM":
        raise ValueError("FusedSAM: the base optimizer must not be FusedSAM itself")


def check_instance(base: Optimizer, params: Iterable[Any] | None, base_kwargs: dict[str, Any]) -> None:
    """Refuse a built base optimizer together with anything that contradicts it."""
    check_class(type(base))
    if base_kwargs:
        raise ValueError(
            f"FusedSAM: {sorted(base_kwargs)} are the base optimizer's arguments, but it is an instance already; "
            "build it with them"
        )
    if params is None:
        return
    given = []
    for item in [params] if isinstance(params, Tensor) else params:
        members = item["params"] if isinstance(item, dict) else [item]
        members = [members] if isinstance(members, Tensor) else members
        given += [member[1] if isinstance(member, tuple) else member for member in members]
    held = [param for group in base.param_groups for param in group["params"]]
    if {id(p) for p in given} != {id(p) for p in held}:
        raise ValueError(
            f"FusedSAM: params must be None or exactly the base instance's {len(held)} parameters, "
            f"got {len(given)} others"
        )


def check_keys(base: Optimizer, own: Iterable[str]) -> None:
    """Refuse a base optimizer that gives another meaning to one of our parameter group keys."""
    clash = sorted(set(own) & set(base.defaults))
    if clash:
        raise ValueError(
            f"FusedSAM: {type(base).__name__} cannot be the base optimizer: its own {clash} and FusedSAM's would be "
            "one key of the parameter groups"
        )


def check_differentiable(group: Group) -> None:
    """Refuse a step that autograd could go through."""
    if group.get("differentiable"):
        raise ValueError("FusedSAM: differentiable=True is not supported: the step writes weights in place; use False")
