"""timm: FusedSAM under names that `create_optimizer_v2` and the training scripts' `--opt` know."""

from __future__ import annotations

import inspect

from fastsam import registry
from fastsam.bases.rules import NAMES
from fastsam.integrations import require

require("timm")

from timm.optim._optim_factory import OptimInfo, default_registry, list_optimizers  # noqa: E402

__all__ = ["register"]


def register(*methods: str) -> list[str]:
    """Put methods over every base optimizer into timm's registry, as "fast" + method + base: "fastsamadamw".

    Their names have no underscore, as timm reads what stands before one as a wrapper: "lookahead_fastsamsgd".
    Options are given as for any optimizer of timm: `create_optimizer_v2(model, "fastsamsgd", lr=0.1, rho=0.05)`. It
    makes the groups with and without weight decay. timm's own default of 0.9 holds for `momentum`.

    A loop that calls `optimizer.step()` alone, as timm's does, is given the second pass by
    `fastsam.unwrap(optimizer).attach_second_pass(...)`.

    Args:
        *methods: names of `fastsam.list()`; "sam" by default. Those that make groups of their own by the modules of a
            model ("asam", "samon") are left to `fastsam.create`.

    Returns:
        The names.

    Raises:
        ValueError: a method that is not known, or makes groups of its own.
    """
    names, known = [], list_optimizers()
    for method in methods or ("sam",):
        if method not in registry.METHODS:
            raise ValueError(
                f"fastsam.integrations.timm: there is no method {method!r}; known are {', '.join(registry.names())}"
            )
        cls, options, groups = registry.METHODS[method]
        if groups is not None:
            raise ValueError(
                f"fastsam.integrations.timm: {method} makes parameter groups of its own, as timm does, too; use "
                f'fastsam.create("{method}", ...)'
            )
        for base in registry.names("base_optimizers"):
            arguments = inspect.signature(NAMES[base]).parameters
            info = OptimInfo(
                name=f"fast{method}{base}",
                opt_class=cls,
                description=f"{cls.__name__} of fastsam around {NAMES[base].__name__}",
                has_eps="eps" in arguments,
                has_momentum="momentum" in arguments,
                has_betas="betas" in arguments,
                defaults={"base_optimizer": base, **options},
            )
            if info.name not in known:  # it would warn
                default_registry.register(info)
            names.append(info.name)
    return names
