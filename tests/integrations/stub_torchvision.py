"""A torchvision that has nothing in it, for the names that timm imports from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType

MODULES = (
    *("datasets", "models", "models.feature_extraction", "ops", "ops.misc", "utils"),
    *("transforms", "transforms.functional"),
)


class InterpolationMode(Enum):
    """timm makes a table of these when it is imported."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Stub(ModuleType):
    """Whatever is asked for is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else type(name, (), {})


@contextmanager
def torchvision() -> Iterator[None]:
    """Within the block torchvision is there, if it was not: for one import, as others ask whether it is."""
    if sys.modules.get("torchvision", None) is not None:
        yield
        return
    names = ["torchvision", *(f"torchvision.{name}" for name in MODULES)]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    for name in names:
        sys.modules[name] = Stub(name)
        sys.modules[name].__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)
