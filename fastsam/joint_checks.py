"""What `fastsam.joint` refuses: optimizers that cannot be under one norm."""

from __future__ import annotations

from collections.abc import Sequence

from fastsam.algebra import Algebra
from fastsam.methods.msam import MSAM
from fastsam.methods.preconditioned import PreconditionedSAM
from fastsam.optimizer import FusedSAM

APART = {
    MSAM: "it perturbs along the momentum after its step and takes no gradients for it",
    PreconditionedSAM: "it divides by a number of its own, <P g1, g1>, and not by a norm that can be added up",
}


def name_of(part: object, place: int) -> str:
    """How messages name a part."""
    return f"optimizer {place} ({type(part).__name__})"


def check_same(optimizers: Sequence[FusedSAM], option: str) -> None:
    """Refuse optimizers that differ in an option."""
    values = [getattr(part, option) for part in optimizers]
    for i, (part, value) in enumerate(zip(optimizers, values, strict=True)):
        if value != values[0]:
            raise ValueError(
                f"fastsam.joint: {option} must be the same in all optimizers, got {values[0]!r} in "
                f"{name_of(optimizers[0], 0)} and {value!r} in {name_of(part, i)}"
            )


def check_clipping(optimizers: Sequence[FusedSAM]) -> None:
    """Refuse to clip where what the base optimizers step with is known in their own step only."""
    for i, part in enumerate(optimizers):
        if type(part).descent is not Algebra.descent or type(part).plain is not Algebra.plain:
            raise ValueError(
                "fastsam.joint: with max_grad_norm all base optimizers must step with the second gradients, and that "
                f"of {name_of(part, i)} steps with something made of them; leave max_grad_norm out"
            )


def check_owners(optimizers: Sequence[FusedSAM]) -> None:
    """Refuse a parameter that two optimizers would step."""
    owners: dict[int, int] = {}
    for i, part in enumerate(optimizers):
        for param in part._params():
            if (other := owners.setdefault(id(param), i)) != i:
                raise ValueError(
                    f"fastsam.joint: a parameter of shape {list(param.shape)} is in "
                    f"{name_of(optimizers[other], other)} and in {name_of(part, i)}; each may be in one of them only"
                )


def check_parts(optimizers: Sequence[FusedSAM]) -> None:
    """Refuse what cannot be under one norm; see `joint`."""
    if len(optimizers) < 2:
        raise ValueError(f"fastsam.joint: it takes two or more FusedSAM optimizers, got {len(optimizers)}")
    for i, part in enumerate(optimizers):
        name = name_of(part, i)
        if not isinstance(part, FusedSAM):
            raise ValueError(
                f"fastsam.joint: all must be FusedSAM optimizers, got {name}; wrap it, FusedSAM(None, optimizer), with "
                "perturb=False if its weights are not to be perturbed"
            )
        for cls, reason in APART.items():
            if isinstance(part, cls):
                raise ValueError(f"fastsam.joint: {name} cannot be joint: {reason}; leave it out")
        part._sam.require_clean("fastsam.joint()")
        if part._sam.joint() is not None or any(part is other for other in optimizers[:i]):
            raise ValueError(f"fastsam.joint: {name} is joint already; an optimizer can be in one joint, once")
        if part.max_grad_norm is not None:
            raise ValueError(
                f"fastsam.joint: {name} has max_grad_norm={part.max_grad_norm!r}, which would clip to the norm of its "
                "own gradients; leave it out, and give it to the joint: joint(..., max_grad_norm=1.0)"
            )
        if part.renormalize or part._measures():
            option = "renormalize=True" if part.renormalize else f"when={part.when!r}"
            raise ValueError(
                f"fastsam.joint: {name} has {option}, which goes by the length of its own gradients alone; leave it out"
            )
    check_owners(optimizers)
    for option in ("p", "closure_calls"):
        check_same(optimizers, option)
