"""CUDA graphs and the CUDA kernels: a captured step reads the groups' values from the device.

Outside a capture the values travel in a launch's arguments, which a graph would repeat for good. The Triton kernels
have the same functions in their own module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.bases.rules import Row
from fastsam.ops import native
from fastsam.ops.tables import Tables


class Captures:
    """What the captured graphs of an optimizer read and write: none of it must be freed, whatever replaces it.

    Attributes:
        any: whether a pass was captured.
        outdated: whether a table of the last capture was replaced since.
    """

    def __init__(self) -> None:
        """No pass was captured yet."""
        self.any = self.outdated = False
        self._held: dict[Any, Any] = {}  # each thing once, however many passes are captured
        self._states: frozenset[str] = frozenset()  # those that the captured kernels know
        self._perturbs: tuple[bool, ...] = ()  # of the groups, as captured

    def begin(self, states: frozenset[str], perturbs: tuple[bool, ...]) -> None:
        """A pass is being captured, with the tables of now.

        Args:
            states: the states of which the captured kernels know.
            perturbs: which groups the first pass perturbs.
        """
        self.any, self.outdated, self._states, self._perturbs = True, False, states, perturbs

    def keep(self, items: Iterable[Any]) -> None:
        """Keep for good what the graph that is being captured reads and writes."""
        self._held.update((_identity(item), item) for item in items if item is not None)

    def hold(self, *replaced: Any) -> None:
        """Keep what is replaced by other tables, if a graph may read it, and note that this one is outdated."""
        if self.any:
            self.outdated = True
            self.keep(replaced)

    def require_current(self, states: frozenset[str], perturbs: tuple[bool, ...]) -> None:
        """Refuse to go on with a graph that is no longer the step which the groups ask for.

        Raises:
            RuntimeError: its tables were replaced, its kernels lack a state that a group uses now, or a group is
                perturbed that was not, or the other way round.
        """
        if self.outdated or (self.any and (not states <= self._states or perturbs != self._perturbs)):
            raise RuntimeError(
                "FusedSAM: parameters, states or groups were added or moved, or momentum, amsgrad or perturb switched, "
                "since the CUDA graph was captured, which goes on without them and without new values of lr and rho: "
                "capture it again"
            )


def _identity(item: Any) -> Any:
    """The same for a tensor over the same memory, of which there may be several."""
    return (item.data_ptr(), item.nbytes) if isinstance(item, Tensor) and item.nbytes else id(item)


def capturing(device: torch.device) -> bool:
    """Whether what is queued on this device now goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def own_rows(n_segments: int, n_groups: int) -> int:
    """How many rows behind the segments in a bucket's table are the kernels' own, as in csrc/cuda/launch.h."""
    return 1 + -(-2 * n_groups * len(Row._fields) // 8) + -(-n_segments // 8)


def prepare_capture(tables: Tables) -> None:
    """Before a pass: make sure that a graph finds the groups' values on the device.

    Raises:
        RuntimeError: a graph is being captured and the device holds other values.
    """
    if _uploaded(tables):
        return
    if capturing(tables.device):
        raise RuntimeError(
            "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
            "optimizer.refresh() after changing them, before the capture and before each replay"
        )
    if tables.cache is None:
        upload_values(tables)


def upload_values(tables: Tables) -> None:
    """Bring the groups' values to the device, outside of graphs, unless they are there."""
    if not _uploaded(tables):
        native.upload_rows(tables)
        tables.cache = _told(tables)


def _uploaded(tables: Tables) -> bool:
    return bool(tables.cache == _told(tables))


def _told(tables: Tables) -> tuple[Any, ...]:
    """What an upload tells the device, and what decides which kernels it loads."""
    return tables.rows, tables.format, tables.q
