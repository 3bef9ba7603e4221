"""Distributed tensors (DTensor: FSDP2, tensor parallelism): the part that lies on this rank, which operations work on.

It shares its memory with the DTensor, is written in place and never replaced.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor


def distributed_class() -> type[Any] | None:
    """DTensor; None as long as nobody has imported it, so that there are none. Importing it takes most of a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    cls = distributed_class()
    return cls is not None and isinstance(tensor, cls)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies here, once it has arrived; any other tensor itself."""
    if not is_distributed(tensor):
        return tensor
    part: Any = cast(Any, tensor)._local_tensor
    return cast(Tensor, part.wait() if hasattr(part, "wait") else part)  # of a collective that is under way
