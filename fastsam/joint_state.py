"""`optimizer.state` of several optimizers as one mapping."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from fastsam.optimizer import FusedSAM


class JointState(MutableMapping[Tensor, Any]):
    """`optimizer.state` of a joint: for each parameter that of the part whose it is."""

    def __init__(self, optimizers: Sequence[FusedSAM]) -> None:
        """Of these optimizers."""
        self._optimizers = optimizers

    def _of(self, param: Tensor) -> MutableMapping[Tensor, Any]:
        for part in self._optimizers:
            if param in part.state or any(param is own for own in part._params()):
                return part.state
        raise KeyError(param)

    def __getitem__(self, param: Tensor) -> Any:
        """As torch's: an entry that is not there yet is made."""
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        """Replace an entry."""
        self._of(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        """Remove an entry."""
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        """Whether there is an entry; none is made."""
        return any(param in part.state for part in self._optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        """The parameters that have an entry."""
        return (param for part in self._optimizers for param in part.state)

    def __len__(self) -> int:
        """How many have one."""
        return sum(len(part.state) for part in self._optimizers)
