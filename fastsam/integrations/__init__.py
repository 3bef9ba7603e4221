"""fastsam within training frameworks: one thin module for each, which imports its framework and nothing else does.

`import fastsam` imports none of them. `docs/frameworks.md` shows how each is used.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from fastsam.generators import Generators
from fastsam.joint import Joint
from fastsam.methods.msam import MSAM
from fastsam.optimizer import FusedSAM
from fastsam.step_graphs import index_of
from fastsam.wrappers import innermost


def require(framework: str) -> ModuleType:
    """Import a framework.

    Raises:
        ImportError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(framework)
    except ImportError as error:
        package = framework.partition(".")[0]
        raise ImportError(
            f"fastsam.integrations: {framework} must be importable, but: {error}. Install {package}, or all frameworks "
            "that fastsam knows: pip install 'fastsam[integrations]'"
        ) from error


def has_first_step(optimizer: Any) -> bool:
    """Whether this is, in wrappers or not, an optimizer of fastsam whose steps begin with `first_step`."""
    found = innermost(optimizer)
    return isinstance(found, (FusedSAM, Joint)) and not isinstance(found, MSAM)


def generators_of(model: torch.nn.Module, wanted: bool) -> Generators:
    """The random generators that a model's forward pass draws from, to be set back for the second one."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    return Generators(wanted, {index_of(device)} if device.type == "cuda" else ())
