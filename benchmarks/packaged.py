"""The methods that the package pytorch_optimizer has, too, as it says they are to be called; for methods.py."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from rivals import PACKAGE, package_version
from torch import Tensor, nn
from torch.nn import functional

from fastsam import freeze_running_stats

RHO = 0.05
OF = {"SAM": "SAM", "GSAM": "GSAM", "LookSAM": "LookSAM"}  # a class of the package: the method that it is


def names() -> list[str]:
    """What its rows are called; none where it is not installed."""
    return [] if package_version() is None else [f"{PACKAGE}'s {name}" for name in OF]


class _Constant:
    def step(self) -> float:
        return RHO


def trainer(name: str, model: nn.Module, base: functools.partial[Any]) -> Callable[[Tensor, Tensor], None]:
    """A function that takes one training step with the class of that name.

    Args:
        name: one of `names()`.
        model: whose parameters are trained.
        base: a base optimizer with its options, `fused=True` among them.
    """
    package: Any = importlib.import_module(PACKAGE)
    kind = name.removeprefix(f"{PACKAGE}'s ")
    params = list(model.parameters())

    def gradients(images: Tensor, labels: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()

    if kind == "GSAM":
        gsam = package.GSAM(params, base(params), model, _Constant(), alpha=0.4)

        def step(images: Tensor, labels: Tensor) -> None:
            gsam.set_closure(functional.cross_entropy, images, labels)
            gsam.step()

        return step
    options = {"k": 5, "alpha": 0.7} if kind == "LookSAM" else {}
    optimizer = getattr(package, kind)(params, base.func, rho=RHO, **options, **base.keywords)

    def in_two_calls(images: Tensor, labels: Tensor) -> None:
        gradients(images, labels)
        with freeze_running_stats(model), torch.enable_grad():
            optimizer.step(lambda: gradients(images, labels))

    return in_two_calls
