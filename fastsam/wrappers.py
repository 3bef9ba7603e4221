"""What frameworks wrap an optimizer in, taken off."""

from __future__ import annotations

from typing import Any

from fastsam.joint import Joint
from fastsam.optimizer import FusedSAM

# Where a wrapper keeps the optimizer: Accelerate and pytorch_optimizer, Lightning and Fabric, timm's Lookahead.
INNER = ("optimizer", "_optimizer", "_base_optimizer")


def unwrap(optimizer: Any) -> FusedSAM | Joint:
    """The FusedSAM within what Accelerate, Lightning, Fabric, Transformers or timm's Lookahead made of it.

    Some of these wrappers have no `first_step`, `restore` or `stats`, and step only when they think that it is time.

    Args:
        optimizer: a FusedSAM, a `fastsam.joint`, or a wrapper of one, or of another wrapper.

    Returns:
        The FusedSAM or the joint itself.

    Raises:
        ValueError: there is none.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> accelerator.backward(loss_fn(model(x), y))
        >>> fastsam.unwrap(optimizer).first_step(zero_grad=True)
        >>> accelerator.backward(loss_fn(model(x), y))
        >>> optimizer.step()
    """
    found = innermost(optimizer)
    if not isinstance(found, (FusedSAM, Joint)):
        within = f", with {type(found).__name__} within" if found is not optimizer else ""
        raise ValueError(
            f"fastsam.unwrap: there must be a FusedSAM or a fastsam.joint, got {type(optimizer).__name__}{within}"
        )
    return found


def innermost(optimizer: Any) -> Any:
    """What is left of an optimizer without its wrappers, whatever that is; a FusedSAM or a joint, if one was met.

    A subclass of FusedSAM may have attributes of its own by the names that wrappers use.

    DeepSpeed's are not taken off: the optimizer within has other parameters than the model, flat and sharded ones.
    """
    met: list[Any] = []
    while not any(optimizer is one for one in met):  # a wrapper may derive from FusedSAM, so its class says nothing
        met.append(optimizer)
        if type(optimizer).__module__.partition(".")[0] == "deepspeed":
            break
        held = getattr(optimizer, "__dict__", {})
        optimizer = next((held[name] for name in INNER if name in held), optimizer)
    return next((one for one in reversed(met) if isinstance(one, (FusedSAM, Joint))), optimizer)
